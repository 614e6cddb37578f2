"""AFLoRA beside LoRA on SmolLM2-135M: trainable parameters, cost of a step, loss.

Both are trained on Python's own manual from the same start. While AFLoRA's projections freeze one
by one, the number of trainable parameters, the bytes that forward keeps for backward and the time
of a step fall; LoRA's do not. Writes aflora.png.

    python examples/aflora.py --out build/examples
"""

import io
import statistics
import time
from collections.abc import Callable
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
from lowrank_ext.cli.measure import saved_bytes
from lowrank_ext.cli.models import find_model, load_model, resolve_dtype
from lowrank_ext.cli.training.evaluation import held_out_loss, model_loss

BATCH, RANK = 2, 16
# Freezes between a tenth and six tenths of the steps, with a decision every two steps.
SCHEDULE: dict[str, Any] = {"start": 0.1, "eta": 0.6, "window": 2}
console = Console()


@dataclass
class Run:
    """Measurements of one method; lists have a value per step."""

    name: str
    before: float = 0.0
    after: float = 0.0
    trainable: list[int] = field(default_factory=list)
    milliseconds: list[float] = field(default_factory=list)
    kept_mebibytes: list[float] = field(default_factory=list)

    @property
    def average_trainable(self) -> float:
        """Trainable parameters averaged over the steps, as the paper counts."""
        return statistics.mean(self.trainable)


def real_model() -> tuple[Callable[[], nn.Module], TokenBlocks]:
    """A function that loads SmolLM2-135M, and Python's language topics."""
    source, dtype = find_model(None), resolve_dtype("auto")
    corpus = load_blocks((), "text", load_model(source, dtype).tokenizer, seq_len=128)
    return lambda: load_model(source, dtype).model, corpus


def tiny_model() -> tuple[Callable[[], nn.Module], TokenBlocks]:
    """A small random Llama on bytes, which only shows that everything runs."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes, **heads)).train()

    text = " ".join(load_documents((), "text")).encode()[: 32 * 200]
    rows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().view(-1, 32)
    return make, TokenBlocks(train=rows[:180], held_out=rows[180:], description="bytes")


def train(
    run: Run,
    model: nn.Module,
    corpus: TokenBlocks,
    steps: int,
    peak_lr: float,
    schedule: Callable[[torch.optim.Optimizer], lr.AdaptiveFreezeSchedule | None],
) -> None:
    """A plain training loop; AFLoRA adds the line with freezing.step()."""
    held_out = [text_batch(t) for t in corpus.held_out_batches(BATCH, most=6)]
    run.before = held_out_loss(model, held_out)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=peak_lr, weight_decay=0.0)
    rates = get_cosine_schedule_with_warmup(optimizer, round(0.1 * steps), steps)
    freezing = schedule(optimizer)
    for step in track(range(steps), description=f"{run.name:<7}", console=console):
        tokens = corpus.train_batch(step, BATCH, seed=0)
        started = time.perf_counter()
        model_loss(model, text_batch(tokens)).backward()
        if freezing is not None:
            freezing.step()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        run.milliseconds.append(1e3 * (time.perf_counter() - started))
        run.trainable.append(lr.trainable_parameters(model).trainable)
        run.kept_mebibytes.append(kept(model, tokens, run, freezing, step))
    run.after = held_out_loss(model, held_out)


def kept(
    model: nn.Module,
    tokens: Tensor,
    run: Run,
    freezing: lr.AdaptiveFreezeSchedule | None,
    step: int,
) -> float:
    """MiB that forward keeps for backward; measured again when it may have changed."""
    changed = step == 0 or (freezing is not None and step in freezing.frozen_at.values())
    if not changed:
        return run.kept_mebibytes[-1]
    return saved_bytes(model, lambda: model_loss(model, text_batch(tokens))) / 2**20


def table(runs: list[Run]) -> Table:
    """A row per method; a > b are the values at the first and the last step."""
    shown = Table("method", title=f"rank {RANK}, {len(runs[0].trainable)} steps", show_edge=False)
    headings = ("trainable", "on average", "kept MiB", "ms/step", "held-out loss")
    for heading in headings:
        shown.add_column(heading, justify="right")
    for run in runs:
        fifth = max(1, len(run.milliseconds) // 5)
        first, last = run.milliseconds[:fifth], run.milliseconds[-fifth:]
        shown.add_row(
            run.name,
            f"{run.trainable[0]:,} > {run.trainable[-1]:,}",
            f"{run.average_trainable:,.0f}",
            f"{run.kept_mebibytes[0]:,.1f} > {run.kept_mebibytes[-1]:,.1f}",
            f"{statistics.median(first):,.0f} > {statistics.median(last):,.0f}",
            f"{run.before:.4f} > {run.after:.4f}",
        )
    return shown


def picture(runs: list[Run]) -> bytes:
    """PNG: trainable parameters, bytes kept for backward and milliseconds over the steps."""
    figure = Figure(figsize=(12, 4), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    titles = ("trainable parameters", "MiB kept for backward", "milliseconds per step")
    for axes, title in zip(panels, titles, strict=True):
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    for index, run in enumerate(runs):
        steps = range(1, len(run.trainable) + 1)
        label = f"{run.name}: held-out {run.before:.3f} to {run.after:.3f}"
        panels[0].step(steps, run.trainable, where="post", color=f"C{index}", label=label)
        panels[1].step(steps, run.kept_mebibytes, where="post", color=f"C{index}")
        panels[2].plot(steps, run.milliseconds, ".", color=f"C{index}", alpha=0.4)
        panels[2].plot(steps, running_median(run.milliseconds), color=f"C{index}")
    for axes in panels:
        axes.set_ylim(bottom=0)
    panels[0].legend()
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def running_median(numbers: list[float], width: int = 5) -> list[float]:
    """Median of each number with up to `width` neighbors on either side."""
    spans = (slice(max(0, i - width), i + width + 1) for i in range(len(numbers)))
    return [statistics.median(numbers[span]) for span in spans]


def main(
    out: Annotated[Path, typer.Option(help="Where aflora.png goes.")] = Path("build/examples"),
    steps: Annotated[int, typer.Option(min=5, help="Optimizer steps of each method.")] = 24,
    quick: Annotated[bool, typer.Option(help="A tiny random model: does it all run?")] = False,
) -> None:
    """Train LoRA and AFLoRA, print a table, write aflora.png."""
    prepare_output(out)
    steps = min(steps, 12) if quick else steps
    make_model, corpus = tiny_model() if quick else real_model()
    lora, aflora = Run("LoRA"), Run("AFLoRA")

    torch.manual_seed(0)
    model = lr.adapt(make_model(), lr.LoRAConfig(r=RANK))
    train(lora, model, corpus, steps, 3e-3, lambda optimizer: None)

    torch.manual_seed(0)
    model = lr.adapt(make_model(), lr.AFLoRAConfig(r=RANK))
    options = {"total_steps": steps, **SCHEDULE}
    train(
        *(aflora, model, corpus, steps, 3e-2),
        lambda optimizer: lr.AdaptiveFreezeSchedule(model, optimizer=optimizer, **options),
    )

    console.print(table([lora, aflora]))
    share = aflora.average_trainable / lora.average_trainable
    console.print(
        f"AFLoRA trains {100 * share:.1f} % of LoRA's parameters, averaged over the steps"
    )
    write_bytes(out / "aflora.png", picture([lora, aflora]))
    console.print(f"wrote {out / 'aflora.png'}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
