"""Options that commands share, and the methods' own, added to a command."""

import copy
import inspect
import typing
from collections.abc import Callable, Collection, Mapping
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
        help="Continue the run in --out with its own settings; more steps extend it.",
    ),
]
DTYPE_HELP = (
    "auto, bf16, fp32 or fp16; auto is bf16 where the hardware multiplies it, else fp32 on the CPU "
    "and fp16 on a GPU."
)
Dtype = Annotated[str, typer.Option(help=DTYPE_HELP)]
Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda or cuda:N; auto is the GPU where there is one.")
]
Threads = Annotated[int | None, typer.Option(help="CPU threads.", show_default="torch's choice")]

# The panels of finetune's help, and what is in them; the methods' own options are in "Methods".
PANELS = {
    "Model": "model revision device dtype quantize attention threads compile "
    "gradient_checkpointing fsdp",
    "Data": "text eval eval_split max_rows field format chat_template train_on packing seq_len "
    "preview",
    "Training": "steps epochs batch accumulate lr warmup schedule min_lr weight_decay clip "
    "optimizer betas eps neftune seed",
    "Adapters": "method compare adapter rank alpha rslora dropout targets exclude layers "
    "modules_to_save adapter_dtype",
    "Methods": "",
    "Evaluation and logs": "eval_batches eval_every early_stop log_to log_every run_name",
    "Output": "out save_every keep resume dry_run config",
}
METHODS_PANEL = "Methods"

Command = TypeVar("Command", bound=Callable[..., None])


def with_method_options(command: Command) -> Command:
    """A command whose ``**keywords`` are replaced by the options of all methods, and whose options
    are sorted into PANELS. typer reads a command's options from its signature."""
    signature = inspect.signature(command)
    named = {
        name: parameter
        for name, parameter in signature.parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    own = {option.name: _parameter(option) for option in method_options()}
    ordered = [named.pop("context")]
    for panel, names in PANELS.items():
        group = own.values() if panel == METHODS_PANEL else [named.pop(n) for n in names.split()]
        ordered += [_in_panel(parameter, panel) for parameter in group]
    ordered += named.values()
    keyword_only = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in ordered]
    command.__signature__ = signature.replace(parameters=keyword_only)  # type: ignore[attr-defined]
    return command


def _in_panel(parameter: inspect.Parameter, panel: str) -> inspect.Parameter:
    kind, option = typing.get_args(parameter.annotation)
    shown = copy.copy(option)  # other commands share it
    shown.rich_help_panel = panel
    return parameter.replace(annotation=Annotated[kind, shown])


def with_options_of(
    other: Callable[..., None],
    *,
    without: Collection[str],
    defaults: Mapping[str, Any],
    shown: Mapping[str, str],
) -> Callable[[Command], Command]:
    """Replace a command's ``**keywords`` by the options of another one that it does not have.

    Args:
        without: names of options that are left out.
        defaults: of options, in place of the other command's.
        shown: in place of the default that its help shows.
    """

    def decorate(command: Command) -> Command:
        signature = inspect.signature(command)
        own = {
            name: parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in signature.parameters.items()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        }
        theirs = inspect.signature(other).parameters.items()
        ordered = [
            own.pop(name) if name in own else _changed(parameter, defaults, shown)
            for name, parameter in theirs
            if name not in without
        ]
        command.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*ordered, *own.values()]
        )
        return command

    return decorate


def _changed(
    parameter: inspect.Parameter, defaults: Mapping[str, Any], shown: Mapping[str, str]
) -> inspect.Parameter:
    if parameter.name in shown:
        kind, option = typing.get_args(parameter.annotation)
        option = copy.copy(option)
        option.show_default = shown[parameter.name]
        parameter = parameter.replace(annotation=Annotated[kind, option])
    return parameter.replace(default=defaults.get(parameter.name, parameter.default))


def _parameter(option: Option) -> inspect.Parameter:
    shown: Any = option.shown_default or True
    kind: Any = option.type if option.default is not None else option.type | None
    return inspect.Parameter(
        option.name,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        default=option.default,
        annotation=Annotated[kind, typer.Option(help=option.help, show_default=shown)],
    )
