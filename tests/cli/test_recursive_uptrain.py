"""`lowrank-ext recursive uptrain`: losses, files, runs that continue to the same bits."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

from finetune_runs import check_error, report
from recursive_runs import STEPS, command, convert, uptrain
from transformers import AutoModelForCausalLM

import lowrank_ext as lr
from lowrank_ext.cli.recursive import uptrain as module
from lowrank_ext.cli.recursive.trainer import UptrainTrainer

OPTIONS: dict[str, Any] = {"exits": 0.2, "exit_warm_up": 3, "loss": "jsd"}


DRAW = module.loss_picture


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than such a run; one test draws."""
    monkeypatch.setattr(module, "loss_picture", lambda *arguments: b"")


@pytest.fixture
def run(recursive_model: Path, tiny_model: Path, text_file: Path, tmp_path: Path) -> Any:
    """Uptrains the tiny model; keyword arguments override options, None leaves one out."""

    def run(**options: Any) -> Any:
        out = options.pop("out", tmp_path / "out")
        teacher = options.pop("teacher", tiny_model)
        text = options.pop("text", text_file)
        return uptrain(recursive_model, teacher, text, out, **options)

    return run


def resume(out: Path, *arguments: str, **options: Any) -> Any:
    return command("uptrain", *arguments, "--resume", out=out, **options)


def numbers(out: Path) -> dict[str, Any]:
    """Everything that must not depend on interruptions: losses, and the bits of the model."""
    found = report(out)
    names = ("losses", "held_out", "held_out_before", "held_out_after", "skipped_steps")
    weights = (out / "model" / "model.safetensors").read_bytes()
    return {"weights": weights, **{name: found[name] for name in names}}


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> None:
    """A signal while the given step is computed."""
    training_step = UptrainTrainer.training_step

    def stopped(self: UptrainTrainer, *arguments: Any, **options: Any) -> torch.Tensor:
        loss = training_step(self, *arguments, **options)
        if self.run.progress.step + 1 == step:
            os.kill(os.getpid(), number)
        return loss

    monkeypatch.setattr(UptrainTrainer, "training_step", stopped)


def test_the_model_learns_and_its_files_say_so(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "loss_picture", DRAW)
    result = run(loss="ce", teacher=None, exits=0.1, steps=12, lr=0.01)
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    found = report(out)
    before, after = found["held_out_before"]["losses"], found["held_out_after"]["losses"]
    assert all(last < first for first, last in zip(before, after, strict=True))
    assert found["held_out"][0] == [0, pytest.approx(before[-1], rel=1e-5)]
    assert found["held_out"][-1] == [12, pytest.approx(after[-1], rel=1e-5)]
    assert len(found["losses"]) == 12 and found["losses"][-1] < found["losses"][0]
    assert found["seconds"] == pytest.approx(sum(found["step_seconds"]))
    assert found["environment"]["torch"] == torch.__version__
    assert found["settings"]["exits"] == 0.1 and found["model"]["teacher"] is None
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "step 12 loss" in (out / "uptrain.log").read_text()
    assert f"loop 1: held-out loss {before[1]:.4f} > {after[1]:.4f}" in result.stdout
    model = lr.recursive.load(out / "model")
    assert sum(p.numel() for p in model.parameters()) == found["model"]["stored_parameters"]
    words = ("--text", "--seq-len", "16", "--batch", "2", "--eval-batches", "2", "--dtype", "fp32")
    text = found["settings"]["text"][0]
    evaluated = command("evaluate", out / "model", "--json", words[0], text, *words[1:])
    assert json.loads(evaluated.stdout)["losses"] == after


@pytest.mark.parametrize("loss", ["kl", "reverse-kl", "tvd"])
def test_the_first_loss_is_that_of_the_library(
    run: Any, recursive_model: Path, tiny_model: Path, tmp_path: Path, loss: str
) -> None:
    result = run(loss=loss, exits=0.2, exit_loss="tvd", exit_warm_up=4, steps=1)
    assert result.exit_code == 0, result.output
    settings = report(tmp_path / "out")["settings"]
    model = lr.recursive.load(recursive_model).train()
    teacher = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    from lowrank_ext.cli.data.blocks import load_blocks
    from lowrank_ext.cli.recursive.models import load_recursive

    tokenizer = load_recursive(recursive_model, "fp32").tokenizer
    tokens = load_blocks(tuple(settings["text"]), "text", tokenizer, 16).train_batch(0, 2, 0)
    wanted = lr.recursive.uptrain_loss(
        model,
        teacher,
        {"input_ids": tokens, "labels": tokens},
        loss=loss,
        coefficients=(0.05, 1.0),
        exit_loss="tvd",
    ).total
    assert report(tmp_path / "out")["losses"] == [pytest.approx(wanted.item(), rel=1e-5)]


