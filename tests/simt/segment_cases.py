"""What the tests of the segment kernels share: rows of groups, and the formulas on them."""

from typing import Any, NamedTuple

import torch
from kernel_calls import DTYPES, _simt, matrix, spread, threshold_and_seed
from torch import Tensor

from lowrank_ext import reference

SEED = 0x1234_5678_9ABC_DEF0

# (ids of the rows, n): -1 is no group, -7 and n are invalid.
IDS = {
    "random": (lambda m: [(7 * i * i + i // 3) % 6 - 1 for i in range(m)], 5),
    "one": (lambda m: [1] * m, 3),
    "none": (lambda m: [-1] * m, 2),
    "own": (lambda m: list(range(m)), None),
    "with invalid": (lambda m: [(0, -7, 2, -1, 3)[i % 5] for i in range(m)], 3),
    "many groups": (lambda m: [(i * 37) % 100 - 1 for i in range(m)], 99),
    "no groups": (lambda m: [-1 if i % 3 else 5 for i in range(m)], 0),
}


class Groups(NamedTuple):
    """RowGroups of segments/kernels.h, and what keeps its memory."""

    ids: Tensor
    num_groups: int
    ranks: Tensor | None
    rows: Tensor
    offsets: Tensor
    slots_per_row: int = 1
    shared_dropout: bool = True

    @staticmethod
    def of(ids: list[int] | Tensor, num_groups: int, ranks: list[int] | None = None) -> "Groups":
        ids = torch.as_tensor(ids, dtype=torch.int64)
        valid = (ids >= 0) & (ids < num_groups)
        keys = torch.where(valid, ids, torch.where(ids == -1, num_groups, num_groups + 1))
        counts = torch.bincount(keys, minlength=num_groups + 2)
        offsets = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
        ranks_tensor = None if ranks is None else torch.tensor(ranks, dtype=torch.int64)
        return Groups(ids, num_groups, ranks_tensor, keys.argsort(stable=True), offsets)

    @staticmethod
    def named(name: str, num_rows: int, rank: int, *, mixed_ranks: bool = True) -> "Groups":
        make, num_groups = IDS[name]
        num_groups = num_rows if num_groups is None else num_groups
        ranks = [(rank, 1, (rank + 1) // 2, 0)[i % 4] for i in range(num_groups)]
        return Groups.of(make(num_rows), num_groups, ranks if mixed_ranks else None)

    def argument(self) -> dict[str, int]:
        return {
            "rows": self.rows.data_ptr(),
            "offsets": self.offsets.data_ptr(),
            "ranks": 0 if self.ranks is None else self.ranks.data_ptr(),
            "num_rows": self.ids.numel(),
            "num_groups": self.num_groups,
            "slots_per_row": self.slots_per_row,
            "shared_dropout": self.shared_dropout,
        }

    @staticmethod
    def of_slots(ids: Tensor, num_groups: int, shared_dropout: bool) -> "Groups":
        """ids [M, k]: every row has k groups."""
        groups = Groups.of(ids.flatten(), num_groups)
        return groups._replace(slots_per_row=ids.shape[1], shared_dropout=shared_dropout)

    def dropped(self, x: Tensor, dropout_p: float, seed: int) -> Tensor:
        """x of each slot, through its group's mask and scaled."""
        gathered = x.repeat_interleave(self.slots_per_row, 0)
        scale = reference.dropout_scale(dropout_p)
        for group in set(self.ids.tolist()):
            mask = 0 if self.shared_dropout else group
            kept = reference.dropout_mask(seed, *x.shape, dropout_p, expert=mask)
            own = self.ids == group
            gathered[own] = torch.where(kept.repeat_interleave(self.slots_per_row, 0), gathered, 0)[
                own
            ]
        return scale * gathered

    def rank(self, group: int, whole: int) -> int:
        """-1 for what makes its rows NaN."""
        if not -1 <= group < self.num_groups:
            return -1
        if group == -1:
            return 0
        rank = whole if self.ranks is None else int(self.ranks[group])
        return rank if 0 <= rank <= whole else -1

    def fill(self, out: Tensor, whole: int, base: Tensor | None) -> Tensor:
        """Rows of `out` that nothing is added to."""
        for row, group in enumerate(self.ids.tolist()):
            rank = self.rank(group, whole)
            if rank < 0:
                out[row] = torch.nan
            elif rank == 0:
                out[row] = 0 if base is None else base[row]
        return out

    def segments(self, whole: int) -> list[tuple[int, int, Tensor]]:
        """(group, rank, rows) for what has something to add."""
        found = []
        for group in range(self.num_groups):
            rows, rank = (self.ids == group).nonzero().flatten(), self.rank(group, whole)
            if rank > 0 and len(rows):
                found.append((group, rank, rows))
        return found


def stack(tensor: Tensor) -> dict[str, Any]:
    n, rows, cols = tensor.shape
    assert tensor.stride(2) == 1 or cols <= 1
    return {
        "data_ptr": tensor.data_ptr(),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "num_rows": rows,
        "num_cols": cols,
        "row_stride": tensor.stride(1),
        "num_groups": n,
        "group_stride": tensor.stride(0),
    }


def spread_stack(tensor: Tensor, offset: int, padding: int, gap: int = 0) -> Tensor:
    """As spread of kernel_calls, with `gap` rows between the groups."""
    n, rows, cols = tensor.shape
    wide = tensor.new_full((n, rows + gap, cols), float("nan"))
    wide[:, :rows] = tensor
    flat = spread(wide.flatten(0, 1), offset, padding)
    stride = (rows + gap) * flat.stride(0)
    return flat.as_strided((n, rows, cols), (stride, flat.stride(0), 1))


def poison_padding(groups: Groups, stack: Tensor, rank_dim: int) -> Tensor:
    """NaN in all that must not be read."""
    whole = stack.shape[rank_dim]
    for group in range(groups.num_groups):
        rank = groups.rank(group, whole)
        used = bool((groups.ids == group).any())
        padding = stack[group].narrow(rank_dim - 1, max(rank, 0), whole - max(rank, 0))
        (padding if used else stack[group]).fill_(torch.nan)
    return stack


def scalings(num_groups: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (
        torch.tensor([1.0, -0.5, 2.0, 0.25], dtype=dtype)
        .repeat(num_groups // 4 + 1)[:num_groups]
        .clone()
    )


def same(got: Tensor, expected: Tensor) -> None:
    """Values as they are rounded, NaN in the same places."""
    torch.testing.assert_close(got, expected.to(got.dtype), rtol=0, atol=0, equal_nan=True)


# ---- calls


def out_of(compute_type: str, rows: int, cols: int) -> Tensor:
    return torch.full((rows, cols), 77.0, dtype=DTYPES[compute_type])


def segment_down(
    compute_type: str,
    groups: Groups,
    x: Tensor,
    lora_a: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    num_sms: int = 4,
) -> Tensor:
    h = out_of(compute_type, groups.ids.numel(), lora_a.shape[1])
    _simt.segment_down(
        compute_type,
        groups.argument(),
        matrix(x),
        stack(lora_a),
        matrix(h),
        **threshold_and_seed(dropout_p, seed),
        num_sms=num_sms,
    )
    return h


def segment_up_backward(
    compute_type: str,
    groups: Groups,
    dout: Tensor,
    lora_b: Tensor,
    scaling: Tensor,
    *,
    num_sms: int = 4,
) -> Tensor:
    dh = out_of(compute_type, groups.ids.numel(), lora_b.shape[2])
    _simt.segment_up_backward(
        compute_type,
        groups.argument(),
        matrix(dout),
        stack(lora_b),
        matrix(scaling),
        matrix(dh),
        num_sms=num_sms,
    )
    return dh


def segment_up(
    compute_type: str,
    groups: Groups,
    base: Tensor,
    h: Tensor,
    lora_b: Tensor,
    scaling: Tensor,
    *,
    y: Tensor | None = None,
    num_sms: int = 4,
) -> Tensor:
    y = out_of(compute_type, h.shape[0], lora_b.shape[1]) if y is None else y
    _simt.segment_up(
        compute_type,
        groups.argument(),
        matrix(base),
        matrix(h),
        stack(lora_b),
        matrix(scaling),
        matrix(y),
        num_sms=num_sms,
    )
    return y


def segment_down_backward_x(
    compute_type: str,
    groups: Groups,
    dh: Tensor,
    lora_a: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    num_sms: int = 4,
) -> Tensor:
    dx = out_of(compute_type, dh.shape[0], lora_a.shape[2])
    _simt.segment_down_backward_x(
        compute_type,
        groups.argument(),
        matrix(dh),
        stack(lora_a),
        **threshold_and_seed(dropout_p, seed),
        dx=matrix(dx),
        num_sms=num_sms,
    )
    return dx


def segment_up_backward_lora_b(
    compute_type: str,
    groups: Groups,
    dout: Tensor,
    h: Tensor,
    scaling: Tensor,
    *,
    gradient_dtype: torch.dtype | None = None,
) -> Tensor:
    shape = (groups.num_groups, dout.shape[1], h.shape[1])
    dlora_b = torch.full(shape, 77.0, dtype=gradient_dtype or dout.dtype)
    _simt.segment_up_backward_lora_b(
        compute_type, groups.argument(), matrix(dout), matrix(h), matrix(scaling), stack(dlora_b)
    )
    return dlora_b


def segment_down_backward_lora_a(
    compute_type: str,
    groups: Groups,
    dh: Tensor,
    x: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    gradient_dtype: torch.dtype | None = None,
) -> Tensor:
    shape = (groups.num_groups, dh.shape[1], x.shape[1])
    dlora_a = torch.full(shape, 77.0, dtype=gradient_dtype or x.dtype)
    _simt.segment_down_backward_lora_a(
        compute_type,
        groups.argument(),
        matrix(dh),
        matrix(x),
        **threshold_and_seed(dropout_p, seed),
        dlora_a=stack(dlora_a),
    )
    return dlora_a
