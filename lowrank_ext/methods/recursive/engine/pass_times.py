"""Measured times of calls by their number of rows."""

import bisect

_MEMORY = 0.8  # weight of the past in a running mean


class PassTimes:
    """Running means of the time that a call of n rows takes, with straight lines between them."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._rows: list[int] = []

    def add(self, rows: int, seconds: float) -> None:
        """Note a call."""
        if rows in self._seconds:
            self._seconds[rows] = _MEMORY * self._seconds[rows] + (1 - _MEMORY) * seconds
        else:
            self._seconds[rows] = seconds
            bisect.insort(self._rows, rows)

    def seconds(self, rows: int) -> float:
        """Expected time of a call of ``rows`` rows; 0 before the first call."""
        if not self._rows or rows == 0:
            return 0.0
        at = bisect.bisect_left(self._rows, rows)
        if at == 0:
            return self._seconds[self._rows[0]]
        if at == len(self._rows):
            last = self._rows[-1]
            return self._seconds[last] * max(1.0, rows / last)
        low, high = self._rows[at - 1], self._rows[at]
        share = (rows - low) / (high - low)
        return (1 - share) * self._seconds[low] + share * self._seconds[high]
