"""The entry point: options of the commands, and errors as one line and an exit code."""

import sys
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from typer.core import TyperGroup
except ImportError:
    raise SystemExit("lowrank-ext needs typer, which it installs: pip install typer") from None

import lowrank_ext as lr
from lowrank_ext.cli.data import FORMATS
from lowrank_ext.cli.display import escape_what_cannot_be_shown, make_console
from lowrank_ext.cli.dpo.app import dpo_command
from lowrank_ext.cli.error_lines import errors_as_lines
from lowrank_ext.cli.errors import UserError
from lowrank_ext.cli.guard_train.app import guard_train_command
from lowrank_ext.cli.optimizers import LOGGERS, SCHEDULES
from lowrank_ext.cli.options import (
    Batch,
    Data,
    Device,
    Dtype,
    EvalBatches,
    Field,
    Model,
    Resume,
    SaveEvery,
    SeqLen,
    Targets,
    Threads,
    with_method_options,
)
from lowrank_ext.cli.outputs_app import Base
from lowrank_ext.cli.outputs_app import app as outputs
from lowrank_ext.cli.processes import check_alone, join, leave
from lowrank_ext.cli.recursive.app import app as recursive
from lowrank_ext.cli.settings import (
    ADAPTER_DEFAULTS,
    DEFAULT_STEPS,
    Settings,
    method_names,
)

GUARD_TRAIN = "guard train"
# Commands that torchrun and accelerate launch may start.
IN_SEVERAL_PROCESSES = ("finetune",)


class Commands(TyperGroup):
    """The commands, on streams that show every character in some way."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        escape_what_cannot_be_shown()
        try:
            return super().main(*arguments, **options)
        except SystemExit as end:
            leave(end.code if isinstance(end.code, int) else bool(end.code))
            raise

    def resolve_command(self, context: Any, arguments: list[str]) -> Any:
        """`guard train` is a command of two words, beside `guard FILE`."""
        if arguments[:2] == GUARD_TRAIN.split():
            arguments = [GUARD_TRAIN, *arguments[2:]]
        return super().resolve_command(context, arguments)


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
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Low-rank adapters on fused ops."""
    command = context.invoked_subcommand
    if command not in IN_SEVERAL_PROCESSES:
        with errors_as_lines():
            check_alone(f"lowrank-ext {command}")


