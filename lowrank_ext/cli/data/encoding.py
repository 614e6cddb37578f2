"""Rendered examples to tokens, and these to pieces of at most one sequence."""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowrank_ext.cli.data.chat import Rendered, Span
from lowrank_ext.cli.data.formats import Example, TextExample
from lowrank_ext.cli.errors import UserError, as_user_error

# What a tokenizer gets in one call, during which no signal is heard.
_EXAMPLES_AT_ONCE = 256
_CHARACTERS_AT_ONCE = 2**20

NO_TOKEN, NO_TURN, REST_OF_ONE, CUT_OFF = (
    "nothing to train on",
    "no turn of the assistant",
    "rest of one token",
    "all trained tokens beyond --seq-len",
)


@dataclass(frozen=True, slots=True)
class Pieces:
    """Token sequences of at most one row each, back to back.

    Attributes:
        tokens: int32 [num_tokens].
        trained: bool [num_tokens], whether the loss counts the token.
        offsets: int64 [num_pieces + 1], where each piece begins.
    """

    tokens: Tensor
    trained: Tensor
    offsets: Tensor

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """int64 [num_pieces]."""
        return self.offsets.diff()


@dataclass
class Cuts:
    """What was changed or left out to make pieces: counts."""

    examples: Counter[str] = field(default_factory=Counter)  # by format
    truncated: int = 0
    truncated_tokens: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # by reason


@dataclass(frozen=True, slots=True)
class Part:
    """What a tokenizer gets at once: an example, or a stretch of a long document."""

    rendered: Rendered
    text: str
    is_first: bool
    is_last: bool


@dataclass(frozen=True, slots=True)
class Encoded:
    """The tokens of a part, and whether the loss counts each."""

    part: Part
    ids: list[int]
    trained: list[bool]


def parts(rendered: Iterable[Rendered]) -> Iterator[Part]:
    """The parts of all examples in their order."""
    for each in rendered:
        ends = ends_of_parts(each.example) or [len(each.text)]
        starts = [0, *ends[:-1]]
        for start, end in zip(starts, ends, strict=True):
            yield Part(each, each.text[start:end], start == 0, end == len(each.text))


def ends_of_parts(example: Example) -> list[int]:
    """Where the parts of a document end: each after a megabyte of characters at most, before a line
    feed if there is one. Empty for what is no document, or a short one."""
    if not isinstance(example, TextExample) or len(example.text) <= _CHARACTERS_AT_ONCE:
        return []
    text, ends = example.text, [0]
    while ends[-1] < len(text):
        limit = ends[-1] + _CHARACTERS_AT_ONCE
        line_end = -1 if limit >= len(text) else text.rfind("\n", ends[-1] + 1, limit)
        ends.append(min(limit, len(text)) if line_end < 0 else line_end)
    return ends[1:]


def encode(given: Iterable[Part], tokenizer: Any) -> Iterator[Encoded]:
    """The tokens of each part, with begin and end of text where the tokenizer has them and no chat
    template writes them."""
    starts = _start_tokens(tokenizer)
    for batch in _batches(given):
        # ValueError and TypeError: strings that JSON may hold, but that are no text
        with as_user_error(batch[0].rendered.example.where, ValueError, TypeError):
            encoded = _encoded(batch, tokenizer, starts)
        yield from encoded


def cut(encoded: Iterable[Encoded], seq_len: int) -> tuple[Pieces, Cuts]:
    """Pieces of at most seq_len tokens: of plain text all of it, of other examples the beginning.
    The first token of a piece is predicted from nothing, so it is not trained on; a piece without
    any trained token is left out."""
    maker = _PieceMaker(seq_len)
    for each in encoded:
        maker.add(each)
    return maker.pieces(), maker.cuts


