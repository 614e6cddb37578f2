"""Checkpoints for --resume: OUT[/method]/checkpoint-<step>, each written atomically before the
previous one is removed."""

import dataclasses
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from lowrank_ext.cli.errors import UserError, as_user_error
from lowrank_ext.cli.files import exists, new_directory, require_directory
from lowrank_ext.cli.methods import Entry
from lowrank_ext.cli.models import CausalLM
from lowrank_ext.cli.settings import Settings
from lowrank_ext.cli.training import Progress, Trainer

_NAME = re.compile(r"checkpoint-(\d+)")
_STATE = "training_state.pt"
_PARTS = {"optimizer", "freezing", "rng", "progress", "text_digest"}


def checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not exists(str(directory), directory):
        return []
    require_directory(str(directory), directory)
    found = [
        path
        for path in directory.iterdir()
        if _NAME.fullmatch(path.name) and exists(str(path), path / _STATE)
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
    file = path / _STATE
    with as_user_error(
        f"cannot read {file}", Exception
    ):  # pickle, zip and tensors raise many kinds
        state = torch.load(file, weights_only=True)
    if not isinstance(state, dict) or set(state) != _PARTS:
        raise UserError(f"cannot continue from {file}: it must hold {', '.join(sorted(_PARTS))}")
    if state["text_digest"] != text_digest:
        raise UserError(f"the text or the tokenizer has changed since {path} was written")
    trainer = Trainer(entry, entry.load(base, settings, path), settings)
    for part, restore in (
        ("optimizer", trainer.optimizer.load_state_dict),
        ("freezing", lambda stored: _restore_freezing(trainer, stored)),
        ("progress", lambda stored: _restore_progress(trainer, stored)),
        ("rng", torch.set_rng_state),
    ):
        # What a damaged part raises depends on where it is damaged.
        with as_user_error(f"cannot continue from {file}: its {part} is damaged", Exception):
            restore(state[part])
    return trainer


def _restore_freezing(trainer: Trainer, stored: Any) -> None:
    if trainer.freezing is not None:
        trainer.freezing.load_state_dict(stored)
        trainer.optimizer.forget_frozen()


def _restore_progress(trainer: Trainer, stored: dict[str, Any]) -> None:
    """Raises TypeError or ValueError unless the steps that it tells of were taken."""
    progress = Progress(**stored)
    steps = trainer.settings.steps
    if type(progress.step) is not int or not 0 <= progress.step <= steps:
        raise ValueError(f"step must be from 0 to {steps}, got {progress.step!r}")
    for name in ("losses", "step_seconds", "optimizer_seconds"):
        values = getattr(progress, name)
        if len(values) != progress.step or not all(type(value) is float for value in values):
            raise ValueError(f"{name} must be {progress.step} numbers")
    counts = (progress.skipped_steps, progress.trainable_at_start, progress.saved_bytes_at_start)
    if not all(type(value) is int and value >= 0 for value in counts):
        raise ValueError(f"counts must be whole numbers, got {counts}")
    if not progress.held_out or not all(map(_is_evaluation, progress.held_out)):
        raise ValueError("held_out must be pairs of a step and a loss")
    load = progress.expert_load_at_start
    if load is not None and not all(map(_is_counts, load.items())):
        raise ValueError("expert_load_at_start must be counts by module")
    trainer.progress = progress


def _is_evaluation(value: Any) -> bool:
    return isinstance(value, tuple) and list(map(type, value)) == [int, float]


def _is_counts(item: tuple[Any, Any]) -> bool:
    name, counts = item
    return isinstance(name, str) and all(type(count) is int and count >= 0 for count in counts)


def remove_checkpoints(directory: Path) -> None:
    """Removes all checkpoints, once the result is written."""
    for path in checkpoints(directory):
        shutil.rmtree(path, ignore_errors=True)
