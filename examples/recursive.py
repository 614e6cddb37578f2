"""Relaxed Recursive Transformers on SmolLM2-135M: conversion, uptraining, exits, serving.

1. Held-out loss right after conversion, by start and rank (--full: for 2, 3 and 5 loops).
2. The same after uptraining from several starts, beside the source cut to its first K layers.
3. Losses of the first and the last loop before and after training the exits, with two attempts to
   help a relaxed model's first loop.
4. Exits calibrated on that model; what each treatment of skipped keys and values costs.
5. The engine serves prompts, or those of a file.

Writes recursive.json, recursive.png and, in recursive/, four trained models: pure and relaxed,
before and after the training of their exits. A run goes on where an earlier one into --out was
stopped.

    python examples/recursive.py --out build/examples
"""

import copy
import dataclasses
import io
import json
import time
from collections.abc import Callable
from functools import partial
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
from lowrank_ext.cli.files import prepare_output, write_bytes, write_json
from lowrank_ext.cli.models import find_model, load_model
from lowrank_ext.cli.training.evaluation import held_out_loss

BATCH, PEAK_LR = 4, 2e-4
FULL = 10**6  # a rank that is clamped to that of each weight
STARTS = ("average", "stepwise", "lower")
console = Console()


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        loops: numbers of loops.
        ranks: of the grid after conversion.
        rank: of what is trained.
        steps: of each training.
    """

    loops: tuple[int, ...]
    ranks: tuple[int, ...]
    rank: int
    steps: int


@dataclasses.dataclass
class Subject:
    """The source model, text, and a tokenizer if there is one."""

    source: nn.Module
    corpus: TokenBlocks
    tokenizer: Any

    def held_out(self, model: nn.Module) -> float:
        batches = self.corpus.held_out_batches(BATCH, most=4)
        return held_out_loss(model, [text_batch(tokens) for tokens in batches])

    def converted(self, **options: Any) -> nn.Module:
        config = lr.recursive.RecursiveConfig(**options)
        return lr.recursive.convert(copy.deepcopy(self.source), config)


class Results:
    """Figures by name, in a file that is written after each."""

    def __init__(self, path: Path, what: dict[str, Any]) -> None:
        self._path, what = path, json.loads(json.dumps(what))  # lists for tuples, as in the file
        stored = json.loads(path.read_text()) if path.is_file() else {}
        self.values: dict[str, Any] = stored if stored.get("what") == what else {"what": what}

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """The figure ``name``, measured unless the file has it."""
        if name not in self.values:
            self.values[name] = measure()
            write_json(self._path, self.values)
        return self.values[name]


class Models:
    """Trained models by name, in a folder each."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self._folder, self._tokenizer = folder, tokenizer

    def save(self, name: str, model: nn.Module) -> None:
        model.save_pretrained(self._folder / name)
        if self._tokenizer is not None:
            self._tokenizer.save_pretrained(self._folder / name)

    def load(self, name: str) -> nn.Module:
        return lr.recursive.load(self._folder / name)


def real_subject() -> Subject:
    loaded = load_model(find_model(None), torch.float32)
    corpus = load_blocks((), "text", loaded.tokenizer, seq_len=128)
    return Subject(loaded.model, corpus, loaded.tokenizer)


def tiny_subject() -> Subject:
    """A small random Llama on bytes, which only shows that everything runs."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 256}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    text = " ".join(load_documents((), "text")).encode()[: 32 * 100]
    rows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().view(-1, 32)
    corpus = TokenBlocks(train=rows[:84], held_out=rows[84:], description="bytes")
    return Subject(LlamaForCausalLM(config), corpus, None)


def after_conversion(subject: Subject, plan: Plan, results: Results) -> None:
    """Held-out loss by loops, start and rank; the rank counts only where the start is relaxed."""
    results.get("source", lambda: subject.held_out(subject.source))
    for loops in plan.loops:
        for start in STARTS:
            for rank in (0, *plan.ranks, FULL):
                name = f"converted, {loops} loops, {start}, rank {shown(rank)}"
                console.print(name)
                options = {"num_loops": loops, "init": start, "rank": rank}
                results.get(name, lambda o=options: subject.held_out(subject.converted(**o)))


def shown(rank: int) -> str:
    return "full" if rank == FULL else str(rank)


def train(
    subject: Subject, model: nn.Module, plan: Plan, name: str, loss: str, exits: float
) -> nn.Module:
    """AdamW, cosine, towards the source's logits or the text's next tokens."""
    model.train()
    teacher = None if loss == "ce" else subject.source.eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=PEAK_LR)
    rates = get_cosine_schedule_with_warmup(optimizer, round(0.1 * plan.steps), plan.steps)
    for step in track(range(plan.steps), description=name, console=console):
        tokens = subject.corpus.train_batch(step, BATCH, seed=0)
        batch_loss(model, teacher, tokens, loss, exits).backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
    return model


def batch_loss(
    model: nn.Module, teacher: nn.Module | None, tokens: Tensor, loss: str, exits: float
) -> Tensor:
    if not lr.recursive.is_recursive(model):
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss
    inputs = {"input_ids": tokens, "labels": tokens}
    return lr.recursive.uptrain_loss(model, teacher, inputs, loss=loss, coefficients=exits).total


def cut_model(subject: Subject, loops: int) -> nn.Module:
    """The source's first K layers, the same number of parameters as a pure recursion."""
    model = copy.deepcopy(subject.source)
    length = len(model.model.layers) // loops
    model.model.layers = model.model.layers[:length]
    model.config.num_hidden_layers = length
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:length]
    return model