def test_exits_rise_from_step_to_step(run: Any, monkeypatch: Any) -> None:
    seen = []
    uptrain_loss = lr.recursive.uptrain_loss

    def noted(*arguments: Any, **options: Any) -> Any:
        seen.append(options["coefficients"])
        return uptrain_loss(*arguments, **options)

    monkeypatch.setattr(lr.recursive, "uptrain_loss", noted)
    assert run(exits=0.3, exit_warm_up=3, steps=4).exit_code == 0
    assert seen == [pytest.approx((c, 1.0)) for c in (0.1, 0.2, 0.3, 0.3)]


@pytest.fixture(scope="module")
def whole(
    recursive_model: Path, tiny_model: Path, text_file: Path, tmp_path_factory: Any
) -> dict[str, Any]:
    """The numbers of a run that nothing stops."""
    out = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "loss_picture", lambda *arguments: b"")
        result = uptrain(recursive_model, tiny_model, text_file, out, dtype="bf16", **OPTIONS)
    assert result.exit_code == 0, result.output
    return numbers(out)


class Killed(BaseException):
    """As kill -9: nothing that would be done afterwards is done."""


@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_killed_run_continues_to_the_same_bits(
    run: Any, tmp_path: Path, monkeypatch: Any, whole: dict[str, Any], step: int
) -> None:
    training_step = UptrainTrainer.training_step

    def killed(self: UptrainTrainer, *arguments: Any, **options: Any) -> torch.Tensor:
        if self.run.progress.step == step:
            raise Killed
        return training_step(self, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(UptrainTrainer, "training_step", killed)
        run(dtype="bf16", save_every=2, **OPTIONS)
    out = tmp_path / "out"
    saved = sorted(path.name for path in out.glob("checkpoint-*"))
    assert saved == (["checkpoint-000002"] if step == 3 else [])
    torch.manual_seed(1234)
    result = resume(out)
    assert result.exit_code == 0, result.output
    assert numbers(out) == whole


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_run_continues_to_the_same_bits(
    run: Any, tmp_path: Path, monkeypatch: Any, whole: dict[str, Any], number: int, code: int
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(patch, 2, number)
        result = run(dtype="bf16", **OPTIONS)
    assert result.exit_code == code, result.output
    last = result.stderr.splitlines()[-1]
    assert f"lowrank-ext recursive uptrain --resume --out {out}" in last
    step = 2 if number == signal.SIGINT else 1  # SIGTERM does not wait for the step
    assert [path.name for path in out.glob("checkpoint-*")] == [f"checkpoint-{step:06d}"]
    result = resume(out)
    assert result.exit_code == 0, result.output
    assert numbers(out) == whole
    assert resume(out).exit_code == 0, "a finished run may be asked for again"
    assert numbers(out) == whole


def test_more_steps_extend_a_run(run: Any, tmp_path: Path) -> None:
    assert run().exit_code == 0
    out = tmp_path / "out"
    check_error(resume(out, steps=STEPS - 1), "--resume: --steps was 4, got 3")
    check_error(resume(out, lr=0.1), "--resume: --lr was 0.002, got 0.1")
    check_error(resume(out, str(tmp_path)), "--resume: DIRECTORY was")
    result = resume(out, steps=STEPS + 1)
    assert result.exit_code == 0, result.output
    assert "5 steps instead of 4" in result.stdout
    assert len(report(out)["losses"]) == STEPS + 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "lk"}, ("--loss must be one of", "did you mean kl")),
        ({"exit_loss": "klr"}, ("--exit-loss must be one of", "did you mean kl")),
        ({"loss": "ce"}, ("--teacher is of no use with --loss ce",)),
        ({"exits": -0.1}, ("--exits must be at least 0",)),
        ({"exits": "nan"}, ("--exits must be at least 0",)),
        ({"exit_warm_up": -1}, ("--exit-warm-up must be at least 0",)),
        ({"exit_warm_up": 3}, ("--exit-warm-up is of no use without --exits",)),
        ({"lr": 0}, ("--lr must be a positive number",)),
        ({"steps": 0}, ("--steps must be at least 1",)),
        ({"seq_len": 1}, ("--seq-len must be at least 2",)),
        ({"seq_len": 65}, ("--seq-len must be at most 64, the model's context",)),
        ({"text": "/no/text"}, ("--text /no/text: no such file",)),
        ({"teacher": "/no/model"}, ("/no/model",)),
    ],
)
def test_one_line_for_what_is_wrong(
    run: Any, tmp_path: Path, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    check_error(run(**options), *words)
    assert not (tmp_path / "out" / "settings.json").exists()


def losses_with(directory: Path, text: Path, out: Path, **options: Any) -> list[float]:
    result = uptrain(directory, options.pop("teacher", None), text, out, steps=1, **options)
    assert result.exit_code == 0, result.output
    found: list[float] = report(out)["losses"]
    return found


def test_the_teacher_is_the_model_that_was_converted(
    tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Named by a relative path; after an uptraining too."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    assert convert(Path("base"), tmp_path / "recursive").exit_code == 0
    monkeypatch.chdir("/")
    found = losses_with(tmp_path / "recursive", text_file, tmp_path / "first")
    wanted = losses_with(tmp_path / "recursive", text_file, tmp_path / "same", teacher=tiny_model)
    assert found == wanted
    assert report(tmp_path / "first")["settings"]["teacher"] == str(base)
    losses_with(tmp_path / "first" / "model", text_file, tmp_path / "second", seed=1)
    assert report(tmp_path / "second")["settings"]["teacher"] == str(base)
    assert resume(tmp_path / "second", teacher=base).exit_code == 0


def test_the_default_model_is_the_teacher_where_it_was_converted(
    recursive_model: Path, tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from lowrank_ext.cli import models

    monkeypatch.setattr(models, "_default_model_directory", lambda: tiny_model)
    assert convert(None, tmp_path / "recursive").exit_code == 0
    found = losses_with(tmp_path / "recursive", text_file, tmp_path / "default")
    assert found == losses_with(recursive_model, text_file, tmp_path / "named")


def test_a_teacher_that_is_not_known(
    recursive_model: Path, tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Said before anything is loaded; none is needed for cross entropy."""
    gone, unknown, damaged = (tmp_path / name for name in ("gone", "unknown", "damaged"))
    base = shutil.copytree(tiny_model, tmp_path / "base")
    assert convert(base, gone).exit_code == 0
    shutil.rmtree(base)
    for directory in (unknown, damaged):
        shutil.copytree(recursive_model, directory)
    (unknown / "source.json").unlink()
    (damaged / "source.json").write_text('{"model": 7}')
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(module, "load_recursive", None)
        for directory, words in (
            (gone, f"was converted from {base}, which is gone; say by --teacher"),
            (unknown, "does not say which model it was converted from; give --teacher"),
            (damaged, "source.json: model must be a name or null, got 7"),
        ):
            check_error(uptrain(directory, None, text_file, out), str(directory), words)
            assert not out.exists()
    losses_with(unknown, text_file, out, loss="ce")
    assert not (out / "model" / "source.json").exists()
    losses_with(unknown, text_file, out, teacher=tiny_model)


def test_a_teacher_that_is_recursive(run: Any, recursive_model: Path) -> None:
    words = f"cannot load {recursive_model}", "it is recursive already"
    check_error(run(teacher=recursive_model), *words)


def test_a_teacher_of_another_vocabulary(run: Any, tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.resize_token_embeddings(300)
    model.save_pretrained(other)
    check_error(run(teacher=other), "must have the model's vocabulary of 257 tokens, got 300")


def test_nothing_to_resume_and_nothing_to_train(tmp_path: Path) -> None:
    check_error(command("uptrain", out=tmp_path), "give the directory that convert has written")
    check_error(resume(tmp_path), "holds no run to continue")
    (tmp_path / "settings.json").write_text('{"steps": 3}')
    check_error(resume(tmp_path), "settings.json is not from recursive uptrain")


def test_damaged_state(run: Any, tmp_path: Path) -> None:
    assert run(save_every=2).exit_code == 0
    out = tmp_path / "out"
    (out / "held_out_before.json").write_text('{"losses": [1.0]}')
    check_error(resume(out), "losses must hold a number for each of the 2 loops")
    (out / "held_out_before.json").unlink()
    check_error(resume(out), "held_out_before.json")
    state = out / "checkpoint-000004" / "progress.json"
    state.write_bytes(state.read_bytes()[:100])
    check_error(resume(out), "cannot read", "progress.json")


def test_a_loss_that_is_not_finite_ends_the_run(run: Any, monkeypatch: Any) -> None:
    uptrain_loss = lr.recursive.uptrain_loss

    def infinite(*arguments: Any, **options: Any) -> Any:
        found = uptrain_loss(*arguments, **options)
        return found._replace(total=found.total * torch.inf)

    monkeypatch.setattr(lr.recursive, "uptrain_loss", infinite)
    check_error(run(), "uptrain: the loss is not finite at step 1")


def test_the_teacher_is_not_loaded_for_cross_entropy(run: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "load_model", None)
    assert run(loss="ce", teacher=None, steps=1).exit_code == 0
