"""The rows of one pass over the block, and their attention over ragged caches.

A row is (slot, loop, token position). Rows of one token of a slot are decoded together, padded to
the longest; runs of several tokens of one slot (a prompt, skipped loops) attend by themselves.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ext.methods.recursive.engine.cache import SlotCache

ATTENTION = "lowrank_ext_rows"
# Arguments of transformers' attention functions that change nothing here.
_WITHOUT_EFFECT = ("dropout", "position_ids", "use_cache", "is_causal", "kwargs")


@dataclass(frozen=True)
class Run:
    """Consecutive tokens of one slot in one loop.

    Attributes:
        slot, loop: whose.
        start: position of the first token.
        count: number of tokens.
    """

    slot: int
    loop: int
    start: int
    count: int = 1


class Single:
    """Runs of one token in one loop, which attend in one call.

    Attributes:
        rows: indices of their rows in the pass [R].
        end: number of cached tokens of the longest.
        slots: the slots whose cache is copied, or None where the call covers all slots.
    """

    def __init__(self, runs: Sequence[tuple[int, Run]], cache: SlotCache) -> None:
        device = cache.entries.device
        self.loop = runs[0][1].loop
        self.rows = torch.tensor([row for row, _ in runs], device=device)
        slots = torch.tensor([run.slot for _, run in runs], device=device)
        self.lengths = torch.tensor([run.start + 1 for _, run in runs], device=device)
        self.end = max(run.start + 1 for _, run in runs)
        # Reading the cache of absent slots too costs less than copying that of many.
        self.all_slots = 2 * len(runs) >= cache.num_slots
        self.slots = slots
        self._num_slots = cache.num_slots
        self._masks: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive [S or R, 1, 1, end]: which cached tokens each row sees."""
        key = (window, dtype)
        if key not in self._masks:
            lengths = self.lengths
            if self.all_slots:
                lengths = lengths.new_ones(self._num_slots).index_copy_(0, self.slots, lengths)
            position = torch.arange(self.end, device=lengths.device)
            seen = position < lengths.unsqueeze(1)
            if window is not None:
                seen &= position >= lengths.unsqueeze(1) - window
            mask = torch.zeros(seen.shape, dtype=dtype, device=lengths.device)
            self._masks[key] = mask.masked_fill_(~seen, -torch.inf)[:, None, None, :]
        return self._masks[key]


