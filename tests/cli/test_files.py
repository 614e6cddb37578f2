"""The files that `finetune` writes: whole or not at all, and never through a link."""

import os
import re
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("typer")

from finetune_runs import check_error

from lowrank_ext.cli.errors import UserError
from lowrank_ext.cli.files import new_directory, open_log, replace_directory, write_json

pytestmark = pytest.mark.usefixtures("quick_runs")
ROOT = Path(__file__).parents[2]


def trap(kind: str, path: Path, outside: Path) -> None:
    """Puts something that is not a plain file at `path`."""
    outside.write_text("precious")
    if kind == "symlink":
        path.symlink_to(outside)
    elif kind == "dangling link":
        path.symlink_to(outside.with_name("nowhere"))
    elif kind == "hard link":
        os.link(outside, path)
    else:
        os.mkfifo(path)


KINDS = ["symlink", "dangling link", "hard link", "fifo"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("resumed", [False, True])
def test_log_is_a_file_of_its_own(tmp_path: Path, kind: str, resumed: bool) -> None:
    out, outside = tmp_path / "out", tmp_path / "outside"
    out.mkdir()
    trap(kind, out / "finetune.log", outside)
    if resumed:
        with pytest.raises(UserError, match=r"cannot write .*finetune\.log"):
            open_log(out / "finetune.log", resumed=True)
    else:
        with open_log(out / "finetune.log", resumed=False) as log:
            log.write("a line with é and \udcff\n")
        assert (out / "finetune.log").read_bytes() == "a line with é and \\udcff\n".encode()
        assert (out / "finetune.log").stat().st_nlink == 1
        for again in (False, True):
            with open_log(out / "finetune.log", resumed=again) as log:
                log.write("more\n")
        assert (out / "finetune.log").read_text().endswith("\nmore\nmore\n")
    assert outside.read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["out", "outside"]


@pytest.mark.parametrize("kind", KINDS)
def test_files_replace_what_is_there_and_follow_nothing(tmp_path: Path, kind: str) -> None:
    out, outside = tmp_path / "out", tmp_path / "outside"
    out.mkdir()
    trap(kind, out / "report.json", outside)
    trap(kind, out / "adapter", outside)
    write_json(out / "report.json", [1])
    with new_directory(out / "adapter") as temporary:
        (temporary / "a").write_text("")
    assert (out / "report.json").read_text() == "[\n  1\n]\n"
    assert os.listdir(out / "adapter") == ["a"] and not (out / "adapter").is_symlink()
    assert sorted(os.listdir(out)) == ["adapter", "report.json"]
    assert outside.read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == ["out", "outside"]


def test_link_to_a_directory_is_replaced_and_its_target_kept(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("")
    (tmp_path / "adapter").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "new").mkdir()
    replace_directory(tmp_path / "new", tmp_path / "adapter")
    assert not (tmp_path / "adapter").is_symlink() and os.listdir(tmp_path / "adapter") == []
    assert os.listdir(tmp_path / "elsewhere") == ["precious"]


def test_old_directory_stays_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch) -> None:
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if source == tmp_path / "new":
            raise OSError(5, "Input/output error")
        rename(source, target)

    for name in ("adapter", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        replace_directory(tmp_path / "new", tmp_path / "adapter")
    assert os.listdir(tmp_path / "adapter") == ["adapter"]
    assert sorted(os.listdir(tmp_path)) == ["adapter", "new"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_old_directory_stays_whatever_comes_between_the_renames(
    tmp_path, monkeypatch, error
) -> None:
    """By kind: Ctrl-C is no Exception."""
    target, source = tmp_path / "target", tmp_path / "source"
    for directory in (target, source):
        directory.mkdir()
        (directory / directory.name).touch()
    rename, calls = os.rename, []

    def second_fails(*arguments) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise error
        rename(*arguments)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(BaseException) as raised:
        replace_directory(source, target)
    assert isinstance(raised.value, error if isinstance(error, type) else OSError)
    assert [path.name for path in target.iterdir()] == ["target"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source", "target"]


def test_finetune_leaves_alone_what_its_outputs_link_to(run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("finetune.log", "run.yaml", "result.json", "adapter", "report.json"):
        trap("symlink", out / name, tmp_path / "outside")
    pytest.importorskip("transformers")
    result = run(steps=1)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "outside").read_text() == "precious"
    assert not [path for path in out.iterdir() if path.is_symlink()]
    (out / "finetune.log").unlink()
    (out / "finetune.log").symlink_to(tmp_path / "outside")
    check_error(run("--resume", steps=None), "cannot write", "finetune.log")
    assert (tmp_path / "outside").read_text() == "precious"


def test_messages_and_pages_name_extras_that_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("lowrank_ext/**/*.py")]
    named = {
        extra for page in pages for extra in re.findall(r"lowrank-ext\[(\w+)\]", page.read_text())
    }
    assert named and named <= set(project["optional-dependencies"])
