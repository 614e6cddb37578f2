"""SIGTERM stops a run wherever it is, and what was trained can be continued to the same numbers."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

from finetune_runs import STEPS, invoke, resume, rows, small_run

from lowrank_ext.cli import comparison, job
from lowrank_ext.cli.interrupts import StoppedAtOnce, StopRequest, Terminated
from lowrank_ext.cli.methods import Entry
from lowrank_ext.cli.training import run as training_run
from lowrank_ext.cli.training import trainer
from lowrank_ext.cli.training.optimizer import MasterAdamW
from lowrank_ext.cli.training.run import TrainingRun
from lowrank_ext.cli.training.trainer import FinetuneTrainer

pytestmark = pytest.mark.usefixtures("quick_runs")
OPTIONS = {"dropout": 0.2, "method": "set-and-sequence", "set_fraction": 0.5, "save_every": 3}
NUMBERS = ("losses", "held_out", "trainable_at_start", "trainable_at_end", "saved_bytes_at_start")


@pytest.fixture(scope="module")
def whole(tiny_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The numbers of a run that nothing stops."""
    out = tmp_path_factory.mktemp("whole")
    result = invoke("finetune", *small_run(model=tiny_model, text=text_file, out=out, **OPTIONS))
    assert result.exit_code == 0, result.output
    return {name: rows(out)["set-and-sequence"][name] for name in NUMBERS}


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def terminated(function: Callable[..., Any], call: int) -> Callable[..., Any]:
    """`function` with SIGTERM before the given call of it."""
    calls = [0]

    def wrapper(*arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            terminate()
        return function(*arguments, **options)

    return wrapper


def in_backward(compute_loss: Callable[..., Any], call: int) -> Callable[..., Any]:
    def loss(*arguments: Any, **options: Any) -> Any:
        found = compute_loss(*arguments, **options)
        found.register_hook(hook)
        return found

    hook = terminated(lambda gradient: None, call)
    return loss


PLACES = {
    "loading": (job, "load_model", terminated, 1, None),
    "first evaluation": (training_run, "held_out_loss", terminated, 1, None),
    "first step": (FinetuneTrainer, "training_step", terminated, 1, 0),
    "forward": (FinetuneTrainer, "compute_loss", terminated, 6, 5),
    "backward": (FinetuneTrainer, "compute_loss", in_backward, 6, 5),
    "update": (MasterAdamW, "step", terminated, 5, 5),
    "end of a stage": (TrainingRun, "_begin_next_stage", terminated, 1, 4),
    "evaluation": (training_run, "held_out_loss", terminated, 3, 4),
    "checkpoint": (trainer, "save_checkpoint", terminated, 1, 3),
    "last evaluation": (training_run, "held_out_loss", terminated, 5, STEPS),
    "measuring": (comparison, "interleaved_timing", terminated, 1, STEPS),
}


@pytest.mark.parametrize("place", PLACES)
def test_sigterm_is_heard_and_loses_nothing(run, tmp_path, monkeypatch, whole, place) -> None:
    owner, name, wrap, call, step = PLACES[place]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, wrap(getattr(owner, name), call))
        result = run(**OPTIONS)
    out = tmp_path / "out"
    assert result.exit_code == 143, result.output
    if place == "loading":
        assert "nothing was trained yet" in result.stderr
        assert not (out / "run.yaml").exists()
        return
    assert f"lowrank-ext finetune --resume --out {out}" in result.stderr
    expected = [] if step is None else [f"checkpoint-{step:06d}"]
    assert [path.name for path in out.glob("checkpoint-*")] == expected
    result = resume(out)
    assert result.exit_code == 0, result.output
    found = rows(out)["set-and-sequence"]
    assert {name: found[name] for name in NUMBERS} == whole


def test_sigterm_is_heard_while_a_pattern_backtracks(run, monkeypatch) -> None:
    # From another process: matching holds the lock that a thread of this one would wait for.
    kill = f"import os, time; time.sleep(0.3); os.kill({os.getpid()}, {signal.SIGTERM:d})"

    def build(*arguments: Any) -> None:
        subprocess.Popen([sys.executable, "-S", "-c", kill])
        re.match("(a+)+$", "a" * 60 + "b")  # ends in some years

    monkeypatch.setattr(Entry, "build", build)
    result = run()
    assert result.exit_code == 143, result.output


def test_sigterm_after_ctrl_c_stops_without_waiting_and_a_third_signal_ends_it() -> None:
    with StopRequest() as stop:
        with stop.leaving_at_any_point():
            signal.raise_signal(signal.SIGINT)
            assert stop.requested and stop.exit_code == 130
            with pytest.raises(Terminated):
                terminate()
            assert stop.exit_code == 143
            with pytest.raises(StoppedAtOnce) as stopped:
                signal.raise_signal(signal.SIGINT)
            assert stopped.value.exit_code == 143
        with pytest.raises(Terminated), stop.leaving_at_any_point():
            raise AssertionError("SIGTERM has come before")


def test_sigterm_leaves_an_undisturbed_block_at_its_end() -> None:
    reached = False
    with StopRequest() as stop:
        with pytest.raises(Terminated), stop.leaving_at_any_point(), stop.undisturbed():
            terminate()
            reached = True
        assert reached and stop.requested
