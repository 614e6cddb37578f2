"""`lowrank-ext guard`: a score for each text of a file."""

import json
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lowrank_ext.cli.adapters import INSIDE_GUARD_RUN, find_adapter, find_base
from lowrank_ext.cli.checks import DTYPES, MOST_THREADS
from lowrank_ext.cli.data.lines import Line, lines_of
from lowrank_ext.cli.data.records import Record, open_binary, read_file
from lowrank_ext.cli.data.sources import JSON_LINES, TEXT, file_kind
from lowrank_ext.cli.errors import Interrupted, UserError, as_user_error, near_matches
from lowrank_ext.cli.files import require_directory
from lowrank_ext.cli.interrupts import EXIT_INTERRUPTED
from lowrank_ext.cli.models import (
    LoadedModel,
    ModelSource,
    find_model,
    load_model,
    resolve_dtype,
    why_not_finite,
)
from lowrank_ext.methods.lora_guard import GuardModel, TextScore, conversation, screen
from lowrank_ext.methods.lora_guard.files import HEAD_NAME

STDIN = "-"


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of the command."""

    file: str
    adapter: Path
    model: str | None
    jsonl: bool
    field: str
    threshold: float
    batch: int
    max_length: int | None
    dtype: str
    threads: int | None
    json: bool

    def check(self) -> None:
        """Raises UserError naming the option, what it must be, and what it was."""
        if not 0 <= self.threshold <= 1:
            raise UserError(f"--threshold must be between 0 and 1, got {self.threshold}")
        for option, value in (
            ("--batch", self.batch),
            ("--max-length", self.max_length),
            ("--threads", self.threads),
        ):
            if value is not None and value < 1:
                raise UserError(f"{option} must be at least 1, got {value}")
        if self.threads is not None and self.threads > MOST_THREADS:
            raise UserError(f"--threads must be at most {MOST_THREADS}, got {self.threads}")
        if self.dtype not in DTYPES:
            raise UserError(
                f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}"
                f"{near_matches(self.dtype, DTYPES)}"
            )
        require_directory(f"--adapter {self.adapter}", self.adapter)
        if not _holds_guard(self.directory):
            raise UserError(
                f"--adapter {self.adapter}: holds no {HEAD_NAME}, which `lowrank-ext guard train` "
                "and GuardModel.save_pretrained write"
            )

    @property
    def directory(self) -> Path:
        """The guard's: --adapter, or where a run of `guard train` has it."""
        inside = self.adapter / INSIDE_GUARD_RUN
        return inside if not _holds_guard(self.adapter) and _holds_guard(inside) else self.adapter

    def base(self) -> ModelSource:
        """--model, else what the guard's run or files name."""
        if self.model is not None:
            return find_model(self.model)
        return find_base([find_adapter(self.directory)], None)


def _holds_guard(directory: Path) -> bool:
    return any(directory.glob(f"*{HEAD_NAME}*"))


def run(options: Options) -> None:
    """Prints one line for each text, in the order of the input."""
    options.check()
    lines = read_lines(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        scores = _score(options, lines) if lines else []
    except KeyboardInterrupt:
        message = "stopped; scores are printed once all are there"
        raise Interrupted(message, EXIT_INTERRUPTED) from None
    show = _as_json if options.json else _as_text
    for line, score in zip(lines, scores, strict=True):
        typer.echo(show(line, score, options.threshold))


def read_lines(options: Options) -> list[Line]:
    """The texts to score, by line; blank lines are left out. A file without a format is one text a
    line here, not a document."""
    is_stdin = options.file == STDIN
    name = "stdin" if is_stdin else options.file
    kind = TEXT if is_stdin else file_kind(name)
    with as_user_error(f"cannot read {name}", OSError, UnicodeDecodeError, EOFError, zlib.error):
        if is_stdin and sys.stdin is None:
            raise UserError("stdin is closed")
        with nullcontext(sys.stdin.buffer) if is_stdin else open_binary(name) as file:
            if kind == TEXT and not options.jsonl:
                return list(lines_of(file, name))
            records = read_file(file, name, JSON_LINES if options.jsonl else kind)
            return [Line(each.number, text_of(each, options.field)) for each in records]


def text_of(record: Record, field: str) -> str:
    """The text of a record, of `field`, or of prompt and response. Raises UserError naming the
    record when it has neither."""
    row = record.value
    if isinstance(row, dict):
        if isinstance(text := row.get(field), str):
            return text
        turns = {key: row[key] for key in ("prompt", "response") if row.get(key) is not None}
        if turns and all(isinstance(turn, str) for turn in turns.values()):
            return conversation(**turns)
    there = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    raise UserError(
        f"{record.where} has neither a text field {field!r} nor prompt and response (it has: "
        f"{there}); see --field"
    )


def _score(options: Options, lines: list[Line]) -> list[TextScore]:
    loaded = load_model(options.base(), resolve_dtype(options.dtype))
    model = load_guard(loaded, options.directory)
    with _progress(len(lines)) as advance, as_user_error("cannot score", ValueError):
        scores = screen(
            model,
            loaded.tokenizer,
            [line.text for line in lines],
            batch_size=options.batch,
            max_length=options.max_length,
            on_progress=advance,
        )
    for line, score in zip(lines, scores, strict=True):
        if not 0 <= score.unsafe <= 1:  # NaN
            raise UserError(
                f"line {line.number}: the score is not finite; "
                + why_not_finite(loaded.model, "try --dtype fp32")
            )
    return scores


def load_guard(loaded: LoadedModel, adapter: Path) -> GuardModel:
    """The guard over the loaded model, in evaluation mode."""
    with as_user_error("--adapter", OSError, ValueError, TypeError):
        model = GuardModel.from_pretrained(loaded.model, adapter, trainable=False)
    return model.eval()


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None] | None]:
    """A bar on stderr, if that is a terminal, so that stdout can be piped."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns: list[Any] = [TextColumn("scoring"), BarColumn(), MofNCompleteColumn()]
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("scoring", total=total)
        yield lambda finished: bar.advance(task, finished)


def _verdict(score: TextScore, threshold: float) -> str:
    return "unsafe" if score.unsafe >= threshold else "safe"


def _as_text(line: Line, score: TextScore, threshold: float) -> str:
    return f"{line.number}\t{score.unsafe:.4f}\t{_verdict(score, threshold)}"


def _as_json(line: Line, score: TextScore, threshold: float) -> str:
    return json.dumps(
        {
            "line": line.number,
            "score": score.unsafe,
            "verdict": _verdict(score, threshold),
            "category_scores": dict(score.categories),
            "tokens": score.num_tokens,
        }
    )
