"""The options of `lowrank-ext finetune`: which settings they give, and what is refused."""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

from finetune_runs import check_error, invoke

from lowrank_ext.cli import finetune, optimizers
from lowrank_ext.cli.settings import Settings

SettingsOf = Callable[..., Settings]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {"given_steps": 30, "epochs": None, "device": "auto", "quantize": None}),
        ("", {"accumulate": 1, "warmup": 0.1, "schedule": "cosine", "optimizer": "adamw"}),
        ("", {"weight_decay": 0.0, "clip": 1.0, "keep": 1, "log_to": (), "eval": ()}),
        ("", {"eval_every": None, "early_stop": None, "train_on": "auto", "packing": "auto"}),
        ("--epochs 1.5", {"given_steps": None, "epochs": 1.5}),
        ("--steps 4 --warmup 3", {"given_steps": 4, "warmup": 3.0}),
        ("--quantize nf4 --gradient-checkpointing", {"quantize": "nf4"}),
        ("--gradient-checkpointing", {"gradient_checkpointing": True}),
        ("--modules-to-save a,,b", {"modules_to_save": ("a", "b")}),
        ("--optimizer sgd --schedule constant", {"optimizer": "sgd", "schedule": "constant"}),
        ("--train-on completion --packing off", {"train_on": "completion", "packing": "off"}),
        ("--eval-every 3 --early-stop 2 --keep 3", {"eval_every": 3, "early_stop": 2, "keep": 3}),
        ("--clip 0 --weight-decay 0.1", {"clip": 0.0, "weight_decay": 0.1}),
        ("--text owner/data --text words", {"text": ("owner/data", "words")}),
    ],
)  # fmt: skip
def test_options_become_settings(
    settings_of: SettingsOf, arguments: str, expected: dict[str, Any]
) -> None:
    settings = settings_of(*arguments.split())
    assert {name: getattr(settings, name) for name in expected} == expected
    assert Settings.from_dict(settings.to_dict()) == settings


def test_paths_are_stored_absolute(
    settings_of: SettingsOf, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "a.txt").write_text("text")
    found = settings_of("--text", "texts", "--text", "a.txt", "--eval", "a.txt")
    assert found.text == (str(tmp_path / "texts"), str(tmp_path / "a.txt"))
    assert found.eval == (str(tmp_path / "a.txt"),)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--device gpu", ["--device must be auto, cpu, cuda or cuda:N", "'gpu'"]),
        ("--quantize nf5", ["--quantize must be one of none, nf4, int8", "did you mean nf4"]),
        ("--quantize nf4 --method full", ["--quantize", "full"]),
        ("--epochs 0", ["--epochs must be a positive number", "0"]),
        ("--epochs nan", ["--epochs"]),
        ("--epochs 1 --steps 1", ["--steps or --epochs, not both"]),
        ("--accumulate 0", ["--accumulate must be at least 1, got 0"]),
        ("--warmup -0.1", ["--warmup must be at least 0"]),
        ("--warmup 1.5", ["--warmup", "whole number of steps", "1.5"]),
        ("--warmup 31", ["--warmup must be at most --steps 30, got 31"]),
        ("--schedule cosin", ["--schedule must be one of", "'cosin'", "did you mean cosine"]),
        ("--schedule reduce_lr_on_plateau", ["--schedule must be one of"]),
        ("--optimizer adamv", ["--optimizer must be one of", "'adamv'", "did you mean adamw"]),
        ("--optimizer lomo", ["--optimizer must be one of", "'lomo'"]),
        ("--weight-decay -1", ["--weight-decay must be at least 0"]),
        ("--clip inf", ["--clip must be at least 0 and finite, got inf"]),
        ("--eval-every 0", ["--eval-every must be at least 1"]),
        ("--early-stop 0", ["--early-stop must be at least 1"]),
        ("--keep 0", ["--keep must be at least 1"]),
        ("--log-to tensorbord", ["--log-to must be one of", "did you mean tensorboard"]),
        ("--train-on prompt", ["--train-on must be one of auto, all, completion, assistant"]),
        ("--packing yes", ["--packing must be one of auto, on, off", "'yes'"]),
        ("--text no/such/file", ["--text no/such/file: no such file"]),
        ("--text missing.jsonl", ["--text missing.jsonl: no such file"]),
        ("--eval missing.txt", ["--eval missing.txt: no such file"]),
        ("--eval ./missing", ["--eval ./missing: no such file"]),
    ],
)  # fmt: skip
def test_refused(
    arguments: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "run", lambda *settings, **more: pytest.fail("it would run"))
    check_error(invoke("finetune", *arguments.split(), "--out", str(tmp_path / "out")), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "package"),
    [
        ("--log-to tensorboard", "tensorboard"),
        ("--log-to tensorboard,wandb", "tensorboard"),
        ("--optimizer paged_adamw_8bit", "bitsandbytes"),
        ("--optimizer adamw_torch_4bit", "torchao"),
    ],
)
def test_packages_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: str, package: str
) -> None:
    monkeypatch.setattr(
        optimizers, "find_spec", lambda name: None if name == package else importlib.util.find_spec
    )
    result = invoke("finetune", *arguments.split(), "--out", str(tmp_path / "out"))
    check_error(result, f"needs the package {package}: pip install {package}")


def test_steps_of_epochs_are_known_once_the_data_is(settings_of: SettingsOf) -> None:
    settings = settings_of("--epochs", "2")
    with pytest.raises(RuntimeError, match="steps of --epochs"):
        print(settings.steps)
    known = settings.with_steps(40)
    assert known.steps == 40
    assert known.to_dict() == settings.to_dict()


# -------------------------------------------------------------------------- transformers' names


@pytest.mark.parametrize("name", optimizers.SCHEDULES)
def test_a_schedule_needs_no_arguments(name: str) -> None:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=2, num_training_steps=6)
    rates = []
    for _ in range(6):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert max(rates) == 1 and all(rate >= 0 for rate in rates)


def test_an_optimizer_needs_no_arguments_and_no_gpu(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    for name, package in optimizers.OPTIMIZERS.items():
        if name == optimizers.OWN_OPTIMIZER:
            continue
        if package is not None and importlib.util.find_spec(package) is None:
            continue
        arguments = TrainingArguments(output_dir=str(tmp_path), optim=name, report_to=[])
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        value = torch.ones(64, 64, requires_grad=True)
        value.square().sum().backward()
        optimizer = kind([value], **options)
        if package == "torchao":  # compiles its first step, for a minute
            continue
        optimizer.step()
        assert bool((value < 1).any()) and bool(value.isfinite().all()), name


def test_settings_are_stored_under_the_names_of_options() -> None:
    """So that a file of settings can be written by who knows the options."""
    import typer

    from lowrank_ext.cli.main import app

    command = typer.main.get_command(app).commands["finetune"]  # type: ignore[attr-defined]
    options = {parameter.name for parameter in command.params}
    fields = {field.name for field in dataclasses.fields(Settings)}
    stored = fields - {"options", "given_steps", "resolved_steps", "methods"} | {"steps", "method"}
    assert stored <= options | {"compare"}
