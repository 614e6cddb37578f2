"""What the options of a training do: lengths, rates, evaluation, checkpoints, logs, dry runs."""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

from finetune_runs import STEPS, check_error, losses, report, resume, rows, stop_at

from lowrank_ext.cli import comparison, finetune, job
from lowrank_ext.cli.data import DataOptions, load_corpus
from lowrank_ext.cli.job import Job
from lowrank_ext.cli.run_settings import stored_settings
from lowrank_ext.cli.settings import Settings, method_names
from lowrank_ext.cli.training import checkpoints as checkpoints_module
from lowrank_ext.cli.training import run as training_run
from lowrank_ext.cli.training.trainer import FinetuneTrainer, RunCallback

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """The learning rates of the groups at each step."""
    seen: list[list[float]] = []
    before = RunCallback.on_pre_optimizer_step

    def noted(self: RunCallback, *arguments: Any, **options: Any) -> Any:
        seen.append([group["lr"] for group in self.trainer.optimizer.param_groups])
        return before(self, *arguments, **options)

    monkeypatch.setattr(RunCallback, "on_pre_optimizer_step", noted)
    return seen


# ------------------------------------------------------------------------------------------ length


def test_epochs_see_every_row_as_often(run, tmp_path, monkeypatch) -> None:
    text = tmp_path / "few.txt"
    text.write_text("0123456789abcdef" * 12)
    seen: list[str] = []
    staged = FinetuneTrainer._staged

    def noted(self: FinetuneTrainer, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.extend(str(row.tolist()) for row in inputs["input_ids"])
        return staged(self, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTrainer, "_staged", noted)
        result = run(text=text, epochs=2, batch=3)
    assert result.exit_code == 0, result.output
    num_rows = report(tmp_path / "out")["model"]["data"]["parts"][0]["rows"]
    steps = -(-2 * num_rows // 3)
    assert len(losses(tmp_path / "out")) == steps
    assert len(seen) == 3 * steps >= 2 * num_rows
    assert f"{steps} steps" in result.stdout


@pytest.mark.parametrize("epochs", ["1e12", "1e308"])
def test_too_many_epochs_are_refused(run, epochs) -> None:
    check_error(run(epochs=epochs), "--epochs must be at most 2147483647 steps")


def test_accumulated_batches_are_one_larger_batch(run, tmp_path) -> None:
    for name, batch, accumulate in (("whole", 6, 1), ("parts", 2, 3)):
        options = {"out": tmp_path / name, "batch": batch, "accumulate": accumulate}
        assert run(dropout=0, **options).exit_code == 0
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert parts == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("method", ["goat", "aflora"])
def test_methods_with_more_than_a_loss_accumulate_too(run, tmp_path, method) -> None:
    for name, batch, accumulate in (("whole", 4, 1), ("parts", 2, 2)):
        options = {"out": tmp_path / name, "batch": batch, "accumulate": accumulate}
        assert run(method=method, dropout=0, eval_batches=1, **options).exit_code == 0
    whole, parts = (losses(tmp_path / name, method) for name in ("whole", "parts"))
    # The balance loss of a batch is not the mean of its parts'.
    assert parts == pytest.approx(whole, rel=1e-5 if method == "aflora" else 2e-3)


# -------------------------------------------------------------------------------------------- rates


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"schedule": "constant"}, [1.0] * 8),
        ({"schedule": "linear", "warmup": 0}, [1 - step / 8 for step in range(8)]),
        ({"schedule": "constant_with_warmup", "warmup": 4}, [0, 0.25, 0.5, 0.75, 1, 1, 1, 1]),
        ({"schedule": "constant_with_warmup", "warmup": 0.25}, [0, 0.5, 1, 1, 1, 1, 1, 1]),
    ],
    ids=str,
)
def test_schedule_and_warmup(run, rates, options, expected) -> None:
    assert run(lr=0.01, **options).exit_code == 0
    assert [found[0] / 0.01 for found in rates] == pytest.approx(expected)


