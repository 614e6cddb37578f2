"""`finetune --resume --steps N` gives a run more steps."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

from finetune_runs import STEPS, check_error, resume, rows, stop_at
from transformers import get_scheduler

from lowrank_ext.cli.methods import entry
from lowrank_ext.cli.settings import method_names
from lowrank_ext.cli.training.trainer import FinetuneTrainer

pytestmark = pytest.mark.usefixtures("quick_runs")
MORE = STEPS + 4
NOT_EXTENDABLE = ["lamda", "lamda++", "aflora", "set-and-sequence"]


def follow(monkeypatch: pytest.MonkeyPatch, extended_at: int) -> None:
    """Gives a run of MORE steps the learning rates of one of STEPS steps up to `extended_at`."""

    def create_scheduler(self: FinetuneTrainer, num_training_steps: int, **options: Any) -> Any:
        assert num_training_steps == MORE
        short, long = (
            get_scheduler("cosine", self.optimizer, round(0.1 * steps), steps).lr_lambdas[0]
            for steps in (STEPS, MORE)
        )
        followed = lambda step: (short if step < extended_at else long)(step)  # noqa: E731
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, followed)
        return self.lr_scheduler

    monkeypatch.setattr(FinetuneTrainer, "create_scheduler", create_scheduler)


def losses(out: Path, method: str) -> Any:
    row = rows(out)[method]
    return row["losses"], row["held_out_after"]


@pytest.mark.parametrize(
    ("method", "extended_at"),
    [("lora", STEPS), ("lora", 3), ("peft-lora", STEPS), ("goat", 3), ("full", 3)],
)
def test_more_steps_give_the_numbers_of_one_run(
    run, tmp_path, monkeypatch, method, extended_at
) -> None:
    options = {"method": method, "dropout": 0.2, "dtype": "bf16"}
    with monkeypatch.context() as patch:
        follow(patch, extended_at)
        assert run(out=tmp_path / "whole", steps=MORE, **options).exit_code == 0
    with monkeypatch.context() as patch:
        if extended_at < STEPS:
            stop_at(patch, extended_at)
        run(**options)
    out = tmp_path / "out"
    result = resume(out, "--steps", str(MORE))
    assert result.exit_code == 0, result.output
    assert f"{MORE} steps instead of {STEPS}: from here on the learning rate" in result.stdout
    assert losses(out, method) == losses(tmp_path / "whole", method)
    assert [path.name for path in out.glob("checkpoint-*")] == [f"checkpoint-{MORE:06d}"]
    assert "already finished" in resume(out).stdout, "--steps stays raised"


def test_an_extension_that_is_stopped_resumes_to_the_same_numbers(
    run, tmp_path, monkeypatch
) -> None:
    assert run(compare="frozen,lora").exit_code == 0
    shutil.copytree(tmp_path / "out", tmp_path / "whole")
    assert resume(tmp_path / "whole", "--steps", str(MORE)).exit_code == 0
    with monkeypatch.context() as patch:
        stop_at(patch, STEPS + 2)
        assert resume(tmp_path / "out", "--steps", str(MORE)).exit_code == 130
    result = resume(tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert losses(tmp_path / "out", "lora") == losses(tmp_path / "whole", "lora")


def test_which_methods_can_be_extended() -> None:
    names = [name for name in method_names() if not entry(name).training.can_be_extended]
    assert sorted(names) == sorted(NOT_EXTENDABLE)


@pytest.mark.parametrize("method", ["lamda", "set-and-sequence"])
def test_schedules_over_the_steps_are_not_extended(run, tmp_path, method) -> None:
    assert run(method=method, steps=2).exit_code == 0
    settings = (tmp_path / "out" / "run.yaml").read_bytes()
    words = ("--steps was 2, got 3", method, "depends on the number of steps")
    check_error(resume(tmp_path / "out", "--steps", "3"), *words)
    assert (tmp_path / "out" / "run.yaml").read_bytes() == settings


def test_what_cannot_be_extended_is_left_as_it_is(run, tmp_path) -> None:
    out = tmp_path / "out"
    assert run(steps=2).exit_code == 0
    check_error(resume(out, "--steps", "1"), "--steps was 2, got 1")
    words = "the run has --steps 2, got --epochs 3; give more --steps to extend it"
    check_error(resume(out, "--epochs", "3"), words)
    shutil.rmtree(out / "checkpoint-000002")
    check_error(resume(out, "--steps", "3"), "--steps was 2, got 3", "holds no checkpoint")
    assert "\nsteps: 2\n" in (out / "run.yaml").read_text()
    assert resume(out, "--steps", "2").exit_code == 0


def test_rows_are_consistent(run, tmp_path) -> None:
    assert run(compare="frozen,lora", steps=1).exit_code == 0
    for row in rows(tmp_path / "out").values():
        ratio = row["forward_backward_ms"] / row["frozen_forward_backward_ms"]
        assert row["forward_backward_ratio"] == ratio
