"""The data of a run in numbers: the table before training, and a part of report.json."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

_MOST_SOURCES = 12  # listed below the table; report.json has all


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
class DataReport:
    """Both parts.

    Attributes:
        records: how many came from each source.
        left_out: files that were not read.
        note: what is to be said about packing.
    """

    parts: list[PartReport]
    seq_len: int
    records: dict[str, int]
    left_out: list[str]
    note: str | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-serializable."""
        return dataclasses.asdict(self)

    def reasons(self) -> str:
        """Why sequences were left out, in brackets, or an empty string."""
        reasons = [f"{part.part}: {_counts(part.dropped)}" for part in self.parts if part.dropped]
        return f" (left out, {'; '.join(reasons)})" if reasons else ""

    def table(self) -> Table:
        """A row for each part; below it what was cut or left out."""
        found = Table(
            caption=Text("\n".join(self._remarks())),
            caption_justify="left",
            box=box.SIMPLE_HEAD,
            show_edge=False,
        )
        names = ("data", "examples", "rows", "packed", "tokens", "trained", "shortest", "median")
        for index, name in enumerate((*names, "longest", "padding")):
            found.add_column(name, justify="right" if index > 1 else "left")
        for part in self.parts:
            found.add_row(
                part.part,
                _counts(part.formats),
                f"{part.rows:,}",
                f"{part.packed_rows:,}",
                f"{part.tokens:,}",
                f"{part.trained_tokens:,}",
                f"{part.shortest:,}",
                f"{part.median:,}",
                f"{part.longest:,}",
                f"{part.padding:.1%}",
            )
        return found

    def _remarks(self) -> list[str]:
        remarks = [
            f"rows have at most {self.seq_len:,} tokens; padding: share without a token if all had "
            "as many"
        ]
        if 1 < len(self.records) <= _MOST_SOURCES:
            remarks += [f"{count:,} records of {name}" for name, count in self.records.items()]
        for part in self.parts:
            if part.truncated:
                remarks.append(
                    f"{part.part}: {part.truncated:,} examples cut to {self.seq_len:,} tokens, "
                    f"{part.truncated_tokens:,} tokens lost"
                )
            if part.dropped:
                remarks.append(f"{part.part}: left out: {_counts(part.dropped)}")
        remarks += [f"not read: {name}" for name in self.left_out]
        return remarks + ([self.note] if self.note else [])


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())
