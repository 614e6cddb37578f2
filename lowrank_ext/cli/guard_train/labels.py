"""Labelled records: texts with whether they are unsafe, and of which categories."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import Dataset

from lowrank_ext.cli.data import DataOptions
from lowrank_ext.cli.data.examples import load_examples
from lowrank_ext.cli.data.progress import counted
from lowrank_ext.cli.data.records import Record
from lowrank_ext.cli.data.report import PartsReport, counts
from lowrank_ext.cli.errors import UserError, near_matches
from lowrank_ext.cli.guard import text_of
from lowrank_ext.files import quoted

ANY = "any"  # the category of data without categories
SCORE = 0.5  # a score from here on is unsafe, as `lowrank-ext guard` calls it
_VERDICTS = {"unsafe": True, "safe": False}
_KEYS = ("label", "unsafe", "score", "categories")

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class LabelledExample:
    """A text and its label.

    Attributes:
        categories: that it belongs to; None where the record does not say.
    """

    text: str
    unsafe: bool
    categories: tuple[str, ...] | None
    where: str
    format: str = "labelled"

    @property
    def key(self) -> str:
        """What the held-out split hashes."""
        return self.text


def to_labelled(record: Record, field: str) -> LabelledExample:
    """The example in a record. Raises UserError naming the record for one without a text, without a
    label, or with labels that contradict each other.

    Args:
        field: the key of the text; without it prompt and response, as in `lowrank-ext guard`.
    """
    text, row, where = text_of(record, field), record.value, record.where
    if not isinstance(row, dict):
        raise UserError(f"{where} must be a record with a label, got text")
    said = {key: row[key] for key in _KEYS if row.get(key) is not None}
    if not said:
        there = ", ".join(
            quoted(key) + ("" if key == field else near_matches(str(key), _KEYS)) for key in row
        )
        raise UserError(
            f"{where} has no label: its keys are {there}; known are 'label' (unsafe or safe, true "
            "or false), 'unsafe', 'score' and 'categories'"
        )
    verdicts = {key: _verdict(key, value, where) for key, value in said.items()}
    if len(set(verdicts.values())) > 1:
        shown = ", ".join(f"{key} {'unsafe' if bad else 'safe'}" for key, bad in verdicts.items())
        raise UserError(f"{where}: its labels contradict each other: {shown}")
    categories = _categories(said["categories"], where) if "categories" in said else None
    return LabelledExample(text, next(iter(verdicts.values())), categories, where)


def _verdict(key: str, value: Any, where: str) -> bool:
    """Whether a label says unsafe."""
    if key == "categories":
        return bool(_categories(value, where))
    if key == "score":
        if isinstance(value, str):  # CSV has nothing else
            value = _number(value)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise UserError(f"{where}: score must be a number from 0 to 1, got {quoted(value)}")
        return value >= SCORE
    found = _flag(value)
    if found is None:
        raise UserError(
            f"{where}: {key} must be unsafe or safe, true or false, 1 or 0, got "
            f"{quoted(value)}{near_matches(str(value), list(_VERDICTS))}"
        )
    return found


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _flag(value: Any) -> bool | None:
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    if not isinstance(value, str):
        return None
    word = value.strip().lower()
    return {**_VERDICTS, "true": True, "1": True, "false": False, "0": False}.get(word)


def _categories(value: Any, where: str) -> tuple[str, ...]:
    """The categories of a record: a list of names, an object of name and whether, or names
    separated by commas."""
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",") if name.strip()]
    if isinstance(value, dict):
        flags = {name: _flag(flag) for name, flag in value.items() if flag is not None}
        if odd := [name for name, flag in flags.items() if flag is None]:
            raise UserError(f"{where}: categories: {quoted(odd[0])} must be true or false")
        value = [name for name, flag in flags.items() if flag]
    if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
        raise UserError(
            f"{where}: categories must be a list of names, or an object of names and true or "
            f"false, got {quoted(value)}"
        )
    return tuple(dict.fromkeys(value))


class LabelledRows(Dataset[Row]):
    """Tokens of texts and their labels; a row is `input_ids`, a list, and `categories`, bool [C].

    Args:
        tokens: of each text.
        labels: bool [N, C].
    """

    def __init__(self, tokens: list[npt.NDArray[np.int32]], labels: Tensor) -> None:
        self.tokens, self.labels = tokens, labels

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Row:
        return {"input_ids": self.tokens[index].tolist(), "categories": self.labels[index]}

    @property
    def unsafe(self) -> Tensor:
        """bool [N]."""
        return self.labels.any(1)


@dataclass(frozen=True)
class PartOfTexts:
    """Numbers of the training or of the held-out part.

    Attributes:
        truncated, truncated_tokens: texts that were cut to --seq-len, and tokens that this cost.
        dropped: texts that were left out, by reason.
        categories: number of texts of each.
    """

    part: str
    texts: int
    unsafe: int
    tokens: int
    shortest: int
    median: int
    longest: int
    truncated: int
    truncated_tokens: int
    dropped: dict[str, int]
    categories: dict[str, int]


@dataclass(frozen=True)
class TextsReport(PartsReport):
    """Of labelled texts."""

    kind = "texts"
    columns = ("texts", "unsafe", "tokens", "shortest", "median", "longest")

    parts: list[PartOfTexts]

    def opening(self) -> list[str]:
        return [f"texts have at most {self.seq_len:,} tokens"]

    def remarks_on(self, part: PartOfTexts) -> list[str]:
        has_categories = list(part.categories) != [ANY]
        categories = [f"{part.part}: {counts(part.categories)}"] if has_categories else []
        return categories + super().remarks_on(part)


@dataclass(frozen=True)
class LabelledTexts:
    """Texts to train on and to evaluate on.

    Attributes:
        categories: names, in the order of the labels' columns.
    """

    train: LabelledRows
    held_out: LabelledRows
    categories: tuple[str, ...]
    description: str
    report: TextsReport

    @property
    def largest_id(self) -> int:
        """For `check_vocabulary`."""
        both = (*self.train.tokens, *self.held_out.tokens)
        return max(int(tokens.max()) for tokens in both)

    def digest(self) -> str:
        """Identifies tokens and labels of both parts, so that --resume notices changed data."""
        found = hashlib.sha256(json.dumps(self.categories).encode())
        for rows in (self.train, self.held_out):
            for tokens in rows.tokens:
                found.update(f"{len(tokens)}".encode())
                found.update(tokens.tobytes())
            found.update(rows.labels.numpy().tobytes())
        return found.hexdigest()


def load_labelled(
    options: DataOptions, tokenizer: Any, console: Console | None = None
) -> LabelledTexts:
    """Reads, splits, tokenizes and cuts. Raises UserError for records without a text or a label,
    and where a part has no safe or no unsafe text."""
    examples: Any = load_examples(
        options, console, lambda record: to_labelled(record, options.field)
    )
    both: list[LabelledExample] = [*examples.train, *examples.held_out]
    categories = _names(both)
    made = [
        _rows(own, categories, tokenizer, options.seq_len, name, console)
        for name, own in (("train", examples.train), ("held out", examples.held_out))
    ]
    for _, part in made:
        if part.unsafe in (0, part.texts):
            kind = "safe" if part.unsafe else "unsafe"
            raise UserError(
                f"the {part.part} part has no {kind} text of {part.texts}, and needs both; "
                "give more, or name held-out texts by --eval"
            )
    (train, first), (held_out, second) = made
    report = TextsReport([first, second], options.seq_len, examples.records, examples.left_out)
    return LabelledTexts(train, held_out, categories, examples.description, report)


def _names(examples: Sequence[LabelledExample]) -> tuple[str, ...]:
    """The categories of all, sorted; `any` alone where no record has any. Raises UserError for
    an unsafe text without one where others have them."""
    names = sorted({name for each in examples for name in each.categories or ()})
    if not names:
        return (ANY,)
    for each in examples:
        if each.unsafe and not each.categories:
            raise UserError(
                f"{each.where} is unsafe but of no category, and other records have categories; "
                "name one"
            )
    return tuple(names)


def _rows(
    examples: Sequence[LabelledExample],
    categories: tuple[str, ...],
    tokenizer: Any,
    seq_len: int,
    part: str,
    console: Console | None,
) -> tuple[LabelledRows, PartOfTexts]:
    tokens, labels, dropped, lost = [], [], Counter[str](), []
    column = {name: index for index, name in enumerate(categories)}
    for example in counted(examples, f"tokenizing ({part})", console, len(examples)):
        ids = tokenizer(example.text, verbose=False)["input_ids"]  # as screen does
        if not ids:
            dropped["no token"] += 1
            continue
        tokens.append(np.array(ids[:seq_len], dtype=np.int32))
        lost.append(max(0, len(ids) - seq_len))
        row = torch.zeros(len(categories), dtype=torch.bool)
        for name in example.categories or ((ANY,) if example.unsafe else ()):
            row[column[name]] = True
        labels.append(row)
    if not tokens:
        raise UserError(f"the {part} part has no text with a token")
    rows = LabelledRows(tokens, torch.stack(labels))
    lengths = [len(each) for each in tokens]
    report = PartOfTexts(
        part=part,
        texts=len(rows),
        unsafe=int(rows.unsafe.sum()),
        tokens=sum(lengths),
        shortest=min(lengths),
        median=int(np.median(lengths)),
        longest=max(lengths),
        truncated=sum(each > 0 for each in lost),
        truncated_tokens=sum(lost),
        dropped=dict(dropped),
        categories=dict(zip(categories, rows.labels.sum(0).tolist(), strict=True)),
    )
    return rows, report
