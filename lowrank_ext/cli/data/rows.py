"""Rows of tokens, as a dataset of torch, and batches of them."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lowrank_ext.cli.data.encoding import Pieces

NOT_TRAINED = -100  # the label that transformers' losses leave out

Row = dict[str, Tensor]


class Rows(Dataset[Row]):
    """Rows of one or more pieces. A row is a dictionary of int64 tensors [num_tokens]: `input_ids`,
    `labels` (-100 where the loss does not count a token) and `position_ids`, from 0 again in each
    piece. Holds 5 bytes for a token, and its tensors are made when asked for.

    Args:
        pieces: the token sequences.
        rows: the numbers of the pieces in each row.
    """

    def __init__(self, pieces: Pieces, rows: list[list[int]]) -> None:
        self.pieces = pieces
        self._order = torch.tensor([piece for row in rows for piece in row], dtype=torch.int64)
        self._starts = torch.tensor([0, *map(len, rows)]).cumsum(0)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Row:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        own = [self.piece(number) for number in self.pieces_of(index)]
        return {name: torch.cat([piece[name] for piece in own]) for name in own[0]}

    def pieces_of(self, index: int) -> list[int]:
        """The numbers of the pieces in a row."""
        found: list[int] = self._order[self._starts[index] : self._starts[index + 1]].tolist()
        return found

    def piece(self, number: int) -> Row:
        """A piece by itself, as a row."""
        start, end = self.pieces.offsets[number : number + 2].tolist()
        ids = self.pieces.tokens[start:end].long()
        labels = torch.where(self.pieces.trained[start:end], ids, NOT_TRAINED)
        return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(len(ids))}

    @property
    def num_tokens(self) -> int:
        return len(self.pieces.tokens)

    @property
    def num_trained(self) -> int:
        """Tokens that the loss counts."""
        return int(self.pieces.trained.sum())

    @property
    def num_packed(self) -> int:
        """Rows of more than one piece."""
        return int((self._starts.diff() > 1).sum())

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, int64 [num_rows]."""
        before = self.pieces.lengths[self._order].cumsum(0)
        sums = torch.cat([before.new_zeros(1), before])
        return sums[self._starts].diff()

    @property
    def largest_id(self) -> int:
        return int(self.pieces.tokens.max()) if self.num_tokens else 0

    def digest(self) -> str:
        """Identifies tokens, labels and positions of all rows."""
        digest = hashlib.sha256()
        parts = (self.pieces.tokens, self.pieces.trained, self.pieces.offsets)
        for tensor in (*parts, self._order, self._starts):
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


def collate(rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
    """A batch of rows: tensors [num_rows, length of the longest], padded on the right, with label
    -100.

    transformers keeps documents apart by `position_ids`, and only without an `attention_mask` and
    without a cache (use_cache=False). So a batch with a packed row has position_ids, in which
    padding is a document of its own; any other has an attention_mask where it has padding.
    """
    length = max(len(row["input_ids"]) for row in rows)
    batch = {
        "input_ids": _padded([row["input_ids"] for row in rows], length, pad_id),
        "labels": _padded([row["labels"] for row in rows], length, NOT_TRAINED),
    }
    if any(_is_packed(row) for row in rows):
        batch["position_ids"] = torch.stack(
            [_with_positions_of_padding(row["position_ids"], length) for row in rows]
        )
    elif any(len(row["input_ids"]) < length for row in rows):
        ones = [torch.ones_like(row["input_ids"]) for row in rows]
        batch["attention_mask"] = _padded(ones, length, 0)
    return batch


def _is_packed(row: Row) -> bool:
    return bool((row["position_ids"][1:] == 0).any())


def _padded(tensors: list[Tensor], length: int, value: int) -> Tensor:
    padded = torch.full((len(tensors), length), value)
    for row, tensor in zip(padded, tensors, strict=True):
        row[: len(tensor)] = tensor
    return padded


def _with_positions_of_padding(positions: Tensor, length: int) -> Tensor:
    return torch.cat([positions, torch.arange(length - len(positions))])


def pad_id_of(tokenizer: Any) -> int:
    """The id that padding gets; any would do, as no token sees padding and no loss counts it."""
    for own in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if own is not None:
            return int(own)
    return 0
