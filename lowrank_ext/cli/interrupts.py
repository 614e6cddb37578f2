"""Ctrl-C asks a run to stop after the current step, SIGTERM stops it in the middle of one; a second
signal ends it without saving."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lowrank_ext.cli.processes import is_main_process, largest, num_processes

EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM

_MESSAGES = {
    signal.SIGINT: b"\nstopping after this step; press Ctrl-C again to stop at once\n",
    signal.SIGTERM: b"\nstopping and saving\n",
}

# torchrun sends Ctrl-C to its processes, which the terminal has sent them too.
_SENT_TWICE_SECONDS = 1.0


class StoppedAtOnce(KeyboardInterrupt):
    """A second signal: what runs is left as it is."""

    def __init__(self, exit_code: int = EXIT_INTERRUPTED) -> None:
        super().__init__()
        self.exit_code = exit_code


class Terminated(StoppedAtOnce):
    """SIGTERM, in a part of the run that can be left at any point."""


class StopRequest:
    """While entered, SIGINT and SIGTERM set `requested` instead of ending the process.

    Attributes:
        requested: whether the run is to stop.
        exit_code: that of the process then.
    """

    def __init__(self) -> None:
        self.requested = False
        self.exit_code = EXIT_INTERRUPTED
        self._may_leave = False
        self._heard_at = float("-inf")
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def terminated(self) -> bool:
        """Whether SIGTERM has come."""
        return self.exit_code == EXIT_TERMINATED

    @contextmanager
    def leaving_at_any_point(self) -> Iterator[None]:
        """A block that SIGTERM leaves by `Terminated`, between two instructions of Python: a long
        operation in C is waited for. Raises it at once if SIGTERM has come before."""
        if self.terminated:
            raise Terminated(self.exit_code)
        with self._set(True):
            yield

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """A block that SIGTERM does not leave before its end."""
        with self._set(False):
            yield
        if self.terminated and self._may_leave:
            raise Terminated(self.exit_code)

    @contextmanager
    def _set(self, may_leave: bool) -> Iterator[None]:
        before, self._may_leave = self._may_leave, may_leave
        try:
            yield
        finally:
            self._may_leave = before

    def agree(self) -> bool:
        """Whether any process of the run is to stop; then all of them know, and why."""
        code = largest(self.exit_code if self.requested else 0)
        if code:
            self.requested, self.exit_code = True, code
        return self.requested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first_sigterm = number == signal.SIGTERM and not self.terminated
        if self.requested and not first_sigterm:
            if num_processes() > 1 and time.monotonic() - self._heard_at < _SENT_TWICE_SECONDS:
                return
            raise StoppedAtOnce(self.exit_code)
        self.requested = True
        self._heard_at = time.monotonic()
        if is_main_process():
            # os.write, because the handler may run while the console holds its lock.
            os.write(2, _MESSAGES[signal.Signals(number)])
        if number == signal.SIGTERM:
            self.exit_code = EXIT_TERMINATED
            if self._may_leave:
                raise Terminated(self.exit_code)


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """SIGTERM leaves the block by `Terminated`, between two instructions of Python, so that what is
    temporary is removed."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise Terminated(EXIT_TERMINATED)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
