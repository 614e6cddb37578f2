"""PEFT's models of this library's methods in transformers' Trainer: adapter files only, resume."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("peft")
pytest.importorskip("accelerate")

import peft
from test_peft_tuner import CONFIGS, OWN, llama, logits, peft_model
from transformers import Trainer, TrainingArguments

import lowrank_ext as lr

pytestmark = pytest.mark.filterwarnings("ignore:.*checkpointing.*:FutureWarning")


def data(count: int = 16) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(0, 37, (9,), generator=generator) for _ in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


def arguments(out: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        str(out),
        **{
            "per_device_train_batch_size": 4,
            "max_steps": 6,
            "save_steps": 3,
            "learning_rate": 1e-2,
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 3,
            **options,
        },
    )


def trainer(model: Any, out: Path, name: str, **options: Any) -> Trainer:
    scheduled = isinstance(CONFIGS[name], lr.LaMDAConfig | lr.AFLoRAConfig)
    callbacks = [lr.FreezeCallback(eta=0.5)] if scheduled else []
    given = {"train_dataset": data(), "eval_dataset": data(4), "callbacks": callbacks}
    return Trainer(model, arguments(out, **options), **given)


@pytest.mark.parametrize("name", OWN)
def test_resumes_bit_for_bit_from_adapter_files(name: str, tmp_path: Path) -> None:
    whole = peft_model(name)
    trainer(whole, tmp_path, name).train()
    checkpoint = tmp_path / "checkpoint-3"
    names = {path.name for path in checkpoint.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert "model.safetensors" not in names
    resumed = peft_model(name)
    trainer(resumed, tmp_path, name).train(resume_from_checkpoint=str(checkpoint))
    state = resumed.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in whole.state_dict().items())
    from_files = peft.PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-6")
    assert torch.equal(logits(from_files), logits(whole))


@pytest.mark.parametrize("name", ["lamda", "goat", "basis"])
def test_reloads_the_best(name: str, tmp_path: Path) -> None:
    model = peft_model(name)
    training = trainer(
        model,
        tmp_path,
        name,
        learning_rate=0.3,  # too high: the last checkpoint is not the best
        eval_strategy="steps",
        eval_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    training.train()
    assert training.state.best_model_checkpoint == str(tmp_path / "checkpoint-3")
    best = peft.PeftModel.from_pretrained(llama(), tmp_path / "checkpoint-3")
    assert torch.equal(logits(model), logits(best))
    training.save_model(str(tmp_path / "final"))
    assert torch.equal(logits(lr.load_adapter(llama(), tmp_path / "final")), logits(best))
