"""`lowrank-ext recursive evaluate`, `generate` and `bench`."""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

from finetune_runs import check_error
from recursive_runs import command

import lowrank_ext as lr
from lowrank_ext.cli.data.blocks import load_blocks
from lowrank_ext.cli.recursive.bench import default_prompts
from lowrank_ext.cli.recursive.models import load_recursive, parse_rule

PROMPTS = ["5 times 5", "a", "hello there"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n\n")
    return path


@pytest.fixture(scope="module")
def median(recursive_model: Path) -> float:
    """A threshold at which about half of the prompts' tokens exit."""
    loaded = load_recursive(recursive_model, "fp32")
    ids = torch.tensor([loaded.tokenizer("".join(PROMPTS)).input_ids])
    with torch.no_grad():
        logits = lr.recursive.loop_logits(loaded.model, input_ids=ids)[0]
    return float(logits.softmax(-1).max(-1).values.median())


# -------------------------------------------------------------------------------- evaluate


def evaluate(directory: Path, text: Path, *flags: str, **options: Any) -> Any:
    small = {"text": text, "seq_len": 16, "batch": 2, "eval_batches": 2, "dtype": "fp32"}
    return command("evaluate", directory, *flags, **{**small, **options})


def test_evaluation_is_that_of_the_library(
    recursive_model: Path, text_file: Path, median: float
) -> None:
    loaded = load_recursive(recursive_model, "fp32")
    corpus = load_blocks((str(text_file),), "text", loaded.tokenizer, 16)
    rule = lr.recursive.Confidence("top_probability", [median])
    wanted = lr.recursive.evaluate(loaded.model, corpus.held_out_batches(2, 2), rule=rule)
    options = {"exit": f"top_probability:{median!r}"}
    found = json.loads(evaluate(recursive_model, text_file, "--json", **options).stdout)
    expected = json.loads(json.dumps(wanted.to_dict()))
    assert {name: found[name] for name in expected} == expected
    shown = evaluate(recursive_model, text_file, **options)
    assert shown.exit_code == 0, shown.output
    for loss in (*wanted.losses, *(each.loss for each in wanted.outcomes.values())):
        assert f"{loss:.4f}" in shown.stdout


def test_losses_that_are_not_finite(recursive_model: Path, text_file: Path, tmp_path: Path) -> None:
    broken = load_recursive(recursive_model, "fp32")
    broken.model.lm_head.weight.data[0] = 3e38  # finite, but products overflow
    broken.model.save_pretrained(tmp_path / "model")
    broken.tokenizer.save_pretrained(tmp_path / "model")
    found = evaluate(tmp_path / "model", text_file, "--json")
    check_error(found, "the losses cannot be printed")
    check_error(evaluate(tmp_path / "model", text_file, calibrate="margin"), "must be finite")


def test_calibration_gives_a_rule_that_can_be_typed(recursive_model: Path, text_file: Path) -> None:
    options = {"calibrate": "margin", "target": 0.5, "eval_batches": 3}
    found = json.loads(evaluate(recursive_model, text_file, "--json", **options).stdout)
    rule = found["calibration"]["exit"]
    again = evaluate(recursive_model, text_file, "--json", exit=rule, eval_batches=3)
    assert json.loads(again.stdout)["outcomes"] == found["outcomes"]
    loaded = load_recursive(recursive_model, "fp32")
    corpus = load_blocks((str(text_file),), "text", loaded.tokenizer, 16)
    rows = corpus.train[:6].split(2)
    wanted = lr.recursive.calibrate(loaded.model, rows, measure="margin", target=0.5)
    assert parse_rule(rule) == wanted.rule
    shown = evaluate(recursive_model, text_file, **options).stdout
    assert f"calibrated for 50.0% agreement: --exit {rule}" in shown


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"exit": "margin:0.1", "calibrate": "margin"}, ("give --exit", "not both")),
        ({"calibrate": "magin"}, ("--calibrate must be one of", "did you mean margin?")),
        ({"target": 1.1}, ("--target must be between 0 and 1, got 1.1",)),
        ({"seq_len": 65}, ("--seq-len must be at most 64",)),
        (
            {"calibrate": "margin", "eval_batches": 1},
            ("--calibrate needs 4 sequences", "got 2", "raise --batch"),
        ),
        ({"text": "/no/text"}, ("--text /no/text: no such file",)),
    ],
)
def test_wrong_options_of_evaluate(
    recursive_model: Path, text_file: Path, options: Any, words: tuple[str, ...]
) -> None:
    check_error(evaluate(recursive_model, **{"text": text_file, **options}), *words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("top_probabilty:0.9", ("--exit must be one of", "did you mean top_probability?")),
        ("margin", ("--exit margin must have a threshold, margin:0.9",)),
        ("margin:x", ("--exit margin: thresholds must be numbers", "got 'x'")),
        ("margin:nan", ("--exit margin", "thresholds must be finite")),
        ("margin:0.1,0.2", ("a model of 2 loops takes one threshold or 1, got 2",)),
        ("agreement:1", ("--exit agreement takes no value",)),
        ("fixed", ("--exit fixed: give one loop",)),
        ("fixed:2", ("--exit fixed: loop must be from 0 to 1, got 2",)),
    ],
)
def test_wrong_rules(recursive_model: Path, text_file: Path, text: str, words: Any) -> None:
    check_error(evaluate(recursive_model, text_file, exit=text), *words)


