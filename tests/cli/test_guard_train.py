"""`lowrank-ext guard train`: what it learns, labels of records, runs that continue."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

from finetune_runs import check_error, flags_of, invoke, report, stop_at, write_records
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank_ext as lr
from lowrank_ext.cli.data import DataOptions
from lowrank_ext.cli.data.records import Record
from lowrank_ext.cli.guard_train import command as command_module
from lowrank_ext.cli.guard_train.labels import load_labelled, to_labelled

STEPS = 8
DRAW = command_module.guard_picture
Row = dict[str, Any]


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than such a run; one test draws."""
    monkeypatch.setattr(command_module, "guard_picture", lambda *arguments: b"")


def rows(count: int, start: int = 0, categories: bool = False) -> list[Row]:
    """Texts that begin with another letter when they are unsafe."""
    found: list[Row] = []
    for n in range(start, start + count):
        unsafe = n % 2 == 1
        text = f"zap {n} now" if unsafe else f"add {n}"
        row: Row = {"text": text, "label": "unsafe" if unsafe else "safe"}
        if categories and unsafe:
            row["categories"] = ["even" if n % 4 == 1 else "odd"]
        found.append(row)
    return found


@pytest.fixture
def train(tiny_model: Path, tmp_path: Path) -> Any:
    """Trains a guard with small sizes; keyword arguments override options, None leaves one out."""
    texts = write_records(tmp_path / "texts.jsonl", rows(40, categories=True))
    held_out = write_records(tmp_path / "held-out.jsonl", rows(11, start=60, categories=True))

    def train(*flags: str, **options: Any) -> Any:
        defaults: dict[str, Any] = {
            "model": tiny_model,
            "text": texts,
            "eval": held_out,
            "out": tmp_path / "out",
            "rank": 4,
            "steps": STEPS,
            "batch": 4,
            "seq_len": 32,
            "dtype": "fp32",
            "lr": 0.01,
            "eval_every": 4,
        }
        return invoke("guard", "train", *flags, *flags_of({**defaults, **options}))

    return train


def resume(out: Path, *flags: str) -> Any:
    return invoke("guard", "train", "--resume", "--out", str(out), *flags)


def numbers(out: Path) -> dict[str, Any]:
    """Everything that must not depend on interruptions: losses, scores, and the guard's bits."""
    found = report(out)
    names = ("adapter_model.safetensors", "guard_head.safetensors")
    weights = [(out / "guard" / name).read_bytes() for name in names]
    return {"weights": weights, "losses": found["losses"], "held_out": found["held_out"]}


def confusion(unsafe: list[bool], called: list[bool]) -> dict[str, float]:
    """Accuracy, precision, recall and F1, counted."""
    pairs = list(zip(unsafe, called, strict=True))
    hits, wrong = pairs.count((True, True)), pairs.count((False, True))
    missed = pairs.count((True, False))
    return {
        "accuracy": sum(real == said for real, said in pairs) / len(pairs),
        "precision": hits / (hits + wrong),
        "recall": hits / (hits + missed),
        "f1": 2 * hits / (2 * hits + wrong + missed),
    }


# ------------------------------------------------------------------------------------- training


