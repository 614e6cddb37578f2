"""Options that commands share, and the methods' own, added to a command."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import typer

from lowrank_ext.cli.settings import method_options
from lowrank_ext.recipe import Option

Model = Annotated[
    str | None,
    typer.Option(
        help="Directory, .gguf file, or id of a cached model.", show_default="SmolLM2-135M"
    ),
]
Field = Annotated[str, typer.Option(help="The key of plain text in records.")]
Targets = Annotated[
    str,
    typer.Option(help="all-linear, module names separated by commas, or a regular expression."),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        help="A file, a directory of files or of a dataset, or the id of a cached dataset; may be "
        "repeated.",
        show_default="Python's language topics",
    ),
]
Steps = Annotated[int, typer.Option(help="Optimizer steps.")]
Batch = Annotated[int, typer.Option(help="Sequences per step.")]
SeqLen = Annotated[int, typer.Option(help="Tokens per sequence.")]
EvalBatches = Annotated[int, typer.Option(help="Held-out batches per evaluation, at most.")]
SaveEvery = Annotated[int, typer.Option(help="Steps between checkpoints; 0: only when stopped.")]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Continue the run in --out with its own settings; a larger --steps extends it.",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto, bf16, fp32 or fp16; auto is bf16 where the hardware multiplies it, else fp32 "
        "on the CPU and fp16 on a GPU."
    ),
]
Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda or cuda:N; auto is the GPU where there is one.")
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
