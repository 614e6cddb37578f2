"""Ctrl-C: the first asks the run to stop after the current step, the second stops at once."""

import os
import signal
from types import FrameType
from typing import Any


class StopRequest:
    """While entered, SIGINT and SIGTERM set `requested` instead of ending the process."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # os.write, because the handler may run while the console holds its lock.
        os.write(2, b"\nstopping after this step; press Ctrl-C again to stop at once\n")
