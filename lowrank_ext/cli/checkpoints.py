"""Checkpoints for --resume: OUT[/method]/checkpoint-<step>, each written atomically before the
previous one is removed."""

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from lowrank_ext.cli.errors import UserError, as_user_error
from lowrank_ext.cli.files import new_directory
from lowrank_ext.cli.methods import Entry
from lowrank_ext.cli.models import CausalLM
from lowrank_ext.cli.settings import Settings
from lowrank_ext.cli.training import Progress, Trainer

_NAME = re.compile(r"checkpoint-(\d+)")
_STATE = "training_state.pt"


def checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not directory.is_dir():
        return []
    found = [
        path
        for path in directory.iterdir()
        if _NAME.fullmatch(path.name) and (path / _STATE).is_file()
    ]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def save_checkpoint(trainer: Trainer, tokenizer: Any, directory: Path, text_digest: str) -> Path:
    """Saves adapter, optimizer, freezing schedule, RNG and progress, atomically."""
    path = directory / f"checkpoint-{trainer.progress.step:06d}"
    older = checkpoints(directory)
    with new_directory(path) as temporary:
        trainer.entry.save(trainer.model, tokenizer, temporary)
        state = {
            "optimizer": trainer.optimizer.state_dict(),
            "freezing": None if trainer.freezing is None else trainer.freezing.state_dict(),
            "rng": torch.get_rng_state(),
            "progress": dataclasses.asdict(trainer.progress),
            "text_digest": text_digest,
        }
        with (temporary / _STATE).open("wb") as file:
            torch.save(state, file)
    for old in older:
        if old != path:
            shutil.rmtree(old, ignore_errors=True)
    return path


def restore_trainer(
    entry: Entry, base: CausalLM, settings: Settings, path: Path, text_digest: str
) -> Trainer:
    """The trainer that `save_checkpoint` saved; adapts the base model in place."""
    with as_user_error(
        f"cannot read {path / _STATE}", Exception
    ):  # pickle, zip and tensors raise many kinds
        state = torch.load(path / _STATE, weights_only=True)
    if state["text_digest"] != text_digest:
        raise UserError(f"the text or the tokenizer has changed since {path} was written")
    trainer = Trainer(entry, entry.load(base, settings, path), settings)
    trainer.optimizer.load_state_dict(state["optimizer"])
    if trainer.freezing is not None:
        trainer.freezing.load_state_dict(state["freezing"])
        trainer.optimizer.forget_frozen()
    trainer.progress = Progress(**state["progress"])
    torch.set_rng_state(state["rng"])
    return trainer


def remove_checkpoints(directory: Path) -> None:
    """Removes all checkpoints, once the result is written."""
    for path in checkpoints(directory):
        shutil.rmtree(path, ignore_errors=True)
