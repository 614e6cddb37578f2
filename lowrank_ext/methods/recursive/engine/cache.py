"""Keys and values of all slots, loops and positions of the block, in one preallocated tensor."""

import torch
from torch import Tensor


class SlotCache:
    """Keys and values of ``num_slots`` sequences of up to ``max_length`` tokens.

    Entry (position k of the block, loop l, slot s, token p) holds [heads, head_dim] of keys and of
    values. All of one (k, l, s) lie together, so that a slot's entries are a view.

    Attributes:
        num_bytes: its size.
    """

    def __init__(
        self,
        length: int,
        num_loops: int,
        num_slots: int,
        max_length: int,
        heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_loops, self.num_slots, self.max_length = num_loops, num_slots, max_length
        shape = (length, 2, num_loops * num_slots * max_length, heads, head_dim)
        self.entries = torch.zeros(shape, dtype=dtype, device=device)

    @property
    def num_bytes(self) -> int:
        return self.entries.numel() * self.entries.element_size()

    @property
    def token_bytes(self) -> int:
        """Memory of one token's keys and values at one position and loop."""
        heads, head_dim = self.entries.shape[-2:]
        return 2 * heads * head_dim * self.entries.element_size()

    def index(self, loop: int, slot: int, position: int) -> int:
        """Where the entry of a token is on the long dimension."""
        return (loop * self.num_slots + slot) * self.max_length + position

    def write(self, k: int, where: Tensor, keys: Tensor, values: Tensor) -> None:
        """Entries ``where`` [N] of position ``k`` get keys and values [N, heads, head_dim]."""
        self.entries[k, 0].index_copy_(0, where, keys)
        self.entries[k, 1].index_copy_(0, where, values)

    def slot(self, k: int, loop: int, slot: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values [1, heads, end - begin, head_dim] of tokens of a slot: views."""
        start = self.index(loop, slot, 0)
        found = self.entries[k, :, start + begin : start + end].transpose(1, 2)
        return found[0:1], found[1:2]

    def slots(self, k: int, loop: int, end: int, slots: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values [S, heads, end, head_dim] of the first ``end`` tokens of a loop: views of
        all slots, or copies of those in ``slots``."""
        entries = self.entries[k]
        shape = (2, self.num_loops, self.num_slots, self.max_length, *entries.shape[2:])
        of_loop = entries.view(shape)[:, loop, :, :end]
        if slots is not None:
            of_loop = of_loop.index_select(1, slots)
        keys, values = of_loop.transpose(2, 3)
        return keys, values

    def share(self, source: Tensor, target: Tensor) -> None:
        """Entries ``target`` [N] become those of ``source`` [N], at every position of the block."""
        self.entries.index_copy_(2, target, self.entries.index_select(2, source))

    def clear(self, slot: int, end: int) -> None:
        """Zero a slot's first ``end`` tokens, so that its next sequence finds no NaN there."""
        sizes = (self.num_loops, self.num_slots, self.max_length)
        shape = (*self.entries.shape[:2], *sizes, *self.entries.shape[3:])
        self.entries.view(shape)[:, :, :, slot, :end] = 0
