"""The data of a run in numbers: the table before training, and a part of report.json."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rich import box
from rich.table import Table
from rich.text import Text

_MOST_SOURCES = 12  # listed below the table; report.json has all


@dataclass(frozen=True)
class PartsReport(ABC):
    """Numbers of the parts of some data, of records of any kind.

    Attributes:
        kind: what is counted, in the plural.
        columns: of the table, attributes of a part.
        headings: of columns that are not headed by their attribute.
        parts: they have columns, part, truncated, truncated_tokens and dropped.
        records: how many came from each source.
        left_out: files that were not read.
    """

    kind: ClassVar[str]
    columns: ClassVar[tuple[str, ...]]
    headings: ClassVar[dict[str, str]] = {}

    parts: Sequence[Any]
    seq_len: int
    records: dict[str, int]
    left_out: list[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-serializable."""
        return dataclasses.asdict(self)

    def table(self) -> Table:
        """A row for each part; below it what is to be said about them."""
        found = Table(
            caption=Text("\n".join(self.remarks())),
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
        )
        found.add_column("data")
        for name in self.columns:
            is_words = isinstance(getattr(self.parts[0], name), dict)
            heading = self.headings.get(name, name)
            found.add_column(heading, justify="left" if is_words else "right")
        for part in self.parts:
            found.add_row(part.part, *(_cell(getattr(part, name)) for name in self.columns))
        return found

    def remarks(self) -> list[str]:
        """The lines below the table."""
        of_parts = [line for part in self.parts for line in self.remarks_on(part)]
        return [*self.opening(), *of_parts, *(f"not read: {name}" for name in self.left_out)]

    @abstractmethod
    def opening(self) -> list[str]:
        """The first of them."""

    def remarks_on(self, part: Any) -> list[str]:
        """What was cut or left out."""
        remarks = []
        if part.truncated:
            remarks.append(
                f"{part.part}: {number_of(part.truncated, self.kind)} cut to "
                f"{self.seq_len:,} tokens, {number_of(part.truncated_tokens, 'tokens')} lost"
            )
        if part.dropped:
            remarks.append(f"{part.part}: left out: {counts(part.dropped)}")
        return remarks


def counts(found: dict[str, int]) -> str:
    """As words: `3 chat, 1 text`."""
    return ", ".join(f"{count:,} {name}" for name, count in found.items())


def number_of(count: int, kind: str) -> str:
    """As words: `1 example`, `2 examples`.

    Args:
        kind: what is counted, in the plural.
    """
    return f"{count:,} {kind.removesuffix('s') if count == 1 else kind}"


def _cell(value: int | float | dict[str, int]) -> str:
    if isinstance(value, dict):
        return counts(value)
    return f"{value:.1%}" if isinstance(value, float) else f"{value:,}"


@dataclass(frozen=True)
class PartReport:
    """Numbers of the training or of the held-out part.

    Attributes:
        formats: examples by format.
        pieces: sequences, of which a long document makes several.
        shortest, median, longest: tokens of a piece.
        truncated, truncated_tokens: examples that were cut, and tokens that this cost.
        dropped: sequences that were left out, by reason.
        padding: share of rows x seq_len that holds no token.
    """

    part: str
    formats: dict[str, int]
    pieces: int
    rows: int
    packed_rows: int
    tokens: int
    trained_tokens: int
    shortest: int
    median: int
    longest: int
    truncated: int
    truncated_tokens: int
    dropped: dict[str, int]
    padding: float


@dataclass(frozen=True)
class DataReport(PartsReport):
    """Of rows to train on.

    Attributes:
        note: what is to be said about packing.
    """

    kind = "examples"
    columns = (
        "formats",
        "rows",
        "packed_rows",
        "tokens",
        "trained_tokens",
        "shortest",
        "median",
        "longest",
        "padding",
    )
    headings: ClassVar[dict[str, str]] = {
        "formats": "examples",
        "packed_rows": "packed",
        "trained_tokens": "trained",
    }

    parts: list[PartReport]
    note: str | None

    def reasons(self) -> str:
        """Why sequences were left out, in brackets, or an empty string."""
        reasons = [f"{part.part}: {counts(part.dropped)}" for part in self.parts if part.dropped]
        return f" (left out, {'; '.join(reasons)})" if reasons else ""

    def opening(self) -> list[str]:
        lines = [
            f"rows have at most {self.seq_len:,} tokens; padding: share without a token if all had "
            "as many"
        ]
        if 1 < len(self.records) <= _MOST_SOURCES:
            found = self.records.items()
            lines += [f"{number_of(count, 'records')} of {name}" for name, count in found]
        return lines

    def remarks(self) -> list[str]:
        return super().remarks() + ([self.note] if self.note else [])
