"""docs/coming_from_trainers.md: our options exist and none is left out, TRL's names are TRL's."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from page_blocks import ROOT

from lowrank_ext.cli.main import app
from lowrank_ext.cli.settings import method_options

PAGE = (ROOT / "docs" / "coming_from_trainers.md").read_text()
PROSE = re.sub(r"^```.*?^```", "", PAGE, flags=re.MULTILINE | re.DOTALL)
TOOLS = ["axolotl", "LLaMA-Factory", "torchtune", "TRL", "Unsloth"]


def rows() -> list[list[str]]:
    """The cells of each row of the tables whose first column is ours."""
    found, inside = [], False
    for line in PROSE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line[:1] == "|" else []
        if cells == ["here", *TOOLS]:
            inside = True
        elif not cells:
            inside = False
        elif inside and not cells[0].startswith("---"):
            found.append(cells)
    return found


def spans(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def options_of(*names: str) -> set[str]:
    """The options of a command, as `finetune` or `recursive convert`."""
    command: Any = typer.main.get_command(app)
    for name in names:
        command = command.commands[name]
    return {option for parameter in command.params for option in parameter.opts}


def test_options_named_on_the_page_exist() -> None:
    """Of finetune, as `--rank 16` or `--compile`; of another command behind its name."""
    assert len(rows()) > 40
    for code in spans(PROSE):
        program, *words = code.split()
        if program.startswith("--"):
            assert program in options_of("finetune"), code
        elif program == "lowrank-ext":
            options = [word for word in words if word.startswith("--")]
            assert set(options) <= options_of(*(w for w in words if w not in options)), code


def test_no_option_of_the_command_is_left_out() -> None:
    """But the methods' own, which their pages describe."""
    named = {code.split()[0] for code in spans(PROSE)}
    own = {"--" + option.name.replace("_", "-") for option in method_options()}
    assert options_of("finetune") - own - named == set()


def test_every_row_has_a_cell_for_each_tool() -> None:
    for cells in rows():
        assert len(cells) == 1 + len(TOOLS), cells


def test_names_of_trl_are_in_trl() -> None:
    trl = pytest.importorskip("trl")
    configs = (trl.ScriptArguments, trl.DatasetMixtureConfig, trl.SFTConfig, trl.ModelConfig)
    known = {field.name for config in configs for field in dataclasses.fields(config)}
    for cells in rows():
        for name in spans(cells[1 + TOOLS.index("TRL")]):
            if name == "--config":  # of TRL's parser, not of a dataclass
                assert hasattr(trl, "TrlParser")
            elif name.startswith("trl "):
                script = Path(trl.__file__).with_name("scripts") / f"{name.split()[1]}.py"
                assert script.exists(), name
            else:
                assert name in known, name
