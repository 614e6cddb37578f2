"""The examples of a command's data, and which of them are held out."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from rich.console import Console

from lowrank_ext.cli.data.datasets_library import has_evaluation_split
from lowrank_ext.cli.data.formats import Example, TextExample, to_example
from lowrank_ext.cli.data.options import DataOptions
from lowrank_ext.cli.data.progress import counted
from lowrank_ext.cli.data.records import Record, read_source
from lowrank_ext.cli.data.report import number_of
from lowrank_ext.cli.data.sources import EVALUATION, TRAIN, Source, find_sources
from lowrank_ext.cli.data.split import HELD_OUT_FRACTION, split_examples
from lowrank_ext.cli.errors import UserError

DEFAULT_SOURCE = "pydoc_data.topics"


@dataclass(frozen=True)
class Examples:
    """Examples before any tokenizer.

    Attributes:
        train_records, held_out_records: how many were read for each from every source; for
            `held_out` those of `train` where it is a part of them.
        left_out: files that were not read.
    """

    train: list[Example]
    held_out: list[Example]
    description: str
    train_records: Counter[str]
    held_out_records: Counter[str]
    left_out: list[str] = field(default_factory=list)

    @property
    def records(self) -> dict[str, int]:
        """How many were read from each source."""
        if self.held_out_records is self.train_records:
            return dict(self.train_records)
        return dict(self.train_records + self.held_out_records)


def load_examples(
    options: DataOptions,
    console: Console | None = None,
    read: Callable[[Record], Any] | None = None,
) -> Examples:
    """Training and evaluation examples: the latter those of --eval, of what --text itself has for
    evaluation (a validation split), or a part of --text. Raises UserError where there is none.

    Args:
        read: makes an example of a record; None: `to_example`.
    """
    read = read or (lambda record: to_example(record, options.field, options.format))
    if not options.text:
        return _default_examples(options, read, console)
    sources, left_out = find_sources("--text", options.text)
    counts: Counter[str] = Counter()
    held_out_counts: Counter[str] = Counter()
    train = list(
        _examples(_of_part(sources, TRAIN), read, TRAIN, counts, console, options.max_rows)
    )
    description = _described(", ".join(options.text), train)
    if not train:
        raise UserError(f"{description}: the text is too short: it holds no example")
    own = _of_part(sources, EVALUATION)
    if options.eval:
        left_out += [source.location for source in own if source.part]
        own, about = _evaluation_sources(options)
        left_out += about
    if own and not options.eval_split:
        found = _examples(own, read, EVALUATION, held_out_counts, console, options.max_rows)
        held_out = list(found)
    else:
        train, held_out = _split(train, options)
        held_out_counts = counts
    return Examples(train, held_out, description, counts, held_out_counts, left_out)


def default_documents() -> list[tuple[str, str]]:
    """(name, text) of Python's language topics, which need no file."""
    from pydoc_data import topics

    return [(f"{DEFAULT_SOURCE}: {name}", text) for name, text in topics.topics.items()]


def read_records(option: str, names: tuple[str, ...]) -> Iterator[Record]:
    """The records of all files, directories and datasets that an option names, without what these
    have for evaluation."""
    for source in _of_part(find_sources(option, names)[0], TRAIN):
        yield from read_source(source)


def _default_examples(
    options: DataOptions, read: Callable[[Record], Any], console: Console | None
) -> Examples:
    named = default_documents()[: options.max_rows]
    documents: list[Example] = [TextExample(text, where) for where, text in named]
    counts = Counter({DEFAULT_SOURCE: len(documents)})
    description = _described(DEFAULT_SOURCE, documents)
    if not options.eval:
        return Examples(*_split(documents, options), description, counts, counts)
    sources, left_out = _evaluation_sources(options)
    own: Counter[str] = Counter()
    held_out = list(_examples(sources, read, EVALUATION, own, console, options.max_rows))
    return Examples(documents, held_out, description, counts, own, left_out)


def _split(
    examples: Sequence[Example], options: DataOptions
) -> tuple[list[Example], list[Example]]:
    if options.eval_split == 0:
        raise UserError("--eval-split 0 leaves nothing to evaluate on; name data by --eval")
    return split_examples(examples, options.eval_split or HELD_OUT_FRACTION)


def _evaluation_sources(options: DataOptions) -> tuple[list[Source], list[str]]:
    """Those of --eval: of a directory with files for training and evaluation the latter."""
    sources, left_out = find_sources("--eval", options.eval)
    training = [source.location for source in sources if source.part == TRAIN]
    return [source for source in sources if source.part != TRAIN], left_out + training


def _of_part(sources: Sequence[Source], part: str) -> list[Source]:
    if part == TRAIN:
        return [source for source in sources if source.part != EVALUATION]
    return [
        source for source in sources if source.part == EVALUATION or has_evaluation_split(source)
    ]


def _examples(
    sources: Sequence[Source],
    read: Callable[[Record], Any],
    part: str,
    counts: Counter[str],
    console: Console | None,
    most: int | None,
) -> Iterator[Example]:
    records: Iterable[tuple[Source, Record]] = (
        (source, record) for source in sources for record in read_source(source, part)
    )
    for source, record in counted(islice(records, most), "reading", console):
        counts[source.location] += 1
        yield read(record)


def _described(names: str, examples: Sequence[Example]) -> str:
    are_texts = all(isinstance(example, TextExample) for example in examples)
    return f"{names}: {number_of(len(examples), 'documents' if are_texts else 'examples')}"
