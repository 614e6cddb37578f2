"""Preference pairs: records to the tokens that TRL's DPOTrainer takes."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.console import Console

from lowrank_ext.cli.data import DataOptions, PreferenceExample
from lowrank_ext.cli.data.chat import COMPLETION, Rendered, render
from lowrank_ext.cli.data.encoding import Encoded, encode, parts
from lowrank_ext.cli.data.examples import load_examples
from lowrank_ext.cli.data.formats import ChatExample, CompletionExample, Example
from lowrank_ext.cli.data.progress import counted
from lowrank_ext.cli.data.report import PartsReport, counts
from lowrank_ext.cli.errors import UserError

SAME, NO_ANSWER, LONG_PROMPT, SAME_BEGINNING = (
    "chosen equals rejected",
    "an answer has no token",
    "the prompt alone has --seq-len tokens",
    "the answers differ beyond --seq-len alone",
)
_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")  # TRL's names


@dataclass(frozen=True)
class PartOfPairs:
    """Numbers of the training or of the held-out part.

    Attributes:
        tokens: of all sequences, two for a pair.
        shortest, median, longest: tokens of a sequence, prompt and answer.
        prompt, chosen, rejected: their median lengths.
        truncated, truncated_tokens: pairs that were cut, and tokens that this cost.
        dropped: pairs that were left out, by reason.
    """

    part: str
    pairs: int
    tokens: int
    shortest: int
    median: int
    longest: int
    prompt: int
    chosen: int
    rejected: int
    truncated: int
    truncated_tokens: int
    dropped: dict[str, int]


@dataclass(frozen=True)
class PairsReport(PartsReport):
    """Of pairs."""

    kind = "pairs"
    columns = ("pairs", "tokens", "shortest", "median", "longest", "prompt", "chosen", "rejected")

    parts: list[PartOfPairs]

    def opening(self) -> list[str]:
        return [
            f"tokens of a sequence, at most {self.seq_len:,}; of prompt, chosen and rejected the "
            "medians"
        ]


@dataclass(frozen=True)
class Pairs:
    """Pairs to train on and to evaluate on: datasets of the `datasets` library, whose rows are
    `prompt_ids`, `chosen_ids` and `rejected_ids`."""

    train: Any
    held_out: Any
    description: str
    report: PairsReport

    @property
    def largest_id(self) -> int:
        """For `check_vocabulary`."""
        both = (self.train, self.held_out)
        return max(int(values.max(initial=0)) for part in both for values in _flat(part))

    def sequences(self, count: int) -> Iterator[tuple[str, list[int], list[bool]]]:
        """Title, tokens, and whether they belong to the answer, of the first pairs."""
        for number, row in enumerate(self.train.select(range(min(count, len(self.train)))), 1):
            for name in ("chosen", "rejected"):
                prompt, answer = row["prompt_ids"], row[f"{name}_ids"]
                is_answer = [False] * len(prompt) + [True] * len(answer)
                yield f"pair {number}, {name}", prompt + answer, is_answer

    def digest(self) -> str:
        """Identifies the tokens of both parts, so that --resume notices changed data."""
        found = hashlib.sha256()
        for part in (self.train, self.held_out):
            for values in _flat(part):
                found.update(f"{values.shape}".encode())
                found.update(values.tobytes())
        return found.hexdigest()


def _flat(part: Any) -> Iterator[np.ndarray[Any, Any]]:
    """The tokens of each column back to back, and their lengths."""
    for name in _COLUMNS:
        for chunk in part.data.column(name).chunks:
            yield chunk.flatten().to_numpy(zero_copy_only=False)
            yield chunk.value_lengths().to_numpy(zero_copy_only=False)


def load_pairs(options: DataOptions, tokenizer: Any, console: Console | None = None) -> Pairs:
    """Reads, splits, tokenizes and cuts. Raises UserError for files and records that are no pairs,
    and when nothing is left to train or to evaluate on."""
    examples = load_examples(options, console)
    made = [
        _Maker(_checked(own), options.seq_len, tokenizer, part, console)
        for part, own in (("train", examples.train), ("held out", examples.held_out))
    ]
    for maker, what in zip(made, ("to train", "to evaluate"), strict=True):
        if not maker.rows:
            reasons = f" (left out: {counts(maker.dropped)})" if maker.dropped else ""
            raise UserError(f"no pair is left {what} on; give more, or a larger --seq-len{reasons}")
    train, held_out = (maker.dataset() for maker in made)
    report = PairsReport(
        [maker.report() for maker in made], options.seq_len, examples.records, examples.left_out
    )
    return Pairs(train, held_out, examples.description, report)


def _checked(examples: Sequence[Example]) -> list[PreferenceExample]:
    """Raises UserError for what is no pair; records that are none were refused when read."""
    pairs = []
    for example in examples:
        if not isinstance(example, PreferenceExample):
            raise UserError(
                f"{example.where} is {example.format}, dpo needs records of 'chosen' and "
                "'rejected', with a 'prompt' or not; lowrank-ext finetune trains on text"
            )
        pairs.append(example)
    return pairs


@dataclass
class _Row:
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


@dataclass
class _Maker:
    """The rows of one part, and what was cut or left out for them."""

    pairs: list[PreferenceExample]
    seq_len: int
    tokenizer: Any
    part: str
    console: Console | None
    rows: list[_Row] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    truncated_tokens: int = 0

    def __post_init__(self) -> None:
        encoded = encode(parts(self._rendered()), self.tokenizer)
        for chosen, rejected in zip(encoded, encoded, strict=True):
            self._add(chosen, rejected)

    def _rendered(self) -> Iterator[Rendered]:
        """Of each pair the chosen sequence, then the rejected one."""
        shown = counted(self.pairs, f"tokenizing ({self.part})", self.console, len(self.pairs))
        for pair in shown:
            if pair.chosen == pair.rejected:
                self.dropped[SAME] += 1
                continue
            for example in both_answers(pair):
                yield render(example, self.tokenizer, COMPLETION)

    def _add(self, chosen: Encoded, rejected: Encoded) -> None:
        if not (any(chosen.trained) and any(rejected.trained)):
            self.dropped[NO_ANSWER] += 1
            return
        # Where the answers begin: with the first token that is no token of both sequences.
        start = min(
            chosen.trained.index(True),
            rejected.trained.index(True),
            _common_prefix(chosen.ids, rejected.ids),
        )
        if start >= self.seq_len:
            self.dropped[LONG_PROMPT] += 1
            return
        answers = [each.ids[start : self.seq_len] for each in (chosen, rejected)]
        if answers[0] == answers[1]:
            self.dropped[SAME_BEGINNING] += 1
            return
        lost = sum(max(0, len(each.ids) - self.seq_len) for each in (chosen, rejected))
        self.truncated += lost > 0
        self.truncated_tokens += lost
        self.rows.append(_Row(chosen.ids[:start], *answers))

    def dataset(self) -> Any:
        """The rows as TRL's trainer takes them."""
        import datasets

        columns = {
            f"{name}_ids": [np.array(getattr(row, name), dtype=np.int32) for row in self.rows]
            for name in ("prompt", "chosen", "rejected")
        }
        kinds = {name: datasets.Sequence(datasets.Value("int32")) for name in columns}
        return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))

    def report(self) -> PartOfPairs:
        """Numbers of the rows."""
        prompt, chosen, rejected = (
            np.array([len(getattr(row, name)) for row in self.rows])
            for name in ("prompt", "chosen", "rejected")
        )
        lengths = np.concatenate([prompt + chosen, prompt + rejected])
        return PartOfPairs(
            part=self.part,
            pairs=len(self.rows),
            tokens=int(lengths.sum()),
            shortest=int(lengths.min()),
            median=int(np.median(lengths)),
            longest=int(lengths.max()),
            prompt=int(np.median(prompt)),
            chosen=int(np.median(chosen)),
            rejected=int(np.median(rejected)),
            truncated=self.truncated,
            truncated_tokens=self.truncated_tokens,
            dropped=dict(self.dropped),
        )


def both_answers(pair: PreferenceExample) -> tuple[Example, Example]:
    """The pair as two examples of a prompt and its completion. Raises UserError for messages that
    have nothing in common to answer."""
    from trl import extract_prompt

    row = pair.to_dict() if pair.prompt is not None else extract_prompt(pair.to_dict())
    prompt, answers = row["prompt"], (row["chosen"], row["rejected"])
    if isinstance(prompt, str):
        chosen, rejected = (
            CompletionExample(prompt, answer, pair.where, pair.format) for answer in answers
        )
        return chosen, rejected
    if not prompt or not all(answers):
        raise UserError(
            f"{pair.where}: chosen and rejected must begin with the same messages, the prompt, "
            "and each must have an answer after them"
        )
    first, second = (
        ChatExample([*prompt, *answer], pair.where, pair.format, num_prompt=len(prompt))
        for answer in answers
    )
    return first, second


def _common_prefix(first: list[int], second: list[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
