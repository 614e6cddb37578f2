"""Checkpoints for --resume: OUT[/method]/checkpoint-<step>, each written atomically before the
previous one is removed."""

import dataclasses
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_ext.cli.errors import UserError, as_user_error, one_line
from lowrank_ext.cli.files import exists, new_directory, require_directory
from lowrank_ext.cli.methods import Entry
from lowrank_ext.cli.models import CausalLM
from lowrank_ext.cli.settings import Settings
from lowrank_ext.cli.training import Optimizer, Progress, Trainer
from lowrank_ext.cli.typed import check_types, has_type
from lowrank_ext.files import quoted, read_torch_file
from lowrank_ext.files.tensor_file import is_finite

_NAME = re.compile(r"checkpoint-(\d+)")
_STATE = "training_state.pt"


@dataclass(frozen=True, kw_only=True)
class State:
    """Content of training_state.pt."""

    optimizer: dict[str, Any]
    freezing: dict[str, Any] | None
    rng: Tensor
    progress: dict[str, Any]
    text_digest: str


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
        state = State(
            optimizer=trainer.optimizer.state_dict(),
            freezing=None if trainer.freezing is None else trainer.freezing.state_dict(),
            rng=torch.get_rng_state(),
            progress=dataclasses.asdict(trainer.progress),
            text_digest=text_digest,
        )
        with (temporary / _STATE).open("wb") as file:
            torch.save(vars(state), file)
    for old in older:
        if old != path:
            shutil.rmtree(old, ignore_errors=True)
    return path


def restore_trainer(
    entry: Entry,
    base: CausalLM,
    settings: Settings,
    path: Path,
    text_digest: str,
    make: Callable[[Entry, CausalLM, Settings], Trainer] = Trainer,
) -> Trainer:
    """The trainer that `save_checkpoint` saved, made by `make`; adapts the base model in place."""
    where = f"cannot continue from {path / _STATE}"
    with as_user_error("cannot read", OSError, ValueError):
        values = read_torch_file(path / _STATE, "--resume")
    check_types(State, values, where)
    state = State(**values)
    if state.text_digest != text_digest:
        raise UserError(f"the text or the tokenizer has changed since {path} was written")
    progress = _progress_of(state, where)
    _check_rng(state, where)
    trainer = make(entry, entry.load(base, settings, path), settings)
    if (state.freezing is None) != (trainer.freezing is None):
        needed = "no" if trainer.freezing is None else "a"
        raise UserError(f"{where}: freezing must be {needed} schedule's state for {entry.name}")
    # Inside, what is of another type raises as any code would.
    with as_user_error(where, Exception):
        check_optimizer_state(state.optimizer, trainer.optimizer)
        trainer.optimizer.load_state_dict(state.optimizer)
        if trainer.freezing is not None and state.freezing is not None:
            trainer.freezing.load_state_dict(state.freezing)
            trainer.optimizer.forget_frozen()
    trainer.progress = progress
    torch.set_rng_state(state.rng)
    return trainer


def _progress_of(state: State, where: str) -> Progress:
    check_types(Progress, state.progress, f"{where}: progress")
    progress = Progress(**state.progress)
    for name in ("losses", "step_seconds", "optimizer_seconds"):
        if len(getattr(progress, name)) != progress.step:
            raise UserError(
                f"{where}: progress: {name} must have step={progress.step} entries, got "
                f"{len(getattr(progress, name))}"
            )
    if not progress.held_out:
        raise UserError(f"{where}: progress: held_out must have an entry, got none")
    return progress


def _check_rng(state: State, where: str) -> None:
    try:
        torch.Generator().set_state(state.rng)
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"{where}: rng must be a generator's state, got {state.rng.dtype} "
            f"{list(state.rng.shape)}: {one_line(error)}"
        ) from None


def check_optimizer_state(state: dict[str, Any], optimizer: Optimizer) -> None:
    """Raises ValueError unless ``state`` is of an optimizer of the same parameters: AdamW itself
    would take moments of any shape."""
    own = optimizer.state_dict()
    adamw, groups = state["adamw"], own["adamw"]["param_groups"]
    if state.keys() != own.keys() or adamw.keys() != own["adamw"].keys():
        raise ValueError(f"optimizer must hold {sorted(own)}, got {quoted(sorted(state))}")
    stored_groups = adamw["param_groups"]
    if [(g.keys(), g["params"]) for g in stored_groups] != [
        (g.keys(), g["params"]) for g in groups
    ]:
        raise ValueError(
            f"optimizer must have groups of {[len(g['params']) for g in groups]} parameters with "
            f"the same options, got {quoted(stored_groups)}"
        )
    for stored, group in zip(stored_groups, groups, strict=True):
        for name, value in group.items():
            same_type = has_type(stored[name], type(value)) if name != "params" else True
            if not same_type or (name != "lr" and stored[name] != value):
                raise ValueError(f"optimizer: {name} must be {value!r}, got {quoted(stored[name])}")
    masters = dict(enumerate(optimizer.masters))
    for index, moments in adamw["state"].items():
        if index not in masters or moments.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(f"optimizer: state {quoted(index)} must be of a parameter")
        like = {"step": torch.tensor(0.0)}
        for name, tensor in moments.items():
            _check_like(tensor, like.get(name, masters[index]), f"optimizer: {name} of {index}")
    if len(state["masters"]) != len(masters):
        raise ValueError(f"optimizer must have {len(masters)} masters, got {len(state['masters'])}")
    for index, (stored, own_master) in enumerate(
        zip(state["masters"], own["masters"], strict=True)
    ):
        if (stored is None) != (own_master is None):
            raise ValueError(f"optimizer: master {index} must be there for half precision alone")
        if stored is not None:
            _check_like(stored, own_master, f"optimizer: master {index}")


def _check_like(tensor: Any, like: Tensor, what: str) -> None:
    if not isinstance(tensor, Tensor) or tensor.shape != like.shape or tensor.dtype != like.dtype:
        got = (
            f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else quoted(tensor)
        )
        raise ValueError(f"{what} must be {like.dtype} {list(like.shape)}, got {got}")
    if not is_finite(tensor):
        raise ValueError(f"{what} must be finite, got inf or nan")


def remove_checkpoints(directory: Path) -> None:
    """Removes all checkpoints, once the result is written."""
    for path in checkpoints(directory):
        shutil.rmtree(path, ignore_errors=True)
