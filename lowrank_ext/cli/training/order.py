"""The order in which a run sees its rows: a function of seed and position alone."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler


class RowOrder(Sampler[int]):
    """Indices of `count` rows from position `start` of an endless order of `num_rows` rows.

    Epoch after epoch every row comes once, in an order that depends on seed and epoch. Several
    processes, another number of them, and a resumed run all read the same order.
    """

    def __init__(self, num_rows: int, seed: int, start: int, count: int) -> None:
        self.num_rows, self.seed, self.start, self.count = num_rows, seed, start, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        epoch, order = -1, torch.empty(0)
        for position in range(self.start, self.start + self.count):
            if position // self.num_rows != epoch:
                epoch = position // self.num_rows
                order = self._of_epoch(epoch)
            yield int(order[position % self.num_rows])

    def _of_epoch(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.num_rows, generator=generator)
