"""The commands that use a fine-tuned adapter, and their options."""

from pathlib import Path
from typing import Annotated

import typer

from lowrank_ext.cli.display import make_console
from lowrank_ext.cli.error_lines import errors_as_lines
from lowrank_ext.cli.options import DTYPE_HELP, Device, Field, Threads

app = typer.Typer()

Adapter = Annotated[
    Path,
    typer.Argument(
        help="Directory of an adapter, or --out of a run that has trained one method.",
        show_default=False,
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        help="The base: a directory, .gguf file, or id of a cached model.",
        show_default="what the adapter's run or files name",
    ),
]
Adapters = Annotated[
    list[Path] | None,
    typer.Argument(
        help="Directories of adapters or runs, named after them; none: the base alone.",
        show_default=False,
    ),
]
Named = Annotated[
    list[str] | None,
    typer.Option("--adapter", help="NAME=DIR, an adapter by name; may be repeated."),
]
_AS_THE_MODEL = "the model's, if it samples, or"
Temperature = Annotated[
    float | None,
    typer.Option(
        help="0: always the most likely token. What a model samples with by default is said by its "
        "generation_config.json.",
        show_default=f"{_AS_THE_MODEL} 0",
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        help="The smallest set of tokens with this probability.", show_default=f"{_AS_THE_MODEL} 1"
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        help="The most likely tokens to choose from; 0: all.", show_default=f"{_AS_THE_MODEL} 0"
    ),
]
MaxNewTokens = Annotated[int, typer.Option(help="Per text, at most.")]
System = Annotated[str | None, typer.Option(help="A system message.", show_default=False)]
Quantize = Annotated[
    str | None,
    typer.Option(help="The base in nf4, int8 or none.", show_default="as in the adapter's run"),
]
RunDtype = Annotated[
    str | None, typer.Option(help=DTYPE_HELP, show_default="as in the adapter's run, or auto")
]
Out = Annotated[Path, typer.Option(help="Directory of the result: new, empty, or an earlier one.")]


@app.command()
def merge(
    context: typer.Context,
    adapter: Adapter,
    out: Out,
    model: Base = None,
    quantize: Quantize = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="Of the weights written: base, bf16, fp32 or fp16; base is the one that the base "
            "is stored in, bf16 for GGUF."
        ),
    ] = "base",
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Merge into a quantized base made dense.")
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help="Of the files with weights.")] = "5GB",
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Merge an adapter into its base and write an ordinary model.

    transformers, servers and converters read the directory without lowrank_ext: weights, config,
    generation config, tokenizer and chat template. Merged in fp32, rounded once.
    """
    with errors_as_lines():
        from lowrank_ext.cli import merge as command

        command.run(command.Options(**context.params), make_console())


@app.command("export-lora")
def export_lora(
    context: typer.Context,
    adapter: Adapter,
    out: Out,
    rank: Annotated[
        int | None,
        typer.Option(
            help="The largest rank; higher ones are cut to their best approximation.",
            show_default="the adapter's own",
        ),
    ] = None,
    model: Base = None,
    device: Device = "cpu",
    threads: Threads = None,
) -> None:
    """Write an adapter as a plain LoRA in PEFT's format, for vLLM and other servers.

    Exact for LoRA, PiSSA (of twice its rank), LaMDA, AFLoRA, Set-and-Sequence and ResLoRA with
    shortcut="block"; for its other shortcuts, with a warning, the estimate that a merge makes.
    """
    with errors_as_lines():
        from lowrank_ext.cli import export as command

        command.run(command.Options(**context.params), make_console())


@app.command()
def generate(
    context: typer.Context,
    adapters: Adapters = None,
    adapter: Named = None,
    model: Base = None,
    quantize: Quantize = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt; may be repeated.", show_default="stdin")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="A file with one prompt a line.", show_default=False)
    ] = None,
    compare_base: Annotated[
        bool, typer.Option("--compare-base", help="The base's text too, before the adapters'.")
    ] = False,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Annotated[int, typer.Option(help="Of the first prompt; the next has the next.")] = 0,
    system: System = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue prompts as they are, without chat template.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print a JSON object per text.")] = False,
    device: Device = "auto",
    dtype: RunDtype = None,
    threads: Threads = None,
) -> None:
    """Generate text from a base and its adapters, streamed.

    A prompt is put into the chat template of the tokenizer, where it has one. Several adapters, and
    the base with --compare-base, answer one after another.
    """
    with errors_as_lines(prints_result=True):
        from lowrank_ext.cli import generate as command

        command.run(command.Options(**context.params))


@app.command()
def chat(
    context: typer.Context,
    adapters: Adapters = None,
    adapter: Named = None,
    model: Base = None,
    quantize: Quantize = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Annotated[int, typer.Option(help="Of the first answer; the next has the next.")] = 0,
    system: System = None,
    device: Device = "auto",
    dtype: RunDtype = None,
    threads: Threads = None,
) -> None:
    """Talk with a base and its adapters, a message a line.

    The first adapter answers; /adapter NAME and /base go on with another, /reset begins anew, /save
    FILE writes the conversation, /quit ends. Ctrl-C ends an answer. Reads a pipe too: then answers
    go to standard output, all else to standard error.
    """
    with errors_as_lines(prints_result=True):
        from lowrank_ext.cli import chat as command
        from lowrank_ext.cli.sampling import AnswerOptions

        command.run(AnswerOptions(**context.params))


@app.command()
def evaluate(
    context: typer.Context,
    adapters: Adapters = None,
    adapter: Named = None,
    model: Base = None,
    quantize: Quantize = None,
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="File, directory or dataset, all of which is evaluated on; may be repeated.",
            show_default="the held-out part of the run's own data",
        ),
    ] = None,
    field: Field = "text",
    train_on: Annotated[
        str,
        typer.Option(help="Which tokens the loss counts: auto, all, completion or assistant."),
    ] = "auto",
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens per row, at most.", show_default="the run's, or 256")
    ] = None,
    batch: Annotated[int, typer.Option(help="Sequences per batch.")] = 4,
    tasks: Annotated[
        str | None,
        typer.Option(help="Tasks of lm_eval, separated by commas.", show_default=False),
    ] = None,
    tasks_from: Annotated[
        Path | None,
        typer.Option(help="Directory with tasks in lm_eval's YAML.", show_default=False),
    ] = None,
    few_shots: Annotated[
        int | None, typer.Option(help="Examples before a task's question.", show_default="its own")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Rows of text, and questions of a task.", show_default="all")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    device: Device = "auto",
    dtype: RunDtype = None,
    threads: Threads = None,
) -> None:
    """Measure a base and its adapters: loss and perplexity on the same text, tasks of lm_eval."""
    with errors_as_lines(prints_result=True):
        from lowrank_ext.cli import evaluate as command

        command.run(command.Options(**context.params))
