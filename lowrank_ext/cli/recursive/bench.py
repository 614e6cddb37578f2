"""`lowrank-ext recursive bench`: the engine's policies side by side on the same prompts."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

import lowrank_ext as lr
from lowrank_ext.cli.checks import check_at_least, check_choice
from lowrank_ext.cli.data.blocks import load_documents
from lowrank_ext.cli.environment import environment
from lowrank_ext.cli.errors import Interrupted, UserError, as_user_error
from lowrank_ext.cli.interrupts import EXIT_INTERRUPTED
from lowrank_ext.cli.machine import check_machine
from lowrank_ext.cli.recursive.evaluate import new_table
from lowrank_ext.cli.recursive.generate import encoded
from lowrank_ext.cli.recursive.models import load_recursive, num_loops, parse_rule
from lowrank_ext.cli.sampling import read_prompts
from lowrank_ext.methods.recursive.exits import SKIPPED

DEFAULT_PROMPTS = 16
_DEFAULT_WORDS = 24


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of the command."""

    directory: Path
    file: Path | None
    max_new_tokens: int
    exit: str
    skipped: str
    max_rows: int
    repeats: int
    dtype: str
    threads: int | None
    json: bool

    def check(self) -> None:
        """Raises UserError naming the option, what it must be, and what it was."""
        for option, value in (
            ("--max-new-tokens", self.max_new_tokens),
            ("--max-rows", self.max_rows),
            ("--repeats", self.repeats),
        ):
            check_at_least(option, value, 1)
        parse_rule(self.exit)
        check_choice("--skipped", self.skipped, SKIPPED)
        check_machine(self.dtype, self.threads)


@dataclass(frozen=True)
class Row:
    """What a policy did: medians over the repeats; counts are those of the last one."""

    policy: str
    tokens_per_second: float
    first_token_seconds: float
    rows_per_pass: float
    passes: int
    tokens: int
    exits: list[int]
    mean_loops: float
    all_tokens_per_second: list[float]


def run(options: Options, console: Console) -> None:
    """Measures and prints a table, or one JSON object."""
    options.check()
    prompts = default_prompts() if options.file is None else read_prompts(options.file)
    loaded = load_recursive(options.directory, options.dtype)
    rule = parse_rule(options.exit, num_loops(loaded.model))
    ids, longest = encoded(loaded, prompts, options.max_new_tokens)
    with as_user_error("cannot run", ValueError, TypeError):
        engines = _engines(loaded.model, options, rule, longest)
    try:
        rows = measure(engines, ids, options, console)
    except KeyboardInterrupt:
        raise Interrupted("stopped; nothing was measured to its end", EXIT_INTERRUPTED) from None
    if options.json:
        print(json.dumps(_as_json(options, len(ids), rows), allow_nan=False))
        return
    console.print(
        f"{options.directory}: {len(ids)} prompts, {options.max_new_tokens} new tokens each, "
        f"{options.max_rows} slots; exits {options.exit}, skipped loops by {options.skipped}",
        markup=False,
        soft_wrap=True,
    )
    console.print(table(rows))


def default_prompts() -> list[str]:
    """The first words of the longest topics of Python's manual."""
    topics = sorted(load_documents((), "text"), key=len, reverse=True)[:DEFAULT_PROMPTS]
    return [" ".join(topic.split()[:_DEFAULT_WORDS]) for topic in topics]


def _engines(model: Any, options: Options, rule: Any, longest: int) -> dict[str, Any]:
    shared = {"max_rows": options.max_rows, "max_length": longest}
    with_exits = {**shared, "exit_rule": rule, "skipped": options.skipped}
    make = lr.recursive.DepthwiseEngine
    return {
        "static": make(model, policy="static", **shared),
        "continuous": make(model, policy="continuous", **shared),
        "depth-wise": make(model, policy="depth-wise", **shared),
        "depth-wise + exits": make(model, policy="depth-wise", **with_exits),
    }


def measure(
    engines: dict[str, Any], ids: list[Any], options: Options, console: Console
) -> list[Row]:
    """Each policy in turn, so that a busy machine slows all; after one warm-up round."""
    found: dict[str, list[Any]] = {name: [] for name in engines}
    for repeat in range(options.repeats + 1):
        for name, engine in engines.items():
            metrics = _run_once(engine, ids, options.max_new_tokens)
            if repeat:
                found[name].append(metrics)
            if not options.json and repeat:
                speed = f"{metrics.tokens_per_second:,.1f} tokens/s"
                console.print(f"[{repeat}/{options.repeats}] {name}: {speed}", markup=False)
    loops = next(iter(engines.values())).num_loops
    return [_row(name, runs, loops) for name, runs in found.items()]


def _run_once(engine: Any, ids: list[Any], new_tokens: int) -> Any:
    engine.reset_metrics()
    # No stop tokens: every policy generates the same number.
    names = [engine.add(own, max_new_tokens=new_tokens, stop=[]) for own in ids]
    results = engine.run()
    for number, name in enumerate(names, start=1):
        if results[name].finish_reason == "error":
            raise UserError(f"prompt {number}: {results[name].error}")
        engine.forget(name)
    return engine.metrics()


def _row(name: str, runs: list[Any], loops: int) -> Row:
    speeds = [metrics.tokens_per_second for metrics in runs]
    last = runs[-1]
    return Row(
        name,
        statistics.median(speeds),
        statistics.median(metrics.median_first_token_seconds for metrics in runs),
        last.rows_per_pass,
        last.passes,
        last.tokens,
        [last.exits[loop] for loop in range(loops)],
        last.mean_loops,
        speeds,
    )


def table(rows: list[Row]) -> Any:
    """A row for each policy."""
    caption = (
        "tokens/s: new tokens of all prompts, medians of interleaved runs; first token: median "
        "over the prompts, waiting for a slot included; rows/pass: rows of a block pass on average."
    )
    columns = ("policy", "tokens/s", "x static", "first token s", "rows/pass", "loops/token")
    found = new_table(caption, *columns, "exits by loop")
    for row in rows:
        total = sum(row.exits)
        found.add_row(
            row.policy,
            f"{row.tokens_per_second:,.1f}",
            f"{row.tokens_per_second / rows[0].tokens_per_second:.2f}",
            f"{row.first_token_seconds:.3f}",
            f"{row.rows_per_pass:.2f}",
            f"{row.mean_loops:.2f}",
            " ".join(f"{count / total:.0%}" for count in row.exits),
        )
    return found


def _as_json(options: Options, num_prompts: int, rows: list[Row]) -> dict[str, Any]:
    return {
        "directory": str(options.directory),
        "prompts": num_prompts,
        "max_new_tokens": options.max_new_tokens,
        "max_rows": options.max_rows,
        "exit": options.exit,
        "skipped": options.skipped,
        "repeats": options.repeats,
        "policies": [vars(row) for row in rows],
        "environment": environment(),
    }
