"""What an engine has done: tokens, passes, exits, and where its time went."""

import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

PARTS = ("block", "head", "copy", "embedding")


@dataclass
class Metrics:
    """Counts since the engine was made, or since ``reset_metrics``.

    Attributes:
        tokens: new tokens of all requests.
        seconds: time in ``step``.
        seconds_in: of it in block passes, in the head, in copying states of exited tokens, in the
            embedding; the rest is scheduling and sampling.
        passes: block passes.
        rows: their rows by kind: "decode", "prompt", "backfill" (skipped loops of earlier tokens),
            "finished" (rows of ended sequences that a static batch still computes).
        head_calls, head_rows: calls of the head, and their rows.
        idle_rows: slots without a row, summed over passes.
        exits: number of tokens by exit loop, 0-based.
        first_token_seconds: time to the first token of each request.
        rejected: drafted tokens that the deeper loops did not confirm (lossless mode).
    """

    tokens: int = 0
    seconds: float = 0.0
    seconds_in: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    passes: int = 0
    rows: Counter[str] = field(default_factory=Counter)
    head_calls: int = 0
    head_rows: int = 0
    idle_rows: int = 0
    exits: Counter[int] = field(default_factory=Counter)
    first_token_seconds: list[float] = field(default_factory=list)
    rejected: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def rows_per_pass(self) -> float:
        return sum(self.rows.values()) / self.passes if self.passes else 0.0

    @property
    def mean_loops(self) -> float:
        """Loops per token, exits counted."""
        total = sum(self.exits.values())
        return sum((loop + 1) * n for loop, n in self.exits.items()) / total if total else 0.0

    @property
    def median_first_token_seconds(self) -> float | None:
        times = self.first_token_seconds
        return statistics.median(times) if times else None

    def shares(self) -> dict[str, float]:
        """Share of the time in each part; "backfill" is the block's by its share of rows; "other"
        is the rest."""
        if not self.seconds:
            return {}
        shares = {part: self.seconds_in[part] / self.seconds for part in PARTS}
        rows = sum(self.rows.values())
        shares["backfill"] = shares["block"] * self.rows["backfill"] / rows if rows else 0.0
        shares["block"] -= shares["backfill"]
        shares["other"] = max(0.0, 1 - sum(shares.values()))
        return shares

    @contextmanager
    def timed(self, part: str, clock: Callable[[], float]) -> Iterator[None]:
        """Adds the block's time to the part."""
        started = clock()
        try:
            yield
        finally:
            self.seconds_in[part] += clock() - started
