"""The entry point: options of the commands, and errors as one line and an exit code."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from typer.core import TyperGroup
except ImportError:
    raise SystemExit("lowrank-ext needs typer, which it installs: pip install typer") from None

import lowrank_ext as lr
from lowrank_ext.cli.display import escape_what_cannot_be_shown, make_console
from lowrank_ext.cli.error_lines import errors_as_lines
from lowrank_ext.cli.options import (
    Batch,
    Dtype,
    EvalBatches,
    Field,
    Model,
    Resume,
    SaveEvery,
    SeqLen,
    Steps,
    Targets,
    Text,
    Threads,
    with_method_options,
)
from lowrank_ext.cli.recursive.app import app as recursive
from lowrank_ext.cli.resumed import check_same_settings, is_given
from lowrank_ext.cli.settings import Settings, method_names, method_options, parse_methods


class Commands(TyperGroup):
    """The commands, on streams that show every character in some way."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        escape_what_cannot_be_shown()
        return super().main(*arguments, **options)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fine-tune language models through fused low-rank adapters, make and run recursive "
    "models, screen texts with a guard, and check the installation.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lowrank-ext {lr.__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Low-rank adapters on fused ops."""


@app.command()
@with_method_options(after="lr")
def finetune(
    context: typer.Context,
    model: Model = None,
    text: Text = None,
    field: Field = "text",
    method: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(method_names())}.", show_default="lora")
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(help="Several methods, separated by commas, each from the same start."),
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = 16,
    alpha: Annotated[
        float | None,
        typer.Option(help="The branch is scaled by alpha / rank.", show_default="rank"),
    ] = None,
    dropout: Annotated[float, typer.Option(help="Dropout before lora_a.")] = 0.05,
    targets: Targets = "all-linear",
    steps: Steps = 30,
    batch: Batch = 4,
    seq_len: SeqLen = 256,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate.", show_default="the method's own")
    ] = None,
    dtype: Dtype = "auto",
    adapter_dtype: Annotated[
        str, typer.Option(help="fp32, bf16 or base; PEFT's adapters get the same.")
    ] = "fp32",
    seed: Annotated[int, typer.Option(help="Initialization, order of the data, dropout.")] = 0,
    threads: Threads = None,
    eval_batches: EvalBatches = 6,
    save_every: SaveEvery = 0,
    compile: Annotated[
        bool, typer.Option("--compile", help="Use torch.compile, also for the frozen model.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Where results go.")] = Path("finetune-output"),
    resume: Resume = False,
    **options_of_methods: Any,
) -> None:
    """Fine-tune a causal language model and show what was gained.

    Without options: LoRA on SmolLM2-135M and the language topics of Python's manual. Writes
    adapter/ (PEFT's format), report.json, loss.png and finetune.log to --out, and for methods with
    experts expert_load.png. Ctrl-C stops after the current step and saves, SIGTERM in the middle
    of one; --resume continues to the same numbers. A larger --steps extends a run: the steps to
    come get the learning rates of a run of that length.
    """
    with errors_as_lines():
        from lowrank_ext.cli import finetune as command

        settings, console = _settings(context.params), make_console()
        if resume:
            stored = command.stored_settings(out)
            check_same_settings(
                context, settings.to_dict(), stored.to_dict(), method="methods", compare="methods"
            )
            more = is_given(context, "steps") and settings.steps > stored.steps
            settings = command.extended(stored, settings.steps, out, console) if more else stored
        settings.check()
        command.run(settings, out, resume, console)


def _settings(options: dict[str, Any]) -> Settings:
    """The settings, with absolute paths, so that a run can be resumed from another directory."""
    methods, is_comparison = parse_methods(options["method"], options["compare"])
    model = options["model"]
    derived: dict[str, Any] = {
        "methods": methods,
        "compare": is_comparison,
        "text": tuple(os.path.realpath(path) for path in options["text"] or ()),
        "model": os.path.realpath(model) if model and os.path.exists(model) else model,
    }
    own = {option.name: options[option.name] for option in method_options()}
    plain = {field.name for field in dataclasses.fields(Settings)} - {*derived, "options"}
    return Settings(**derived, **{name: options[name] for name in plain}, options=own)


@app.command()
def guard(
    context: typer.Context,
    file: Annotated[
        str, typer.Argument(help="A file with one text a line, a .jsonl file, or - for stdin.")
    ],
    adapter: Annotated[
        Path, typer.Option(help="Directory that GuardModel.save_pretrained has written.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="The base: a directory, .gguf file, or id of a cached model.",
            show_default="SmolLM2-135M",
        ),
    ] = None,
    jsonl: Annotated[
        bool, typer.Option("--jsonl", help="Lines are JSON objects, as in a .jsonl file.")
    ] = False,
    field: Annotated[
        str,
        typer.Option(help="The field of JSON lines with the text; else prompt and response."),
    ] = "text",
    threshold: Annotated[
        float, typer.Option(help="Texts with this score or more are called unsafe.")
    ] = 0.5,
    batch: Annotated[int, typer.Option(help="Texts per batch.")] = 8,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens read at a time; longer texts are read in overlapping windows.",
            show_default="the context, at most 512",
        ),
    ] = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON object per text.")] = False,
) -> None:
    """Score texts with a guard: the probability that each is unsafe.

    Prints line number, score and verdict, separated by tabs, in the order of the input; empty lines
    are left out. A line has at most 16 MiB. examples/guard.py trains a guard.
    """
    with errors_as_lines(prints_result=True):
        from lowrank_ext.cli import guard as command

        command.run(command.Options(**context.params))


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show versions, CPU features and CUDA, and check every op against its plain definition."""
    with errors_as_lines(prints_result=True):
        from lowrank_ext.cli import doctor as command

        if not command.run(as_json=json):
            raise typer.Exit(1)


app.add_typer(recursive, name="recursive")


if __name__ == "__main__":
    sys.exit(app())
