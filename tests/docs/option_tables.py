"""The tables of docs/reference/finetune.md, made from the command.

`python tests/docs/option_tables.py` writes them.
"""

import re
from typing import Any

import typer
from page_blocks import ROOT

from lowrank_ext.cli.main import app

PAGE = ROOT / "docs" / "reference" / "finetune.md"
_TABLES = re.compile(r"(?<=<!-- made by tests/docs/option_tables.py -->\n).*", re.DOTALL)


def tables() -> str:
    """A heading and a table for each panel of `lowrank-ext finetune --help`."""
    command: Any = typer.main.get_command(app).commands["finetune"]  # type: ignore[attr-defined]
    panels: dict[str, list[str]] = {}
    for option in command.params:
        if option.name != "help":
            panels.setdefault(option.rich_help_panel, []).append(_row(option))
    return "".join(
        f"\n## {panel}\n\n| option | default | what it is |\n|---|---|---|\n" + "".join(rows)
        for panel, rows in panels.items()
    )


def _row(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    default = option.default
    if isinstance(option.show_default, str):
        default = option.show_default
    elif option.is_flag and not option.secondary_opts:
        default = "off"
    elif isinstance(default, bool):
        default = f"`{(option.opts if default else option.secondary_opts)[0]}`"
    else:
        default = "" if default is None else f"`{default}`"
    return f"| {names} | {default} | {option.help} |\n"


def written(page: str) -> str:
    """The page with its tables made anew."""
    return _TABLES.sub(lambda match: tables(), page)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
