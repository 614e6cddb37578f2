"""A run of transformers' Trainer for each method, on a PEFT model: alone, or a rank of torchrun.

    torchrun --nproc-per-node 2 trainer_run.py FOLDER ACCUMULATION

writes into FOLDER, for each method, the checkpoint, and for each rank losses and adapter.
"""

import sys
from pathlib import Path
from typing import Any

import peft
import torch
from distributed_cases import end_worker
from families import VOCABULARY, base
from torch import Tensor
from transformers import Trainer, TrainingArguments

import lowrank_ext as lr
from lowrank_ext.registry import METHODS

# Without masks on the coefficients, which each rank would draw by itself.
OPTIONS: dict[str, dict[str, Any]] = {"SET_AND_SEQUENCE": {"coef_dropout": 0.0}}


def rows(count: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    every = torch.randint(3, VOCABULARY, (count, 9), generator=generator)
    return [{"input_ids": row, "labels": row} for row in every]


def train(method: str, folder: Path, accumulation: int) -> Trainer:
    torch.manual_seed(5)
    config = METHODS[method].config_class(r=8, **OPTIONS.get(method, {}))
    model = peft.get_peft_model(base("llama"), lr.peft_config(config, task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=2,  # two steps each
        save_steps=4,
        logging_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        seed=3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows())
    trainer.train()
    return trainer


def result(trainer: Trainer) -> dict[str, Any]:
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "adapter": peft.get_peft_model_state_dict(trainer.model)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, accumulation = Path(sys.argv[1]), int(sys.argv[2])
    folder.mkdir(exist_ok=True)
    for name in METHODS:
        trainer = train(name, folder / name, accumulation)
        torch.save(result(trainer), folder / f"{name}-{trainer.args.process_index}.pt")
    end_worker()