def test_a_guard_learns_and_scores_files(
    train: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_module, "guard_picture", DRAW)
    result = train(save_every=3, keep=2)
    assert result.exit_code == 0, result.output
    out, held_out = tmp_path / "out", rows(11, start=60)
    names = {"guard", "report.json", "guard.png", "guard.log", "run.yaml"}
    checkpoints = {"checkpoint-000006", "checkpoint-000008"}
    assert {path.name for path in out.iterdir()} == names | checkpoints
    assert (out / "guard.png").read_bytes().startswith(b"\x89PNG")
    for words in ("even", "AUPRC", "F1", f"step {STEPS}/{STEPS}", "held-out loss"):
        assert words in result.stdout

    scored = invoke(
        *("guard", str(tmp_path / "held-out.jsonl"), "--adapter", str(out / "guard"), "--json"),
        *("--model", str(tiny_model), "--dtype", "fp32"),
    )
    assert scored.exit_code == 0, scored.output
    lines = [json.loads(line) for line in scored.stdout.splitlines()]
    scores = torch.tensor([line["score"] for line in lines])
    unsafe = torch.tensor([row["label"] == "unsafe" for row in held_out])
    assert set(lines[0]["category_scores"]) == {"even", "odd"}

    found, after = report(out), report(out)["held_out_after"]
    assert after["auprc"] == pytest.approx(lr.guard.average_precision(unsafe, scores), abs=1e-6)
    expected = confusion(unsafe.tolist(), [line["verdict"] == "unsafe" for line in lines])
    assert {name: after[name] for name in expected} == pytest.approx(expected)
    assert after["f1"] == 1.0 and found["held_out_before"]["f1"] < 1.0
    assert after["loss"] < found["held_out_before"]["loss"] / 2
    assert [each["step"] for each in found["held_out"]] == [0, 4, 8]


def test_the_loss_is_the_guards_over_all_held_out_texts(
    train: Any, tiny_model: Path, tmp_path: Path
) -> None:
    assert train().exit_code == 0
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = lr.guard.GuardModel.from_pretrained(base, tmp_path / "out" / "guard").eval()

    def labels(found: list[Row]) -> torch.Tensor:
        names = [row.get("categories", []) for row in found]
        return torch.tensor([[kind in own for kind in ("even", "odd")] for own in names])

    criterion = lr.guard.GuardLoss(labels(rows(40, categories=True)))
    held_out = rows(11, start=60, categories=True)
    losses = []
    with torch.no_grad():
        for row in held_out:
            unsafe, categories, _ = model.guard(torch.tensor([tokenizer(row["text"])["input_ids"]]))
            losses.append(criterion(unsafe, categories, labels([row])))
    expected = float(torch.stack(losses).mean())
    assert report(tmp_path / "out")["held_out_after"]["loss"] == pytest.approx(expected, abs=1e-5)


def test_preview_and_dry_run(train: Any, tmp_path: Path) -> None:
    result = train("--dry-run", "--preview", "2")
    assert result.exit_code == 0, result.output
    assert "text 1: 5 tokens, safe: add 0" in result.stdout
    assert "text 2: 9 tokens, even: zap 1 now" in result.stdout
    assert "What would train" in result.stdout
    assert not (tmp_path / "out").exists()


def test_without_categories_there_is_one_of_any_kind(
    train: Any, tiny_model: Path, tmp_path: Path
) -> None:
    plain = write_records(tmp_path / "plain.jsonl", rows(40))
    result = train("--preview", "2", text=plain, eval=None, steps=1)
    assert result.exit_code == 0, result.output
    assert "text 2: 9 tokens, unsafe: zap " in result.stdout
    texts = (str(tmp_path / "plain.jsonl"), "--adapter", str(tmp_path / "out"))
    scored = invoke("guard", *texts, "--json", "--dtype", "fp32")
    assert scored.exit_code == 0, scored.output
    for line in map(json.loads, scored.stdout.splitlines()):
        assert set(line["category_scores"]) == {"any"}


def test_accumulated_batches_are_one(train: Any, tmp_path: Path) -> None:
    assert train(dropout=0).exit_code == 0
    assert train(dropout=0, batch=2, accumulate=2, out=tmp_path / "other").exit_code == 0
    expected, found = report(tmp_path / "out"), report(tmp_path / "other")
    assert found["losses"] == pytest.approx(expected["losses"], abs=1e-5)


