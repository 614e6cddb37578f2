"""What a command trains and evaluates on: sources to rows."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from lowrank_ext.cli.data.chat import render
from lowrank_ext.cli.data.encoding import (
    CUT_OFF,
    NO_TOKEN,
    NO_TURN,
    Cuts,
    cut,
    encode,
    ends_of_parts,
    parts,
)
from lowrank_ext.cli.data.examples import Examples, load_examples
from lowrank_ext.cli.data.formats import TEXT, Example, TextExample
from lowrank_ext.cli.data.options import DataOptions
from lowrank_ext.cli.data.packing import one_each, pack
from lowrank_ext.cli.data.preview import preview
from lowrank_ext.cli.data.progress import counted
from lowrank_ext.cli.data.report import DataReport, PartReport
from lowrank_ext.cli.data.rows import Rows
from lowrank_ext.cli.data.support import why_not_packed
from lowrank_ext.cli.errors import UserError


@dataclass(frozen=True)
class Corpus:
    """Rows to train on and to evaluate on."""

    train: Rows
    held_out: Rows
    description: str
    report: DataReport
    tokenizer: Any = field(repr=False)

    @property
    def is_packed(self) -> bool:
        """Whether some row holds several documents."""
        return bool(self.train.num_packed or self.held_out.num_packed)

    @property
    def largest_id(self) -> int:
        """For `check_vocabulary`."""
        return max(self.train.largest_id, self.held_out.largest_id)

    def digest(self) -> str:
        """Identifies tokens, labels and positions, so that --resume notices changed data."""
        both = self.train.digest() + self.held_out.digest()
        return hashlib.sha256(both.encode()).hexdigest()

    def preview(self, n: int, console: Console) -> None:
        """Prints the first n examples as the model sees them."""
        preview(self.train, self.tokenizer, n, console)


def load_corpus(
    options: DataOptions,
    tokenizer: Any,
    model: Any = None,
    console: Console | None = None,
) -> Corpus:
    """Reads, splits, tokenizes, cuts and packs. Raises UserError for options, files and records
    that are not what they must be, and when nothing is left to train or to evaluate on.

    Args:
        model: the one that will be trained; rows are packed where it keeps documents apart.
        console: shows the progress.
    """
    options.check()
    examples = load_examples(options, console)
    packed, note = _packing(options, examples, model)
    train, train_report = _rows(examples.train, options, tokenizer, packed, "train", console)
    held_out, held_out_report = _rows(
        examples.held_out, options, tokenizer, packed, "held out", console
    )
    both = [train_report, held_out_report]
    report = DataReport(both, options.seq_len, examples.records, examples.left_out, note)
    for part, what in zip(both, ("to train", "to evaluate"), strict=True):
        _check_rows(part, what, report)
    return Corpus(train, held_out, examples.description, report, tokenizer)


def load_held_out(
    options: DataOptions,
    tokenizer: Any,
    model: Any = None,
    console: Console | None = None,
) -> tuple[Rows, DataReport]:
    """The rows to evaluate on alone, and what is to be said about them; otherwise as
    `load_corpus`, whose held-out rows they are."""
    options.check()
    examples = load_examples(options, console)
    packed, note = _packing(options, examples, model)
    rows, part = _rows(examples.held_out, options, tokenizer, packed, "held out", console)
    records = dict(examples.held_out_records)
    report = DataReport([part], options.seq_len, records, examples.left_out, note)
    _check_rows(part, "to evaluate", report)
    return rows, report


def _check_rows(part: PartReport, what: str, report: DataReport) -> None:
    """Raises UserError where the part has no row, with what would help."""
    if part.rows:
        return
    start = f"nothing is left {what} on"
    if CUT_OFF in part.dropped:
        told = f"{start} within --seq-len {report.seq_len}; give a larger --seq-len"
    elif NO_TURN in part.dropped:
        told = f"{start}: the conversations have no turn of the assistant; see --train-on"
    elif NO_TOKEN in part.dropped and TEXT not in part.formats:
        told = f"{start}: what would be trained on is empty; see --train-on"
    else:
        told = f"the text is too short: {start}; give more text or a smaller --seq-len"
    raise UserError(told + report.reasons())


def _packing(options: DataOptions, examples: Examples, model: Any) -> tuple[bool, str | None]:
    """Whether rows hold several documents, and what is to be said about it."""
    if options.packing == "off":
        return False, None
    both = (*examples.train, *examples.held_out)
    if options.packing == "auto" and not all(isinstance(each, TextExample) for each in both):
        return False, None
    reason = None if model is None else why_not_packed(model)
    if reason is None:
        return True, None
    if options.packing == "on":
        raise UserError(f"--packing on: {reason}; use off or auto")
    return False, f"rows are padded, not packed: {reason}"


def _rows(
    examples: Sequence[Example],
    options: DataOptions,
    tokenizer: Any,
    packed: bool,
    part: str,
    console: Console | None,
) -> tuple[Rows, PartReport]:
    total = sum(len(ends_of_parts(example)) or 1 for example in examples)
    rendered = (render(example, tokenizer, options.train_on) for example in examples)
    shown = counted(parts(rendered), f"tokenizing ({part})", console, total)
    pieces, cuts = cut(encode(shown, tokenizer), options.seq_len)
    order = pack(pieces.lengths, options.seq_len) if packed else one_each(len(pieces))
    rows = Rows(pieces, order)
    return rows, _part_report(part, rows, cuts, options.seq_len)


def _part_report(part: str, rows: Rows, cuts: Cuts, seq_len: int) -> PartReport:
    lengths = rows.pieces.lengths
    return PartReport(
        part=part,
        formats=dict(cuts.examples),
        pieces=len(rows.pieces),
        rows=len(rows),
        packed_rows=rows.num_packed,
        tokens=rows.num_tokens,
        trained_tokens=rows.num_trained,
        shortest=int(lengths.min()) if len(lengths) else 0,
        median=int(lengths.median()) if len(lengths) else 0,
        longest=int(lengths.max()) if len(lengths) else 0,
        truncated=cuts.truncated,
        truncated_tokens=cuts.truncated_tokens,
        dropped=dict(cuts.dropped),
        padding=1 - rows.num_tokens / max(1, len(rows) * seq_len),
    )
