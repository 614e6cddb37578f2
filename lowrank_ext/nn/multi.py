"""MultiLoRALinear: one frozen linear map under many LoRA adapters, a different one for each row.

    y[m] = W x[m] + bias + scaling[i] · lora_b[i] lora_a[i] x[m],     i the adapter of row m

The adapter of each row is an argument of forward, or comes from the enclosing ``AdapterBank.rows``
block.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ext import ops
from lowrank_ext.checks import check_scaling
from lowrank_ext.nn.base_keys import BaseKeys
from lowrank_ext.nn.base_layer import (
    adapter_dtype_for,
    dense_weight,
    execution_device,
    is_plain,
    linear_features,
)
from lowrank_ext.nn.call_arguments import input_name, split_call
from lowrank_ext.nn.fixed_size import FixedSize
from lowrank_ext.nn.rows import ACTIVE_ROWS, ids_of_block


class Stacks(NamedTuple):
    """The adapters of a MultiLoRALinear, as its attributes of these names."""

    names: tuple[str, ...]
    lora_a: Tensor
    lora_b: Tensor
    scaling: Tensor
    ranks: Tensor


class MultiLoRALinear(FixedSize, BaseKeys):
    """LoRA adapters stacked over one base; made by ``from_linear``.

    Adapters of smaller rank are padded to the largest; padding takes memory but is never read.
    ``lora_a`` and ``lora_b`` require no gradient at first. Rows without an adapter add nothing to
    their gradients.

    Attributes:
        weight, bias: the Parameters of a plain nn.Linear base, at their old state-dict keys; None
            where ``base_layer`` holds a base of another kind.
        names: the adapters, in the order of their ids.
        lora_a: Parameter [n, r, K], of the base's dtype (float32 over a base without a dense
            weight) unless ``adapter_dtype`` is float32.
        lora_b: Parameter [n, N, r], of the same dtype.
        dropout: probability of dropping an element of a branch's input in training mode, by default
            0; rows without an adapter have no branch.
        scaling: float64 buffer [n].
        ranks: int64 buffer [n].
        bank: number of the AdapterBank whose ``rows`` blocks apply here, or -1.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    lora_a: nn.Parameter
    lora_b: nn.Parameter
    scaling: Tensor
    ranks: Tensor
    base_layer: nn.Module | None

    def __init__(
        self, base: nn.Module, bank: int = -1, adapter_dtype: torch.dtype | str = "base"
    ) -> None:
        super().__init__()
        features = linear_features(base)
        if features is None:
            raise TypeError(
                "MultiLoRALinear: base must be nn.Linear, Conv1D or a module with in_features and "
                f"out_features, got {type(base).__name__}"
            )
        self.in_features, self.out_features = features
        self.bank = bank
        self.dropout = 0.0
        self.names: tuple[str, ...] = ()
        # F.linear need not give the bits of Conv1D's own product: Conv1D stays in base_layer.
        plain = type(base) is nn.Linear and is_plain(base)
        self.register_parameter("weight", base._parameters["weight"] if plain else None)
        self.register_parameter("bias", base._parameters["bias"] if plain else None)
        self.base_layer = None if plain else base
        self.input_name = input_name(base)
        weight = dense_weight(base)
        device = execution_device(base)
        base_dtype = None if weight is None else weight.dtype
        dtype = adapter_dtype_for(base_dtype, adapter_dtype, "MultiLoRALinear")
        self._set_stacks(
            torch.empty(0, 1, self.in_features, dtype=dtype, device=device),
            torch.empty(0, self.out_features, 1, dtype=dtype, device=device),
        )
        self.register_buffer("scaling", torch.empty(0, dtype=torch.float64, device=device))
        self.register_buffer("ranks", torch.empty(0, dtype=torch.int64, device=device))
        self.train(base.training)

    @classmethod
    def from_linear(cls, linear: nn.Module, *, adapter_dtype: torch.dtype | str = "base") -> Self:
        """A module without adapters over ``linear``, whose Parameters it shares.

        Args:
            adapter_dtype: of the stacks, ``"base"`` or float32 beside a bfloat16 or float16 base.

        Raises:
            TypeError: ``linear`` is not nn.Linear, Conv1D or a module with integer ``in_features``
                and ``out_features``.
            ValueError: the ops do not support the pair of dtypes.

        Examples:
            >>> layer = MultiLoRALinear.from_linear(nn.Linear(64, 32))
            >>> layer.add("french", lora_a, lora_b, scaling=2.0)
            >>> y = layer(x, adapter_ids)  # x [B, T, 64], adapter_ids int64 [B, T]
        """
        return cls(linear, adapter_dtype=adapter_dtype)

    def _set_stacks(self, lora_a: Tensor, lora_b: Tensor) -> None:
        trains = "lora_a" in self._parameters and self.lora_a.requires_grad
        self.lora_a = nn.Parameter(lora_a, requires_grad=trains)
        self.lora_b = nn.Parameter(lora_b, requires_grad=trains)

    @torch.no_grad()
    def add(self, name: str, lora_a: Tensor, lora_b: Tensor, scaling: float) -> None:
        """Append an adapter, copies of lora_a [r, K] and lora_b [N, r]; it gets the next id.

        Raises:
            ValueError: the name is taken, a shape does not fit, or a value overflows in the dtype
                of the stacks; nothing has changed then.
        """
        self.set_stacks(self.stacks_with(name, lora_a, lora_b, scaling))

    @torch.no_grad()
    def stacks_with(self, name: str, lora_a: Tensor, lora_b: Tensor, scaling: float) -> Stacks:
        """What ``add`` would make of the module, which is not changed. Raises as ``add``."""
        if name in self.names:
            raise ValueError(f"MultiLoRALinear.add: name must be new, got {name!r}")
        check_scaling(scaling, "MultiLoRALinear.add")
        fits = lora_a.dim() == 2 and lora_a.shape[0] >= 1 and lora_a.shape[1] == self.in_features
        if not fits:
            raise ValueError(
                f"MultiLoRALinear.add: lora_a must be [r, in_features={self.in_features}], "
                f"got {list(lora_a.shape)}"
            )
        rank = lora_a.shape[0]
        if lora_b.shape != (self.out_features, rank):
            raise ValueError(
                f"MultiLoRALinear.add: lora_b must be [out_features={self.out_features}, "
                f"r={rank}], got {list(lora_b.shape)}"
            )
        slots = [*range(len(self.names)), -1]
        a, b = self._restacked(slots, max([rank, *self.ranks.tolist()]), lora_a, lora_b)
        for what, given, stacked in (("lora_a", lora_a, a[-1]), ("lora_b", lora_b, b[-1])):
            if not torch.isfinite(stacked).all() and torch.isfinite(given).all():
                raise ValueError(
                    f"MultiLoRALinear.add: {what} must be finite in {stacked.dtype}, the dtype of "
                    "the stacks"
                )
        return Stacks(
            (*self.names, name),
            a,
            b,
            torch.cat([self.scaling, self.scaling.new_tensor([scaling])]),
            torch.cat([self.ranks, self.ranks.new_tensor([rank])]),
        )

    def set_stacks(self, stacks: Stacks) -> None:
        """Take over what ``stacks_with`` made."""
        self._set_stacks(stacks.lora_a, stacks.lora_b)
        self.names, self.scaling, self.ranks = stacks.names, stacks.scaling, stacks.ranks

    @torch.no_grad()
    def remove(self, name: str) -> None:
        """Remove an adapter and free its memory; the ids after its own decrease by one.

        Raises:
            ValueError: no adapter has this name.
        """
        if name not in self.names:
            raise ValueError(
                f"MultiLoRALinear.remove: name must be one of {list(self.names)}, got {name!r}"
            )
        kept = [i for i, other in enumerate(self.names) if other != name]
        self._set_stacks(*self._restacked(kept, max([1, *(int(self.ranks[i]) for i in kept)])))
        self.scaling, self.ranks = self.scaling[kept], self.ranks[kept]
        self.names = tuple(self.names[i] for i in kept)

    def adapter(self, name: str) -> tuple[Tensor, Tensor, float]:
        """lora_a [r, K], lora_b [N, r] and scaling of an adapter, without padding."""
        slot = self.names.index(name)
        rank = int(self.ranks[slot])
        return self.lora_a[slot, :rank], self.lora_b[slot, :, :rank], float(self.scaling[slot])

    def _restacked(self, slots: Sequence[int], rank: int, *new: Tensor) -> tuple[Tensor, Tensor]:
        """Stacks of ``rank`` with the adapters ``slots``, where -1 stands for ``new`` (a, b)."""
        a = self.lora_a.new_zeros(len(slots), rank, self.in_features)
        b = self.lora_b.new_zeros(len(slots), self.out_features, rank)
        for slot, old in enumerate(slots):
            lora_a, lora_b = new if old == -1 else (self.lora_a[old], self.lora_b[old])
            used = min(rank, lora_a.shape[0])
            a[slot, :used].copy_(lora_a[:used])
            b[slot, :, :used].copy_(lora_b[:, :used])
        return a, b

    def base_module(self, original: nn.Module) -> nn.Module:
        """``original``, the module that this one replaced, with the present base and mode."""
        if self.base_layer is None:
            original._parameters.update(weight=self.weight, bias=self.bias)
        return original.train(self.training)

    def bytes_of_rank(self, rank: int) -> int:
        """Memory of one adapter of ``rank`` here."""
        return rank * (self.in_features + self.out_features) * self.lora_a.element_size()

    def forward(
        self,
        x: Tensor | None = None,
        *args: Any,
        adapter_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """x [..., K] to [..., N] in x's dtype.

        x is the first argument, or named as by the base (``input`` of nn.Linear). Further arguments
        go to the base, but for a second positional one outside of a bank: it is ``adapter_ids``.

        Args:
            adapter_ids: int64 [...], an id for each row, -1 for the base alone. None: the ids of
                the active ``AdapterBank.rows`` block; the base alone outside of one.

        Raises:
            RuntimeError: activation checkpointing reruns a trained adapter outside of the block of
                its first run.
        """
        if self.bank < 0 and args and adapter_ids is None:
            adapter_ids, args = args[0], args[1:]
        if x is None or args or kwargs:
            x, args, kwargs = split_call(self, args if x is None else (x, *args), kwargs)
        if self.base_layer is None:
            assert self.weight is not None
            base_out = F.linear(x, self.weight, self.bias)
        else:
            base_out = self.base_layer(x, *args, **kwargs)
        if adapter_ids is None:
            self._check_no_recomputation()
            adapter_ids = ids_of_block(x, self.bank, self.names)
        if adapter_ids is None:
            return base_out
        return ops.multi_lowrank_add(
            base_out,
            x,
            self.lora_a,
            self.lora_b,
            adapter_ids,
            self.scaling,
            ranks=self.ranks,
            dropout_p=self.dropout if self.training else 0.0,
        )

    def _check_no_recomputation(self) -> None:
        """Raise where backward reruns forward outside of its block: the gradients of lora_a and
        lora_b would be missing."""
        if torch.compiler.is_compiling() or not self.lora_a.requires_grad:
            return
        in_block = self.bank in ACTIVE_ROWS.get()
        if not in_block and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "MultiLoRALinear: activation checkpointing must run a module again inside the rows "
                "block of its first run, got no block; checkpoint lowrank_ext.nn.rows.in_block "
                "of the function (GuardModel.enable_checkpointing does), or call backward inside "
                "the block"
            )

    def extra_repr(self) -> str:
        dropout = f", dropout={self.dropout:g}" if self.dropout else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"adapters={list(self.names)}, r={self.lora_a.shape[1]}{dropout}"
        )

    def _apply(self, fn: object, recurse: bool = True) -> Self:
        scaling = self.scaling
        super()._apply(fn, recurse)
        if self.scaling.dtype != scaling.dtype:  # .to(dtype) must not change it
            self.scaling = scaling.to(self.scaling.device)
        return self
