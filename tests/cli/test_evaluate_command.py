"""`lowrank-ext evaluate`: losses as computed by hand, and what lm_eval is asked."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

from finetune_runs import check_error, invoke, report, small_run, write_records
from saved_adapters import load_plain
from transformers import AutoTokenizer

import lowrank_ext as lr

TASKS = ["arc_easy", "hellaswag"]


def evaluate(*arguments: Any, dtype: str | None = "fp32") -> Any:
    more = () if dtype is None else ("--dtype", dtype)
    return invoke("evaluate", *map(str, arguments), *more)


def found(result: Any) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@torch.no_grad()
def loss_by_hand(model: Any, ids: list[int], first: int) -> torch.Tensor:
    """Negative log-likelihoods of the tokens from `first` on."""
    logits = model(torch.tensor([ids])).logits[0, :-1].double()
    values = -logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return values[max(first - 1, 0) :]


def by_name(found: dict[str, Any]) -> dict[str, float]:
    return {row["name"]: row["loss"] for row in found["text"]["results"]}


def test_losses_are_those_of_all_counted_tokens(tiny_model, adapters, tmp_path) -> None:
    pairs = [("a b", " c d e"), ("long prompt:", " x"), ("q", " answer")]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    got = found(evaluate(adapters / "a", adapters / "dora", "--text", file, "--json"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    expected = {}
    for name in ("base", "a", "dora"):
        model = load_plain(tiny_model)
        if name != "base":
            model = lr.load_adapter(model, adapters / name, trainable=False)
        values = [
            loss_by_hand(model, [*tokenizer(p + c).input_ids, tokenizer.eos_token_id], len(p))
            for p, c in pairs
        ]
        expected[name] = torch.cat(values).mean().item()
    assert by_name(got) == pytest.approx(expected, rel=1e-5)
    assert got["text"]["targets"] == sum(len(c) + 1 for _, c in pairs)
    for row in got["text"]["results"]:
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
    assert len({round(loss, 3) for loss in expected.values()}) == 3


def test_a_run_is_evaluated_on_its_own_held_out_part(tiny_model, text_file, tmp_path) -> None:
    out = tmp_path / "run"
    arguments = small_run(model=tiny_model, text=text_file, out=out, steps=2, eval_batches=999)
    assert invoke("finetune", *arguments).exit_code == 0
    (row,) = report(out)["methods"]
    losses = by_name(found(evaluate(out, "--json")))
    assert losses["base"] == pytest.approx(row["held_out_before"], rel=1e-5)
    assert losses["run"] == pytest.approx(row["held_out_after"], rel=1e-5)


def test_the_base_has_the_runs_dtype_unless_another_is_given(
    tiny_model, text_file, adapters, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(torch.ops.lowrank_ext, "cpu_features", lambda: "")  # auto is fp32
    outs = {dtype: tmp_path / dtype for dtype in ("bf16", "fp32")}
    for dtype, out in outs.items():
        arguments = small_run(model=tiny_model, text=text_file, out=out, steps=1, dtype=dtype)
        assert invoke("finetune", *arguments).exit_code == 0

    def measured(*paths: Path, dtype: str | None = None) -> tuple[str, float]:
        got = found(evaluate(*paths, "--limit", "2", "--json", dtype=dtype))
        assert (got["model"], got["quantize"]) == (str(tiny_model), None)
        assert got["quantized_parameters"] == 0
        return got["dtype"], by_name(got)["base"]

    for dtype, out in outs.items():
        assert measured(out) == measured(out, dtype=dtype)
        assert measured(out)[0] == dtype
    assert measured(outs["bf16"])[1] != measured(outs["fp32"])[1]
    check_error(
        evaluate(*outs.values(), dtype=None), "must have one dtype", "bf16 (", "give it by --dtype"
    )
    assert measured(*outs.values(), dtype="bf16")[0] == "bf16"
    alone = evaluate(adapters / "a", "--text", text_file, "--limit", "2", dtype=None)
    assert f"base: {tiny_model}, fp32\n" in alone.stdout


def test_runs_are_evaluated_on_the_records_that_both_held_out(tiny_model, tmp_path) -> None:
    file = tmp_path / "records.jsonl"
    rows = [{"text": f"text {n}" * 4, "prompt": f"p{n}", "completion": f" c{n}"} for n in range(40)]
    file.write_text("\n".join(map(json.dumps, rows)))
    shared: dict[str, Any] = {"model": tiny_model, "text": file, "steps": 1, "eval_batches": 999}
    outs = [tmp_path / name for name in ("pairs", "texts", "more")]
    own = [
        {"format": "completion"},
        {"format": "text"},
        {"format": "completion", "eval_split": 0.4},
    ]
    for out, options in zip(outs, own, strict=True):
        arguments = small_run(out=out, batch=1, **shared, **options)
        assert invoke("finetune", *arguments).exit_code == 0
    for out in outs:
        (row,) = report(out)["methods"]
        losses = by_name(found(evaluate(out, "--json")))
        assert losses[out.name] == pytest.approx(row["held_out_after"], rel=1e-5)
    for other in outs[1:]:
        check_error(evaluate(outs[0], other), "the runs of the adapters have different data")


def test_the_table_has_each_variant_and_its_distance_to_the_base(adapters, text_file) -> None:
    plain = evaluate(adapters / "a", "--text", text_file, "--limit", "3")
    assert plain.exit_code == 0, plain.output
    losses = by_name(found(evaluate(adapters / "a", "--text", text_file, "--limit", 3, "--json")))
    (line,) = [each for each in plain.stdout.splitlines() if each.split()[:1] == ["a"]]
    change = f"{losses['a'] - losses['base']:+.4f}"
    assert line.split()[1:] == [f"{losses['a']:.4f}", f"{math.exp(losses['a']):,.3f}", change]


def test_nothing_but_the_text_is_tokenized_and_named(adapters, tmp_path, monkeypatch) -> None:
    from lowrank_ext.cli.data import corpus

    seen: list[str] = []
    render = corpus.render

    def noted(example: Any, *arguments: Any) -> Any:
        seen.append(example.where)
        return render(example, *arguments)

    monkeypatch.setattr(corpus, "render", noted)
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for file in files:
        write_records(file, [{"text": f"{file.name} {n}"} for n in range(3)])
    result = evaluate(adapters / "a", "--text", files[0], "--text", files[1])
    assert result.exit_code == 0, result.output
    assert seen == [f"{file}: line {n}" for file in files for n in (1, 2, 3)]
    lines = [line.strip() for line in result.stdout.splitlines() if " records of " in line]
    assert "pydoc_data" not in result.stdout
    assert [line.split(" of ")[0] for line in lines] == ["3 records"] * 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch", "0"], "--batch must be at least 1"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--few-shots", "2"], "--tasks-from and --few-shots are for --tasks"),
        (["--train-on", "answers"], "--train-on must be one of"),
        (["--text", "none.txt"], "--text none.txt"),
        (["--seq-len", "1"], "--seq-len must be at least 2"),
        (["--seq-len", "65"], "--seq-len must be at most 64"),
    ],
)
def test_wrong_options(tiny_model, text_file, flags, words) -> None:
    text = [] if "--text" in flags else ["--text", text_file]
    check_error(evaluate("--model", tiny_model, *text, *flags), words)


# --------------------------------------------------------------------------------------- lm_eval

FAKE = {
    "__init__.py": """
