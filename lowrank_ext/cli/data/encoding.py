"""Rendered examples to tokens, and these to pieces of at most one sequence."""

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lowrank_ext.cli.data.chat import Rendered, Span
from lowrank_ext.cli.data.formats import TextExample
from lowrank_ext.cli.errors import UserError, as_user_error

# What a tokenizer gets in one call, during which no signal is heard.
_EXAMPLES_AT_ONCE = 256
_CHARACTERS_AT_ONCE = 2**20

NO_TOKEN, REST_OF_ONE, CUT_OFF = (
    "nothing to train on",
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

    tokens: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    offsets: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """int64 [num_pieces]."""
        return np.diff(self.offsets)


@dataclass
class Cuts:
    """What was changed or left out to make pieces: counts."""

    examples: Counter[str] = field(default_factory=Counter)  # by format
    truncated: int = 0
    truncated_tokens: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # by reason


def encode(
    rendered: Iterable[Rendered], tokenizer: Any
) -> Iterator[tuple[Rendered, list[int], list[bool]]]:
    """(example, tokens, trained) of each, with begin and end of text where the tokenizer has them
    and no chat template writes them."""
    starts = _start_tokens(tokenizer)
    for batch in _batches(rendered):
        # ValueError and TypeError: strings that JSON may hold, but that are no text
        with as_user_error(batch[0].example.where, ValueError, TypeError):
            yield from zip(batch, *_tokenized(batch, tokenizer, starts), strict=True)


def cut(
    encoded: Iterable[tuple[Rendered, list[int], list[bool]]], seq_len: int
) -> tuple[Pieces, Cuts]:
    """Pieces of at most seq_len tokens: of plain text all of it, of other examples the beginning.
    The first token of a piece is predicted from nothing, so it is not trained on; a piece without
    any trained token is left out."""
    tokens, trained, offsets, cuts = array("i"), bytearray(), array("q", [0]), Cuts()
    for rendered, ids, mask in encoded:
        cuts.examples[rendered.example.format] += 1
        is_text = isinstance(rendered.example, TextExample)
        if len(ids) > seq_len and not is_text:
            cuts.truncated += 1
            cuts.truncated_tokens += len(ids) - seq_len
        for start in range(0, max(1, len(ids)) if is_text else 1, seq_len):
            end = min(len(ids), start + seq_len)
            if not any(mask[start + 1 : end]):
                cuts.dropped[_why_dropped(is_text, start, any(mask[1:]))] += 1
                continue
            tokens.extend(ids[start:end])
            trained += b"\0" + bytes(mask[start + 1 : end])
            offsets.append(len(tokens))
    return (
        Pieces(
            np.array(tokens, dtype=np.int32),
            np.frombuffer(bytes(trained), dtype=np.bool_),
            np.array(offsets, dtype=np.int64),
        ),
        cuts,
    )


def _why_dropped(is_text: bool, start: int, has_trained: bool) -> str:
    if is_text and start:
        return REST_OF_ONE
    return CUT_OFF if has_trained else NO_TOKEN


def _start_tokens(tokenizer: Any) -> list[int]:
    """The begin-of-text token, if the tokenizer writes it by itself."""
    own = list(tokenizer("", verbose=False)["input_ids"])
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and own[:1] == [bos] else []


def _batches(rendered: Iterable[Rendered]) -> Iterator[list[Rendered]]:
    batch: list[Rendered] = []
    size = 0
    for each in rendered:
        batch.append(each)
        size += len(each.text)
        if len(batch) == _EXAMPLES_AT_ONCE or size >= _CHARACTERS_AT_ONCE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenized(
    batch: list[Rendered], tokenizer: Any, starts: list[int]
) -> tuple[list[list[int]], list[list[bool]]]:
    if len(batch) == 1 and batch[0].spans is None and len(batch[0].text) > _CHARACTERS_AT_ONCE:
        ids = [_long_text(batch[0].text, tokenizer)]
        offsets: Any = [None]
    else:
        needs_offsets = any(each.spans is not None for each in batch)
        found = _call(tokenizer, [each.text for each in batch], needs_offsets)
        ids = found["input_ids"]
        offsets = found.get("offset_mapping") or [None] * len(batch)
    pairs = [
        _with_ends(each, own, _trained(each, own, spots, tokenizer), tokenizer, starts)
        for each, own, spots in zip(batch, ids, offsets, strict=True)
    ]
    return [own for own, _ in pairs], [mask for _, mask in pairs]


def _call(tokenizer: Any, texts: list[str], needs_offsets: bool = False) -> Any:
    return tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=needs_offsets and getattr(tokenizer, "is_fast", False),
        verbose=False,
    )


def _long_text(text: str, tokenizer: Any) -> list[int]:
    """The tokens of a text of any length, part by part, each of which begins at a line."""
    ids: list[int] = []
    start = 0
    while start < len(text):
        limit = start + _CHARACTERS_AT_ONCE
        end = len(text) if limit >= len(text) else text.rfind("\n", start + 1, limit)
        end = limit if end < 0 else end
        ids += _call(tokenizer, [text[start:end]])["input_ids"][0]
        start = end
    return ids


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
    rendered: Rendered, ids: list[int], mask: list[bool], tokenizer: Any, starts: list[int]
) -> tuple[list[int], list[bool]]:
    """With the begin-of-text token unless it is there, and the end-of-text token, which is trained
    on: it ends document or completion. A chat template writes its own."""
    if rendered.is_template:
        return ids, mask
    before = starts if ids[:1] != starts else []
    eos = tokenizer.eos_token_id
    after = [] if eos is None or ids[-1:] == [eos] else [eos]
    return [*before, *ids, *after], [*([False] * len(before)), *mask, *([True] * len(after))]