def after_uptraining(subject: Subject, plan: Plan, results: Results, models: Models) -> None:
    """Held-out loss before and after the same number of steps; two models are saved."""

    def pure() -> nn.Module:
        return subject.converted(num_loops=2, init="stepwise")

    def relaxed(lora_init: str = "svd") -> nn.Module:
        return subject.converted(num_loops=2, rank=plan.rank, lora_init=lora_init)

    starts: dict[str, tuple[Callable[[], nn.Module], str, str | None]] = {
        "pure, KL": (pure, "kl", "pure"),
        "relaxed, SVD start, KL": (relaxed, "kl", "relaxed"),
        "relaxed, SVD start, cross entropy": (relaxed, "ce", None),
        "relaxed, zero start, KL": (lambda: relaxed("zero"), "kl", None),
        "cut to K layers, cross entropy": (lambda: cut_model(subject, 2), "ce", None),
    }

    def measure(
        name: str, make: Callable[[], nn.Module], loss: str, saved_as: str | None
    ) -> list[float]:
        torch.manual_seed(0)
        model = make()
        before = subject.held_out(model)
        train(subject, model, plan, name, loss, exits=0.0)
        if saved_as is not None:
            models.save(saved_as, model)
        return [before, subject.held_out(model)]

    for name, start in starts.items():
        results.get(f"uptrained, {name}", partial(measure, name, *start))


def without_first_adapters(model: nn.Module) -> nn.Module:
    """Loop 0 has the tied weights alone: its adapters are zero and do not train."""
    for module in model.modules():
        if isinstance(module, lr.recursive.RelaxedLinear) and module.loop == 0:
            nn.init.zeros_(module.lora_b)
            module.lora_a.requires_grad_(False)
            module.lora_b.requires_grad_(False)
    return model


def loop_losses(subject: Subject, model: nn.Module) -> list[float]:
    batches = subject.corpus.held_out_batches(BATCH, most=4)
    return list(lr.recursive.evaluate(model, batches).losses)


def after_exit_training(subject: Subject, plan: Plan, results: Results, models: Models) -> None:
    """Losses of both loops before and after; two models are saved."""

    def measure(source: str, exits: float, bare_first: bool, saved_as: str | None) -> Any:
        model = models.load(source)
        if bare_first:
            without_first_adapters(model)
        before = loop_losses(subject, model)
        train(subject, model, plan, f"exits of {source}, {exits}", "kl", exits)
        if saved_as is not None:
            models.save(saved_as, model)
        return [before, loop_losses(subject, model)]

    variants = {
        "pure, 0.1": ("pure", 0.1, False, "exits-pure"),
        "relaxed, 0.1": ("relaxed", 0.1, False, "exits-relaxed"),
        "relaxed, 0.3": ("relaxed", 0.3, False, None),
        "relaxed, no adapters in loop 0, 0.1": ("relaxed", 0.1, True, None),
    }
    for name, variant in variants.items():
        results.get(f"exits, {name}", partial(measure, *variant))


def calibrated(subject: Subject, model: nn.Module, results: Results) -> Any:
    """A rule that keeps 90 % agreement, and what skipped loops cost under it."""
    model.eval()
    batches = subject.corpus.train[: 8 * BATCH].split(BATCH)
    found = lr.recursive.calibrate(model, batches, target=0.9)
    held_out = subject.corpus.held_out_batches(BATCH, most=4)
    measured = lr.recursive.evaluate(model, held_out, rule=found.rule)
    losses = {name: each.loss for name, each in measured.outcomes.items()}
    results.values.pop("calibrated", None)
    results.get(
        "calibrated",
        lambda: {
            "thresholds": list(found.rule.thresholds),
            "exits": list(found.held_out.exits),
            "agreement": found.held_out.exited_agreement,
            "loss without exits": measured.losses[-1],
            "loss": losses,
        },
    )
    return found.rule