@pytest.mark.parametrize("step", [1, 6])
def test_a_stopped_run_continues_to_the_same_bits(
    step: int, train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(out=tmp_path / "whole").exit_code == 0
    with monkeypatch.context() as patch:
        stop_at(patch, step)
        stopped = train()
    assert stopped.exit_code == 130, stopped.output
    assert "lowrank-ext guard train --resume" in stopped.stderr
    resumed = resume(tmp_path / "out")
    assert resumed.exit_code == 0, resumed.output
    assert numbers(tmp_path / "out") == numbers(tmp_path / "whole")


def test_a_run_is_extended_and_repeated_from_its_options(train: Any, tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert train(schedule="constant", warmup=0).exit_code == 0
    assert train(schedule="constant", warmup=0, steps=STEPS + 2, out=whole).exit_code == 0
    assert resume(out, "--steps", str(STEPS + 2)).exit_code == 0
    assert numbers(out)["weights"] == numbers(whole)["weights"]
    again = tmp_path / "again"
    options = ("--config", str(whole / "run.yaml"), "--out", str(again))
    assert invoke("guard", "train", *options).exit_code == 0
    assert numbers(again) == numbers(whole)
    check_error(resume(out, "--batch", "3"), "--batch was 4, got 3")


# --------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("labels", "unsafe", "categories"),
    [
        ({"label": "unsafe"}, True, None),
        ({"label": "Safe"}, False, None),
        ({"label": True}, True, None),
        ({"label": 0}, False, None),
        ({"label": "1"}, True, None),
        ({"unsafe": False}, False, None),
        ({"score": 0.5}, True, None),
        ({"score": "0.49"}, False, None),
        ({"score": 0.9, "label": "unsafe"}, True, None),
        ({"categories": ["a", "b", "a"]}, True, ("a", "b")),
        ({"categories": {"a": False, "b": True}}, True, ("b",)),
        ({"categories": "a, b"}, True, ("a", "b")),
        ({"categories": []}, False, ()),
        ({"categories": None, "label": "safe"}, False, None),
    ],
)
def test_labels(labels: Row, unsafe: bool, categories: tuple[str, ...] | None) -> None:
    found = to_labelled(Record({"text": "t", **labels}, "f", 1), "text")
    assert (found.text, found.unsafe, found.categories) == ("t", unsafe, categories)


def test_prompt_and_response_are_a_conversation() -> None:
    row = {"prompt": "p", "response": "r", "label": "safe"}
    assert to_labelled(Record(row, "f", 1), "text").text == lr.guard.conversation("p", "r")
    alone = {"prompt": "p", "response": None, "label": "safe"}
    assert to_labelled(Record(alone, "f", 1), "text").text == lr.guard.conversation("p")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "t"}, ["line 1 has no label", "'label'"]),
        ({"text": "t", "lable": "safe"}, ["'lable' (did you mean label?)"]),
        ({"text": "t", "label": "unsfae"}, ["label must be unsafe or safe", "did you mean unsafe"]),
        ({"text": "t", "label": 2}, ["label must be unsafe or safe", "got 2"]),
        ({"text": "t", "score": 1.5}, ["score must be a number from 0 to 1, got 1.5"]),
        ({"text": "t", "score": float("nan")}, ["score must be a number from 0 to 1"]),
        ({"text": "t", "label": "safe", "score": 0.9}, ["contradict", "label safe, score unsafe"]),
        ({"text": "t", "label": "safe", "categories": ["a"]}, ["contradict"]),
        ({"text": "t", "categories": [1]}, ["categories must be a list of names"]),
        ({"text": "t", "categories": {"a": "maybe"}}, ["'a' must be true or false"]),
        ({"label": "safe"}, ["neither a text field 'text' nor prompt and response"]),
    ],
)
def test_wrong_records(row: Row, words: list[str], train: Any, tmp_path: Path) -> None:
    check_error(
        train(text=write_records(tmp_path / "wrong.jsonl", [row])), "wrong.jsonl: line 1", *words
    )


def test_unsafe_texts_without_a_category_are_refused_beside_others(
    train: Any, tmp_path: Path
) -> None:
    found = [*rows(4, categories=True), {"text": "t", "label": "unsafe"}]
    check_error(
        train(text=write_records(tmp_path / "mixed.jsonl", found)), "line 5", "of no category"
    )


