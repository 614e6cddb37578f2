"""ResLoRA beside LoRA on SmolLM2-135M: loss at equal steps, and what merging costs.

LoRA and ResLoRA's three shortcuts are trained on Python's own manual from the same start, with the
same numbers of parameters. Afterwards each is merged; for shortcuts that a merged weight can only
estimate, the table shows the effect on the held-out loss. Writes reslora.png.

    python examples/reslora.py --out build/examples
"""

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, get_cosine_schedule_with_warmup

import lowrank_ext as lr
from lowrank_ext.cli.data.blocks import TokenBlocks, load_blocks, load_documents, text_batch
from lowrank_ext.cli.files import prepare_output, write_bytes
from lowrank_ext.cli.models import find_model, load_model, resolve_dtype
from lowrank_ext.cli.report import smoothed
from lowrank_ext.cli.training.evaluation import held_out_loss, model_loss

BATCH, RANK, PEAK_LR = 2, 16, 3e-3
NUM_EVALUATIONS, NUM_HELD_OUT = 2, 3
METHODS: dict[str, lr.LoRAConfig | lr.ResLoRAConfig] = {
    "LoRA": lr.LoRAConfig(r=RANK),
    "input": lr.ResLoRAConfig(r=RANK, shortcut="input", merge="input"),
    "block": lr.ResLoRAConfig(r=RANK, shortcut="block"),
    "middle": lr.ResLoRAConfig(r=RANK, shortcut="middle", merge="input"),
}
console = Console()


@dataclass
class Run:
    """Measurements of one method."""

    name: str
    trainable: int
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    merged: float = 0.0
    output_error: float | None = None


def real_model() -> tuple[nn.Module, TokenBlocks]:
    """SmolLM2-135M and Python's language topics."""
    loaded = load_model(find_model(None), resolve_dtype("auto"))
    return loaded.model, load_blocks((), "text", loaded.tokenizer, seq_len=64)


def tiny_model() -> tuple[nn.Module, TokenBlocks]:
    """A small random Llama on bytes, which only shows that everything runs."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    text = " ".join(load_documents((), "text")).encode()[: 32 * 200]
    rows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().view(-1, 32)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes, **heads)).train()
    return model, TokenBlocks(train=rows[:180], held_out=rows[180:], description="bytes")


def train(name: str, model: nn.Module, corpus: TokenBlocks, steps: int) -> Run:
    """A plain training loop."""
    run = Run(name, lr.trainable_parameters(model).trainable)
    held_out = [text_batch(t) for t in corpus.held_out_batches(BATCH, most=NUM_HELD_OUT)]
    run.held_out.append((0, held_out_loss(model, held_out)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=PEAK_LR, weight_decay=0.0)
    rates = get_cosine_schedule_with_warmup(optimizer, round(0.1 * steps), steps)
    for step in track(range(steps), description=f"{name:<7}", console=console):
        loss = model_loss(model, text_batch(corpus.train_batch(step, BATCH, seed=0)))
        loss.backward()
        run.losses.append(loss.item())
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        if (step + 1) % max(1, steps // NUM_EVALUATIONS) == 0:
            run.held_out.append((step + 1, held_out_loss(model, held_out)))
    return run


def merge(run: Run, model: nn.Module, corpus: TokenBlocks) -> None:
    """Held-out loss with merged weights; for ResLoRA the relative error of the logits too."""
    held_out = [text_batch(t) for t in corpus.held_out_batches(BATCH, most=NUM_HELD_OUT)]
    model.eval()
    if isinstance(model.lowrank_config, lr.ResLoRAConfig):
        with lr.reslora_statistics(model), torch.no_grad():
            for batch in corpus.train[: 4 * BATCH].split(BATCH):
                model(input_ids=batch, use_cache=False)
        first = held_out[0]["input_ids"]
        run.output_error = lr.reslora_merge_error(model, lambda: logits(model, first)).output
    lr.merge(model)
    run.merged = held_out_loss(model, held_out)
    lr.unmerge(model)


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    values: Tensor = model(input_ids=tokens, use_cache=False).logits
    return values


def table(runs: list[Run], steps: int) -> Table:
    shown = Table("method", title=f"rank {RANK}, {steps} steps", show_edge=False)
    for heading in ("trainable", "held-out loss", "merged", "error of merged logits"):
        shown.add_column(heading, justify="right")
    for run in runs:
        error = "-" if run.output_error is None else f"{run.output_error:.4f}"
        before, after = run.held_out[0][1], run.held_out[-1][1]
        loss = f"{before:.4f} > {after:.4f}"
        shown.add_row(run.name, f"{run.trainable:,}", loss, f"{run.merged:.4f}", error)
    return shown


def picture(runs: list[Run]) -> bytes:
    """PNG: training and held-out loss over the steps; the loss of merged weights as crosses."""
    figure = Figure(figsize=(11, 4.5), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    training, held_out = figure.subplots(1, 2)
    for i, run in enumerate(runs):
        steps = range(1, len(run.losses) + 1)
        training.plot(steps, smoothed(run.losses), f"C{i}", label=run.name)
        held_out.plot(*zip(*run.held_out, strict=True), f"C{i}o-", label=run.name)
        held_out.plot([len(run.losses)], [run.merged], f"C{i}x", markersize=9)
    titles = ("training loss, smoothed", "held-out loss (crosses: merged)")
    for axes, title in zip((training, held_out), titles, strict=True):
        axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
        axes.grid(alpha=0.3)
        axes.legend()
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def main(
    out: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("build/examples"),
    quick: Annotated[bool, typer.Option("--quick", help="A tiny random model, seconds.")] = False,
) -> None:
    """Train LoRA and ResLoRA's three shortcuts alike, draw their losses, and merge them."""
    prepare_output(out)
    model: Any
    model, corpus = tiny_model() if quick else real_model()
    steps = 8 if quick else 16
    runs = []
    for name, config in METHODS.items():
        torch.manual_seed(0)  # the same start of lora_a for all
        lr.adapt(model, config)
        run = train(name, model, corpus, steps)
        merge(run, model, corpus)
        lr.unload(model)
        model.train()
        runs.append(run)
    console.print(table(runs, steps))
    write_bytes(out / "reslora.png", picture(runs))
    console.print(f"wrote {out / 'reslora.png'}")


if __name__ == "__main__":
    typer.run(main)