def test_rules() -> None:
    assert parse_rule("fixed:0", 2) == lr.recursive.FixedDepth(0)
    assert parse_rule("agreement", 3) == lr.recursive.Agreement()
    assert parse_rule("entropy:1e-3, none", 3) == lr.recursive.Confidence("entropy", (1e-3, None))


# -------------------------------------------------------------------------------- generate


def test_the_output_of_uptrain_names_its_model(recursive_model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model").symlink_to(recursive_model)
    message = f"whose model is {tmp_path / 'out' / 'model'}"
    check_error(generate(tmp_path / "out", prompt="a"), message)


def generate(directory: Path, *flags: str, **options: Any) -> Any:
    return command("generate", directory, *flags, **{"dtype": "fp32", **options})


def by_engine(directory: Path, new: int, **options: Any) -> list[Any]:
    """Results of the prompts, each by an engine of its own."""
    loaded = load_recursive(directory, "fp32")
    sampling = options.pop("sampling", [lr.recursive.Sampling()] * len(PROMPTS))
    found = []
    for prompt, own in zip(PROMPTS, sampling, strict=True):
        engine = lr.recursive.DepthwiseEngine(
            loaded.model, max_rows=1, max_length=64, tokenizer=loaded.tokenizer, **options
        )
        name = engine.add(prompt, max_new_tokens=new, sampling=own)
        found.append(engine.run()[name])
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"policy": "static", "max_rows": 2},
        {"policy": "continuous"},
        {"draft_tokens": 2},
        {"max_rows": 1},
    ],
    ids=str,
)
def test_texts_are_those_of_the_engine(
    recursive_model: Path, prompts: Path, options: dict[str, Any]
) -> None:
    tokenizer = load_recursive(recursive_model, "fp32").tokenizer
    results = by_engine(recursive_model, 7)
    texts = [tokenizer.decode(each.tokens, skip_special_tokens=True) for each in results]
    expected = "\n\n".join(p + text for p, text in zip(PROMPTS, texts, strict=True)) + "\n"
    shown = generate(recursive_model, file=prompts, max_new_tokens=7, **options)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout == expected
    flags = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    assert generate(recursive_model, *flags, max_new_tokens=7, **options).stdout == expected


