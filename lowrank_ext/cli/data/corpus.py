"""What a command trains and evaluates on: sources to rows."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console

from lowrank_ext.cli.data.chat import TRAIN_ON, render
from lowrank_ext.cli.data.datasets_library import has_evaluation_split
from lowrank_ext.cli.data.encoding import Cuts, cut, encode
from lowrank_ext.cli.data.formats import FORMATS, Example, TextExample, to_example
from lowrank_ext.cli.data.packing import one_each, pack
from lowrank_ext.cli.data.preview import preview
from lowrank_ext.cli.data.progress import counted
from lowrank_ext.cli.data.records import Record, read_source
from lowrank_ext.cli.data.report import DataReport, PartReport
from lowrank_ext.cli.data.rows import Rows
from lowrank_ext.cli.data.sources import Source, check_source, find_sources
from lowrank_ext.cli.data.split import split_examples
from lowrank_ext.cli.data.support import why_not_packed
from lowrank_ext.cli.errors import UserError, near_matches

PACKING = ("auto", "on", "off")
DEFAULT_SOURCE = "pydoc_data.topics"


@dataclass(frozen=True)
class DataOptions:
    """The options that say what a command reads, and what of it it trains on.

    Attributes:
        text: files, directories, datasets; without one Python's language topics.
        eval: the same for evaluation; without one a validation split, or a part of `text`.
        field: the key of plain text.
        seq_len: the most tokens of a row.
        train_on: auto, all, completion or assistant.
        packing: auto, on or off.
        format: auto, or that of all records.
    """

    text: tuple[str, ...]
    eval: tuple[str, ...] = ()
    field: str = "text"
    seq_len: int = 256
    train_on: str = "auto"
    packing: str = "auto"
    format: str = "auto"

    def check(self) -> None:
        """Raises UserError naming the option, what it must be, and what it was."""
        if self.seq_len < 2:
            raise UserError(f"--seq-len must be at least 2, got {self.seq_len}")
        for option, value, known in (
            ("--train-on", self.train_on, TRAIN_ON),
            ("--packing", self.packing, PACKING),
            ("--format", self.format, FORMATS),
        ):
            if value not in known:
                raise UserError(
                    f"{option} must be one of {', '.join(known)}, got {value!r}"
                    f"{near_matches(value, known)}"
                )
        for option, names in (("--text", self.text), ("--eval", self.eval)):
            for name in names:
                check_source(option, name)


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


@dataclass(frozen=True)
class Examples:
    """The examples of a command's data, before any tokenizer."""

    train: list[Example]
    held_out: list[Example]
    description: str
    left_out: list[str]


def load_corpus(
    options: DataOptions,
    tokenizer: Any,
    model_config: Any = None,
    console: Console | None = None,
) -> Corpus:
    """Reads, splits, tokenizes, cuts and packs. Raises UserError for options, files and records
    that are not what they must be, and when nothing is left to train or to evaluate on.

    Args:
        model_config: of the model that will be trained, which must keep packed documents apart.
        console: shows the progress.
    """
    options.check()
    examples = load_examples(options, console)
    packed, note = _packing(options, examples, model_config)
    train, train_report = _rows(examples.train, options, tokenizer, packed, "train", console)
    held_out, held_out_report = _rows(
        examples.held_out, options, tokenizer, packed, "held out", console
    )
    report = DataReport([train_report, held_out_report], options.seq_len, examples.left_out, note)
    for rows, part in ((train, "to train"), (held_out, "to evaluate")):
        if not len(rows):
            raise UserError(
                f"the text is too short: nothing is left {part} on; give more text or a smaller "
                f"--seq-len{report.reasons()}"
            )
    return Corpus(train, held_out, examples.description, report, tokenizer)


def load_examples(options: DataOptions, console: Console | None = None) -> Examples:
    """Training and evaluation examples: those of --eval, of a validation split, or held out of
    --text."""
    if not options.text:
        documents: list[Example] = [TextExample(text, where) for where, text in default_documents()]
        return _with_held_out(options, documents, DEFAULT_SOURCE, [], console)
    sources, left_out = find_sources("--text", options.text)
    description = ", ".join(options.text)
    train = list(_examples(sources, options, "train", console))
    own = [] if options.eval else [each for each in sources if has_evaluation_split(each)]
    if own:
        held_out = list(_examples(own, options, "evaluation", console))
        return Examples(train, held_out, _described(description, train), left_out)
    return _with_held_out(options, train, description, left_out, console)


def default_documents() -> list[tuple[str, str]]:
    """(name, text) of Python's language topics, which need no file."""
    from pydoc_data import topics

    return [(f"{DEFAULT_SOURCE}: {name}", text) for name, text in topics.topics.items()]


def read_records(option: str, names: tuple[str, ...], part: str = "train") -> Iterator[Record]:
    """The records of all files, directories and datasets that an option names."""
    for source in find_sources(option, names)[0]:
        yield from read_source(source, part)


def _with_held_out(
    options: DataOptions,
    train: list[Example],
    description: str,
    left_out: list[str],
    console: Console | None,
) -> Examples:
    described = _described(description, train)
    if not train:
        raise UserError(f"{description}: the text is too short: it holds no example")
    if not options.eval:
        return Examples(*split_examples(train), described, left_out)
    sources, about = find_sources("--eval", options.eval)
    held_out = list(_examples(sources, options, "evaluation", console))
    return Examples(train, held_out, described, left_out + about)


def _described(names: str, examples: Sequence[Example]) -> str:
    are_texts = all(isinstance(example, TextExample) for example in examples)
    return f"{names}: {len(examples):,} {'documents' if are_texts else 'examples'}"


def _examples(
    sources: Sequence[Source], options: DataOptions, part: str, console: Console | None
) -> Iterator[Example]:
    records: Iterable[Record] = (
        record for source in sources for record in read_source(source, part)
    )
    for record in counted(records, "reading", console):
        yield to_example(record, options.field, options.format)


def _packing(
    options: DataOptions, examples: Examples, model_config: Any
) -> tuple[bool, str | None]:
    """Whether rows hold several documents, and what is to be said about it."""
    if options.packing == "off":
        return False, None
    both = (*examples.train, *examples.held_out)
    if options.packing == "auto" and not all(isinstance(each, TextExample) for each in both):
        return False, None
    reason = None if model_config is None else why_not_packed(model_config)
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
    shown = counted(examples, f"tokenizing ({part})", console, len(examples))
    rendered = (render(example, tokenizer, options.train_on) for example in shown)
    pieces, cuts = cut(encode(rendered, tokenizer), options.seq_len)
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
        shortest=int(lengths.min(initial=seq_len)),
        median=int(np.median(lengths)) if len(lengths) else 0,
        longest=int(lengths.max(initial=0)),
        truncated=cuts.truncated,
        truncated_tokens=cuts.truncated_tokens,
        dropped=dict(cuts.dropped),
        padding=1 - rows.num_tokens / max(1, len(rows) * seq_len),
    )
