"""One reader for all commands: finetune, recursive evaluate and guard read the same files alike."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

from finetune_runs import check_error, invoke, report

from lowrank_ext.cli import guard
from lowrank_ext.cli.data.blocks import load_documents

TEXTS = [f"text {k}\u2028with\u0085all that JSON may hold\fin it " * 4 for k in range(12)]
ROWS = [{"text": text} for text in TEXTS]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()

FILES: dict[str, bytes] = {
    "x.jsonl": LINES,
    "bom.jsonl": b"\xef\xbb\xbf" + LINES,
    "x.JSONL": LINES,
    "x.ndjson": LINES,
    "x.json": json.dumps(ROWS, ensure_ascii=False, indent=1).encode(),
    "x.csv": b"text\n" + b"".join(f'"{text}"\n'.encode() for text in TEXTS),
}


def guard_options(file: Path, tmp_path: Path, **changes: Any) -> guard.Options:
    options: dict[str, Any] = {
        **{"file": str(file), "adapter": tmp_path, "model": None, "jsonl": False, "field": "text"},
        **{"threshold": 0.5, "batch": 8, "max_length": None, "dtype": "auto", "threads": None},
        **{"json": False, **changes},
    }
    return guard.Options(**options)


@pytest.mark.parametrize("name", FILES)
def test_every_command_reads_the_same_texts(tmp_path, name) -> None:
    file = tmp_path / name
    file.write_bytes(FILES[name])
    assert load_documents((str(file),), "text") == TEXTS
    assert [line.text for line in guard.read_lines(guard_options(file, tmp_path))] == TEXTS


def test_guard_reads_lines_where_finetune_reads_documents(tmp_path) -> None:
    file = tmp_path / "x.txt"
    file.write_bytes(b"\xef\xbb\xbfone\n\ntwo\x0cand a half\r\n")
    lines = guard.read_lines(guard_options(file, tmp_path))
    assert lines == [(1, "one"), (3, "two\x0cand a half")]
    assert load_documents((str(file),), "text") == ["one\n\ntwo\x0cand a half\n"]
    file.write_bytes(b'{"text": "a"}\n\n{"prompt": "b", "response": "c"}')
    found = guard.read_lines(guard_options(file, tmp_path, jsonl=True))
    assert [line.number for line in found] == [1, 3] and "c" in found[1].text


@pytest.mark.usefixtures("quick_runs")
def test_finetune_trains_on_the_texts_whatever_holds_them(run, tmp_path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, text in enumerate(TEXTS):
        (folder / f"{number}.txt").write_text(text)
    (tmp_path / "x.json").write_bytes(FILES["x.json"])
    (tmp_path / "x.jsonl").write_bytes(FILES["x.jsonl"])
    found = set()
    for number, source in enumerate((folder, tmp_path / "x.json", tmp_path / "x.jsonl")):
        result = run(text=source, out=tmp_path / f"out{number}", steps=1)
        assert result.exit_code == 0, result.output
        assert f"{source.name}: 12 documents" in result.output.replace("\n", "")
        found.add(json.dumps(report(tmp_path / f"out{number}")["model"]["data"]["parts"]))
    assert len(found) == 1


@pytest.mark.usefixtures("quick_runs")
def test_finetune_trains_on_completions(run, tmp_path) -> None:
    file, out = tmp_path / "x.jsonl", tmp_path / "out"
    rows = [
        {"prompt": f"{k} and {k} is", "completion": f" {2 * k}", "text": f"t{k}"} for k in range(30)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    check_error(run(text=file), "x.jsonl: line 1", "several formats (text, completion)", "--format")
    losses = []
    for options in ({"train_on": "auto"}, {"train_on": "all"}, {"packing": "on"}):
        result = run(text=file, steps=1, format="completion", seq_len=64, **options)
        assert result.exit_code == 0, result.output
        assert "27 completion" in result.output
        losses.append(report(out)["methods"][0]["losses"])
    assert losses[0] != losses[1] and losses[0] != losses[2]
    check_error(run(text=file, format="completion", train_on="assistant"), "has no messages")
    check_error(run(text=file, format="text", train_on="completion"), "plain text")


def test_recursive_evaluate_reads_them_too(tmp_path, recursive_model) -> None:
    (tmp_path / "x.json").write_bytes(FILES["x.json"])
    arguments = ["--seq-len", "16", "--dtype", "fp32", "--eval-batches", "1"]
    command = ["recursive", "evaluate", str(recursive_model), *arguments, "--text"]
    result = invoke(*command, str(tmp_path / "x.json"))
    assert result.exit_code == 0, result.output
    (tmp_path / "x.json").write_text('[{"txt": "a"}]')
    result = invoke(*command, str(tmp_path / "x.json"))
    check_error(
        result, "x.json: line 1", "'txt' (did you mean text?); known are 'text'; see --field"
    )
