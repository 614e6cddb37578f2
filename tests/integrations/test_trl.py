"""TRL's trainers with `peft_config=`: no second model, adapter files, the base as reference."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("peft")

import peft
import trl
from char_tokenizer import char_tokenizer
from datasets import Dataset
from small_models import llama_sizes as sizes
from test_peft_tuner import CONFIGS, OWN
from transformers import (
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from trl.experimental.kto import KTOConfig, KTOTrainer

import lowrank_ext as lr

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*trains without:UserWarning",
    "ignore::FutureWarning",
    "ignore::DeprecationWarning",
)
OPTIONS: dict[str, Any] = {
    "max_steps": 4,
    "save_steps": 4,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}
PROMPTS = ["hello", "a fox", "lorem", "abc d"] * 4


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return char_tokenizer()


def causal() -> LlamaForCausalLM:
    torch.manual_seed(7)
    return LlamaForCausalLM(sizes(pad_token_id=0))


def config(name: str, task_type: str = "CAUSAL_LM") -> Any:
    return lr.peft_config(CONFIGS[name], task_type=task_type)


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def check_saved(trainer: Any, out: Path, base: Any) -> None:
    names = {path.name for path in (out / "checkpoint-4").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    loaded = peft.PeftModel.from_pretrained(base, out / "checkpoint-4").eval()
    row = torch.arange(3, 9)[None]
    with torch.no_grad():
        expected = trainer.model.eval()(row).logits
        assert torch.equal(loaded(row).logits, expected)


@pytest.mark.parametrize("name", OWN)
def test_sft(name: str, tokenizer: Any, tmp_path: Path) -> None:
    trainer = trl.SFTTrainer(
        causal(),
        args=trl.SFTConfig(str(tmp_path), max_length=16, **OPTIONS),
        train_dataset=Dataset.from_dict({"text": PROMPTS}),
        processing_class=tokenizer,
        peft_config=config(name),
    )
    trainer.train()
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]
    check_saved(trainer, tmp_path, causal())


@pytest.mark.parametrize("name", ["lora", "lamda", "goat", "basis"])
def test_dpo(name: str, tokenizer: Any, tmp_path: Path) -> None:
    pairs = {"prompt": PROMPTS, "chosen": [" yes"] * 16, "rejected": [" no"] * 16}
    trainer = trl.DPOTrainer(
        causal(),
        args=trl.DPOConfig(str(tmp_path), **OPTIONS),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer,
        peft_config=config(name),
    )
    assert getattr(trainer, "ref_model", None) is None
    trainer.train()
    losses = logged(trainer, "loss")
    # log 2 while policy and reference are the same; GOAT starts at its base on average only.
    assert losses[0] == pytest.approx(0.6931, abs=5e-3 if name == "goat" else 2e-4)
    assert losses[-1] < losses[0] - 1e-3 and logged(trainer, "rewards/margins")[-1] > 0
    check_saved(trainer, tmp_path, causal())


@pytest.mark.parametrize("name", ["lamda", "aflora"])
def test_kto(name: str, tokenizer: Any, tmp_path: Path) -> None:
    rows = {"prompt": PROMPTS, "completion": [" yes", " no"] * 8, "label": [True, False] * 8}
    trainer = KTOTrainer(
        causal(),
        args=KTOConfig(str(tmp_path), **OPTIONS),
        train_dataset=Dataset.from_dict(rows),
        processing_class=tokenizer,
        peft_config=config(name),
    )
    assert getattr(trainer, "ref_model", None) is None
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(0.5, abs=1e-3)
    check_saved(trainer, tmp_path, causal())


@pytest.mark.parametrize("name", ["lamda", "reslora"])
def test_reward(name: str, tokenizer: Any, tmp_path: Path) -> None:
    def base() -> LlamaForSequenceClassification:
        torch.manual_seed(7)
        return LlamaForSequenceClassification(sizes(pad_token_id=0, num_labels=1))

    pairs = {"chosen": [p + " yes" for p in PROMPTS], "rejected": [p + " no" for p in PROMPTS]}
    trainer = trl.RewardTrainer(
        base(),
        args=trl.RewardConfig(str(tmp_path), **OPTIONS),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer,
        peft_config=config(name, "SEQ_CLS"),
    )
    trainer.train()
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0]
    check_saved(trainer, tmp_path, base())


@pytest.mark.parametrize("name", ["lamda", "basis"])
def test_grpo(name: str, tokenizer: Any, tmp_path: Path) -> None:
    trainer = trl.GRPOTrainer(
        causal(),
        reward_funcs=lambda completions, **_: [float(text.count("a")) for text in completions],
        args=trl.GRPOConfig(
            str(tmp_path), num_generations=4, max_completion_length=6, beta=0.1, **OPTIONS
        ),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
        peft_config=config(name),
    )
    assert getattr(trainer, "ref_model", None) is None
    trainer.train()
    divergence = logged(trainer, "kl")  # from the base, which the model leaves
    assert divergence[0] == pytest.approx(0, abs=1e-5) and divergence[-1] > 1e-5
    check_saved(trainer, tmp_path, causal())


def test_dpo_of_a_trained_adapter_starts_from_it(tokenizer: Any, tmp_path: Path) -> None:
    """Its reference is a copy of the adapter, which stays as it was."""
    model = peft.get_peft_model(causal(), config("lamda"))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    row = torch.arange(3, 9)[None]
    before = model.eval()(row).logits.detach()
    pairs = {"prompt": PROMPTS, "chosen": [" yes"] * 16, "rejected": [" no"] * 16}
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(str(tmp_path), **OPTIONS),
        train_dataset=Dataset.from_dict(pairs),
        processing_class=tokenizer,
    )
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(0.6931, abs=2e-4)
    assert logged(trainer, "loss")[-1] < 0.69
    trained = trainer.model
    trained.set_adapter("ref")
    with torch.no_grad():
        torch.testing.assert_close(trained.eval()(row).logits, before, rtol=1e-5, atol=1e-5)
