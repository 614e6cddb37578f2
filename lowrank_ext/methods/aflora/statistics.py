"""Scores of the projections: statistics of their gradients, and the k-th smallest of all entries.

See ``freezing.py`` for the formulas. Parameters may be DTensors, of which each rank holds a part.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowrank_ext.sharding import Groups, gathered_like, local_part, local_part_like, shard_groups

STATISTICS = ("window_sum", "mean", "spread")  # Σ |G| of the window, Ī and U


class Projection:
    """A live lora_a or lora_b and the statistics of its gradient, fp32; of DTensors the local part.

    Attributes:
        groups: the process groups over which the parameter is sharded.
    """

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.name = name
        self.parameter = parameter
        self.groups = shard_groups(parameter)
        local = local_part(parameter.detach())
        self.window_sum, self.mean, self.spread = (
            torch.zeros_like(local, dtype=torch.float32, memory_format=torch.contiguous_format)
            for _ in STATISTICS
        )

    @property
    def gradient(self) -> Tensor | None:
        gradient = self.parameter.grad
        return None if gradient is None else local_part(gradient)

    def close_window(self, count: Tensor, weights: Sequence[Tensor]) -> None:
        """Update Ī and U with the mean of a window of ``count`` steps, with weights 1 - beta."""
        count, mean_weight, spread_weight = (t.to(self.mean.device) for t in (count, *weights))
        window_mean = self.window_sum / count.clamp(min=1)
        self.mean.lerp_(window_mean, mean_weight)
        self.spread.lerp_((window_mean - self.mean).abs_(), spread_weight)
        self.window_sum.zero_()

    def state(self) -> dict[str, Tensor]:
        """Whole tensors on the CPU, gathered if sharded."""
        tensors = {key: getattr(self, key) for key in STATISTICS}
        return {key: gathered_like(tensor, self.parameter) for key, tensor in tensors.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        for key in STATISTICS:
            getattr(self, key).copy_(local_part_like(state[key], self.parameter))


def kth_smallest(entries: Mapping[Groups, Sequence[Tensor]], k: int) -> Tensor:
    """The k-th smallest (k from 1) of all entries of all tensors, fp32 without dimensions.

    The entries must be at least 0 and not nan, k at most their number. They are neither
    concatenated nor sorted: nonnegative fp32 numbers are ordered like their bits, and a radix
    select by histograms of 11, 11 and 9 bits finds the answer. Exact; the host does not wait.

    Args:
        entries: for each tuple of process groups the tensors that are sharded over these.
    """
    device = next(tensor.device for tensors in entries.values() for tensor in tensors)
    prefix = torch.zeros(1, dtype=torch.int64, device=device)
    rank = torch.full((1,), k, dtype=torch.int64, device=device)
    for shift, num_bits in ((20, 11), (9, 11), (0, 9)):
        counts = torch.zeros(1 << num_bits, dtype=torch.int64, device=device)
        for groups, tensors in entries.items():
            own = torch.zeros_like(counts)
            for tensor in tensors:
                own += _histogram(tensor, prefix, shift, num_bits).to(device)
            counts += reduced(own, groups)
        up_to = counts.cumsum(0)
        digit = (up_to < rank).sum(dim=0, keepdim=True)
        rank = rank - (up_to - counts).gather(0, digit)
        prefix = (prefix << num_bits) | digit
    return prefix.to(torch.int32).view(torch.float32).squeeze(0)


def _histogram(tensor: Tensor, prefix: Tensor, shift: int, num_bits: int) -> Tensor:
    """Histogram of the ``num_bits`` bits from ``shift`` up, over entries whose higher bits are
    ``prefix``."""
    bits = tensor.contiguous().view(torch.int32).flatten()
    matches = (bits >> (shift + num_bits)) == prefix.to(bits.device)
    digits = (bits >> shift) & ((1 << num_bits) - 1)
    counts = torch.zeros(1 << num_bits, dtype=torch.int64, device=bits.device)
    return counts.scatter_add_(0, digits.long(), matches.long())


def reduced(tensor: Tensor, groups: Groups) -> Tensor:
    """Summed over the ranks, in place."""
    for group in groups:
        dist.all_reduce(tensor, dist.ReduceOp.SUM, group)
    return tensor


def everywhere(flag: Tensor, groups: Groups) -> Tensor:
    """Whether ``flag`` is true on all ranks."""
    for group in groups:
        flag = flag.int()
        dist.all_reduce(flag, dist.ReduceOp.MIN, group)
    return flag.bool()