@app.command()
@with_method_options
def finetune(
    context: typer.Context,
    model: Model = None,
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit of a cached model.", show_default="main"),
    ] = None,
    device: Device = "auto",
    quantize: Annotated[
        str | None,
        typer.Option(
            help="Of the base: nf4, int8 or none.", show_default="none, or as in --adapter's run"
        ),
    ] = None,
    attention: Annotated[
        str,
        typer.Option(help="auto, sdpa, eager or flash_attention_2; auto is transformers' choice."),
    ] = "auto",
    chat_template: Annotated[
        str | None,
        typer.Option(
            help="A file with a template (Jinja) of conversations, which the adapter keeps.",
            show_default="the tokenizer's",
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient-checkpointing", help="Keep less for backward, compute it again."),
    ] = False,
    text: Data = None,
    eval: Annotated[
        list[str] | None,
        typer.Option(
            help="Held-out data, of the same kinds; may be repeated.",
            show_default="a tenth of --text",
        ),
    ] = None,
    field: Field = "text",
    format: Annotated[
        str,
        typer.Option(help=f"{', '.join(FORMATS)}; auto: known by the keys of each record."),
    ] = "auto",
    train_on: Annotated[
        str,
        typer.Option(
            help="all, completion or assistant: tokens with a loss; auto: completions of pairs, "
            "the assistant's turns of chats, all of texts."
        ),
    ] = "auto",
    packing: Annotated[
        str, typer.Option(help="auto, on or off: several documents in a sequence.")
    ] = "auto",
    eval_split: Annotated[
        float | None,
        typer.Option(
            help="Part of --text that is held out; 0: none, with --eval.",
            show_default="0.1, unless --text or --eval has more",
        ),
    ] = None,
    max_rows: Annotated[
        int | None,
        typer.Option(help="Records to read of --text, and of --eval.", show_default="all"),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(method_names())}.", show_default="lora")
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(help="Several methods, separated by commas, each from the same start."),
    ] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            help="A saved adapter to begin with, whose options and base hold; one method.",
            show_default="a new one",
        ),
    ] = None,
    rank: Annotated[int, typer.Option(help="Rank of the adapters.")] = ADAPTER_DEFAULTS["rank"],
    alpha: Annotated[
        float | None,
        typer.Option(help="The branch is scaled by alpha / rank.", show_default="rank"),
    ] = None,
    dropout: Annotated[
        float | None,
        typer.Option(help="Dropout before lora_a.", show_default="the method's own"),
    ] = ADAPTER_DEFAULTS["dropout"],
    targets: Targets = ADAPTER_DEFAULTS["targets"],
    exclude: Annotated[
        str | None,
        typer.Option(help="Modules that are not adapted, named as targets.", show_default="none"),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            help="Layers of --targets, which are names then, as in 0,4-7.", show_default="all"
        ),
    ] = None,
    rslora: Annotated[
        bool, typer.Option("--rslora", help="Scale the branch by alpha / sqrt(rank).")
    ] = False,
    modules_to_save: Annotated[
        str | None,
        typer.Option(
            help="Modules that train whole and are saved with the adapters, separated by commas.",
            show_default="none",
        ),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps.", show_default=str(DEFAULT_STEPS))
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(help="Passes over the data, instead of --steps.", show_default="none"),
    ] = None,
    batch: Batch = 4,
    accumulate: Annotated[int, typer.Option(help="Batches per step.")] = 1,
    seq_len: SeqLen = 256,
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate.", show_default="the method's own")
    ] = None,
    warmup: Annotated[
        float,
        typer.Option(help="The learning rate rises: a fraction of the steps, or from 1 steps."),
    ] = 0.1,
    schedule: Annotated[
        str, typer.Option(help=f"The learning rate after that: {', '.join(SCHEDULES)}.")
    ] = "cosine",
    min_lr: Annotated[
        float, typer.Option(help="Where --schedule cosine ends, as a fraction of the peak.")
    ] = 0.0,
    weight_decay: Annotated[float, typer.Option(help="Decoupled weight decay.")] = 0.0,
    clip: Annotated[float, typer.Option(help="Largest norm of the gradient; 0: any.")] = 1.0,
    optimizer: Annotated[
        str,
        typer.Option(help="adamw in fp32, or a name of transformers' such as paged_adamw_8bit."),
    ] = "adamw",
    betas: Annotated[
        str | None,
        typer.Option(
            help="Of Adam and Lion, as 0.9,0.95: how slowly they forget.",
            show_default="the optimizer's own",
        ),
    ] = None,
    eps: Annotated[
        float | None, typer.Option(help="Of Adam.", show_default="the optimizer's own")
    ] = None,
    neftune: Annotated[
        float | None,
        typer.Option(
            help="Noise on the embeddings in training (NEFTune), its alpha, as 5.",
            show_default="none",
        ),
    ] = None,
    dtype: Dtype = "auto",
    adapter_dtype: Annotated[
        str, typer.Option(help="fp32, bf16 or base; PEFT's adapters get the same.")
    ] = ADAPTER_DEFAULTS["adapter_dtype"],
    seed: Annotated[int, typer.Option(help="Initialization, order of the data, dropout.")] = 0,
    threads: Threads = None,
    eval_batches: EvalBatches = 6,
    eval_every: Annotated[
        int | None,
        typer.Option(help="Steps between evaluations.", show_default="four evaluations"),
    ] = None,
    early_stop: Annotated[
        int | None,
        typer.Option(
            help="Stop after that many evaluations without improvement.", show_default="never"
        ),
    ] = None,
    log_to: Annotated[
        str | None,
        typer.Option(
            help=f"Also {', '.join(LOGGERS)}; several are separated by commas.",
            show_default="finetune.log",
        ),
    ] = None,
    log_every: Annotated[
        int, typer.Option(help="Steps between losses to --log-to, which are means of these steps.")
    ] = 1,
    run_name: Annotated[
        str | None, typer.Option(help="In --log-to.", show_default="as --log-to has it")
    ] = None,
    save_every: SaveEvery = 0,
    keep: Annotated[int, typer.Option(help="Checkpoints that stay, the newest.")] = 1,
    compile: Annotated[
        bool, typer.Option("--compile", help="Use torch.compile, also for the frozen model.")
    ] = False,
    fsdp: Annotated[
        bool,
        typer.Option("--fsdp/--no-fsdp", help="Share the model among several processes (FSDP2)."),
    ] = False,
    out: Annotated[Path, typer.Option(help="Where results go.")] = Path("finetune-output"),
    resume: Resume = False,
    preview: Annotated[
        int, typer.Option(help="Examples to print as the model sees them.", min=0)
    ] = 0,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say what would train, and its memory and time; write nothing."
        ),
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            help="A YAML file of options; those of the command line win.", show_default="none"
        ),
    ] = None,
    **options_of_methods: Any,
) -> None:
    """Fine-tune a causal language model and show what was gained.

    Without options: LoRA on SmolLM2-135M and the language topics of Python's manual. Writes
    adapter/ (PEFT's format), report.json, loss.png, run.yaml (these options) and finetune.log to
    --out, and for methods with experts expert_load.png. Ctrl-C stops after the current step and
    saves, SIGTERM in the middle of one; --resume continues to the same numbers. A larger --steps
    or --epochs extends a run: the steps to come get the learning rates of a run of that length.
    """
    with errors_as_lines():
        from lowrank_ext.cli import finetune as command
        from lowrank_ext.cli.run_settings import chosen_settings

        join()
        if dry_run:
            check_alone("--dry-run")
        if dry_run and resume:
            raise UserError("give --dry-run or --resume, not both")
        console = make_console()
        settings = chosen_settings(Settings, context, config, out, resume, console)
        if dry_run:
            command.estimate(settings, out, console, preview)
        else:
            command.run(settings, out, resume, console, preview)


app.command()(dpo_command(finetune))


@app.command()
def guard(
    context: typer.Context,
    file: Annotated[
        str,
        typer.Argument(
            help="A file with one text a line, one of records (JSON lines, JSON, CSV, Parquet), "
            "or - for stdin."
        ),
    ],
    adapter: Annotated[
        Path,
        typer.Option(
            help="Directory of a guard, which guard train or GuardModel.save_pretrained has "
            "written, or --out of guard train."
        ),
    ],
    model: Base = None,
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
    are left out. With --json an object: line, score, verdict, category_scores (the probability of
    each category) and tokens. A line has at most 16 MiB. `lowrank-ext guard train` makes a guard.
    """
    with errors_as_lines(prints_result=True):
        from lowrank_ext.cli import guard as command

        command.run(command.Options(**context.params))


app.command(GUARD_TRAIN)(guard_train_command(finetune))


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show versions, CPU features and CUDA, and check every op against its plain definition."""
    with errors_as_lines(prints_result=True):
        from lowrank_ext.cli import doctor as command

        if not command.run(as_json=json):
            raise typer.Exit(1)


app.add_typer(outputs)
app.add_typer(recursive, name="recursive")


if __name__ == "__main__":
    sys.exit(app())