def serve(subject: Subject, model: nn.Module, rule: Any, prompts: Path | None) -> None:
    """Every line of the file is a prompt; each answer is shown when it is whole."""
    if prompts is not None and subject.tokenizer is not None:
        lines = [line for line in prompts.read_text().splitlines() if line]
        inputs = [subject.tokenizer(line).input_ids for line in lines]
    else:
        inputs = [row[:12].tolist() for row in subject.corpus.held_out[:6]]
    longest = max(map(len, inputs)) + 24
    engine = lr.recursive.DepthwiseEngine(
        model, max_rows=4, exit_rule=rule, skipped="share-first", max_length=longest
    )
    for number, tokens in enumerate(inputs):
        engine.add(tokens, max_new_tokens=24, id=number)
    started = time.perf_counter()
    for request, _, reason in engine.stream():
        if reason is not None:
            tokens = engine.result(request).tokens
            text = tokens if subject.tokenizer is None else subject.tokenizer.decode(tokens)
            where = f"[{time.perf_counter() - started:.1f} s] {request}, {reason}: "
            console.print(f"{where}{text!r}", markup=False, soft_wrap=True)
    metrics = engine.metrics()
    console.print(
        f"{metrics.tokens} tokens, {metrics.mean_loops:.2f} loops each, "
        f"{metrics.rows_per_pass:.1f} rows per pass"
    )


def table(results: Results) -> Table:
    """A row per figure."""
    made = Table("held-out loss", "before", "after", show_edge=False)
    for name, value in results.values.items():
        if name in ("what", "calibrated"):
            continue
        pair = value if isinstance(value, list) else [value, None]
        made.add_row(name, *(cell(each) for each in pair))
    return made


def cell(value: Any) -> str:
    if value is None:
        return ""
    return ", ".join(f"{v:.3f}" for v in (value if isinstance(value, list) else [value]))


def picture(plan: Plan, results: Results) -> bytes:
    """PNG: loss after conversion by rank; after uptraining; of both loops after exit training."""
    figure = Figure(figsize=(14, 4.2), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3)
    ranks = (0, *plan.ranks, FULL)
    for index, start in enumerate(STARTS):
        for loops, style in zip(plan.loops, ("-o", "--s", ":^"), strict=False):
            losses = [
                results.values[f"converted, {loops} loops, {start}, rank {shown(rank)}"]
                for rank in ranks
            ]
            label = f"{start}, {loops} loops"
            panels[0].plot(range(len(ranks)), losses, style, color=f"C{index}", label=label)
    panels[0].axhline(results.values["source"], color="black", lw=0.8, label="source")
    panels[0].set_xticks(range(len(ranks)), [shown(rank) for rank in ranks])
    panels[0].set(title="held-out loss after conversion", xlabel="rank")
    panels[0].legend(fontsize=7)
    bars(panels[1], "after uptraining", named(results, "uptrained, "), ("before", "after"))
    exits = {name: pair[1] for name, pair in named(results, "exits, ").items()}
    bars(panels[2], "after exit training", exits, ("first loop", "last loop"))
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def named(results: Results, prefix: str) -> dict[str, Any]:
    values = results.values
    return {name.removeprefix(prefix): values[name] for name in values if name.startswith(prefix)}


def bars(axes: Any, title: str, pairs: dict[str, list[float]], labels: tuple[str, str]) -> None:
    rows = range(len(pairs))
    for index, label in enumerate(labels):
        values = [pair[index] for pair in pairs.values()]
        axes.barh([row + 0.38 * index for row in rows], values, 0.36, label=label)
    axes.set_yticks([row + 0.19 for row in rows], [name.replace(", ", "\n") for name in pairs])
    axes.tick_params(labelsize=7)
    axes.invert_yaxis()
    axes.set(title=f"held-out loss {title}")
    axes.legend(fontsize=7)


def main(
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path("build/examples"),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each training.")] = 8,
    full: Annotated[bool, typer.Option(help="The whole grid: more than an hour.")] = False,
    prompts: Annotated[Path | None, typer.Option(help="A file with a prompt in each line.")] = None,
    quick: Annotated[bool, typer.Option(help="A tiny random model: does it all run?")] = False,
) -> None:
    """Measure all parts, print tables, write recursive.json and recursive.png."""
    prepare_output(out)
    if quick:
        subject, plan = tiny_subject(), Plan((2,), (4,), 4, min(steps, 2))
    else:
        grid = ((2, 3, 5), (64, 256)) if full else ((2,), (64,))
        subject, plan = real_subject(), Plan(*grid, 64, steps)
    results = Results(out / "recursive.json", {**dataclasses.asdict(plan), "quick": quick})
    after_conversion(subject, plan, results)
    models = Models(out / "recursive", subject.tokenizer)
    after_uptraining(subject, plan, results, models)
    after_exit_training(subject, plan, results, models)
    model = models.load("exits-pure")
    rule = calibrated(subject, model, results)
    serve(subject, model, rule, prompts)
    console.print(table(results))
    console.print_json(data=results.values["calibrated"])
    write_bytes(out / "recursive.png", picture(plan, results))
    console.print(f"wrote {out / 'recursive.png'}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
