"""Which examples are held out."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from lowrank_ext.cli.data.formats import Example, TextExample
from lowrank_ext.cli.errors import UserError

HELD_OUT_FRACTION = 0.1
# Below this number the tail of each document is held out instead of whole documents.
MIN_DOCUMENTS_TO_SPLIT = 10

AnyExample = TypeVar("AnyExample", bound=Example)


def split_examples(
    examples: Sequence[AnyExample], fraction: float = HELD_OUT_FRACTION
) -> tuple[list[AnyExample], list[AnyExample]]:
    """(train, held-out), the first in its order. Whole examples are held out, that fraction of all
    characters, chosen by a hash of their content, so that the choice depends on neither the order
    of the files nor --seed, and equal ones stay together; of a few documents the tails."""
    are_texts = all(isinstance(example, TextExample) for example in examples)
    if are_texts and len(examples) < MIN_DOCUMENTS_TO_SPLIT:
        train = _parts_of_each(examples, fraction, tail=False)
        return train, _parts_of_each(examples, fraction, tail=True)
    keys = [example.key for example in examples]
    hashes = [hashlib.sha256(key.encode()).digest() for key in keys]
    wanted = fraction * sum(map(len, keys))
    held_out: list[int] = []
    size = 0
    for index in sorted(range(len(keys)), key=hashes.__getitem__):
        if held_out and size >= wanted and hashes[index] != hashes[held_out[-1]]:
            break
        held_out.append(index)
        size += len(keys[index])
    if len(held_out) == len(examples):
        raise UserError(
            f"{len(examples)} examples are too few to hold some out, or all are equal; name others "
            "by --eval"
        )
    left = set(held_out)
    train = [example for index, example in enumerate(examples) if index not in left]
    return train, [examples[index] for index in held_out]


def _parts_of_each(examples: Sequence[AnyExample], fraction: float, tail: bool) -> list[AnyExample]:
    parts: list[AnyExample] = []
    for example in examples:
        assert isinstance(example, TextExample)
        cut = round(len(example.text) * (1 - fraction))
        part = example.text[cut:] if tail else example.text[:cut]
        parts.append(replace(example, text=part))
    return parts