@pytest.mark.parametrize("skipped", ["backfill", "copy", "share-first"])
def test_exits_and_their_loops(
    recursive_model: Path, prompts: Path, median: float, skipped: str
) -> None:
    rule = lr.recursive.Confidence("top_probability", [median])
    wanted = by_engine(recursive_model, 9, exit_rule=rule, skipped=skipped)
    options = {"exit": f"top_probability:{median!r}", "skipped": skipped, "max_new_tokens": 9}
    shown = generate(recursive_model, "--json", file=prompts, **options)
    records = sorted(map(json.loads, shown.stdout.splitlines()), key=lambda each: each["number"])
    assert [each["prompt"] for each in records] == PROMPTS
    assert [each["exit_loops"] for each in records] == [each.exit_loops for each in wanted]
    assert [each["tokens"] for each in records] == [each.tokens for each in wanted]
    assert {loop for each in wanted for loop in each.exit_loops} == {0, 1}


def test_sampling_depends_on_the_seed_alone(recursive_model: Path, prompts: Path) -> None:
    options = {"temperature": 0.8, "top_p": 0.9, "file": prompts, "max_new_tokens": 8}
    sampling = [
        lr.recursive.Sampling(temperature=0.8, top_p=0.9, seed=5 + n) for n in range(len(PROMPTS))
    ]
    wanted = by_engine(recursive_model, 8, sampling=sampling)
    for max_rows in (1, 3):
        shown = generate(recursive_model, "--json", seed=5, max_rows=max_rows, **options)
        records = sorted(map(json.loads, shown.stdout.splitlines()), key=lambda e: e["number"])
        assert [each["tokens"] for each in records] == [each.tokens for each in wanted]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": None}, ("give --prompt, which may be repeated, or --file",)),
        ({"file": "x"}, ("give --prompt, which may be repeated, or --file",)),
        ({"prompt": None, "file": "/no/file"}, ("--file /no/file: no such file",)),
        ({"prompt": "x" * 60}, ("prompt 1 must have at most 56 tokens", "got 60")),
        ({"prompt": ""}, ("prompt 1 has no tokens",)),
        ({"max_new_tokens": 0}, ("--max-new-tokens must be at least 1",)),
        ({"policy": "deepwise"}, ("--policy must be one of", "did you mean depth-wise?")),
        ({"skipped": "backfil"}, ("--skipped must be one of", "did you mean backfill?")),
        ({"exit": "agreement", "policy": "static"}, ("--exit needs --policy depth-wise",)),
        ({"exit": "agreement", "draft_tokens": 2}, ("no --draft-tokens",)),
        ({"draft_tokens": 2, "temperature": 1}, ("--draft-tokens needs", "--temperature 0")),
        ({"temperature": -1}, ("temperature must be at least 0",)),
        ({"top_p": 1.5}, ("top_p must be at most 1",)),
        ({"max_rows": 0}, ("--max-rows must be at least 1",)),
    ],
)
def test_wrong_options_of_generate(
    recursive_model: Path, options: dict[str, Any], words: tuple[str, ...]
) -> None:
    given = {"prompt": "a", "max_new_tokens": 8, **options}
    check_error(generate(recursive_model, **given), *words)