class _PieceMaker:
    """Pieces in flat arrays, and what is left of a document whose next part is to come."""

    def __init__(self, seq_len: int) -> None:
        self.seq_len, self.cuts = seq_len, Cuts()
        self._tokens, self._trained, self._offsets = array("i"), bytearray(), array("q", [0])
        self._left: list[int] = []

    def add(self, encoded: Encoded) -> None:
        part, example = encoded.part, encoded.part.rendered.example
        self.cuts.examples[example.format] += part.is_first
        if isinstance(example, TextExample):
            self._add_text(self._left + encoded.ids, part)
        else:
            no_token = NO_TURN if part.rendered.spans == [] else NO_TOKEN
            self._add_whole(encoded.ids, encoded.trained, no_token)

    def pieces(self) -> Pieces:
        return Pieces(
            _tensor(self._tokens, torch.int32),
            _tensor(self._trained, torch.bool),
            _tensor(self._offsets, torch.int64),
        )

    def _add_text(self, ids: list[int], part: Part) -> None:
        end = len(ids) if part.is_last else len(ids) - len(ids) % self.seq_len
        for start in range(0, end, self.seq_len):
            own = ids[start : min(end, start + self.seq_len)]
            if len(own) > 1:
                self._append(own, [True] * len(own))
            else:
                is_whole = part.is_first and len(ids) == 1
                self.cuts.dropped[NO_TOKEN if is_whole else REST_OF_ONE] += 1
        if part.is_first and not ids:
            self.cuts.dropped[NO_TOKEN] += 1
        self._left = ids[end:]

    def _add_whole(self, ids: list[int], trained: list[bool], no_token: str) -> None:
        if len(ids) > self.seq_len:
            self.cuts.truncated += 1
            self.cuts.truncated_tokens += len(ids) - self.seq_len
        if any(trained[1 : self.seq_len]):
            self._append(ids[: self.seq_len], trained[: self.seq_len])
        else:
            self.cuts.dropped[CUT_OFF if any(trained[1:]) else no_token] += 1

    def _append(self, ids: list[int], trained: list[bool]) -> None:
        self._tokens.extend(ids)
        self._trained += b"\0" + bytes(trained[1:])
        self._offsets.append(len(self._tokens))


def _tensor(values: "array[int] | bytearray", dtype: torch.dtype) -> Tensor:
    # The memory of the values; frombuffer takes no empty one.
    return torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)


def _start_tokens(tokenizer: Any) -> list[int]:
    """The begin-of-text token, if the tokenizer writes it by itself."""
    own = list(tokenizer("", verbose=False)["input_ids"])
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and own[:1] == [bos] else []


def _batches(given: Iterable[Part]) -> Iterator[list[Part]]:
    batch: list[Part] = []
    size = 0
    for part in given:
        batch.append(part)
        size += len(part.text)
        if len(batch) == _EXAMPLES_AT_ONCE or size >= _CHARACTERS_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encoded(batch: list[Part], tokenizer: Any, starts: list[int]) -> list[Encoded]:
    needs_offsets = any(part.rendered.spans is not None for part in batch)
    found = _call(tokenizer, [part.text for part in batch], needs_offsets)
    offsets = found.get("offset_mapping") or [None] * len(batch)
    return [
        _with_ends(part, ids, _trained(part.rendered, ids, places, tokenizer), tokenizer, starts)
        for part, ids, places in zip(batch, found["input_ids"], offsets, strict=True)
    ]


def _call(tokenizer: Any, texts: list[str], needs_offsets: bool = False) -> Any:
    return tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=needs_offsets and getattr(tokenizer, "is_fast", False),
        verbose=False,
    )


def _trained(
    rendered: Rendered, ids: list[int], offsets: list[Span] | None, tokenizer: Any
) -> list[bool]:
    """Whether the loss counts each token: those with a character in one of the spans."""
    if rendered.spans is None:
        return [True] * len(ids)
    if offsets is None:
        return _trained_by_prefixes(rendered, ids, tokenizer)
    mask, spans, at = [], rendered.spans, 0
    for start, end in offsets:
        while at < len(spans) and spans[at][1] <= start:
            at += 1
        mask.append(at < len(spans) and end > spans[at][0])
    return mask


def _trained_by_prefixes(rendered: Rendered, ids: list[int], tokenizer: Any) -> list[bool]:
    """For tokenizers that do not say where their tokens stand: the tokens of the text up to a span
    must be the first of the whole."""
    mask = [False] * len(ids)
    for span in rendered.spans or []:
        ends = []
        for end in span:
            before = _call(tokenizer, [rendered.text[:end]])["input_ids"][0]
            if ids[: len(before)] != before:
                raise UserError(
                    f"{rendered.example.where}: this tokenizer does not say which characters a "
                    "token stands for, and one spans the border of what is trained on; use "
                    "--train-on all"
                )
            ends.append(len(before))
        mask[ends[0] : ends[1]] = [True] * (ends[1] - ends[0])
    return mask


def _with_ends(
    part: Part, ids: list[int], trained: list[bool], tokenizer: Any, starts: list[int]
) -> Encoded:
    """With the begin-of-text token unless it is there, and the end-of-text token, which is trained
    on: it ends document or completion. A chat template writes its own."""
    if part.rendered.is_template:
        return Encoded(part, ids, trained)
    before = starts if part.is_first and ids[:1] != starts else []
    eos = tokenizer.eos_token_id
    after = [eos] if part.is_last and eos is not None and ids[-1:] != [eos] else []
    mask = [*([False] * len(before)), *trained, *([True] * len(after))]
    return Encoded(part, [*before, *ids, *after], mask)