def test_both_kinds_are_needed(train: Any, tmp_path: Path) -> None:
    safe = write_records(tmp_path / "safe.jsonl", rows(20)[::2])
    check_error(train(text=safe), "the train part has no unsafe text of 10")
    check_error(train(eval=safe), "the held out part has no unsafe text of 10")


def test_what_is_cut_is_said(tmp_path: Path, tiny_model: Path) -> None:
    found = [*rows(4), {"text": "z" * 20, "label": "unsafe"}, {"text": "", "label": "safe"}]
    options = DataOptions(
        text=(str(write_records(tmp_path / "a.jsonl", found)),),
        eval=(str(write_records(tmp_path / "b.jsonl", rows(3))),),
        seq_len=16,
    )
    texts = load_labelled(options, AutoTokenizer.from_pretrained(tiny_model))
    [train, held_out] = texts.report.parts
    assert (train.texts, train.unsafe, train.truncated, train.truncated_tokens) == (5, 3, 1, 4)
    assert train.dropped == {"no token": 1} and held_out.texts == 3
    assert texts.categories == ("any",)
    assert texts.train.labels[:, 0].tolist() == [False, True, False, True, True]


# --------------------------------------------------------------------------------------- command


def test_a_file_called_train_is_scored(tiny_model: Path, tmp_path: Path, train: Any) -> None:
    assert train(steps=1).exit_code == 0
    (tmp_path / "train").write_text("hello\n")
    scored = invoke(
        *("guard", str(tmp_path / "train"), "--adapter", str(tmp_path / "out" / "guard")),
        *("--model", str(tiny_model)),
    )
    assert scored.exit_code == 0 and scored.stdout.startswith("1\t")


def test_the_base_is_the_one_that_was_trained_over(
    tiny_model: Path, tmp_path: Path, train: Any
) -> None:
    """The run names it, and without a run the guard's config."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    assert train(model=base, steps=2).exit_code == 0
    guard = tmp_path / "out" / "guard"
    alone = shutil.copytree(guard, tmp_path / "alone")

    def score(adapter: Path, *flags: str) -> Any:
        texts = str(tmp_path / "held-out.jsonl")
        return invoke("guard", texts, "--adapter", str(adapter), "--dtype", "fp32", *flags)

    expected = score(guard, "--model", str(tiny_model))
    assert expected.exit_code == 0, expected.output
    for adapter in (tmp_path / "out", guard, alone):
        assert score(adapter).stdout == expected.stdout
    base.rename(tmp_path / "moved")
    for adapter in (tmp_path / "out", alone):
        check_error(score(adapter), "its base model", "base' is not there; give it by --model")
    assert score(alone, "--model", str(tmp_path / "moved")).stdout == expected.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"text": None}, ["guard train needs --text"]),
        ({"targets": "nothing"}, ["nothing"]),
        ({"seq_len": 100}, ["--seq-len must be at most 64"]),
        ({"eval_split": 0, "eval": None}, ["--eval-split must be above 0"]),
        ({"rank": 0}, ["--rank must be at least 1, got 0"]),
    ],
)
def test_wrong_options(options: Row, words: list[str], train: Any, tmp_path: Path) -> None:
    check_error(train(**options), *words)
    assert not (tmp_path / "out" / "guard").exists()


def test_changed_labels_are_not_continued(train: Any, tmp_path: Path) -> None:
    assert train(steps=1).exit_code == 0
    changed = rows(40, categories=True)
    changed[1]["categories"] = ["odd"]
    write_records(tmp_path / "texts.jsonl", changed)
    check_error(resume(tmp_path / "out"), "the text or the tokenizer has changed")


def test_nothing_is_written_among_the_weights_of_the_model(
    train: Any, tiny_model: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(tiny_model, tmp_path / "base")
    before = set(base.iterdir())
    check_error(train(model=base, out=base), f"--out {base}: it holds the input {base}")
    assert set(base.iterdir()) == before
