"""What the tests of `lowrank-ext finetune` share: its sizes, its outputs, and how it is stopped."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lowrank_ext import registry
from lowrank_ext.cli.main import app
from lowrank_ext.cli.settings import ADAPTER_DEFAULTS, BASELINES, method_options
from lowrank_ext.cli.training.trainer import FinetuneTrainer

STEPS = 8
CONTEXT = 64


def invoke(*arguments: str, **keywords: Any) -> Any:
    """Runs lowrank-ext in this process."""
    return CliRunner().invoke(app, list(arguments), **keywords)


def unread_options(method: str | None, compare: str | None) -> set[str]:
    """Names of the options that none of the methods reads; none for methods that are refused."""
    names = set((compare or method or "lora").split(","))
    recipes = {recipe.name: recipe for recipe in registry.recipes()}
    if names - {*recipes, *BASELINES}:
        return set()
    read = {option.name for name in names & recipes.keys() for option in recipes[name].options}
    has_adapters = bool(names - {"frozen", "full"})
    own = {option.name for option in method_options()}
    unread = own - read | (set() if has_adapters else set(ADAPTER_DEFAULTS))
    return unread | ({"lr"} if names == {"frozen"} else set())


def small_run(**options: Any) -> list[str]:
    """The arguments of a run of small sizes, those that its methods read; None leaves one out."""
    defaults = {
        "rank": 4,
        "steps": None if "epochs" in options else STEPS,
        "batch": 2,
        "seq_len": 16,
        "eval_batches": 2,
        "experts": 2,
        "top_k": 1,
        "window": 4,
        "dtype": "fp32",
        "lr": 0.002,
    }
    unread = unread_options(options.get("method"), options.get("compare"))
    given = {**defaults, **options}
    return flags_of({name: value for name, value in given.items() if name not in unread})


def flags_of(options: dict[str, Any]) -> list[str]:
    """Arguments of the command line; an option that is None is left out."""
    given = [(name, str(value)) for name, value in options.items() if value is not None]
    return [each for name, value in given for each in ("--" + name.replace("_", "-"), value)]


def resume(out: Path, *flags: str) -> Any:
    return invoke("finetune", "--resume", "--out", str(out), *flags)


def report(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


def rows(out: Path) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in report(out)["methods"]}


def losses(out: Path, method: str = "lora") -> list[float]:
    found: list[float] = rows(out)[method]["losses"]
    return found


def write_records(path: Path, records: list[dict[str, Any]]) -> Path:
    """As JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def check_error(result: Any, *words: str) -> None:
    """One line on stderr that has the words, exit code 2, no traceback."""
    assert result.exit_code == 2, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    for word in words:
        assert word in lines[0]


def stop_at(
    monkeypatch: pytest.MonkeyPatch, step: int, times: int = 1, method: str | None = None
) -> None:
    """Ctrl-C while the given step is computed, of a method or of any."""
    training_step = FinetuneTrainer.training_step

    def interrupted(self: FinetuneTrainer, *arguments: Any, **options: Any) -> torch.Tensor:
        loss = training_step(self, *arguments, **options)
        of_method = method in (None, self.run.entry.name)
        if of_method and self.run.progress.step + 1 == step:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        return loss

    monkeypatch.setattr(FinetuneTrainer, "training_step", interrupted)