def test_weight_decay_shrinks_matrices_alone(run, tmp_path, monkeypatch) -> None:
    decays: dict[str, float] = {}
    create = FinetuneTrainer.create_optimizer

    def noted(self: FinetuneTrainer, *arguments: Any) -> Any:
        made = create(self, *arguments)
        names = {id(p): name for name, p in self.model.named_parameters()}
        for group in made.param_groups:
            for parameter in group["params"]:
                decays[names[id(parameter)]] = group["weight_decay"]
        return made

    monkeypatch.setattr(FinetuneTrainer, "create_optimizer", noted)
    assert run(method="full", weight_decay=0.1).exit_code == 0
    norms = {name for name in decays if "norm" in name}
    assert norms and {decays[name] for name in norms} == {0.0}
    assert {decay for name, decay in decays.items() if name not in norms} == {0.1}


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_clip_bounds_the_gradient_or_nothing(run, monkeypatch, clip) -> None:
    norms: list[float] = []
    before = RunCallback.on_pre_optimizer_step

    def noted(self: RunCallback, *arguments: Any, **options: Any) -> Any:
        gradients = [p.grad for p in self.run.model.parameters() if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        return before(self, *arguments, **options)

    monkeypatch.setattr(RunCallback, "on_pre_optimizer_step", noted)
    assert run(clip=clip).exit_code == 0
    assert all(norm <= 1.001e-3 for norm in norms) == (clip > 0)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd", "adafactor"])
def test_optimizers_of_transformers_train_and_resume(run, tmp_path, monkeypatch, optimizer) -> None:
    options = {"optimizer": optimizer, "lr": 0.05 if optimizer == "sgd" else 0.002}
    assert run(out=tmp_path / "whole", **options).exit_code == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert run(**options).exit_code == 130
    assert resume(tmp_path / "out").exit_code == 0
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    assert rows(tmp_path / "out")["lora"]["held_out_after"] < 6


# --------------------------------------------------------------------------------------- evaluation


def test_own_evaluation_file_and_steps(run, tmp_path) -> None:
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("a text of its own, " * 20)
    assert run(eval=held_out, eval_every=3).exit_code == 0
    row = rows(tmp_path / "out")["lora"]
    assert [step for step, _ in row["held_out"]] == [0, 3, 6, 8]
    parts = report(tmp_path / "out")["model"]["data"]["parts"]
    assert parts[1]["tokens"] == pytest.approx(len("a text of its own, ") * 20, abs=2)


@pytest.mark.parametrize("eval_batches", [1, 99])
def test_evaluations_count_every_row_or_say_which(run, tmp_path, eval_batches) -> None:
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("a text of its own, " * 8)  # ten rows, the last one short
    result = run(eval=held_out, batch=4, eval_batches=eval_batches)
    assert result.exit_code == 0, result.output
    number = report(tmp_path / "out")["model"]["data"]["parts"][1]["rows"]
    said = f"evaluated on 4 of {number} held-out rows (--eval-batches)" in result.stdout
    assert said == (eval_batches == 1)
    before = rows(tmp_path / "out")["lora"]["held_out_before"]
    settings = stored_settings(Settings, tmp_path / "out")
    loaded = job.load_model(job.find_model(settings.model), torch.float32)
    corpus = load_corpus(DataOptions.of(settings), loaded.tokenizer)
    sums = [0.0, 0]
    for index in range(number if eval_batches == 99 else 4):
        row = corpus.held_out[index]
        targets = int((row["labels"][1:] != -100).sum())
        with torch.no_grad():
            batch = {name: row[name][None] for name in ("input_ids", "labels")}
            sums[0] += loaded.model.eval()(**batch).loss.item() * targets
        sums[1] += targets
    assert before == pytest.approx(sums[0] / sums[1], rel=1e-5)


def test_speed_counts_the_tokens_of_rows_not_their_padding(run, tmp_path) -> None:
    text = tmp_path / "pairs.jsonl"
    pairs = [{"prompt": "a" * (n % 5 + 1), "completion": "b" * (n % 3 + 1)} for n in range(40)]
    text.write_text("\n".join(map(json.dumps, pairs)))
    assert run(text=text, keep=1).exit_code == 0
    progress = json.loads((tmp_path / "out" / "checkpoint-000008" / "progress.json").read_text())
    assert len(progress["tokens"]) == STEPS
    longest = 2 * (5 + 3 + 1)  # two rows of prompt, completion and end
    assert all(2 * 3 <= tokens <= longest for tokens in progress["tokens"])
    ratios = [t / s for t, s in zip(progress["tokens"], progress["step_seconds"], strict=True)]
    found = rows(tmp_path / "out")["lora"]["tokens_per_second"]
    assert found == pytest.approx(statistics.median(ratios))


@pytest.fixture
def scripted_losses(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float]], None]:
    """Held-out losses, one for each evaluation."""

    def script(values: list[float]) -> None:
        left = iter(values)
        monkeypatch.setattr(training_run, "held_out_loss", lambda *arguments: next(left))

    return script


