"""Options that commands share, and the methods' own, added to a command."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

from lowrank_ext.cli.settings import method_options
from lowrank_ext.recipe import Option

Dtype = Annotated[
    str,
    typer.Option(
        help="auto, bf16, fp32 or fp16; auto is bf16 where the CPU multiplies it in hardware."
    ),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads.", show_default="torch's choice")]

Command = TypeVar("Command", bound=Callable[..., None])


def with_method_options(after: str) -> Callable[[Command], Command]:
    """Replace a command's ``**keywords`` by the options of all methods.

    typer reads a command's options from its signature.

    Args:
        after: the option of the command that precedes them in its help.
    """

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command)
        parameters = []
        for parameter in signature.parameters.values():
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
                parameters.append(parameter)
            if parameter.name == after:
                parameters += [_parameter(option) for option in method_options()]
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return command

    return decorate


def _parameter(option: Option) -> inspect.Parameter:
    shown: Any = option.shown_default or True
    kind: Any = option.type if option.default is not None else option.type | None
    return inspect.Parameter(
        option.name,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=option.default,
        annotation=Annotated[kind, typer.Option(help=option.help, show_default=shown)],
    )
