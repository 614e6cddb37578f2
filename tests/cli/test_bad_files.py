"""Arguments that name files: whatever is there, a command ends in one line and exit code 2."""

import builtins
import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

from finetune_runs import check_error, invoke, resume, rows, small_run, stop_at

from lowrank_ext.cli import models
from lowrank_ext.cli.data import lines
from lowrank_ext.cli.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_runs")


def deny(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """What the system says of a path of mode 000 and of all below it; root would be let in."""

    def denied(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(target: Any, *arguments: Any, **options: Any) -> Any:
            own = Path(os.fsdecode(target)) if isinstance(target, str | bytes | Path) else Path()
            if (own == path and function is not os.stat) or path in own.parents:
                raise PermissionError(13, "Permission denied", str(target))
            return function(target, *arguments, **options)

        return call

    for owner, name in ((builtins, "open"), (io, "open"), (os, "open"), (os, "scandir")):
        monkeypatch.setattr(owner, name, denied(getattr(owner, name)))
    monkeypatch.setattr(os, "stat", denied(os.stat))


def put(kind: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(path.with_name("nowhere"))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "binary":
        path.write_bytes(bytes(range(256)) * 8)
    elif kind == "denied":
        path.write_text("some text " * 100)
        deny(monkeypatch, path)


KINDS = ["absent", "directory", "fifo", "loop", "dangling", "empty", "binary", "denied"]
NAMES = ["plain", "esc\x1b]0;t\x07", "new\nline", "bad-\udcff", "x" * 300]


def option_of(name: str, path: Path, tmp_path: Path, tiny_model: Path, text_file: Path) -> Any:
    """Runs a command with `path` as one of its files, the others good."""
    out, texts = tmp_path / "good-out", tmp_path / "texts"
    texts.write_text("a text\n")
    good: dict[str, Any] = {"model": tiny_model, "text": text_file, "out": out}
    if name in good:
        return invoke("finetune", *small_run(**{**good, name: path}, steps=1))
    if name == "resume":
        return resume(path)
    head = tmp_path / "guard" / "guard_head.safetensors"
    head.parent.mkdir(exist_ok=True)
    head.touch()
    adapter = path if name == "adapter" else head.parent
    file = path if name == "file" else texts
    return invoke("guard", str(file), "--adapter", str(adapter), "--model", str(tiny_model))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("option", ["model", "text", "out", "resume", "file", "adapter"])
def test_a_file_that_is_not_what_it_must_be(
    option, kind, tmp_path, monkeypatch, tiny_model, text_file
) -> None:
    path = tmp_path / "given"
    if option == "file" and kind == "fifo":
        pytest.skip("guard reads pipes: it would wait for a writer")
    put(kind, path, monkeypatch)
    if option == "out" and kind in ("absent", "directory", "dangling"):
        return  # made, or written to
    if option in ("file", "adapter"):
        monkeypatch.setattr(models, "load_model", lambda *arguments: pytest.fail("was loaded"))
    if (option, kind) == ("file", "empty"):
        return  # no texts, no scores
    result = option_of(option, path, tmp_path, tiny_model, text_file)
    check_error(result, "given")
    if kind == "denied":
        assert "ermission denied" in result.stderr or "not readable" in result.stderr
        assert "no such" not in result.stderr and "found: none" not in result.stderr


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("option", ["model", "text", "resume", "file", "adapter"])
def test_names_that_control_terminals_or_are_too_long(
    option, name, tmp_path, tiny_model, text_file
) -> None:
    result = option_of(option, tmp_path / name, tmp_path, tiny_model, text_file)
    check_error(result)
    assert result.stderr.rstrip("\n").isprintable() and len(result.stderr) < 1_500


def test_a_directory_of_mode_000_is_not_called_empty(
    tmp_path, monkeypatch, tiny_model, text_file
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    deny(monkeypatch, model)
    for option in ("model", "adapter", "resume"):
        result = option_of(option, model, tmp_path, tiny_model, text_file)
        check_error(result, "cannot be read: Permission denied")


# ------------------------------------------------------------------------------- texts of guard


@pytest.mark.parametrize("name", ["texts.txt", "texts.jsonl", "-"])
@pytest.mark.parametrize("end", ["\n", ""])
def test_a_long_line_is_not_read_to_its_end(tmp_path, monkeypatch, tiny_model, name, end) -> None:
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1000)
    (tmp_path / "guard_head.safetensors").touch()
    text = "short\n" * (name != "texts.jsonl") + "x" * 1001 + end
    file = name if name == "-" else str(tmp_path / name)
    (tmp_path / name).write_text(text)
    result = invoke("guard", file, "--adapter", str(tmp_path), input=text)
    check_error(result, f"line {1 + ('short' in text)} must be at most", "MiB")


def test_lines_of_guard_are_read_in_pieces(monkeypatch) -> None:
    sizes: list[int] = []

    class Endless(io.RawIOBase):
        def readline(self, size: int | None = -1) -> bytes:
            sizes.append(size or 0)
            return b"x" * (size or 0)

    with pytest.raises(UserError, match="line 1 must be at most 16 MiB"):
        list(lines.lines_of(Endless(), "stdin"))
    assert sizes == [16 * 2**20 + 1]


DEEP = "[" * 100_000
RECORDS = [
    DEEP,
    '{"text": ' * 50_000,
    '{"text": "\\ud800"}',
    "1" * 5_000,
    '{"\\u001b]0;x\\u0007": 1}',
    "NaN",
    '"',
    "\x00",
    '{"text": 1e999}',
    '{"text": null}',
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: ascii(record[:12]))
def test_json_that_holds_no_text(run, tmp_path, record) -> None:
    (tmp_path / "guard_head.safetensors").touch()
    file = tmp_path / "texts.jsonl"
    file.write_text(record + "\n")
    for result in (run(text=file), invoke("guard", str(file), "--adapter", str(tmp_path))):
        check_error(result, "")
        assert result.stderr.rstrip("\n").isprintable() and len(result.stderr) < 1_500


# ------------------------------------------------------------------------------ a damaged run


@pytest.fixture(scope="module")
def stopped(tiny_model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after its third step."""
    out = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 3)
        arguments = small_run(model=tiny_model, text=text_file, out=out, dtype="bf16")
        assert invoke("finetune", *arguments).exit_code == 130
    return out


@pytest.mark.parametrize("content", ["[]", "{}", "null", DEEP, "{"])
def test_resume_with_a_damaged_result(stopped, tmp_path, content) -> None:
    out = shutil.copytree(stopped, tmp_path / "out")
    (out / "result.json").write_text(content)
    check_error(resume(out), "result.json")


def test_the_run_that_these_tests_damage_can_be_continued(stopped, tmp_path) -> None:
    out = shutil.copytree(stopped, tmp_path / "out")
    assert resume(out).exit_code == 0
    assert len(rows(out)["lora"]["losses"]) == 8
