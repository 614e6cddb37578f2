"""`lowrank-ext recursive evaluate`: loops, exits and skipped loops on held-out text."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import lowrank_ext as lr
from lowrank_ext.cli.checks import check_at_least, check_choice
from lowrank_ext.cli.data.blocks import TokenBlocks, load_blocks
from lowrank_ext.cli.data.sources import check_source
from lowrank_ext.cli.environment import environment
from lowrank_ext.cli.errors import UserError, as_user_error
from lowrank_ext.cli.machine import check_machine
from lowrank_ext.cli.models import check_context, check_vocabulary
from lowrank_ext.cli.recursive.models import (
    load_recursive,
    num_loops,
    parse_rule,
    shown_rule,
)
from lowrank_ext.methods.recursive.calibration import LEAST_SEQUENCES
from lowrank_ext.methods.recursive.exits import MEASURES

DEFAULT_TARGET = 0.95


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of the command."""

    directory: Path
    text: list[str] | None
    field: str
    seq_len: int
    batch: int
    eval_batches: int
    exit: str | None
    calibrate: str | None
    target: float | None
    dtype: str
    threads: int | None
    json: bool

    def check(self) -> None:
        """Raises UserError naming the option, what it must be, and what it was."""
        check_at_least("--seq-len", self.seq_len, 2)
        check_at_least("--batch", self.batch, 1)
        check_at_least("--eval-batches", self.eval_batches, 1)
        if self.exit is not None and self.calibrate is not None:
            raise UserError("give --exit for a rule or --calibrate to find one, not both")
        if self.exit is not None:
            parse_rule(self.exit)
        if self.calibrate is not None:
            check_choice("--calibrate", self.calibrate, MEASURES)
        if self.target is not None and not 0 <= self.target <= 1:
            raise UserError(f"--target must be between 0 and 1, got {self.target}")
        if self.target is not None and self.calibrate is None:
            raise UserError("--target is of no use without --calibrate; leave it out")
        check_machine(self.dtype, self.threads)
        for path in self.text or ():
            check_source("--text", path)


def run(options: Options, console: Console) -> None:
    """Measures and prints tables, or one JSON object."""
    options.check()
    loaded = load_recursive(options.directory, options.dtype)
    model = loaded.model
    check_context(model, options.seq_len)
    paths = tuple(options.text or ())
    corpus = load_blocks(paths, options.field, loaded.tokenizer, options.seq_len)
    check_vocabulary(model, int(max(corpus.train.max(), corpus.held_out.max())))
    rule, calibration = None, None
    with as_user_error("cannot evaluate", ValueError):
        if options.exit is not None:
            rule = parse_rule(options.exit, num_loops(model))
        elif options.calibrate is not None:
            calibration = _calibrated(model, corpus, options)
            rule = calibration.rule
        batches = corpus.held_out_batches(options.batch, options.eval_batches)
        found = lr.recursive.evaluate(model, batches, rule=rule)
    if options.json:
        with as_user_error("the losses cannot be printed", ValueError):  # inf or nan
            print(json.dumps(_as_json(options, corpus, found, calibration), allow_nan=False))
        return
    title = f"{options.directory}, {corpus.description}, {found.num_tokens:,} held-out tokens"
    console.print(title, markup=False, soft_wrap=True)
    console.print(loops_table(found))
    if calibration is not None:
        _print_calibration(console, calibration)
    if found.outcomes:
        console.print()
        console.print(outcomes_table(found))


def _calibrated(model: Any, corpus: TokenBlocks, options: Options) -> Any:
    """On text that training may have seen, never on the held-out part."""
    rows = corpus.train[: options.batch * options.eval_batches]
    if len(rows) < LEAST_SEQUENCES:
        raise UserError(
            f"--calibrate needs {LEAST_SEQUENCES} sequences of the training part, got {len(rows)}; "
            "raise --batch or --eval-batches, or give a longer --text"
        )
    target = DEFAULT_TARGET if options.target is None else options.target
    return lr.recursive.calibrate(
        model, rows.split(options.batch), measure=options.calibrate or "", target=target
    )


def _as_json(options: Options, corpus: TokenBlocks, found: Any, calibration: Any) -> dict[str, Any]:
    shown = None
    if calibration is not None:
        shown = {**calibration.to_dict(), "exit": shown_rule(calibration.rule)}
    return {
        "directory": str(options.directory),
        "text": corpus.description,
        "exit": options.exit,
        "calibration": shown,
        **found.to_dict(),
        "environment": environment(),
    }


def new_table(caption: str, *columns: str) -> Table:
    """A table whose columns after the first are numbers."""
    table = Table(
        caption=Text(caption),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
    )
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left")
    return table


def loops_table(found: Any) -> Table:
    """A row for each loop."""
    caption = (
        "agreement: share of tokens whose most likely next token is the last loop's; oracle: share "
        "that could exit here at the earliest with that token."
    )
    table = new_table(caption, "after loop", "loss", "agreement", "oracle")
    rows = zip(found.losses, found.agreement, found.oracle, strict=True)
    for loop, (loss, agreement, oracle) in enumerate(rows):
        table.add_row(
            str(loop), f"{loss:.4f}", f"{agreement:.1%}", f"{oracle / found.num_tokens:.1%}"
        )
    return table


def outcomes_table(found: Any) -> Table:
    """A row for each treatment of skipped keys and values."""
    caption = (
        "Each token exits by the rule; later tokens see what it left in the cache. agreement: with "
        "the token of full depth, of those that exited and of all."
    )
    names = ("skipped loops", "loss", "x full", "exited", "agreement", "of all", "loops/token")
    table = new_table(caption, *names)
    for name, outcome in found.outcomes.items():
        early = sum(outcome.exits[:-1]) / sum(outcome.exits)
        agreed = outcome.exited_agreement
        table.add_row(
            name,
            f"{outcome.loss:.4f}",
            f"{outcome.loss / found.losses[-1]:.3f}",
            f"{early:.1%}",
            "-" if agreed is None else f"{agreed:.1%}",
            f"{outcome.agreement:.1%}",
            f"{outcome.mean_loops:.2f}",
        )
    return table


def _print_calibration(console: Console, calibration: Any) -> None:
    held_out = calibration.held_out
    early = sum(held_out.exits[:-1]) / held_out.num_tokens
    agreed = held_out.exited_agreement
    shown = "-" if agreed is None else f"{agreed:.1%}"
    rule = shown_rule(calibration.rule)
    console.print(
        f"calibrated for {calibration.target:.1%} agreement: --exit {rule}\n"
        f"on sequences left out of the calibration {early:.1%} of the tokens exit, {shown} of them "
        "with the token of full depth",
        markup=False,
        soft_wrap=True,
    )
