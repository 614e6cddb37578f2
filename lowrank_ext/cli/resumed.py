"""Options given beside --resume, compared with those of the run."""

from typing import Any

import typer

from lowrank_ext.cli.errors import UserError


def check_same_settings(
    context: typer.Context, asked: dict[str, Any], stored: dict[str, Any], **names: str
) -> None:
    """Raises UserError when an option given with --resume differs from the resumed run's; --steps
    may be larger.

    Args:
        asked: the settings of the command line.
        stored: those of the run.
        names: of the settings whose option has another name.
    """
    arguments = {p.name for p in context.command.params if p.param_type_name == "argument"}
    for option in context.params:
        if option in ("out", "resume") or not is_given(context, option):
            continue
        name = names.get(option, option)
        was, now = stored[name], asked[name]
        extends = name == "steps" and was is not None and now is not None and now > was
        if was != now and not extends:
            flag = option.upper() if option in arguments else "--" + option.replace("_", "-")
            raise UserError(
                f"--resume: {flag} was {_shown(was)}, got {_shown(now)}; leave it out or start anew"
            )


def is_given(context: typer.Context, option: str) -> bool:
    """Whether the option stands on the command line."""
    source = context.get_parameter_source(option)
    return source is not None and source.name == "COMMANDLINE"


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
