"""`finetune --resume` from damaged state: one line that names the file and the key, exit code 2."""

import dataclasses
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

from finetune_runs import check_error, invoke, resume, small_run, stop_at
from rich.console import Console

from lowrank_ext.cli.comparison import start_run
from lowrank_ext.cli.display import make_display
from lowrank_ext.cli.errors import UserError
from lowrank_ext.cli.interrupts import StopRequest
from lowrank_ext.cli.job import Job, prepare
from lowrank_ext.cli.methods import entry
from lowrank_ext.cli.run_file import RUN_FILE, read_run_file
from lowrank_ext.cli.settings import Settings, option_types
from lowrank_ext.cli.training.checkpoints import checkpoints
from lowrank_ext.cli.typed import has_type

CHECKPOINT = "checkpoint-000001"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, text_file: Path) -> Path:
    """A run of AFLoRA, which has a schedule with statistics, stopped after its first step."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    options = small_run(model=tiny_model, text=text_file, out=out, method="aflora", dtype="bf16")
    options += ["--adapter-dtype", "bf16"]
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, step=1)
        assert invoke("finetune", *options).exit_code == 130
    return out


def copied(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "out"))


def moments(state: dict[str, Any]) -> dict[str, Any]:
    return next(iter(state["state"].values()))


Edit = Callable[[Any], object]
OPTIMIZER, SCHEDULER, FREEZING = "optimizer.pt", "scheduler.pt", "freezing.pt"
RNG, TRAINER = "rng_state.pth", "trainer_state.json"
PROGRESS, IDENTITY = "progress.json", "identity.json"
# The file of a checkpoint, what is done to its content, and what the error must say.
EDITS: dict[str, tuple[str, Edit, str]] = {
    "optimizer more": (OPTIMIZER, lambda s: s.update(more=1), "optimizer must hold"),
    "optimizer empty": (OPTIMIZER, lambda s: s.clear(), "optimizer must hold"),
    "state of text": (OPTIMIZER, lambda s: s.update(state="x"), "cannot continue"),
    "masters missing": (OPTIMIZER, lambda s: s.pop("masters"), "optimizer must hold"),
    "masters short": (OPTIMIZER, lambda s: s["masters"].pop(), "masters, got"),
    "master of ints": (
        OPTIMIZER,
        lambda s: s["masters"].__setitem__(0, torch.ones(3, dtype=torch.int32)),
        "master 0 must be torch.float32",
    ),
    "groups": (OPTIMIZER, lambda s: s["param_groups"].pop(), "must have groups of"),
    "betas": (OPTIMIZER, lambda s: s["param_groups"][0].update(betas="x"), "betas must be"),
    "moment of another shape": (
        OPTIMIZER,
        lambda s: moments(s).update(exp_avg=torch.ones(7)),
        r"exp_avg of \d+ must be",
    ),
    "moment missing": (
        OPTIMIZER,
        lambda s: moments(s).pop("exp_avg"),
        r"state \d+ must be of a parameter",
    ),
    "moment not finite": (
        OPTIMIZER,
        lambda s: moments(s)["exp_avg"].fill_(torch.nan),
        r"exp_avg of \d+ must be finite",
    ),
    "state of no parameter": (
        OPTIMIZER,
        lambda s: s["state"].update({999: {}}),
        "state 999 must be of a parameter",
    ),
    "schedule of another step": (
        SCHEDULER,
        lambda s: s.update(last_epoch=3),
        "scheduler.pt must be of step 1, got 3",
    ),
    "schedule of text": (SCHEDULER, lambda s: s.update(last_epoch="x"), "scheduler.pt must be"),
    "rng short": (RNG, lambda s: s.update(cpu=s["cpu"][:5]), "cannot continue"),
    "rng of floats": (RNG, lambda s: s.update(cpu=s["cpu"].float()), "cannot continue"),
    "rng missing": (RNG, lambda s: s.pop("numpy"), "numpy"),
    "trainer at another step": (TRAINER, lambda s: s.update(global_step=0), "must be 1, got 0"),
    "trainer of text": (TRAINER, lambda s: s.update(global_step="1"), "global_step must be int"),
    "trainer more": (TRAINER, lambda s: s.update(more=1), "trainer_state.json"),
    "progress more": (PROGRESS, lambda s: s.update({"\x1b]0;x\x07": 1}), r"\\x1b\]0;x\\x07"),
    "progress missing": (PROGRESS, lambda s: s.pop("step"), "is not from this .*step"),
    "progress of text": (PROGRESS, lambda s: s.update(step="3"), "step must be int, got '3'"),
    "progress further": (PROGRESS, lambda s: s.update(step=4), "losses must have step=4 entries"),
    "rows of a step": (PROGRESS, lambda s: s.update(rows_per_step=9), "must have 9 rows, got 2"),
    "digest": (IDENTITY, lambda s: s.update(text_digest=3), "text_digest must be str, got 3"),
    "other digest": (
        IDENTITY,
        lambda s: s.update(text_digest="3"),
        "the text or the tokenizer has changed",
    ),
    "other optimizer": (
        IDENTITY,
        lambda s: s["settings"].update(optimizer="sgd"),
        "'optimizer' was 'sgd' when .* was written, got 'adamw'",
    ),
    "fewer settings": (IDENTITY, lambda s: s["settings"].pop("rank"), "'rank' was None when"),
    "settings of text": (IDENTITY, lambda s: s.update(settings="x"), "settings must be"),
    "freezing": (FREEZING, lambda s: s.pop("step"), "state must have the keys"),
    "freezing of text": (
        FREEZING,
        lambda s: s.update(live="x"),
        "live must be a mapping, got 'x'",
    ),
    "statistics of text": (
        FREEZING,
        lambda s: [t.update({k: "x" for k in t}) for t in s["live"].values()],
        "statistics of .* must be floating-point tensors",
    ),
    "statistics": (
        FREEZING,
        lambda s: [t.update({k: torch.ones(2) for k in t}) for t in s["live"].values()],
        "statistics of .* must be",
    ),
}


def read(path: Path) -> Any:
    if path.suffix == ".json":
        return json.loads(path.read_text())
    return torch.load(path, weights_only=path.name != RNG)  # numpy's state is no plain value


def write(path: Path, value: Any) -> None:
    if path.suffix == ".json":
        path.write_text(json.dumps(value))
    else:
        torch.save(value, path)


@pytest.fixture(scope="module")
def shared(stopped: Path) -> Iterator[Job]:
    """The model and the text, loaded once."""
    settings = Settings.from_dict(stored(stopped))
    with StopRequest() as stop:
        yield prepare(settings, stopped, True, Console(file=io.StringIO()), stop)


def resume_training(shared: Job, out: Path) -> None:
    """What `--resume` does with a checkpoint, up to its next step."""
    display = make_display(Console(file=io.StringIO()), "aflora", 8)
    run = start_run(dataclasses.replace(shared, out=out), entry("aflora"), out, display)
    run.train()


@pytest.mark.parametrize("edit", EDITS)
def test_damaged_training_state(edit: str, stopped: Path, shared: Job, tmp_path: Path) -> None:
    out = copied(stopped, tmp_path)
    name, spoil, message = EDITS[edit]
    path = out / CHECKPOINT / name
    state = read(path)
    spoil(state)
    write(path, state)
    with pytest.raises(UserError, match=message) as caught:
        resume_training(shared, out)
    text = str(caught.value)
    assert len(text) < 1200 and text.isprintable()
    assert CHECKPOINT in text or name in text


@pytest.mark.parametrize("name", [OPTIMIZER, SCHEDULER, FREEZING, RNG, TRAINER, IDENTITY])
@pytest.mark.parametrize("content", [None, b"", b"PK\x03\x04", b"[1]"], ids=str)
def test_files_that_are_missing_or_of_something_else(
    name: str, content: bytes | None, stopped: Path, shared: Job, tmp_path: Path
) -> None:
    out = copied(stopped, tmp_path)
    path = out / CHECKPOINT / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=f"{CHECKPOINT}|{name}"):
        resume_training(shared, out)


def test_a_checkpoint_without_its_last_file_is_none(stopped: Path, tmp_path: Path) -> None:
    out = copied(stopped, tmp_path)
    assert [path.name for path in checkpoints(out)] == [CHECKPOINT]
    (out / CHECKPOINT / PROGRESS).unlink()
    assert checkpoints(out) == []


def test_the_command_ends_with_one_line(stopped: Path, tmp_path: Path) -> None:
    out = copied(stopped, tmp_path)
    path = out / CHECKPOINT / PROGRESS
    write(path, {**read(path), "\x1b]0;x\x07": 1})
    check_error(resume(out), str(path), r"\x1b]0;x\x07")


def stored(stopped: Path) -> dict[str, Any]:
    return read_run_file(stopped / RUN_FILE, "--resume", option_types())


def test_types() -> None:
    assert has_type(1, float) and not has_type(True, int) and not has_type(1.0, int)
    assert has_type(None, int | None) and not has_type("1", int | None)
    assert has_type([1, 2.5], tuple[float, ...]) and not has_type("12", tuple[str, ...])
    assert has_type([[1, 2.0]], list[tuple[int, float]])
    assert not has_type([[1]], list[tuple[int, float]])
    assert has_type({"a": [1]}, dict[str, list[int]]) and not has_type(
        {1: [1]}, dict[str, list[int]]
    )
