"""Every code block of the README and of the pages: Python is run, commands are parsed."""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
import typer
from page_blocks import LANGUAGES, PAGES, ROOT, Block, blocks_of, page_id, read_blocks

from lowrank_ext.cli.main import app

USAGE_ERROR = typer.BadParameter.__base__  # of every wrong command line; typer exports no name
with_blocks = pytest.mark.parametrize("page", [p for p in PAGES if blocks_of(p)], ids=page_id)


@with_blocks
def test_blocks_are_marked(page: Path) -> None:
    """An indented block or a fence without a language would be run by nobody."""
    for block in blocks_of(page):
        assert block.language in (*LANGUAGES, "table"), f"{page}:{block.line}"
        if block.fragment is not None:
            assert len(block.fragment.split()) > 2, f"{page}:{block.line}: say why it is not run"


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(b.language == "python" for b in blocks_of(p))], ids=page_id
)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page and in one namespace, in an empty folder beside build/."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "build").symlink_to(ROOT / "build")
    namespace = {"__name__": "page"}
    for block in blocks_of(page):
        if block.language == "python" and block.fragment is None:
            code = "\n" * (block.line - 1) + block.code
            exec(compile(code, page, "exec"), namespace)


@with_blocks
def test_figures_stand_in_the_results(page: Path) -> None:
    for block in blocks_of(page):
        if block.source is None:
            continue
        results = (ROOT / block.source).read_text()
        if block.language == "table":
            figures = re.findall(r"\d[\d,]*\.\d+", block.code)
            assert figures and [f for f in figures if f not in results] == []
        else:
            assert block.code in results, f"{page}:{block.line}"


# ---------------------------------------------------------------------------------------- commands


def commands(block: Block) -> list[list[str]]:
    """The commands of a bash block in words, without comments and leading NAME=value."""
    lines = block.code.replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    for words in split:
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
    return [words for words in split if words]


BASH = [
    (page, block)
    for page in PAGES
    for block in blocks_of(page)
    if block.language == "bash" and block.fragment is None
]


@pytest.mark.parametrize(
    ("page", "block"), BASH, ids=lambda value: page_id(value) if isinstance(value, Path) else ""
)
def test_commands_parse(page: Path, block: Block) -> None:
    for words in commands(block):
        check_command(words)


def check_command(words: list[str]) -> None:
    """Raises for a command whose program, script, target or options do not exist."""
    program, *arguments = words
    if program == "lowrank-ext":
        check_cli(arguments)
    elif program == "make":
        check_make(arguments)
    elif program == "python":
        check_script(*arguments)
    elif program == "pip":
        check_pip(arguments)
    else:
        raise ValueError(f"{program}: no check is known, mark the block as a fragment")


def check_cli(arguments: list[str]) -> None:
    """Parses as `lowrank-ext` does, and runs nothing."""
    if arguments in (["--help"], ["--version"]):
        return
    group = typer.main.get_command(app)
    name, command, options = group.resolve_command(typer.Context(group), list(arguments))
    if isinstance(command, typer.core.TyperGroup) and options != ["--help"]:
        name, command, options = command.resolve_command(typer.Context(command), options)
    if options != ["--help"]:
        command.make_context(name, options)


def check_make(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in arguments:
        name, is_setting, _ = word.partition("=")
        pattern = rf"^{name} +\?=" if is_setting else rf"^{name}:.*## "
        assert re.search(pattern, makefile, re.MULTILINE), f"make {word}"


def check_script(script: str, *arguments: str) -> None:
    """A script of ours, whose source or command.py (benchmarks) or typer names each option."""
    source = (ROOT / script).read_text()
    if script.startswith("benchmarks/bench_"):
        source += (ROOT / "benchmarks" / "command.py").read_text()
    for option in (word.partition("=")[0] for word in arguments if word.startswith("--")):
        named = f'"{option}"' in source or re.search(rf"\b{option[2:]}: Annotated\[", source)
        assert named, f"{script} {option}"


def check_pip(arguments: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert arguments[0] == "install"
    for extras in re.findall(r"\[([\w,]+)\]", " ".join(arguments)):
        assert set(extras.split(",")) <= set(project["optional-dependencies"])


@pytest.mark.parametrize(
    "command",
    [
        "lowrank-ext finetune --no-such-option",
        "lowrank-ext finetune --rank many",
        "lowrank-ext no-such-command",
        "make no-such-target",
        "make NO_SUCH_VARIABLE=1",
        "python examples/no_such_script.py",
        "python examples/guard.py --no-such-option",
        "python benchmarks/bench_moe.py --no-such-option",
        "pip install '.[no_such_extra]'",
        "rm -rf .",
    ],
)
def test_wrong_commands_are_seen(command: str) -> None:
    with pytest.raises((AssertionError, ValueError, OSError, USAGE_ERROR)):
        check_command(shlex.split(command))


def test_commands_of_the_demo_parse() -> None:
    said = subprocess.run(
        ["make", "-n", "-o", "build", "demo"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    commands = [shlex.split(line) for line in said.splitlines() if "/lowrank-ext " in line]
    assert [words[1] for words in commands] == ["finetune", "generate"]
    for _, *arguments in commands:
        check_cli(arguments)


def test_blocks_are_found() -> None:
    """Each kind of block and of mark once."""
    found = read_blocks(
        "<!-- hidden python\na = 1\n\nb = 2\n-->\n\n```python\nc = 3\n```\n\n"
        "<!-- fragment: needs a GPU -->\n```bash\nx\n```\n\n    y\n\n"
        "<!-- from: f -->\n| z |\n|---|\n| 1.5 |\n"
    )
    assert found == [
        Block("python", "a = 1\n\nb = 2\n", 2),
        Block("python", "c = 3\n", 8),
        Block("bash", "x\n", 13, fragment="needs a GPU"),
        Block("", "y\n", 16),
        Block("table", "| z |\n|---|\n| 1.5 |", 19, source="f"),
    ]
