"""`lowrank-ext evaluate`: a base and its adapters on held-out text, and on tasks of lm_eval."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowrank_ext.cli.adapters import AdapterSource, Run
from lowrank_ext.cli.checks import check_at_least, check_choice
from lowrank_ext.cli.data import (
    TRAIN_ON,
    DataOptions,
    check_source,
    collate,
    load_held_out,
    pad_id_of,
)
from lowrank_ext.cli.display import make_console
from lowrank_ext.cli.errors import Interrupted, UserError
from lowrank_ext.cli.harness import check_tasks, run_tasks
from lowrank_ext.cli.interrupts import EXIT_INTERRUPTED
from lowrank_ext.cli.methods import base_dtype
from lowrank_ext.cli.models import (
    LoadedModel,
    check_context,
    check_vocabulary,
    dtype_name,
    why_not_finite,
)
from lowrank_ext.cli.quantization import num_quantized
from lowrank_ext.cli.training.evaluation import held_out_loss, num_targets
from lowrank_ext.cli.variants import (
    BASE,
    VariantOptions,
    Variants,
    load_variants,
    named_adapters,
)

DEFAULT_SEQ_LEN = 256


@dataclass(frozen=True, kw_only=True)
class Options(VariantOptions):
    """The options of the command."""

    text: list[str] | None
    field: str
    train_on: str
    seq_len: int | None
    batch: int
    tasks: str | None
    tasks_from: Path | None
    few_shots: int | None
    limit: int | None
    json: bool

    def check(self) -> None:
        """Raises UserError naming the option, what it must be, and what it was."""
        check_at_least("--batch", self.batch, 1)
        if self.seq_len is not None:
            check_at_least("--seq-len", self.seq_len, 2)
        check_choice("--train-on", self.train_on, TRAIN_ON)
        for option, value, least in (
            ("--few-shots", self.few_shots, 0),
            ("--limit", self.limit, 1),
        ):
            if value is not None:
                check_at_least(option, value, least)
        if self.tasks is None and (self.tasks_from is not None or self.few_shots is not None):
            raise UserError(
                "--tasks-from and --few-shots are for --tasks; give it, or leave them out"
            )
        for name in self.text or ():
            check_source("--text", name)
        super().check()
        if self.task_names:
            check_tasks(self.task_names, self.tasks_from)

    @property
    def task_names(self) -> list[str]:
        return [name.strip() for name in (self.tasks or "").split(",") if name.strip()]

    @property
    def measures_text(self) -> bool:
        """Without --tasks, and beside them where --text asks for it."""
        return bool(self.text) or not self.task_names


def run(options: Options) -> None:
    """Measures each variant on the same batches, prints tables or one JSON object."""
    options.check()
    console = make_console()
    adapters = named_adapters(options.adapters, options.adapter)
    variants = load_variants(options, adapters, with_base=True)
    shown = None if options.json else console
    try:
        found = _measured(options, variants, adapters, shown)
    except KeyboardInterrupt:
        raise Interrupted("stopped; nothing is whole yet", EXIT_INTERRUPTED) from None
    if options.json:
        print(json.dumps(found))


def _measured(
    options: Options,
    variants: Variants,
    adapters: dict[str, AdapterSource],
    console: Console | None,
) -> dict[str, Any]:
    found = _base(variants.loaded)
    if console is not None:
        console.print(_base_line(found), markup=False, soft_wrap=True)
    if options.measures_text:
        found["text"] = _on_text(options, variants, adapters, console)
        if console is not None:
            console.print(_text_table(found["text"]["results"]))
    if options.task_names:
        found["tasks"] = {
            name: run_tasks(
                variants.using(name),
                variants.loaded.tokenizer,
                options.task_names,
                options.tasks_from,
                batch=options.batch,
                few_shots=options.few_shots,
                limit=options.limit,
            )
            for name in variants.names
        }
        if console is not None:
            console.print(_tasks_table(found["tasks"]))
    return found


def _base(loaded: LoadedModel) -> dict[str, Any]:
    """What the numbers are of, by the names in the report.json of a run."""
    return {
        "model": loaded.name,
        "dtype": dtype_name(base_dtype(loaded.model)),
        "quantize": loaded.quantize,
        "quantized_parameters": num_quantized(loaded.model),
    }


def _base_line(base: dict[str, Any]) -> str:
    linears = ""
    if base["quantized_parameters"]:
        linears = f", linears {base['quantize'] or 'quantized, as stored'}"
    return f"base: {base['model']}, {base['dtype']}{linears}"


def data_options(
    options: Options, adapters: dict[str, AdapterSource], context: int | None
) -> DataOptions:
    """What is evaluated on: all of --text, else the held-out part of the run's own data, else that
    of Python's language topics.

    context: the most tokens that the model takes.
    """
    usual = min(DEFAULT_SEQ_LEN, context or DEFAULT_SEQ_LEN)
    shared: dict[str, Any] = {"field": options.field, "train_on": options.train_on}
    runs = [adapter.run for adapter in adapters.values() if adapter.run is not None]
    if options.text or not runs:
        length = options.seq_len or usual
        return DataOptions(text=(), eval=tuple(options.text or ()), seq_len=length, **shared)
    own = runs[0]
    if len({_records_of(run) for run in runs}) > 1:
        raise UserError("the runs of the adapters have different data; give --text")
    return DataOptions(
        text=own.text,
        eval=own.eval,
        field=own.field,
        format=own.format,
        seq_len=options.seq_len or own.seq_len or usual,
        train_on=own.train_on,
        packing=own.packing,
        eval_split=own.eval_split,
        max_rows=own.max_rows,
    )


def _records_of(run: Run) -> tuple[Any, ...]:
    """What decides which records a run trains on and which it holds out."""
    return run.text, run.eval, run.eval_split, run.max_rows, run.field, run.format


def _on_text(
    options: Options,
    variants: Variants,
    adapters: dict[str, AdapterSource],
    console: Console | None,
) -> dict[str, Any]:
    """Loss and perplexity of each variant, over all labels."""
    model, tokenizer = variants.loaded.model, variants.loaded.tokenizer
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    data = data_options(options, adapters, context)
    check_context(model, data.seq_len)
    rows, report = load_held_out(data, tokenizer, model)
    check_vocabulary(model, rows.largest_id)
    if console is not None:
        console.print(report.table())
    most = len(rows) if options.limit is None else min(options.limit, len(rows))
    pad = pad_id_of(tokenizer)
    batches = [
        collate([rows[index] for index in range(start, min(start + options.batch, most))], pad)
        for start in range(0, most, options.batch)
    ]
    targets = sum(num_targets(batch) for batch in batches)
    if not targets:
        raise UserError("no token of the text is one that the loss counts; see --train-on")
    results = []
    for name in variants.names:
        loss = held_out_loss(variants.using(name), batches)
        if not math.isfinite(loss):
            raise UserError(
                f"{name}: the loss is not finite; {why_not_finite(model, 'try --dtype fp32')}"
            )
        results.append({"name": name, "loss": loss, "perplexity": _perplexity(loss)})
    sources = list(data.eval or data.text) or ["pydoc_data.topics"]
    return {"sources": sources, "rows": most, "targets": targets, "results": results}


def _perplexity(loss: float) -> float | None:
    """exp(loss); None where that overflows."""
    return math.exp(loss) if loss < 700 else None


def _table(*names: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for index, name in enumerate(names):
        table.add_column(name, justify="right" if index else "left")
    return table


def _text_table(results: list[dict[str, Any]]) -> Table:
    table = _table("model", "loss", "perplexity", "loss - base's")
    base = results[0]["loss"]
    for row in results:
        perplexity = "-" if row["perplexity"] is None else f"{row['perplexity']:,.3f}"
        change = "" if row["name"] == BASE else f"{row['loss'] - base:+.4f}"
        table.add_row(Text(row["name"]), f"{row['loss']:.4f}", perplexity, change)
    return table


def _tasks_table(found: dict[str, dict[str, dict[str, float]]]) -> Table:
    """A row for each task and metric, a column for each variant."""
    table = _table("task", "metric", *found)
    first = next(iter(found.values()))
    for task, metrics in first.items():
        for metric in metrics:
            values = (f"{results[task][metric]:.4f}" for results in found.values())
            table.add_row(Text(task), metric, *values)
    return table
