"""The commands of ``lowrank-ext recursive`` and their options."""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from lowrank_ext.cli.data import absolute
from lowrank_ext.cli.display import make_console
from lowrank_ext.cli.error_lines import errors_as_lines
from lowrank_ext.cli.errors import UserError
from lowrank_ext.cli.options import (
    Batch,
    Data,
    Dtype,
    EvalBatches,
    Field,
    Model,
    Resume,
    SaveEvery,
    SeqLen,
    Steps,
    Targets,
    Threads,
)
from lowrank_ext.cli.recursive.models import RULE_HELP
from lowrank_ext.cli.resumed import check_same_settings, given_names, is_given

app = typer.Typer(
    no_args_is_help=True,
    help="Fold a language model into a block of layers that runs several times (Relaxed Recursive "
    "Transformers), train it, and generate by depth-wise batching.",
)

Directory = Annotated[
    Path, typer.Argument(help="Directory that convert or uptrain has written.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Skipped = Annotated[
    str, typer.Option(help="Keys and values of skipped loops: backfill, copy or share-first.")
]
Exit = Annotated[str | None, typer.Option(help=RULE_HELP, show_default="never")]
MaxRows = Annotated[int, typer.Option(help="Sequences that run at the same time.")]


@app.command()
def convert(
    context: typer.Context,
    loops: Annotated[int, typer.Option(help="How often the block runs; divides the layers.")],
    out: Annotated[Path, typer.Option(help="Directory of the result, tokenizer included.")],
    model: Model = None,
    rank: Annotated[
        int, typer.Option(help="Rank of the adapters of each loop; 0: no adapters.")
    ] = 0,
    init: Annotated[
        str, typer.Option(help="Tied weights: average, stepwise or lower.")
    ] = "average",
    lora_init: Annotated[
        str | None,
        typer.Option(help="Adapters: svd of what tying takes away, or zero.", show_default="svd"),
    ] = None,
    targets: Targets = "all-linear",
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(help="Of adapters that start at zero.")] = 0,
    threads: Threads = None,
) -> None:
    """Fold the layers of a model into loops, with an adapter for each loop and linear.

    Prints what is stored, beside the source model. --out must be new or empty, or hold a converted
    model, which is replaced.
    """
    with errors_as_lines():
        from lowrank_ext.cli.recursive import convert as command

        command.run(command.Options(**context.params), make_console())


@app.command()
def uptrain(
    context: typer.Context,
    directory: Annotated[
        Path | None,
        typer.Argument(help="Directory that convert has written; none with --resume."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Model to learn from: a directory, .gguf file, or id of a cached model.",
            show_default="the model that convert has read",
        ),
    ] = None,
    text: Data = None,
    field: Field = "text",
    steps: Steps = 30,
    batch: Batch = 4,
    seq_len: SeqLen = 256,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-4,
    loss: Annotated[
        str,
        typer.Option(help="Of the last loop: ce, or from the teacher kl, reverse-kl, jsd or tvd."),
    ] = "kl",
    exits: Annotated[
        float, typer.Option(help="Coefficient of the earlier loops' losses; the paper has 0.1.")
    ] = 0.0,
    exit_loss: Annotated[
        str, typer.Option(help="Of the earlier loops, towards the last: one of the same.")
    ] = "kl",
    exit_warm_up: Annotated[int, typer.Option(help="Steps over which that coefficient rises.")] = 0,
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(help="Order of the data.")] = 0,
    threads: Threads = None,
    eval_batches: EvalBatches = 6,
    save_every: SaveEvery = 0,
    out: Annotated[Path, typer.Option(help="Where results go.")] = Path("uptrain-output"),
    resume: Resume = False,
) -> None:
    """Train a converted model: tied weights, adapters, norms, by AdamW with warm-up and cosine.

    Writes model/, report.json, loss.png and uptrain.log to --out. Ctrl-C stops after the current
    step and saves, SIGTERM in the middle of one; --resume continues to the same numbers.
    """
    with errors_as_lines():
        from lowrank_ext.cli.recursive import uptrain as command

        console = make_console()
        if not resume:
            if directory is None:
                raise UserError("give the directory that convert has written, or --resume")
            settings = _settings(context.params)
        else:
            settings = command.stored_settings(out)
            # An argument that is not given is no part of the comparison.
            asked = _settings({**context.params, "directory": directory or settings.directory})
            check_same_settings(
                given_names(context), asked.to_dict(), settings.to_dict(), arguments=["directory"]
            )
            if is_given(context, "steps") and steps > settings.steps:
                settings = command.extended(settings, steps, console)
        settings.check()
        command.run(settings, out, resume, console)