def test_early_stop_saves_the_best_step(run, tmp_path, scripted_losses) -> None:
    scripted_losses([3.0, 2.0, 1.0, 1.5, 1.2])
    result = run(eval_every=1, early_stop=2)
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    row = rows(out)["lora"]
    assert len(row["losses"]) == 4 and row["ended_early"] and row["saved_step"] == 2
    assert row["held_out_after"] == 1.0
    saved = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    names = sorted(path.name for path in out.glob("checkpoint-*"))
    assert names == ["checkpoint-000002", "checkpoint-000004"]
    best, last = ((out / name / "adapter/adapter_model.safetensors").read_bytes() for name in names)
    assert saved == best != last
    assert "already finished" in resume(out).stdout
    words = "ended early after step 4, step 2 has the best held-out loss and is saved"
    assert words in result.stdout and words in (out / "finetune.log").read_text()
    check_error(resume(out, "--steps", "20"), "--early-stop has ended lora")


def test_early_stop_lets_a_run_that_improves_end(run, tmp_path, scripted_losses) -> None:
    scripted_losses([3.0, 2.0, 2.5, 1.5, 1.6])
    assert run(early_stop=2).exit_code == 0
    row = rows(tmp_path / "out")["lora"]
    assert len(row["losses"]) == STEPS and not row["ended_early"]
    assert row["saved_step"] == 6 and row["held_out_after"] == 1.5


def test_early_stop_is_refused_where_stages_follow(run) -> None:
    check_error(run(method="set-and-sequence", early_stop=1), "--early-stop", "set-and-sequence")


@pytest.mark.parametrize("method", ["full", "peft-lora", "lamda"])
def test_every_method_goes_back_to_its_best_step(run, tmp_path, scripted_losses, method) -> None:
    scripted_losses([3.0, 1.0, 2.0, 2.5, 2.6])
    assert run(method=method, early_stop=9, keep=9, save_every=2).exit_code == 0
    out = tmp_path / "out"
    assert rows(out)[method]["saved_step"] == 2
    name = "model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors"
    kept = out / "checkpoint-000002" / name
    if kept.exists():  # methods whose runs cannot be extended keep none
        assert (out / name).read_bytes() == kept.read_bytes()


# -------------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(("keep", "left"), [(1, [8]), (2, [6, 8]), (9, [2, 4, 6, 8])])
def test_the_newest_checkpoints_stay(run, tmp_path, keep, left) -> None:
    assert run(save_every=2, keep=keep).exit_code == 0
    names = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert names == [f"checkpoint-{step:06d}" for step in left]


class Killed(BaseException):
    """As kill -9: nothing that would be done afterwards is done."""


@pytest.mark.parametrize("place", ["progress", "rename", "removal"])
def test_a_kill_while_a_checkpoint_is_written_loses_no_complete_one(
    run, tmp_path, monkeypatch, place
) -> None:
    options = {"save_every": 2, "dropout": 0.2}
    assert run(out=tmp_path / "whole", **options).exit_code == 0
    name = {"progress": "write_json", "rename": "replace_directory", "removal": "_remove_older"}
    before = getattr(checkpoints_module, name[place])

    def killed(*arguments: Any) -> Any:
        # The paths alone: a measured time can hold these digits too.
        if any("000006" in str(path) for path in arguments if isinstance(path, Path)):
            raise Killed
        return before(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoints_module, name[place], killed)
        run(**options)
    out = tmp_path / "out"
    complete = [path.name for path in checkpoints_module.checkpoints(out)]
    extra = ["checkpoint-000006"] if place == "removal" else []
    assert complete == ["checkpoint-000004", *extra]
    result = resume(out)
    assert result.exit_code == 0, result.output
    assert losses(out) == losses(tmp_path / "whole")
    assert [path.name for path in out.glob("*checkpoint*")] == ["checkpoint-000008"]


def test_a_second_run_into_the_same_directory_is_refused(run, tmp_path, monkeypatch) -> None:
    results: list[Any] = []
    prepare = finetune.prepare

    def meanwhile(*arguments: Any) -> Any:
        if not results:
            results.append(None)
            other = [sys.executable, "-m", "lowrank_ext", "finetune", "--method", "frozen"]
            other += ["--out", str(tmp_path / "out")]
            results[0] = subprocess.run(other, capture_output=True, text=True)
        return prepare(*arguments)

    monkeypatch.setattr(finetune, "prepare", meanwhile)
    assert run().exit_code == 0
    assert results[0].returncode == 2
    assert "another run is writing there" in results[0].stderr
    assert run().exit_code == 0, "the first run has unlocked it"


