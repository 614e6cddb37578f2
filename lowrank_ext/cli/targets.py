"""Modules and layers as options name them."""

import re

from lowrank_ext.cli.errors import UserError, as_user_error
from lowrank_ext.recipe import parse_modules

_LAYERS = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?", re.ASCII)


def parse_targets(targets: str, option: str = "--targets") -> str | list[str]:
    """See `parse_modules`. Raises UserError for what is no regular expression."""
    found = parse_modules(targets)
    if isinstance(found, str):
        with as_user_error(f"{option} {targets!r} is not a regular expression", re.error):
            re.compile(found)
    return found


def parse_layers(layers: str | None) -> list[int] | None:
    """The numbers of layers in `0,4-7`, each once; None for None."""
    if layers is None:
        return None
    numbers: set[int] = set()
    for part in layers.split(","):
        match = _LAYERS.fullmatch(part.strip())
        if match is None or int(match[1]) > int(match[2] or match[1]):
            raise UserError(
                f"--layers must be numbers and ranges separated by commas, as in 0,4-7, got "
                f"{layers!r}"
            )
        numbers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return sorted(numbers)