calls = []
def simple_evaluate(**arguments):
    calls.append(arguments)
    if arguments["limit"] == 13:
        raise ConnectionError("data of arc_easy\\nis not here")
    number = float(len(calls))
    metrics = {"alias": "x", "acc,none": number, "acc_stderr,none": "N/A", "f,strict": 0.5}
    return {"results": {name: metrics for name in arguments["tasks"]}}
""",
    "tasks.py": """
class TaskManager:
    def __init__(self, include_path=None):
        self.include_path = include_path
        self.all_tasks = ["arc_easy", "hellaswag"]
""",
    "models/__init__.py": "",
    "models/huggingface.py": """
class HFLM:
    def __init__(self, pretrained, tokenizer, batch_size):
        self.logits = pretrained(**tokenizer("a text", return_tensors="pt")).logits
        self.batch_size = batch_size
""",
}


@pytest.fixture
def lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package of that name, which notes what it is asked."""
    for name in [each for each in sys.modules if each.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    for name, text in FAKE.items():
        path = tmp_path / "packages" / "lm_eval" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "0")
    import lm_eval

    yield lm_eval
    for name in [each for each in sys.modules if each.split(".")[0] == "lm_eval"]:
        del sys.modules[name]


def test_tasks_are_run_with_each_variant(tiny_model, adapters, tmp_path, lm_eval) -> None:
    (tmp_path / "own").mkdir()
    flags = ["--tasks", ",".join(TASKS), "--tasks-from", tmp_path / "own", "--batch", "2"]
    flags += ["--few-shots", "1", "--limit", "5"]
    got = found(evaluate(adapters / "a", *flags, "--json"))
    assert "text" not in got
    assert got["tasks"] == {
        name: {task: {"acc": number, "f,strict": 0.5} for task in TASKS}
        for name, number in (("base", 1.0), ("a", 2.0))
    }
    ids = AutoTokenizer.from_pretrained(tiny_model)("a text", return_tensors="pt").input_ids
    adapted = lr.load_adapter(load_plain(tiny_model), adapters / "a", trainable=False)
    for call, model in zip(lm_eval.calls, (load_plain(tiny_model), adapted), strict=True):
        assert call["tasks"] == TASKS
        assert (call["num_fewshot"], call["limit"], call["model"].batch_size) == (1, 5, 2)
        assert call["task_manager"].include_path == str(tmp_path / "own")
        torch.testing.assert_close(call["model"].logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    table = evaluate(adapters / "a", *flags)
    assert table.exit_code == 0, table.output
    assert [line.split() for line in table.stdout.splitlines() if "arc_easy" in line] == [
        ["arc_easy", "acc", "3.0000", "4.0000"],
        ["arc_easy", "f,strict", "0.5000", "0.5000"],
    ]


def test_unknown_tasks_and_missing_data_are_said(tiny_model, lm_eval) -> None:
    ask = ("--model", tiny_model, "--tasks")
    check_error(evaluate(*ask, "arc_eazy"), "lm_eval knows no 'arc_eazy' (did you mean arc_easy?)")
    assert lm_eval.calls == []
    check_error(
        evaluate(*ask, "arc_easy", "--limit", "13"), "lm_eval: data of arc_easy is not here"
    )


def test_without_lm_eval_the_way_to_get_it_is_said(tiny_model, monkeypatch) -> None:
    from lowrank_ext.cli import harness

    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    check_error(evaluate("--model", tiny_model, "--tasks", "arc_easy"), "pip install 'lm_eval[hf]'")
