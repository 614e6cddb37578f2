"""Which adapter each row of a batch has, inside an ``AdapterBank.rows`` or ``motion.rows`` block.

Blocks live in a context variable, so threads and asyncio tasks do not see each other's. A block
belongs to one owner, a bank or a model under ``motion.rows``, identified by a number. Blocks of
several owners may be nested.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from lowrank_ext.ops._registration import library

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# The numbers of the owners.
ROWS_NUMBERS = itertools.count()


class RowsBlock:
    """Names of the adapters of a batch's rows, and their ids by layout (the tuple of a module's
    adapter names) and device, cached.

    With ``repeats`` a batch may also hold each sequence several times, copies next to each other,
    as ``generate`` makes it with num_beams or num_return_sequences.
    """

    def __init__(self, names: Sequence[str | None], caller: str, repeats: bool = False) -> None:
        self.names = tuple(names)
        self.caller = caller
        self.repeats = repeats
        self._ids: dict[tuple[tuple[str, ...], torch.device], Tensor | None] = {}

    def ids(self, layout: tuple[str, ...], device: torch.device) -> Tensor | None:
        """int64 [number of rows] on ``device``; None where no row has an adapter of ``layout``."""
        key = (layout, device)
        if key not in self._ids:
            used = any(name in layout for name in self.names)
            # A first call in inference mode must not make a tensor that training cannot use.
            with torch.inference_mode(False):
                self._ids[key] = ids_of_names(self.names, layout, device) if used else None
        return self._ids[key]

    def ids_of_rows(self, layout: tuple[str, ...], x: Tensor) -> Tensor | None:
        """An id for each row of x, whose first dimension is the batch."""
        copies = self._copies(x)
        ids = self.ids(layout, x.device)
        if ids is None:
            return None
        return ids_per_row(ids if copies == 1 else ids.repeat_interleave(copies), x)

    def _copies(self, x: Tensor) -> int:
        """How many rows in a row each name stands for in this call.

        Rows [M, K] are not repeated: they may be tokens, in whatever order.
        """
        names, rows = len(self.names), x.shape[0] if x.dim() >= 2 else -1
        if rows == names:
            return 1
        if self.repeats and x.dim() >= 3 and names and rows % names == 0:
            return rows // names
        multiple = ", or a multiple of that" if self.repeats else ""
        raise ValueError(
            f"{self.caller}: the batch must have {names} rows, one for each name{multiple}, got an "
            f"input of shape {list(x.shape)}; give a name for each row of the smallest batch"
        )


# The active blocks, by owner number.
ACTIVE_ROWS: ContextVar[Mapping[int, RowsBlock]] = ContextVar("active_rows", default={})  # noqa: B039


# The adapter of all rows outside of an owner's blocks, by owner number.
DEFAULT_NAMES: dict[int, str] = {}


def ids_of_names(
    names: Sequence[str | None], layout: Sequence[str], device: torch.device
) -> Tensor:
    """int64 [number of names]: the index of each name in ``layout``, -1 for a name not in it."""
    ids = [layout.index(name) if name in layout else -1 for name in names]
    return torch.tensor(ids, device=device)


def ids_per_row(ids: Tensor, x: Tensor) -> Tensor:
    """ids [B] of the sequences of x [B, ..., K], expanded to [B, ...]: one for each row of x."""
    return ids.view(-1, *(1,) * (x.dim() - 2)).expand(x.shape[:-1])


def check_names(names: Sequence[str | None], caller: str) -> None:
    """Raise TypeError unless ``names`` is a sequence of strings and None."""
    if isinstance(names, str) or not all(isinstance(n, str | None) for n in names):
        raise TypeError(f"{caller}: names must be a sequence of names and None, got {names!r}")


@contextmanager
def rows_block(
    owner: int, names: Sequence[str | None], caller: str, repeats: bool = False
) -> Iterator[None]:
    """A ``with`` block in which row b of every batch has the adapter ``names[b]`` of ``owner``."""
    block = RowsBlock(names, caller, repeats)
    token = ACTIVE_ROWS.set({**ACTIVE_ROWS.get(), owner: block})
    try:
        yield
    finally:
        ACTIVE_ROWS.reset(token)


def in_block(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """``function`` with the blocks that are active now, whenever and in whatever thread it runs.

    For activation checkpointing, whose second run happens in backward: after the block's end, and
    on a GPU in a thread of autograd.
    """
    active = ACTIVE_ROWS.get()

    @wraps(function)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        token = ACTIVE_ROWS.set(active)
        try:
            return function(*args, **kwargs)
        finally:
            ACTIVE_ROWS.reset(token)

    return run


def ids_of_block(x: Tensor, owner: int, layout: tuple[str, ...]) -> Tensor | None:
    """The id of each row of x: the index of its name in ``layout``, or -1.

    Outside of the owner's blocks the id of its default, if it has one. None where no row has a
    name of ``layout``; in compiled code the ids are then all -1.
    """
    if torch.compiler.is_compiling():
        # The op reads the block when it runs: one graph serves every block.
        return torch.ops.lowrank_ext.active_adapter_ids.default(x, owner, list(layout))
    return _ids_now(x, owner, layout)


def _ids_now(x: Tensor, owner: int, layout: tuple[str, ...]) -> Tensor | None:
    block = ACTIVE_ROWS.get().get(owner)
    if block is not None:
        return block.ids_of_rows(layout, x)
    default = DEFAULT_NAMES.get(owner)
    if default not in layout:
        return None
    ids = torch.full((), layout.index(default), dtype=torch.int64, device=x.device)
    return ids.expand(x.shape[:-1])


def _active_adapter_ids(x: Tensor, owner: int, layout: Sequence[str]) -> Tensor:
    ids = _ids_now(x, owner, tuple(layout))
    if ids is None:
        return torch.full(x.shape[:-1], -1, dtype=torch.int64, device=x.device)
    return ids.clone(memory_format=torch.contiguous_format)


library("lowrank_ext").impl("active_adapter_ids", _active_adapter_ids, "CompositeExplicitAutograd")


@torch.library.register_fake("lowrank_ext::active_adapter_ids")
def _active_adapter_ids_fake(x: Tensor, owner: int, layout: Sequence[str]) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.int64)
