"""Counts in messages."""

import pytest

from lowrank_ext.cli.data.report import number_of


@pytest.mark.parametrize(
    ("count", "kind", "words"),
    [
        (0, "rows", "0 rows"),
        (1, "rows", "1 row"),
        (1, "examples", "1 example"),
        (1234, "documents", "1,234 documents"),
    ],
)
def test_one_is_singular(count: int, kind: str, words: str) -> None:
    assert number_of(count, kind) == words
