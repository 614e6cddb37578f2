"""The first examples as the model sees them."""

import itertools
from typing import Any

from rich.console import Console
from rich.text import Text

from lowrank_ext.cli.data.rows import NOT_TRAINED, Rows

_OPEN, _CLOSE = "⟦", "⟧"


def preview(rows: Rows, tokenizer: Any, n: int, console: Console) -> None:
    """Prints n sequences with their special tokens. What the loss does not count is grey on a
    terminal, and between ⟦ ⟧ elsewhere."""
    in_color = console.is_terminal
    how = "grey" if in_color else f"between {_OPEN} {_CLOSE}"
    console.print(f"not trained on: {how}", markup=False)
    for number in range(min(n, len(rows.pieces))):
        piece = rows.piece(number)
        ids, labels = piece["input_ids"].tolist(), piece["labels"].tolist()
        trained = sum(label != NOT_TRAINED for label in labels)
        console.print(
            f"\nexample {number + 1}: {len(ids):,} tokens, {trained:,} trained", markup=False
        )
        console.print(_shown(ids, labels, tokenizer, in_color), soft_wrap=True)


def _shown(ids: list[int], labels: list[int], tokenizer: Any, in_color: bool) -> Text:
    text = Text()
    pairs = zip(ids, labels, strict=True)
    for trained, run in itertools.groupby(pairs, lambda pair: pair[1] != NOT_TRAINED):
        own = tokenizer.decode([token for token, _ in run], skip_special_tokens=False)
        clean = _on_lines(own)
        if trained:
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
