"""The reader of all commands: every file of texts ends in records, or in one line that names file
and place (RF-38)."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from lowrank_ext.cli.data import lines, read_records
from lowrank_ext.cli.data.records import Record, read_source
from lowrank_ext.cli.data.sources import find_sources
from lowrank_ext.cli.errors import UserError

ROWS = [{"text": "one"}, {"text": "two, three"}, {"text": 'a "four"\nfive'}]
BOM = b"\xef\xbb\xbf"


def values(path: Path | str, part: str = "train") -> list[Any]:
    sources = find_sources("--text", (str(path),))[0]
    return [record.value for source in sources for record in read_source(source, part)]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def write_csv(path: Path, rows: list[dict[str, str]], **options: Any) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    return path


WRITERS: dict[str, Callable[[Path, Any], Path]] = {
    "x.jsonl": write_jsonl,
    "x.JSONL": write_jsonl,
    "x.ndjson": write_jsonl,
    "x.json": lambda path, rows: Path(path.write_text(json.dumps(rows)) and path),
    "x.Json": lambda path, rows: Path(path.write_text(json.dumps(rows, indent=2)) and path),
    "lines.json": write_jsonl,
    "x.csv": write_csv,
    "x.tsv": lambda path, rows: write_csv(path, rows, delimiter="\t"),
    "x.parquet": write_parquet,
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("name", WRITERS)
def test_formats_of_files_hold_the_same_rows(tmp_path, name, packed) -> None:
    path = WRITERS[name](tmp_path / name, ROWS)
    if packed:
        path = tmp_path / f"{name}.gz"
        path.write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    assert values(path) == ROWS


# ------------------------------------------------------------------ what JSON and text may hold

GOOD: dict[str, tuple[str, bytes, list[Any]]] = {
    "U+2028 in a string": (
        "x.jsonl",
        '{"text": "a\u2028b"}\n{"text": "c"}\n'.encode(),
        [{"text": "a\u2028b"}, {"text": "c"}],
    ),
    "U+0085 in a string": ("x.jsonl", '{"text": "a\u0085b"}'.encode(), [{"text": "a\u0085b"}]),
    "U+2029 in a list": ("x.json", '[{"text": "a\u2029b"}]'.encode(), [{"text": "a\u2029b"}]),
    "escaped form feed": ("x.jsonl", rb'{"text": "a\fb"}', [{"text": "a\fb"}]),
    "Windows line ends": (
        "x.jsonl",
        b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n',
        [{"text": "a"}, {"text": "b"}],
    ),
    "BOM, JSON lines": ("x.jsonl", BOM + b'{"text": "a"}', [{"text": "a"}]),
    "BOM, JSON": ("x.json", BOM + b'[{"text": "a"}]', [{"text": "a"}]),
    "BOM, text": ("x.txt", BOM + b"a text", ["a text"]),
    "BOM, CSV": ("x.csv", BOM + b"text\na\n", [{"text": "a"}]),
    "text with Windows line ends": ("x.txt", b"a\r\nb\rc\n", ["a\nb\nc\n"]),
    "text with form feeds": ("x.md", "a\fb\u2028c".encode(), ["a\fb\u2028c"]),
    "no suffix": ("LICENSE", b"words", ["words"]),
    "unknown suffix": ("x.rst", b"words", ["words"]),
    "both halves of a pair": ("x.jsonl", rb'{"text": "\ud83d\ude00"}', [{"text": "\U0001f600"}]),
    "one object, indented": ("x.json", b'{\n "text": "a"\n}\n', [{"text": "a"}]),
    "a number of 400 digits": (
        "x.jsonl",
        b'{"text": "a", "n": 1e400}',
        [{"text": "a", "n": float("inf")}],
    ),
    "an empty list": ("dir/x.json", b"[ ]", []),
    "lines in CSV fields": (
        "x.csv",
        b'text,n\n"a\nb",1\n\nc,2\n',
        [{"text": "a\nb", "n": "1"}, {"text": "c", "n": "2"}],
    ),
}


@pytest.mark.parametrize("case", GOOD)
def test_what_is_read(tmp_path, case) -> None:
    name, content, wanted = GOOD[case]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    assert values(path.parent if "/" in name else path) == wanted


DEEP = b"[" * 100_000
BAD: dict[str, tuple[str, bytes, str]] = {
    "half a surrogate pair": (
        "x.jsonl",
        b'{"text": "a"}\n{"text": "\\ud800"}',
        "line 2 .*not JSON of text",
    ),
    "half a pair in a key": ("x.jsonl", b'{"\\uDC00": "a"}', "line 1 .*not JSON of text"),
    "half a pair in a list": (
        "x.json",
        b'[{"text": "a"},\n{"text": "\\udfff"}]',
        "line 2 .*not JSON of text",
    ),
    "deep lists": ("x.jsonl", DEEP, "line 1 .*not JSON of text"),
    "deep lists in a list": ("x.json", b'[{"text": "a"},\n' + DEEP, "line 2 .*not JSON of text"),
    "deep objects": ("x.jsonl", b'{"text":' * 50_000, "line 1 .*not JSON of text"),
    "a number of 5,000 digits": (
        "x.jsonl",
        b'{"n": ' + b"1" * 5_000 + b"}",
        "line 1 .*not JSON of text",
    ),
    "a raw form feed": (
        "x.jsonl",
        b'{"text": "a\fb"}',
        "line 1 .*not JSON of text.*control character",
    ),
    "a key twice": ("x.jsonl", b'{"text": "a", "text": "b"}', "line 1 .*'text' is there twice"),
    "a key twice in a list": (
        "x.json",
        b'[\n\n{"n": {"a": 1, "a": 2}}]',
        "line 3 .*'a' is there twice",
    ),
    "half a line": ("x.jsonl", b'{"text": "a"}\n{"text"', "line 2 .*not JSON of text"),
    "a list without an end": ("x.json", b'[{"text": "a"}', "line 1 .*does not go on or end"),
    "a list that ends in a comma": ("x.json", b'[{"text": "a"},\n', "has no end"),
    "a list with a comma too many": (
        "x.json",
        b'[{"text": "a"},\n]',
        "line 1 .*nothing follows a comma",
    ),
    "a list without a comma": (
        "x.json",
        b'[{"text": "a"}\n{"text": "b"}]',
        "line 1 .*does not go on",
    ),
    "more after a list": ("x.json", b'[{"text": "a"}]\n[1]', "line 1 .*more follows the end"),
    "an open list": ("x.json", b"[", "has no end"),
    "no UTF-8": ("x.jsonl", b'{"text": "\xe9"}', "cannot read"),
    "UTF-16": ("x.txt", "text".encode("utf-16"), "cannot read"),
    "binary": ("x.bin", b"a\x00b", "is no text"),
    "empty text": ("x.txt", b" \n", "the file is empty"),
    "empty JSON lines": ("x.jsonl", b"\n\n", "the file is empty"),
    "CSV of a header alone": ("x.csv", b"text\n", "the file is empty"),
    "CSV with a field too many": ("x.csv", b"text\na\nb,c\n", "line 3 must have 1 fields.*got 2"),
    "CSV with a quote too many": ("x.csv", b'text\n"a" b\n', "line 2 is not CSV"),
    "CSV whose quote does not end": ("x.csv", b'text\n"a\n', "not CSV"),
    "CSV with a column twice": (
        "x.csv",
        b"text,text\na,b\n",
        "line 1: a column's name is there twice",
    ),
    "Parquet that is none": ("x.parquet", b"PAR1 not", "cannot read"),
    "gzip that is none": ("x.txt.gz", b"a text", "cannot read"),
    "half a gzip file": ("x.txt.gz", gzip.compress(b"a text " * 99)[:-9], "cannot read"),
    "an archive": ("x.zip", b"PK", r"\.zip is not read; unpack it"),
    "a packed archive": ("x.tar.gz", b"", r"\.tar is not read; unpack it"),
    "another compression": ("x.jsonl.zst", b"", r"\.zst is not read"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_in_one_line(tmp_path, case) -> None:
    name, content, message = BAD[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        values(tmp_path / name)
    text = str(caught.value)
    assert name in text and "\n" not in text


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_a_line_is_read_up_to_a_limit(tmp_path, monkeypatch, name) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 100)
    content = b'{"text": "a"}\n{"text": "' + b"b" * 100 + b'"}\n'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(UserError, match="line 2 must be at most"):
        values(tmp_path / name)


def test_records_know_their_place(tmp_path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n\n\n{"text": "b"}\n')
    found = list(read_records("--text", (str(path),)))
    assert [record.where for record in found] == [f"{path}: line 1", f"{path}: line 4"]
    path = tmp_path / "x.json"
    path.write_text('[\n{"text": "a"}, {"text": "b"},\n\n{"text":\n"c"}, 4]')
    numbers = [record.number for record in read_records("--text", (str(path),))]
    assert numbers == [2, 2, 4, 5]
    path = tmp_path / "x.csv"
    path.write_text('text\n"a\nb"\nc\n')
    assert [record.number for record in read_records("--text", (str(path),))] == [2, 4]
    assert Record("a", "x.txt", 0).where == "x.txt"


# --------------------------------------------------------------------- directories and datasets


def test_a_directory_is_read_in_the_order_of_its_paths(tmp_path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "c.txt").write_text("third")
    (tmp_path / "b" / "x.jsonl").write_text('{"text": "second"}')
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "empty.txt").write_text("")
    for hidden in (".hidden.txt", ".git/x.txt"):
        (tmp_path / hidden).write_text("hidden")
    assert values(tmp_path) == ["first", {"text": "second"}, "third"]


def test_what_describes_data_is_not_data(tmp_path) -> None:
    (tmp_path / "README.md").write_text("about the data")
    (tmp_path / "guide.md").write_text("a guide")
    assert values(tmp_path) == ["about the data", "a guide"]  # documents, both
    write_jsonl(tmp_path / "x.jsonl", ROWS)
    sources, left_out = find_sources("--text", (str(tmp_path),))
    assert [Path(source.location).name for source in sources] == ["guide.md", "x.jsonl"]
    assert left_out == [str(tmp_path / "README.md")]


def test_a_directory_that_cannot_be_read(tmp_path) -> None:
    (tmp_path / ".hidden").write_text("x")
    with pytest.raises(UserError, match="holds no file"):
        values(tmp_path)
    (tmp_path / "x.pdf").write_bytes(b"%PDF")
    with pytest.raises(UserError, match=r"x\.pdf: \.pdf is not read; convert it to text"):
        values(tmp_path)


@pytest.mark.parametrize("name", ["missing.txt", "missing.jsonl", "no/such/file", "../x", "a b"])
def test_names_that_are_nothing(tmp_path, monkeypatch, name) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such file"):
        values(name)


@pytest.fixture
def splits(tmp_path: Path) -> Any:
    datasets = pytest.importorskip("datasets")
    parts = {"train": ROWS[:2], "validation": ROWS[2:], "extra": ROWS[:1]}
    return datasets.DatasetDict(
        {name: datasets.Dataset.from_list(rows) for name, rows in parts.items()}
    )


def test_a_saved_dataset(tmp_path, splits) -> None:
    splits["train"].save_to_disk(tmp_path / "one")
    assert values(tmp_path / "one") == values(tmp_path / "one", "evaluation") == ROWS[:2]
    splits.save_to_disk(tmp_path / "all")
    assert values(tmp_path / "all") == ROWS[:2]
    assert values(tmp_path / "all", "evaluation") == ROWS[2:]
    [source] = find_sources("--text", (str(tmp_path / "all"),))[0]
    assert [record.where for record in read_source(source)][1] == f"{tmp_path / 'all'}: row 2"
    del splits["train"]
    splits.save_to_disk(tmp_path / "no train")
    with pytest.raises(UserError, match="no split named train; it has: validation, extra"):
        values(tmp_path / "no train")


def test_a_cached_dataset(tmp_path, monkeypatch, splits) -> None:
    import datasets

    # What load_dataset leaves behind for somebody/texts, made from files.
    cache = tmp_path / "cache"
    files = {name: str(tmp_path / f"{name}.jsonl") for name in splits}
    for name, part in splits.items():
        write_jsonl(Path(files[name]), list(part))
    datasets.load_dataset("json", data_files=files, cache_dir=str(cache))
    [made] = (cache / "json").iterdir()
    [version] = made.iterdir()
    [build] = [path for path in version.iterdir() if path.is_dir()]
    target = cache / "somebody___texts" / "default" / "0.0.0"
    target.mkdir(parents=True)
    build = build.rename(target / build.name)
    for path in list(build.glob("json-*.arrow")):
        path.rename(build / path.name.replace("json-", "texts-"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    assert values("somebody/texts") == ROWS[:2]
    assert values("somebody/texts", "evaluation") == ROWS[2:]
    assert values("somebody/texts:extra") == ROWS[:1]
    with pytest.raises(UserError, match=r"no split 'extr' \(did you mean extra\?\)"):
        values("somebody/texts:extr")
    with pytest.raises(UserError, match="no dataset of that name in the local cache"):
        values("somebody/else")


def test_a_library_that_is_missing(tmp_path, monkeypatch) -> None:
    import sys

    write_parquet(tmp_path / "x.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install 'lowrank-ext\[finetune\]'"):
        values(tmp_path / "x.parquet")
