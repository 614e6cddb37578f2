"""The first examples as the model sees them."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from lowrank_ext.cli.data.rows import NOT_TRAINED, Rows

_OPEN, _CLOSE = "⟦", "⟧"


def preview(rows: Rows, tokenizer: Any, n: int, console: Console) -> None:
    """Prints n sequences, see `preview_sequences`."""
    preview_sequences(_sequences(rows, n), tokenizer, console)


def _sequences(rows: Rows, n: int) -> Iterator[tuple[str, list[int], list[bool]]]:
    for number in range(min(n, len(rows.pieces))):
        piece = rows.piece(number)
        trained = (piece["labels"] != NOT_TRAINED).tolist()
        yield f"example {number + 1}", piece["input_ids"].tolist(), trained


def preview_sequences(
    sequences: Iterable[tuple[str, list[int], list[bool]]], tokenizer: Any, console: Console
) -> None:
    """Prints sequences with their special tokens. What the loss does not count is grey on a
    terminal, and between ⟦ ⟧ elsewhere.

    Args:
        sequences: title, tokens, and whether the loss counts each.
    """
    in_color = console.is_terminal
    how = "grey" if in_color else f"between {_OPEN} {_CLOSE}"
    console.print(f"not trained on: {how}", markup=False)
    for title, ids, trained in sequences:
        console.print(f"\n{title}: {len(ids):,} tokens, {sum(trained):,} trained", markup=False)
        console.print(_shown(ids, trained, tokenizer, in_color), soft_wrap=True)


def _shown(ids: list[int], trained: list[bool], tokenizer: Any, in_color: bool) -> Text:
    text = Text()
    pairs = zip(ids, trained, strict=True)
    for is_trained, run in itertools.groupby(pairs, lambda pair: pair[1]):
        own = tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
        clean = _on_lines(own)
        if is_trained:
            text.append(clean)
        elif in_color:
            text.append(clean, style="dim")
        else:
            text.append(f"{_OPEN}{clean}{_CLOSE}")
    return text


def _on_lines(text: str) -> str:
    """Printable, but for line feeds and tabs."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )
