"""What the commands print, on streams of any encoding, and how they end."""

import pytest

pytest.importorskip("typer")

from finetune_runs import invoke
from typer.testing import CliRunner

from lowrank_ext.cli import doctor, finetune
from lowrank_ext.cli.errors import UserError, one_line
from lowrank_ext.cli.main import app

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.mark.parametrize(
    ("charset", "name"), [("ascii", "résultats"), ("latin-1", "結果"), ("utf-8", "bad-\udcff")]
)
def test_names_that_cannot_be_printed_end_no_run(run, tmp_path, monkeypatch, charset, name) -> None:
    pytest.importorskip("transformers")
    runner = CliRunner(charset=charset)
    text = tmp_path / f"text-{name}.txt"
    text.write_text("some text " * 100)
    monkeypatch.setattr("finetune_runs.CliRunner", lambda: runner)
    result = run(steps=1, text=text, out=tmp_path / name, compare="frozen,lora")
    assert result.exit_code == 0, result.output
    assert (tmp_path / name / "report.json").is_file()
    shown = name.encode(charset, "backslashreplace")
    assert result.stdout_bytes.count(shown) >= 4, "the text, and what was written"
    assert (
        name.encode("utf-8", "backslashreplace") in (tmp_path / name / "finetune.log").read_bytes()
    )


@pytest.mark.parametrize("arguments", [["--help"], ["finetune", "--help"], ["doctor"]])
def test_help_and_doctor_on_an_ascii_stream(arguments, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "OPS", ("moe_route",))
    result = CliRunner(charset="ascii").invoke(app, arguments)
    assert result.exit_code == 0, result.output


def test_errors_are_one_line_of_limited_length_without_control_characters() -> None:
    error = UserError("\x1b]0;title\x07 \x9b2J two\n\tlines \udcff é " + "x" * 10_000)
    text = one_line(error)
    assert text.startswith("\\x1b]0;title\\x07 \\x9b2J two lines \\udcff é x")
    assert text.isprintable() and len(text) < 1_100
    assert one_line(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("two\nlines"), 2, "error: two lines"),
        (PermissionError(13, "Permission denied", "/a\x1b"), 2, "Permission denied: '/a\\x1b'"),
        (KeyError("optimizer"), 1, "error: unexpected KeyError in "),
        (RecursionError(), 1, "error: unexpected RecursionError"),
        (MemoryError(), 1, "error: unexpected MemoryError"),
    ],
)
@pytest.mark.parametrize("command", ["finetune", "doctor"])
def test_no_error_ends_in_a_traceback(monkeypatch, tmp_path, command, error, code, words) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr({"finetune": finetune, "doctor": doctor}[command], "run", fail)
    result = invoke(command)
    assert result.exit_code == code and isinstance(result.exception, SystemExit)
    assert words in result.stderr and result.stderr.count("\n") == 1