class Rows:
    """All rows of a pass, in the order of ``runs``."""

    def __init__(self, runs: Sequence[Run], cache: SlotCache) -> None:
        self.cache = cache
        device = cache.entries.device
        loops: list[int] = []
        positions: list[int] = []
        where: list[int] = []
        first: list[int] = []
        at = 0
        for run in runs:
            first.append(at)
            at += run.count
            span = range(run.start, run.start + run.count)
            loops += [run.loop] * run.count
            positions += span
            base = cache.index(run.loop, run.slot, 0)
            where += [base + position for position in span]
        self.count = at
        self.loops = torch.tensor([loops], device=device)
        self.position_ids = torch.tensor([positions], device=device)
        self.where = torch.tensor(where, device=device)
        placed = list(zip(first, runs, strict=True))
        self.long = [(row, run) for row, run in placed if run.count > 1]
        by_loop: dict[int, list[tuple[int, Run]]] = {}
        for row, run in placed:
            if run.count == 1:
                by_loop.setdefault(run.loop, []).append((row, run))
        self.single = [Single(group, cache) for group in by_loop.values()]

    def attend(self, k: int, query: Tensor, window: int | None, scale: float | None) -> Tensor:
        """Attention of all rows at position ``k`` of the block.

        Args:
            query: [1, heads, N, head_dim].

        Returns:
            [1, N, heads, head_dim of the values].
        """
        rows = query[0].transpose(0, 1)  # [N, heads, head_dim]
        parts = [
            (
                slice(row, row + run.count),
                self._long(k, run, rows[row : row + run.count], window, scale),
            )
            for row, run in self.long
        ]
        if len(parts) == 1 and not self.single:
            return parts[0][1].unsqueeze(0)
        out = rows.new_empty((self.count, rows.shape[1], self.cache.entries.shape[-1]))
        for span, part in parts:
            out[span] = part
        for group in self.single:
            out.index_copy_(0, group.rows, self._single(k, group, rows, window, scale))
        return out.unsqueeze(0)

    def _long(
        self, k: int, run: Run, query: Tensor, window: int | None, scale: float | None
    ) -> Tensor:
        """[count, heads, head_dim] of a run of several tokens."""
        end = run.start + run.count
        keys, values = self.cache.slot(k, run.loop, run.slot, end)
        mask = None
        if run.start or window is not None:
            position = torch.arange(end, device=query.device)
            own = position[run.start :].unsqueeze(1)
            mask = position <= own
            if window is not None:
                mask &= position > own - window
        out = F.scaled_dot_product_attention(
            query.transpose(0, 1).unsqueeze(0),
            _repeated(keys, query.shape[1]),
            _repeated(values, query.shape[1]),
            attn_mask=mask,
            is_causal=mask is None,
            scale=scale,
        )
        return out[0].transpose(0, 1)

    def _single(
        self, k: int, group: Single, rows: Tensor, window: int | None, scale: float | None
    ) -> Tensor:
        """[R, heads, head_dim] of rows of one token each."""
        slots = None if group.all_slots else group.slots
        keys, values = self.cache.slots(k, group.loop, group.end, slots)
        query = rows.index_select(0, group.rows)
        if group.all_slots:
            query = query.new_zeros((self.cache.num_slots, *query.shape[1:])).index_copy_(
                0, group.slots, query
            )
        # The query heads of one key head are rows of one product: no key is repeated.
        heads = keys.shape[1]
        query = query.view(query.shape[0], heads, -1, query.shape[-1])
        out = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=group.mask(window, query.dtype), scale=scale
        )
        out = out.reshape(out.shape[0], -1, out.shape[-1])
        return out.index_select(0, group.slots) if group.all_slots else out


def _repeated(states: Tensor, heads: int) -> Tensor:
    """[1, heads, T, d] of [1, key heads, T, d]."""
    copies = heads // states.shape[1]
    return states if copies == 1 else states.repeat_interleave(copies, dim=1)


_ACTIVE: ContextVar["Rows | None"] = ContextVar("active_pass", default=None)


@contextmanager
def active(rows: Rows) -> Iterator[None]:
    """A block whose forwards of engine layers are about ``rows``."""
    token = _ACTIVE.set(rows)
    try:
        yield
    finally:
        _ACTIVE.reset(token)


def active_rows() -> Rows:
    """The rows of the present pass."""
    rows = _ACTIVE.get()
    assert rows is not None
    return rows


class KeysWritten(Exception):
    """Ends a layer once its keys and values are in the cache."""


class RowsCache:
    """What layers take for their cache: writes the rows' keys and values where they belong.

    Args:
        only_write: end each layer then.
    """

    is_compileable = False

    def __init__(self, only_write: bool = False) -> None:
        self._only_write = only_write

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        rows = active_rows()
        rows.cache.write(layer_idx, rows.where, keys[0].transpose(0, 1), values[0].transpose(0, 1))
        if self._only_write:
            raise KeysWritten
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of the engine's layers: over the cache of the active rows."""
    unknown = [
        name
        for name, given in kwargs.items()
        if given is not None and name not in _WITHOUT_EFFECT and not isinstance(given, bool)
    ]
    if unknown:
        raise NotImplementedError(
            f"DepthwiseEngine: {type(module).__name__} must attend without {', '.join(unknown)}, "
            "which scaled_dot_product_attention does not have"
        )
    layer: Any = module
    return active_rows().attend(layer.layer_idx, query, sliding_window, scaling), None