def _settings(options: dict[str, Any]) -> Any:
    """The settings, with absolute paths, so that a run can be resumed from another directory."""
    from lowrank_ext.cli.recursive.settings import UptrainSettings

    teacher = options["teacher"]
    if teacher and os.path.exists(teacher):
        teacher = os.path.realpath(teacher)
    named = {name: value for name, value in options.items() if name not in ("out", "resume")}
    return UptrainSettings(
        **{
            **named,
            "directory": os.path.realpath(options["directory"]),
            "teacher": teacher,
            "text": tuple(absolute(path) for path in options["text"] or ()),
        }
    )


@app.command()
def evaluate(
    context: typer.Context,
    directory: Directory,
    text: Data = None,
    field: Field = "text",
    seq_len: SeqLen = 256,
    batch: Annotated[int, typer.Option(help="Sequences per batch.")] = 4,
    eval_batches: Annotated[int, typer.Option(help="Held-out batches, at most.")] = 6,
    exit: Exit = None,
    calibrate: Annotated[
        str | None,
        typer.Option(help="Find thresholds for this measure, on the text's training part."),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(
            help="Share of exiting tokens that are to agree with full depth.", show_default="0.95"
        ),
    ] = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Measure a converted model on held-out text: loss and agreement of each loop.

    With --exit or --calibrate also what exits cost, for each treatment of the keys and values of
    loops that a token has skipped.
    """
    with errors_as_lines(prints_result=True):
        from lowrank_ext.cli.recursive import evaluate as command

        command.run(command.Options(**context.params), make_console())


@app.command()
def generate(
    context: typer.Context,
    directory: Directory,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt; may be repeated.", show_default=False)
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="A file with one prompt a line.", show_default=False)
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Per prompt, at most.")] = 64,
    policy: Annotated[str, typer.Option(help="static, continuous or depth-wise.")] = "depth-wise",
    exit: Exit = None,
    skipped: Skipped = "backfill",
    draft_tokens: Annotated[
        int, typer.Option(help="Tokens that loop 0 drafts and the others verify; 0: none.")
    ] = 0,
    temperature: Annotated[float, typer.Option(help="0: always the most likely token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="The smallest set of tokens with this probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the first prompt; the next has the next.")] = 0,
    max_rows: MaxRows = 16,
    dtype: Dtype = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Generate text, streamed: prompts in their order, each followed by its continuation.

    --json prints an object per text when it ends, with its tokens and exit loops.
    """
    with errors_as_lines(prints_result=True):
        from lowrank_ext.cli.recursive import generate as command

        command.run(command.Options(**context.params))


@app.command()
def bench(
    context: typer.Context,
    directory: Directory,
    file: Annotated[
        Path | None,
        typer.Option(help="A file with one prompt a line.", show_default="16 beginnings of topics"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Per prompt.")] = 32,
    exit: Annotated[str, typer.Option(help=RULE_HELP)] = "top_probability:0.9",
    skipped: Skipped = "backfill",
    max_rows: MaxRows = 8,
    repeats: Annotated[int, typer.Option(help="Runs of each policy, interleaved.")] = 3,
    dtype: Dtype = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Compare static, continuous and depth-wise batching, the last without and with exits."""
    with errors_as_lines(prints_result=True):
        from lowrank_ext.cli.recursive import bench as command

        command.run(command.Options(**context.params), make_console())
