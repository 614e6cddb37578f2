"""Options given beside --resume, compared with those of the run; options from a file."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import typer

from lowrank_ext.cli.errors import UserError
from lowrank_ext.cli.run_file import read_run_file

# Of these the command line gives one: it wins over either in a file.
_ALTERNATIVES = ({"method", "compare"}, {"steps", "epochs"})
_LENGTHS = {"steps": "epochs", "epochs": "steps"}  # each with the one that may be given instead


def check_same_settings(
    given: Iterable[str],
    asked: Mapping[str, Any],
    stored: Mapping[str, Any],
    arguments: Iterable[str] = (),
) -> None:
    """Raises UserError when an option given with --resume differs from the resumed run's; the one
    of --steps and --epochs that the run has may be larger, and --fsdp may be left out.

    Args:
        given: the names of the options on the command line.
        asked: the values of the command line, by the names of options.
        stored: those of the run.
        arguments: those that are no options.
    """
    for option in given:
        if option in ("out", "resume", "fsdp"):
            continue
        was, now = stored[option], asked[option]
        if option in _LENGTHS and now is not None:
            _check_length(option, now, stored)
        elif was != now:
            flag = option.upper() if option in arguments else "--" + option.replace("_", "-")
            raise UserError(
                f"--resume: {flag} was {_shown(was)}, got {_shown(now)}; leave it out or start anew"
            )


def _check_length(option: str, now: float, stored: Mapping[str, Any]) -> None:
    """A run is extended in the unit that it has."""
    was, other = stored[option], _LENGTHS[option]
    if was is None:
        raise UserError(
            f"--resume: the run has --{other} {_shown(stored[other])}, got --{option} "
            f"{_shown(now)}; give more --{other} to extend it"
        )
    if now < was:
        raise UserError(
            f"--resume: --{option} was {_shown(was)}, got {_shown(now)}; leave it out, or give "
            "more to extend the run"
        )


def given_names(context: typer.Context) -> list[str]:
    """The names of the options and arguments that stand on the command line."""
    return [name for name in context.params if is_given(context, name)]


def is_given(context: typer.Context, option: str) -> bool:
    """Whether the option stands on the command line."""
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def with_config(
    context: typer.Context, path: Path | None, types: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """The options of the command line and, where it does not give them, of a file; and the names of
    those that either gives.

    Args:
        path: of --config.
        types: of the options that a file may hold, see `read_run_file`.
    """
    given = given_names(context)
    if path is None:
        return dict(context.params), given
    if "resume" in given:
        raise UserError(f"--config {path}: --resume has the options of the run; leave one out")
    values = read_run_file(path, "--config", types)
    settled = set(given).union(*(pair for pair in _ALTERNATIVES if pair & set(given)))
    new = {name: value for name, value in values.items() if name not in settled}
    if "compare" in new and "method" in new:
        raise UserError(f"--config {path}: must hold method or compare, got both")
    return {**context.params, **new}, [*given, *new]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