def test_what_a_dead_run_was_writing_is_removed(run, tmp_path) -> None:
    stale = tmp_path / "out" / ".checkpoint-000004.saving"
    stale.mkdir(parents=True)
    assert run().exit_code == 0
    assert not stale.exists()


def test_resume_refuses_a_run_file_that_was_edited(run, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert run().exit_code == 130
    path = out / "run.yaml"
    stored = path.read_text()
    path.write_text(stored.replace("seed: 0", "seed: 5"))
    check_error(resume(out), "'seed' was 0", "got 5")
    path.write_text(stored)
    assert resume(out, "--keep", "1").exit_code == 0


# ---------------------------------------------------------------------------------- memory and logs


def test_gradient_checkpointing_keeps_less_and_gives_the_same_losses(run, tmp_path) -> None:
    assert run(out=tmp_path / "plain", dropout=0).exit_code == 0
    result = run("--gradient-checkpointing", dropout=0, compare="lora,peft-lora")
    assert result.exit_code == 0, result.output
    plain = rows(tmp_path / "plain")["lora"]
    for row in rows(tmp_path / "out").values():
        assert row["losses"] == pytest.approx(plain["losses"], rel=1e-4)
        assert row["saved_bytes_at_end"] < 0.5 * plain["saved_bytes_at_end"]


def test_losses_go_to_tensorboard(run, tmp_path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run(log_to="tensorboard").exit_code == 0
    (file,) = (tmp_path / "out").rglob("events.out.tfevents.*")
    found = events.EventAccumulator(str(file.parent))
    found.Reload()
    logged = [scalar.value for scalar in found.Scalars("train/loss")]
    assert logged == pytest.approx(losses(tmp_path / "out"), rel=1e-4)
    assert [scalar.step for scalar in found.Scalars("eval/loss")] == [2, 4, 6, 8]


def test_dry_run_shows_costs_and_writes_nothing(run, tmp_path) -> None:
    result = run("--dry-run", compare="frozen,lora,full", preview=1)
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "out").exists()
    for word in ("What would train", "lora", "held out", "example 1: 16 tokens"):
        assert word in result.stdout
    check_error(run("--dry-run", "--resume"), "--dry-run or --resume")


def test_dry_run_measures_what_a_run_measures(run, tmp_path, monkeypatch) -> None:
    from lowrank_ext.cli import dry_run

    found = []
    show = dry_run.table
    monkeypatch.setattr(
        dry_run, "table", lambda job, rows: (found.extend(rows), show(job, rows))[1]
    )
    assert run("--dry-run", compare="frozen,lora,full", dtype="bf16").exit_code == 0
    assert run(compare="frozen,lora,full", dtype="bf16").exit_code == 0
    for estimate, row in zip(found, rows(tmp_path / "out").values(), strict=True):
        assert estimate.trained == row["trainable_at_start"]
        assert estimate.kept == row["saved_bytes_at_start"]
    lora, full = found[1:]
    assert lora.optimizer == 8 * lora.trained and lora.gradients == 4 * lora.trained
    assert full.optimizer == 12 * full.trained and full.gradients == 2 * full.trained


# --------------------------------------------------------------------------------- the frozen model


CHANGING = ("full", "goat", "lamda", "lamda++")


@pytest.mark.parametrize("method", [name for name in method_names() if name != "frozen"])
def test_the_frozen_model_stays_as_it_is(run, monkeypatch, method) -> None:
    """Methods that leave the base's weights as they are share its tensors; others get copies."""
    copies: list[bool] = []
    copied = Job.training_copy

    def noted(self: Job, found: Any) -> Any:
        before = [parameter.clone() for parameter in self.base.parameters()]
        model = copied(self, found)
        own = {parameter.data_ptr() for parameter in self.base.parameters()}
        copies.append(not own & {parameter.data_ptr() for parameter in model.parameters()})
        kept.append((self, before))
        assert found.changes_base(self.settings) == (method in CHANGING)
        return model

    kept: list[Any] = []
    monkeypatch.setattr(Job, "training_copy", noted)
    assert run(method=method, steps=2).exit_code == 0
    shared, before = kept[0]
    assert all(map(torch.equal, shared.base.parameters(), before))
    assert not any(parameter.requires_grad for parameter in shared.base.parameters())
    assert copies == [method in CHANGING]


def test_a_method_that_writes_to_shared_weights_is_noticed() -> None:
    weight = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    state = comparison.TensorState([weight])
    state.check_unchanged("lora")
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="lora has changed the frozen model"):
        state.check_unchanged("lora")
