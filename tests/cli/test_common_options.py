"""Options that other trainers have too: what they do to a run, and what is refused."""

import math
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

from finetune_runs import check_error, invoke, resume, rows, stop_at

from lowrank_ext.cli import finetune, optimizers
from lowrank_ext.cli.training.trainer import RunCallback

pytestmark = pytest.mark.usefixtures("quick_runs")


def losses(out: Path, method: str = "lora") -> list[float]:
    found: list[float] = rows(out)[method]["losses"]
    return found


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--betas 0.9", ["--betas must be two numbers", "0.9,0.95", "'0.9'"]),
        ("--betas 0.9,1", ["--betas must be two numbers", "below 1", "'0.9,1'"]),
        ("--betas a,b", ["--betas must be two numbers", "'a,b'"]),
        ("--betas 0.9,0.9 --optimizer sgd", ["--betas is of adamw", "--optimizer sgd"]),
        ("--eps 0", ["--eps must be a positive number"]),
        ("--eps 1e-6 --optimizer lion_8bit", ["--eps is of adamw", "--optimizer lion_8bit"]),
        ("--min-lr 1", ["--min-lr must be a fraction of the peak", "got 1.0"]),
        ("--min-lr 0.1 --schedule linear", ["--min-lr is of --schedule cosine, got linear"]),
        ("--neftune 0", ["--neftune must be a positive number"]),
        ("--neftune 5 --compile", ["--neftune", "--compile"]),
        ("--log-every 0", ["--log-every must be at least 1"]),
        ("--log-every 2", ["--log-every is of --log-to"]),
        ("--run-name mine", ["--run-name is of --log-to", "the run has none"]),
        ("--run-name a --log-to tensorboard", ["--run-name is of", "the run has tensorboard"]),
        ("--log-to trackoi", ["--log-to must be one of", "did you mean trackio"]),
        ("--log-to mlflow", ["--log-to mlflow needs the package mlflow: pip install mlflow"]),
    ],
)
def test_refused(
    arguments: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "run", lambda *settings, **more: pytest.fail("it would run"))
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None if name == "mlflow" else name)
    check_error(invoke("finetune", *arguments.split(), "--out", str(tmp_path / "out")), *words)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------- optimizer


def test_betas_and_eps_are_those_of_torch(run, tmp_path) -> None:
    """Ours and torch's AdamW agree, and neither is what it is without them."""
    own: dict[str, Any] = {"betas": "0.5,0.6", "eps": 1e-3, "dropout": 0}
    assert run(out=tmp_path / "plain", dropout=0).exit_code == 0
    assert run(out=tmp_path / "ours", **own).exit_code == 0
    assert run(out=tmp_path / "torch", optimizer="adamw_torch", **own).exit_code == 0
    ours, torchs = losses(tmp_path / "ours"), losses(tmp_path / "torch")
    assert ours == pytest.approx(torchs, rel=1e-5)
    assert ours[-1] != pytest.approx(losses(tmp_path / "plain")[-1], rel=1e-5)


def test_optimizers_that_have_betas_and_eps(tmp_path) -> None:
    from importlib.util import find_spec

    from transformers import Trainer, TrainingArguments

    for name, package in optimizers.OPTIMIZERS.items():
        if name == optimizers.OWN_OPTIMIZER or (package is not None and find_spec(package) is None):
            continue
        arguments = TrainingArguments(
            output_dir=str(tmp_path), optim=name, report_to=[], adam_beta1=0.5, adam_epsilon=1e-3
        )
        _, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        assert (options.get("betas", (0,))[0] == 0.5) == optimizers.takes_betas(name), name
        assert (options.get("eps") == 1e-3) == optimizers.takes_eps(name), name


def test_cosine_ends_at_the_lowest_rate(run, monkeypatch) -> None:
    rates: list[float] = []
    before = RunCallback.on_pre_optimizer_step

    def noted(self: RunCallback, *arguments: Any, **options: Any) -> Any:
        rates.append(self.trainer.optimizer.param_groups[0]["lr"])
        return before(self, *arguments, **options)

    monkeypatch.setattr(RunCallback, "on_pre_optimizer_step", noted)
    assert run(min_lr=0.25, warmup=2, steps=6, lr=0.004).exit_code == 0
    falling = [0.25 + 0.75 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert rates == pytest.approx([0, 0.002, *(0.004 * factor for factor in falling)])


def test_noise_on_embeddings_is_in_training_alone(run, tmp_path, monkeypatch) -> None:
    assert run(out=tmp_path / "plain").exit_code == 0
    assert run(out=tmp_path / "least", neftune=1e-9).exit_code == 0
    assert run(out=tmp_path / "whole", neftune=5).exit_code == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert run(neftune=5).exit_code == 130
    assert resume(tmp_path / "out").exit_code == 0
    plain, whole = (rows(tmp_path / name)["lora"] for name in ("plain", "whole"))
    assert losses(tmp_path / "least") != pytest.approx(whole["losses"], rel=1e-3)
    assert rows(tmp_path / "out")["lora"]["losses"] == whole["losses"]
    assert rows(tmp_path / "out")["lora"]["held_out"] == whole["held_out"]
    # Before the first step nothing but noise could make a difference.
    assert whole["held_out"][0] == plain["held_out"][0]
    assert whole["saved_bytes_at_start"] == plain["saved_bytes_at_start"]
    assert whole["saved_bytes_at_end"] == plain["saved_bytes_at_end"]


# --------------------------------------------------------------------------------------------- logs


def test_loggers_are_those_of_transformers() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(optimizers.LOGGERS) == set(INTEGRATION_TO_CALLBACK) - {"kubeflow"}


def test_means_of_losses_go_to_a_logger_by_name(run, tmp_path, monkeypatch) -> None:
    from transformers import TrainerCallback
    from transformers.integrations import integration_utils

    seen: list[Any] = []

    class Logger(TrainerCallback):
        def on_train_begin(self, args: Any, *others: Any, **more: Any) -> None:
            seen.append(args.run_name)

        def on_log(self, args: Any, state: Any, *others: Any, logs: Any, **more: Any) -> None:
            if "loss" in logs:
                seen.append((state.global_step, logs["loss"]))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "trackio", Logger)
    monkeypatch.setattr(optimizers, "find_spec", lambda name: name)
    result = run(log_to="trackio", log_every=3, run_name="mine")
    assert result.exit_code == 0, result.output
    found = losses(tmp_path / "out")
    assert seen[0] == "mine"
    assert seen[1:] == [(3, pytest.approx(mean(found[:3]))), (6, pytest.approx(mean(found[3:6])))]
