"""How far reading and tokenizing is: a bar on a terminal, a line every few seconds elsewhere."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 5.0

Item = TypeVar("Item")


def counted(
    items: Iterable[Item], what: str, console: Console | None, total: int | None = None
) -> Iterator[Item]:
    """The items, while the console shows how many have come; without one they just come."""
    if console is None:
        yield from items
    elif console.is_terminal:
        yield from _with_bar(items, what, console, total)
    else:
        yield from _with_lines(items, what, console, total)


def _with_bar(
    items: Iterable[Item], what: str, console: Console, total: int | None
) -> Iterator[Item]:
    columns = (TextColumn(what), BarColumn(bar_width=24), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        for item in items:
            yield item
            bar.advance(task)


def _with_lines(
    items: Iterable[Item], what: str, console: Console, total: int | None
) -> Iterator[Item]:
    printed_at = time.monotonic()
    for number, item in enumerate(items, start=1):
        yield item
        if time.monotonic() - printed_at >= LINE_SECONDS:
            printed_at = time.monotonic()
            end = "" if total is None else f"/{total:,}"
            console.print(f"{what}  {number:,}{end}", markup=False, soft_wrap=True)
