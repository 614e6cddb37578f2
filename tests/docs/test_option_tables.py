"""docs/reference/finetune.md has the options that the command has."""

from option_tables import PAGE, tables, written

from lowrank_ext.cli.options import PANELS
from lowrank_ext.cli.settings import option_types


def test_the_page_is_that_of_the_command() -> None:
    page = PAGE.read_text()
    assert written(page) == page, "run `python tests/docs/option_tables.py`"


def test_every_option_is_in_a_panel_and_every_stored_one_in_a_table() -> None:
    text = tables()
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == list(PANELS)
    for name in option_types():
        assert f"| `--{name.replace('_', '-')}`" in text, name
