"""TokenRows: an embedding, or a head, of which some rows of the weight train.

    embedding: y = W'[ids]            head: y = x W'ᵀ + bias

W' is W with the rows ``token_ids`` replaced by ``rows`` [t, N]. PEFT's ``trainable_token_indices``.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ext.nn.base_layer import (
    EMBEDDING,
    LINEAR,
    Adapter,
    computes_its_weight,
    dense_weight,
    execution_device,
    family_of,
    features_of,
    is_conv1d,
    looks_up_its_ids,
)
from lowrank_ext.nn.fixed_size import FixedVocabulary, check_stays
from lowrank_ext.nn.merged_state import MergedState
from lowrank_ext.nn.merged_weight import check_finite, without_gradient
from lowrank_ext.wrappers import replace_wrapped


class WithRows(FixedVocabulary, Adapter):
    """Keeps ``base_layer`` and computes its output with other rows."""

    base_layer: nn.Module
    rows: nn.Parameter
    token_ids: Tensor
    blocks: int
    merged: bool
    # What PEFT's module of the same tensors does otherwise.
    differs_in_peft = ""

    def __init__(self, base: nn.Module, token_ids: Sequence[int]) -> None:
        super().__init__()
        self.check_base(base)
        features = features_of(base)
        assert features is not None  # check_base
        self.family = family_of(base)
        self.in_features, self.out_features = features
        self.base_layer = base
        if self.family == LINEAR and base._parameters.get("bias") is not None:
            self.differs_in_peft = "leaves out the bias of a head"
        # The slot of the padding token, whose row has no gradient, if it is one of them.
        padding: Any = getattr(base, "padding_idx", None)
        self._padding = list(token_ids).index(padding) if padding in token_ids else None
        self.train(base.training)

    @classmethod
    def check_base(cls, base: nn.Module) -> None:
        """Raise ValueError where rows of the base's weight cannot be replaced."""
        known = family_of(base) in (EMBEDDING, LINEAR) and not is_conv1d(base)
        of_ids = family_of(base) != EMBEDDING or looks_up_its_ids(base)
        if not (known and of_ids and computes_its_weight(base)):
            raise ValueError(
                f"{cls.__name__}: base must be an embedding or a head that computes its dense "
                f"weight, a row for each token, got {type(base).__name__}"
            )
        if (max_norm := getattr(base, "max_norm", None)) is not None:
            raise ValueError(
                f"{cls.__name__}: max_norm must be None, by which each lookup rewrites the frozen "
                f"weight, got {max_norm}"
            )

    @property
    def weight(self) -> Any:
        """The base's Parameter."""
        base: Any = self.base_layer
        return base.weight

    @property
    def bias(self) -> Any:
        """The base's Parameter, or None."""
        return getattr(self.base_layer, "bias", None)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of nn.Module, but weight and bias are the base's: tie_weights of transformers sets
        them. The weight keeps its shape."""
        if name not in ("weight", "bias"):
            super().register_parameter(name, param)
            return
        if name == "weight" and param is not None:
            sizes = (self.in_features, self.out_features)
            made_for = [*sizes] if self.family == EMBEDDING else [*reversed(sizes)]
            check_stays(self, "the shape of the weight", made_for, [*param.shape])
        self.base_layer.register_parameter(name, param)

    @property
    def padding_idx(self) -> int | None:
        """The embedding's padding token."""
        return getattr(self.base_layer, "padding_idx", None)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """ids [...], or x [..., K] of a head, to the base's output with the trained rows."""
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.blocks:
            return y
        if self.merged:
            return without_gradient(self, y) if self.training else y
        return self._looked_up(x, y) if self.family == EMBEDDING else self._multiplied(x, y)

    def _looked_up(self, ids: Tensor, y: Tensor) -> Tensor:
        base: Any = self.base_layer
        ordered, order = self.token_ids.sort()
        wanted = ids.to(ordered.dtype).contiguous()
        slot = torch.searchsorted(ordered, wanted).clamp(max=len(ordered) - 1)
        trains = ordered[slot] == ids
        # Tokens that do not train read a row behind the others, whose gradient is dropped.
        slot = torch.where(trains, order[slot], len(ordered))
        table = F.pad(self.rows, (0, 0, 0, 1))
        rows = F.embedding(slot, table, self._padding, scale_grad_by_freq=base.scale_grad_by_freq)
        scale = getattr(base, "embed_scale", None)
        if scale is not None:
            rows = rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)
        return torch.where(trains.unsqueeze(-1), rows.to(y.dtype), y)

    def _multiplied(self, x: Tensor, y: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias[self.token_ids]
        z = F.linear(x, self.rows.to(x.dtype), bias).to(y.dtype)
        # A few columns can round otherwise than inside of the whole product: rows that are still
        # the base's keep its bits, and have the gradient of their own product.
        base = self.weight.detach()[self.token_ids]
        changed = (self.rows.detach().to(base.dtype) != base).any(-1)
        kept = y[..., self.token_ids].detach() + (z - z.detach())
        return y.index_copy(-1, self.token_ids, torch.where(changed, z, kept))


class TokenRows(MergedState, WithRows):
    """Owns the rows, which start as the base's.

    Args:
        base: nn.Embedding, or a linear head with a row for each token; kept, frozen.
        token_ids: the tokens whose rows train, [t], all different.
        dtype: of ``rows``.

    Attributes:
        rows: [t, N], in place of the base's rows. That of the base's padding_idx has no gradient;
            an ``embed_scale`` of the base scales all.
        token_ids: int64 [t].
        merged: whether the rows are inside the base weight right now.
        blocks: the number of ``lowrank_ext.disable_adapter`` blocks that the module is in.

    State dict: the base's keys, ``rows`` and ``token_ids``; merged, the base's keys alone, which a
    plain module loads.

    Raises:
        ValueError: the base is neither of these, its output is not that of its weight, or it has a
            max_norm.

    Examples:
        >>> layer = TokenRows(nn.Embedding(1000, 64), [7, 8])
    """

    unmergeable_because = ""
    base_bias: Tensor | None = None  # which a merge would change

    indices: tuple[int, ...]
    unmerged_rows: Tensor | None

    def __init__(
        self, base: nn.Module, token_ids: Sequence[int], dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(base, token_ids)
        base.requires_grad_(False)
        self.indices = tuple(token_ids)
        self.register_buffer("token_ids", torch.tensor(self.indices, device=execution_device(base)))
        self.rows = nn.Parameter(self.weight.detach()[self.token_ids].to(dtype))
        self.register_buffer("unmerged_rows", None, persistent=False)
        self.merged = False
        self.blocks = 0
        self.merges_after_blocks = False

    @property
    def mergeable_parameter(self) -> nn.Parameter | None:
        """The base's weight."""
        return dense_weight(self.base_layer)

    def branch_bias(self) -> Tensor | None:
        """None: rows have no bias of their own."""
        return None

    def check_mergeable(self) -> None:
        """Never raises: all that a merge needs is here."""

    @torch.no_grad()
    def merge(self) -> None:
        """Put the rows into the base weight, rounded to its dtype. Merging twice does nothing.

        Raises:
            ValueError: the weight has no values, a row has inf or nan in its dtype, or the adapter
                is switched off by ``disable_adapter``. Nothing has changed then.
        """
        if self.merged:
            return
        owner = f"{type(self).__name__}.merge"
        if self.blocks:
            raise ValueError(
                f"{owner}: the adapter must act, got one that lr.disable_adapter has switched off; "
                "merge after its block"
            )
        weight = self.weight
        if weight.is_meta:
            raise ValueError(f"{owner}: the base weight must hold values, got a meta tensor")
        rows = self.rows.to(weight.dtype)
        check_finite(rows, owner)
        self.unmerged_rows = weight[self.token_ids].clone()
        weight.index_copy_(0, self.token_ids, rows)
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the base weight the bits it had before ``merge``. Harmless when not merged."""
        if self.merged:
            assert self.unmerged_rows is not None
            self.weight.index_copy_(0, self.token_ids, self.unmerged_rows)
            self.unmerged_rows, self.merged = None, False

    def to_linear(self, merge: bool, dense_dtype: torch.dtype | None = None) -> nn.Module:
        """The base again, the rows merged in or dropped."""
        if merge:
            self.merge()
        else:
            self.unmerge()
        return self.base_layer.train(self.training)

    @classmethod
    def disconnect(cls, model: nn.Module) -> None:
        """Put the base of every TiedTokenRows of the model back in its place."""
        for parent in list(model.modules()):
            for name, child in list(parent._modules.items()):
                if isinstance(child, TiedTokenRows):
                    replace_wrapped(parent, name, child.base_layer)

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The tensors that train."""
        return {"rows": self.rows}

    def extra_repr(self) -> str:
        merged = ", merged=True" if self.merged else ""
        return f"in_features={self.in_features}, tokens={len(self.indices)}{merged}"

    def _names_of_adapter(self) -> Iterable[str]:
        return "rows", "token_ids"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *arguments: Any
    ) -> None:
        given = state_dict.get(prefix + "token_ids")
        if not self.merged and given is not None and given.tolist() != list(self.indices):
            where, error_msgs = prefix.removesuffix(".") or type(self).__name__, arguments[-1]
            error_msgs.append(
                f"{where}: token_ids must be {list(self.indices)}, got {given.tolist()}"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *arguments)


class TiedTokenRows(WithRows):
    """A module whose weight is tied to that of a TokenRows: it computes with the owner's rows.

    Args:
        base: the embedding or head; kept.
        owner: the module that registers the rows, merges them and saves them.
    """

    owner: TokenRows

    def __init__(self, base: nn.Module, owner: TokenRows) -> None:
        super().__init__(base, owner.indices)
        base.requires_grad_(False)
        vars(self)["owner"] = owner  # no submodule: it has its own place in the model

    @property
    def rows(self) -> nn.Parameter:  # type: ignore[override]
        return self.owner.rows

    @property
    def token_ids(self) -> Tensor:  # type: ignore[override]
        return self.owner.token_ids

    @property
    def merged(self) -> bool:  # type: ignore[override]
        return self.owner.merged

    @property
    def blocks(self) -> int:  # type: ignore[override]
        return self.owner.blocks
