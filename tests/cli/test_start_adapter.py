"""--adapter: runs that begin with a saved adapter."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

from byte_llama import save_byte_llama
from finetune_runs import CONTEXT, check_error, invoke, report, resume, rows, small_run, stop_at

from lowrank_ext.cli import finetune, models

pytestmark = pytest.mark.usefixtures("quick_runs")


def begin(model: Path, text: Path, adapter: Path, out: Path, *more: str) -> Any:
    """A short run from an adapter; its rank and targets are not given."""
    options = small_run(model=model, text=text, adapter=adapter, out=out, steps=4, rank=None)
    return invoke("finetune", *options, *more)


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({}, None),
        ({"alpha": 12, "targets": "q_proj,up_proj"}, "peft-lora"),
        ({"init": "pissa"}, None),
        ({"dora": None}, None),
        ({"method": "peft-lora", "layers": "0", "targets": "q_proj,up_proj"}, None),
        ({"method": "moe-lora"}, None),
        ({"method": "goat", "balance": 0.01}, None),
        ({"method": "reslora-bs", "pre_num": 2}, None),
    ],
)
def test_a_run_begins_where_another_has_ended(
    run, tiny_model, text_file, tmp_path, options, method
) -> None:
    flags = [f"--{name}" for name, value in options.items() if value is None]
    own = {name: value for name, value in options.items() if value is not None}
    first = run(*flags, out=tmp_path / "first", **own)
    assert first.exit_code == 0, first.output
    before = report(tmp_path / "first")["methods"][0]
    more = [] if method is None else ["--method", method]
    result = begin(tiny_model, text_file, tmp_path / "first", tmp_path / "out", *more)
    assert result.exit_code == 0, result.output
    after = report(tmp_path / "out")["methods"][0]
    expected = method or ("lora" if before["method"] == "peft-lora" else before["method"])
    assert after["method"] == expected
    assert after["held_out_before"] == pytest.approx(before["held_out_after"], rel=1e-5)
    assert after["trainable_at_start"] == before["trainable_at_start"]
    assert after["held_out_after"] < before["held_out_after"]


def test_the_base_is_the_one_that_the_adapter_names(
    run, adapters, tiny_model, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(models, "_default_model_directory", lambda: pytest.fail("another base"))
    base = shutil.copytree(tiny_model, tmp_path / "base")
    assert run(out=tmp_path / "first", model=base, steps=2).exit_code == 0
    for adapter, model in ((tmp_path / "first", base), (adapters / "a", tiny_model)):
        result = run(out=tmp_path / "out", adapter=adapter, model=None, rank=None, steps=2)
        assert result.exit_code == 0, result.output
        assert report(tmp_path / "out")["model"]["name"] == str(model)
    base.rename(tmp_path / "moved")
    result = run(out=tmp_path / "new", adapter=tmp_path / "first", model=None, rank=None)
    check_error(result, "its base model", "base' is not there; give it by --model")
    assert not (tmp_path / "new").exists()


def test_an_adapter_of_another_model_is_said_in_a_line(adapters, text_file, tmp_path) -> None:
    """It has nothing for the last of three layers, which stays as in the base."""
    save_byte_llama(tmp_path / "deep", context=CONTEXT, num_hidden_layers=3)
    given = ("--model", str(tmp_path / "deep"), "--text", str(text_file))
    tuned = begin(tmp_path / "deep", text_file, adapters / "a", tmp_path / "out")
    measured = invoke("evaluate", str(adapters / "a"), *given)
    for result in (tuned, measured):
        assert result.exit_code == 0, result.output
        (line,) = result.stderr.splitlines()
        assert line.startswith("warning: ")
        assert "model.layers.2" in line
        assert "Was it trained on another model?" in line


def test_it_is_resumed_and_repeated_to_the_same_numbers(
    run, tiny_model, text_file, tmp_path, monkeypatch
) -> None:
    first = tmp_path / "first"
    assert run(out=first, dropout=0.2).exit_code == 0
    assert begin(tiny_model, text_file, first, tmp_path / "whole").exit_code == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        assert begin(tiny_model, text_file, first, tmp_path / "out").exit_code == 130
    again = ["--config", str(tmp_path / "whole" / "run.yaml"), "--out", str(tmp_path / "again")]
    assert invoke("finetune", *again).exit_code == 0
    shutil.rmtree(first)
    assert resume(tmp_path / "out").exit_code == 0
    losses = [rows(tmp_path / name)["lora"]["losses"] for name in ("whole", "out", "again")]
    assert losses[0] == losses[1] == losses[2]
    assert "\ndropout: 0.2\n" in (tmp_path / "out" / "run.yaml").read_text()


def test_dropout_may_be_another_one(run, tiny_model, text_file, tmp_path) -> None:
    assert run(out=tmp_path / "first", dropout=0.2).exit_code == 0
    for method in ("lora", "peft-lora"):
        out = tmp_path / method
        more = ("--dropout", "0", "--method", method)
        assert begin(tiny_model, text_file, tmp_path / "first", out, *more).exit_code == 0
        config = json.loads((out / "adapter" / "adapter_config.json").read_text())
        assert config["lora_dropout"] == 0
    ours, pefts = (rows(tmp_path / name)[name]["losses"] for name in ("lora", "peft-lora"))
    assert ours == pytest.approx(pefts, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--rank 8", ["--rank must be 4, which it has, got 8; leave it out"]),
        ("--alpha 3", ["--alpha must be 4, which it has, got 3"]),
        ("--targets q_proj", ["--targets must be down_proj,q_proj", "got q_proj"]),
        ("--rslora", ["--rslora must be False, which it has, got True"]),
        ("--method goat", ["--method must be lora or peft-lora", "got goat"]),
        ("--compare lora,frozen", ["is of one method"]),
    ],
)
def test_options_that_are_not_the_adapters_are_refused(
    adapters, tmp_path, monkeypatch, arguments, words
) -> None:
    monkeypatch.setattr(finetune, "run", lambda *settings, **more: pytest.fail("it would run"))
    given = ["--adapter", str(adapters / "a"), *arguments.split()]
    check_error(invoke("finetune", *given, "--out", str(tmp_path / "out")), "--adapter", *words)
    assert not (tmp_path / "out").exists()


def test_what_is_no_adapter_to_begin_with_is_refused(run, tiny_model, text_file, tmp_path) -> None:
    assert run(out=tmp_path / "lamda", method="lamda", steps=2).exit_code == 0
    result = begin(tiny_model, text_file, tmp_path / "lamda", tmp_path / "out")
    check_error(result, "--adapter", "is of lamda", "cannot begin in its middle")
    check_error(begin(tiny_model, text_file, tiny_model, tmp_path / "out"), "must hold an adapter")
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_dtype_says_so(run, tiny_model, text_file, tmp_path) -> None:
    first = run(out=tmp_path / "first", dtype="bf16", adapter_dtype="bf16")
    assert first.exit_code == 0, first.output
    more = ("--dtype", "bf16")
    result = begin(tiny_model, text_file, tmp_path / "first", tmp_path / "out", *more)
    check_error(result, "is in torch.bfloat16: --adapter-dtype must be the same, got fp32")


def test_dpo_begins_with_an_adapter_and_compares_with_it(run, tiny_model, tmp_path) -> None:
    pytest.importorskip("trl")
    assert run(out=tmp_path / "first").exit_code == 0
    pairs = tmp_path / "pairs.jsonl"
    row = {"prompt": "1+1? ", "chosen": "yes, 2", "rejected": "no: 3"}
    pairs.write_text("".join(json.dumps({**row, "prompt": f"{n}? "}) + "\n" for n in range(40)))
    sizes = small_run(model=tiny_model, text=pairs, rank=None, steps=2, seq_len=32, lr=0.01)
    more = ("--adapter", str(tmp_path / "first"), "--out", str(tmp_path / "out"))
    result = invoke("dpo", *sizes, *more)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["held_out_before"]["margin"] == pytest.approx(0, abs=1e-5)
    assert found["held_out_before"]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert abs(found["held_out_after"]["margin"]) > 1e-4
    assert "with the given adapter" in result.stdout
