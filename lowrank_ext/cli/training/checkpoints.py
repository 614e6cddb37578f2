"""Checkpoints for --resume: OUT[/method]/checkpoint-<step>, each written under another name and
renamed before an older one is removed."""

import dataclasses
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lowrank_ext.cli.errors import UserError, as_user_error
from lowrank_ext.cli.files import (
    cannot_write,
    exists,
    read_json,
    replace_directory,
    require_directory,
    sync_tree,
    write_json,
)
from lowrank_ext.cli.processes import on_main_process
from lowrank_ext.cli.training.progress import PROGRESS_NAME, Progress
from lowrank_ext.cli.typed import check_types
from lowrank_ext.files import quoted, read_torch_file

if TYPE_CHECKING:
    from lowrank_ext.cli.training.trainer import FinetuneTrainer

_UNFINISHED = ".checkpoint-*.saving"
_NAME = re.compile(r"checkpoint-(\d+)")
_TRAINER_STATE = "trainer_state.json"  # transformers' name
_FREEZING = "freezing.pt"
# What a resumed run may do otherwise; how many rows a step has is compared by itself.
_MAY_CHANGE = {
    *("steps", "epochs", "accumulate", "keep", "save_every", "early_stop", "log_to", "log_every"),
    *("run_name", "device", "threads", "fsdp", "compile", "gradient_checkpointing"),
}


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a checkpoint belongs to.

    Attributes:
        text_digest: of the data.
        settings: of the run, but those that a resumed run may change.
    """

    text_digest: str
    settings: dict[str, Any]

    @classmethod
    def of(cls, text_digest: str, settings: dict[str, Any]) -> "Identity":
        """That of a run with these settings."""
        kept = {name: value for name, value in settings.items() if name not in _MAY_CHANGE}
        return cls(text_digest=text_digest, settings=json.loads(json.dumps(kept)))


def checkpoints(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    if not exists(str(directory), directory):
        return []
    require_directory(str(directory), directory)
    found = [
        path
        for path in directory.iterdir()
        if _NAME.fullmatch(path.name) and exists(str(path), path / PROGRESS_NAME)
    ]
    return sorted(found, key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.split("-")[1])


def save_checkpoint(trainer: "FinetuneTrainer") -> Path:
    """Saves the adapter, the optimizer, the schedules, random generators and the progress. Every
    process calls it; the first one writes what all of them have."""
    run = trainer.run
    path = run.directory / f"checkpoint-{run.progress.step:06d}"
    temporary = path.with_name(_UNFINISHED.replace("*", path.name.split("-")[1]))
    on_main_process(lambda: _make_empty(temporary))
    with cannot_write(path):
        run.save(temporary)
        trainer._save_optimizer_and_scheduler(str(temporary))
        trainer._save_scaler(str(temporary))
        trainer._save_rng_state(str(temporary))
    # Of a sharded model its statistics are gathered.
    freezing = None if run.freezing is None else run.freezing.state_dict()

    def complete() -> None:
        with cannot_write(path):
            trainer.state.save_to_json(str(temporary / _TRAINER_STATE))
            if freezing is not None:
                torch.save(freezing, temporary / _FREEZING)
            write_json(temporary / "identity.json", dataclasses.asdict(run.identity))
            write_json(temporary / PROGRESS_NAME, run.progress.to_dict())
            sync_tree(temporary)
            replace_directory(temporary, path)
        _remove_older(run.directory, path, run.kept_checkpoints())

    on_main_process(lambda: None)  # every process has written its part
    on_main_process(complete)
    return path


def _make_empty(path: Path) -> None:
    with cannot_write(path):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)


def _remove_older(directory: Path, newest: Path, kept: set[int]) -> None:
    older = [p for p in checkpoints(directory) if p != newest and _step_of(p) not in kept]
    for path in (*older, *directory.glob(_UNFINISHED)):
        shutil.rmtree(path, ignore_errors=True)


def newest_steps(directory: Path, count: int) -> set[int]:
    """The steps of the last ``count`` checkpoints."""
    return {_step_of(path) for path in checkpoints(directory)[-count:]} if count > 0 else set()


def checkpoint_of_step(directory: Path, step: int) -> Path:
    """The checkpoint after a step. Raises UserError when it is not there."""
    for path in checkpoints(directory):
        if _step_of(path) == step:
            return path
    raise UserError(f"{directory} must hold the checkpoint of step {step}, got none")


def read_progress(path: Path, identity: Identity) -> Progress:
    """The progress of a checkpoint. Raises UserError for a damaged one, and for one of another
    text."""
    values = read_json(path / "identity.json")
    check_types(Identity, values, str(path / "identity.json"))
    if values["text_digest"] != identity.text_digest:
        raise UserError(f"the text or the tokenizer has changed since {path} was written")
    for name in sorted(values["settings"].keys() | identity.settings.keys()):
        was, now = (found.get(name) for found in (values["settings"], identity.settings))
        if was != now:
            raise UserError(
                f"{quoted(name)} was {quoted(was)} when {path} was written, got {quoted(now)}"
            )
    _check_complete(path)
    where = f"cannot continue from {path / PROGRESS_NAME}"
    return Progress.from_dict(read_json(path / PROGRESS_NAME), where)


def _check_complete(path: Path) -> None:
    """transformers goes on without most of its files."""
    for name in (_TRAINER_STATE, "scheduler.pt"):
        if not exists(str(path), path / name):
            raise UserError(f"cannot continue from {path}: it must hold {name}, got none")
    if not (list(path.glob("optimizer*")) or list(path.glob("global_step*"))):
        raise UserError(f"cannot continue from {path}: it must hold optimizer.pt, got none")
    if not list(path.glob("rng_state*.pth")):
        raise UserError(f"cannot continue from {path}: it must hold rng_state.pth, got none")
    from transformers import TrainerState

    with as_user_error(f"cannot continue from {path / _TRAINER_STATE}", Exception):
        state = TrainerState.load_from_json(str(path / _TRAINER_STATE))
        if type(state.global_step) is not int:
            raise ValueError(f"global_step must be int, got {quoted(state.global_step)}")


def restore_freezing(path: Path, schedule: Any, method: str) -> None:
    """Gives a method's schedule its state back."""
    stored = exists(str(path), path / _FREEZING)
    if stored != (schedule is not None):
        needed = "no" if schedule is None else "a"
        raise UserError(
            f"cannot continue from {path}: {_FREEZING} must be {needed} schedule's state for "
            f"{method}"
        )
    if schedule is None:
        return
    with as_user_error(f"cannot continue from {path / _FREEZING}", Exception):
        schedule.load_state_dict(read_torch_file(path / _FREEZING, "--resume"))


def remove_checkpoints(directory: Path) -> None:
    """Removes all checkpoints, once the result is written."""
    for path in checkpoints(directory):
        shutil.rmtree(path, ignore_errors=True)
