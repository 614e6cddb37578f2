"""Progress: a bar on a terminal, a plain line every few seconds anywhere else."""

import io
import statistics
import sys
import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from lowrank_ext.cli.processes import is_main_process
from lowrank_ext.cli.training.progress import Progress

LINE_SECONDS = 5.0
_SPEED_WINDOW = 10
NON_TERMINAL_WIDTH = 120


class Display(Protocol):
    """Shows the progress of one method; a context manager."""

    def __enter__(self) -> "Display": ...

    def __exit__(self, *exception: object) -> None: ...

    def update(self, progress: Progress) -> None:
        """Shows the progress after a step."""

    def phase(self, text: str) -> None:
        """Shows what the run does outside of training steps."""


def escape_what_cannot_be_shown() -> None:
    """Makes stdout and stderr write characters that their encoding lacks as escapes (``\\xe9``):
    nothing that is printed can end a run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def make_console() -> Console:
    """A console on stdout, without a terminal wide enough for the table; the first of several
    processes alone prints."""
    if not is_main_process():
        return Console(quiet=True, force_terminal=False)
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=NON_TERMINAL_WIDTH)


def make_display(console: Console, title: str, steps: int) -> Display:
    """A bar on a terminal, else lines."""
    kind = BarDisplay if console.is_terminal else LineDisplay
    return kind(console, title, steps)


class BarDisplay:
    """A rich progress bar with step, loss, tokens/s and time left."""

    def __init__(self, console: Console, title: str, steps: int) -> None:
        self.bar = RichProgress(
            TextColumn("{task.description:<16}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task: TaskID = self.bar.add_task(title, total=steps, status="")

    def __enter__(self) -> "BarDisplay":
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()

    def update(self, progress: Progress) -> None:
        speed = progress.tokens_per_second(_SPEED_WINDOW)
        status = f"loss {progress.losses[-1]:.4f}  {speed:,.0f} tokens/s"
        self.bar.update(self.task, completed=progress.step, status=status)

    def phase(self, text: str) -> None:
        self.bar.update(self.task, status=text)


class LineDisplay:
    """Plain lines: for the first and the last step, every few seconds in between, and for every
    phase."""

    def __init__(self, console: Console, title: str, steps: int) -> None:
        self.console = console
        self.title = title
        self.steps = steps
        self.printed_at = float("-inf")

    def __enter__(self) -> "LineDisplay":
        return self

    def __exit__(self, *exception: object) -> None:
        return None

    def update(self, progress: Progress) -> None:
        now = time.monotonic()
        if now - self.printed_at < LINE_SECONDS and progress.step < self.steps:
            return
        self.printed_at = now
        speed = progress.tokens_per_second(_SPEED_WINDOW)
        left = (self.steps - progress.step) * statistics.mean(
            progress.step_seconds[-_SPEED_WINDOW:]
        )
        self._print(
            f"step {progress.step}/{self.steps}  loss {progress.losses[-1]:.4f}  "
            f"{speed:,.0f} tokens/s  {left:.0f} s left"
        )

    def phase(self, text: str) -> None:
        self._print(text)

    def _print(self, text: str) -> None:
        self.console.print(f"{self.title}  {text}", markup=False, soft_wrap=True)