def test_a_file_without_a_prompt(recursive_model: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n \n")
    check_error(generate(recursive_model, file=tmp_path / "empty"), "the file holds no prompt")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    check_error(generate(recursive_model, file=tmp_path / "bytes"), "cannot read")


def test_ctrl_c_ends_with_one_line(recursive_model: Path, monkeypatch: Any) -> None:
    def stream(self: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(lr.recursive.DepthwiseEngine, "stream", stream)
    result = generate(recursive_model, prompt="a", max_new_tokens=3)
    assert result.exit_code == 130
    assert result.stderr.splitlines() == ["stopped; texts that were finished are above"]


# ----------------------------------------------------------------------------------- bench


def bench(directory: Path, *flags: str, **options: Any) -> Any:
    small = {"max_new_tokens": 5, "repeats": 1, "max_rows": 2, "dtype": "fp32"}
    return command("bench", directory, *flags, **{**small, **options})


def test_four_policies_on_the_same_prompts(
    recursive_model: Path, prompts: Path, median: float
) -> None:
    rule = f"top_probability:{median!r}"
    shown = bench(recursive_model, "--json", file=prompts, exit=rule, repeats=2)
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    rows = {row["policy"]: row for row in found["policies"]}
    assert list(rows) == ["static", "continuous", "depth-wise", "depth-wise + exits"]
    for name, row in rows.items():
        assert row["tokens"] == sum(row["exits"]) == 5 * len(PROMPTS)
        assert len(row["all_tokens_per_second"]) == 2 and min(row["all_tokens_per_second"]) > 0
        assert (row["exits"][0] > 0) == (name == "depth-wise + exits")
    assert rows["static"]["mean_loops"] == 2 > rows["depth-wise + exits"]["mean_loops"]
    assert found["environment"]["torch"] == torch.__version__


def test_the_table_has_a_row_for_each(recursive_model: Path, prompts: Path) -> None:
    shown = bench(recursive_model, file=prompts, exit="fixed:0")
    assert shown.exit_code == 0, shown.output
    assert "[1/1] continuous:" in shown.stdout
    # A prompt's last token runs all loops: of five tokens of a prompt four exit.
    assert "80% 20%" in shown.stdout and shown.stdout.count("0% 100%") == 3


def test_wrong_options_of_bench(recursive_model: Path, prompts: Path) -> None:
    check_error(bench(recursive_model, repeats=0), "--repeats must be at least 1")
    check_error(bench(recursive_model, skipped="x"), "--skipped must be one of")
    check_error(bench(recursive_model, exit="x"), "--exit must be one of")
    check_error(bench(recursive_model, file=prompts, max_new_tokens=64), "at most 0 tokens")


def test_default_prompts_are_short_and_many() -> None:
    found = default_prompts()
    assert len(found) == len(set(found)) == 16
    assert all(len(prompt.split()) == 24 for prompt in found)


def test_a_text_that_failed_is_an_error(
    recursive_model: Path, prompts: Path, monkeypatch: Any
) -> None:
    def fails(self: Any, rows: Any) -> Any:
        raise ValueError("asked too much")

    monkeypatch.setattr(lr.recursive.FixedDepth, "exits", fails)
    result = generate(recursive_model, "--json", file=prompts, exit="fixed:0", max_new_tokens=3)
    assert result.exit_code == 2
    assert "no whole text for prompt 1, 2" in result.stderr
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert all("asked too much" in record["error"] for record in records)
    result = generate(recursive_model, prompt="hi", exit="fixed:0", max_new_tokens=3)
    check_error(result, "asked too much")


@pytest.mark.parametrize("temperature", [1e-38, 1e-7])
def test_a_temperature_that_overflows(recursive_model: Path, temperature: float) -> None:
    words = "--temperature or --top-p", "temperature must be 0 or at least 1e-06"
    check_error(generate(recursive_model, prompt="hi", temperature=temperature), *words)
    words_of_length = "--max-new-tokens must be at most the model's context"
    check_error(generate(recursive_model, prompt="hi", max_new_tokens=1000), words_of_length)


def test_an_option_that_does_nothing_is_refused(recursive_model: Path, text_file: Path) -> None:
    result = evaluate(recursive_model, text_file, target=0.9)
    check_error(result, "--target is of no use without --calibrate")


@pytest.mark.parametrize(
    "words", [["doctor", "--json"], ["recursive", "generate", "x", "--prompt", "a"]]
)
def test_closed_standard_output_is_bad_input(words: list[str]) -> None:
    """As by the shell's >&-; nothing that is printed would go anywhere."""
    main = shlex.join([sys.executable, "-m", "lowrank_ext.cli.main", *words])
    done = subprocess.run(["sh", "-c", f"{main} >&-"], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr == "error: standard output is closed, where the result would go\n"
