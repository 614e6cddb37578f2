"""The rows of one pass over the block, and their attention over ragged caches.

A row is (slot, loop, token position). Rows of one loop and one token each are attended together,
padded to the longest, or one by one without padding, whichever reads less; runs of several tokens
of one slot (a prompt, skipped loops) attend by themselves.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

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


# A call of attention takes as long as reading this much memory: what batching may waste for it.
_CALL_BYTES = 64 * 1024


class Batch:
    """Runs of one token in one loop, which attend in one call.

    Attributes:
        loop: theirs.
        rows: indices of their rows in the pass [R].
        end: number of cached tokens of the longest.
        slots: theirs [R].
        all_slots: whether the call reads the cache of all slots where it lies, the rows of absent
            slots being zero; else the cache of theirs is copied.
        num_sequences: that the call is about, absent ones included.
    """

    def __init__(self, runs: Sequence[tuple[int, Run]], cache: SlotCache) -> None:
        device = cache.entries.device
        self.loop = runs[0][1].loop
        self.rows = torch.tensor([row for row, _ in runs], device=device)
        self.slots = torch.tensor([run.slot for _, run in runs], device=device)
        self.lengths = torch.tensor([run.start + 1 for _, run in runs], device=device)
        self.end = max(run.start + 1 for _, run in runs)
        # A copy is written and read again.
        self.all_slots = 3 * len(runs) >= cache.num_slots
        self._num_slots = cache.num_slots
        self.num_sequences = cache.num_slots if self.all_slots else len(runs)
        self._masks: dict[tuple[int | None, torch.dtype], Tensor] = {}

    @staticmethod
    def pays(runs: Sequence[tuple[int, Run]], cache: SlotCache) -> bool:
        """Whether one padded call is cheaper than a call for each run."""
        if cache.entries.device.type != "cpu":
            return True
        own = sum(run.start + 1 for _, run in runs)
        padded = max(run.start + 1 for _, run in runs) * min(cache.num_slots, 3 * len(runs))
        return padded * cache.token_bytes <= own * cache.token_bytes + len(runs) * _CALL_BYTES

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

    def attend(
        self, cache: SlotCache, k: int, rows: Tensor, window: int | None, scale: float | None
    ) -> Tensor:
        """[R, heads, head_dim] of its rows among ``rows`` [N, heads, head_dim]."""
        keys, values = cache.slots(k, self.loop, self.end, None if self.all_slots else self.slots)
        query = rows.index_select(0, self.rows)
        if self.all_slots:
            everywhere = query.new_zeros((self._num_slots, *query.shape[1:]))
            query = everywhere.index_copy_(0, self.slots, query)
        out = _attend_one_token(query, keys, values, self.mask(window, query.dtype), scale)
        return out.index_select(0, self.slots) if self.all_slots else out


class AttentionWork(NamedTuple):
    """What the attention of a pass is about, at one position of the block.

    Attributes:
        pairs: of a row and a cached token that it sees.
        reads: cached tokens; the rows of a run read them together.
        computed: pairs that the calls compute, padding included.
    """

    pairs: int
    reads: int
    computed: int


class Rows:
    """All rows of a pass, in the order of ``runs``.

    Attributes:
        count: number of rows.
        loops, position_ids: int64 [1, N].
        where: int64 [N], the rows' entries in the cache.
    """

    def __init__(self, runs: Sequence[Run], cache: SlotCache) -> None:
        self.cache = cache
        device = cache.entries.device
        loops: list[int] = []
        positions: list[int] = []
        where: list[int] = []
        first: list[int] = []
        for run in runs:
            first.append(len(loops))
            span = range(run.start, run.start + run.count)
            loops += [run.loop] * run.count
            positions += span
            base = cache.index(run.loop, run.slot, 0)
            where += [base + position for position in span]
        self.count = len(loops)
        self.loops = torch.tensor([loops], device=device)
        self.position_ids = torch.tensor([positions], device=device)
        self.where = torch.tensor(where, device=device)
        self._alone: list[tuple[int, Run]] = []
        self._batches: list[Batch] = []
        by_loop: dict[int, list[tuple[int, Run]]] = {}
        for row, run in zip(first, runs, strict=True):
            if run.count == 1:
                by_loop.setdefault(run.loop, []).append((row, run))
            else:
                self._alone.append((row, run))
        for group in by_loop.values():
            if Batch.pays(group, cache):
                self._batches.append(Batch(group, cache))
            else:
                self._alone += group
        self._alone.sort(key=lambda entry: entry[0])
        self._num_reads = sum(run.start + run.count for run in runs)

    @property
    def attention_work(self) -> AttentionWork:
        return AttentionWork(
            pairs=int(self.position_ids.sum()) + self.count,
            reads=self._num_reads,
            computed=sum(batch.num_sequences * batch.end for batch in self._batches)
            + sum(run.count * (run.start + run.count) for _, run in self._alone),
        )

    def attend(self, k: int, query: Tensor, window: int | None, scale: float | None) -> Tensor:
        """Attention of all rows at position ``k`` of the block.

        Args:
            query: [1, heads, N, head_dim].

        Returns:
            [1, N, heads, head_dim of the values].
        """
        rows = query[0].transpose(0, 1)  # [N, heads, head_dim]
        parts = [
            self._attend_alone(k, run, rows[row : row + run.count], window, scale)
            for row, run in self._alone
        ]
        if not self._batches:
            return torch.cat(parts).unsqueeze(0)
        out = rows.new_empty((self.count, rows.shape[1], self.cache.entries.shape[-1]))
        for (row, run), part in zip(self._alone, parts, strict=True):
            out[row : row + run.count] = part
        for batch in self._batches:
            out.index_copy_(0, batch.rows, batch.attend(self.cache, k, rows, window, scale))
        return out.unsqueeze(0)

    def _attend_alone(
        self, k: int, run: Run, query: Tensor, window: int | None, scale: float | None
    ) -> Tensor:
        """[count, heads, head_dim] of one run's rows."""
        end = run.start + run.count
        begin = 0 if window is None else max(0, run.start + 1 - window)
        keys, values = self.cache.slot(k, run.loop, run.slot, begin, end)
        if run.count == 1:
            return _attend_one_token(query, keys, values, None, scale)
        mask = None
        if run.start or window is not None:
            position = torch.arange(begin, end, device=query.device)
            own = torch.arange(run.start, end, device=query.device).unsqueeze(1)
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


def _attend_one_token(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float | None
) -> Tensor:
    """[R, heads, d] of ``query`` [R, heads, d], a token each, over [R, key heads, T, d]. The query
    heads of one key head are rows of one product: no key is repeated."""
    grouped = query.view(query.shape[0], keys.shape[1], -1, query.shape[-1])
    out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scale)
    return out.reshape(out.shape[0], query.shape[1], out.shape[-1])


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
    config = getattr(module, "config", None)
    window = getattr(config, "sliding_window", None)
    if sliding_window is None and window is not None and not getattr(config, "layer_types", None):
        raise NotImplementedError(
            f"DepthwiseEngine: {type(module).__name__} must give its sliding_window={window} to "
            "the attention function; the engine does not read the model's mask"
        )
    layer: Any = module
    return active_rows().attend(layer.layer_idx, query, sliding_window, scaling), None
