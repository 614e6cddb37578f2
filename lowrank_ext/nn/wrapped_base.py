"""WrappedBase: the module that an adapter wraps, taken over, kept whole or borrowed."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ext.nn.base_layer import (
    LINEAR,
    Adapter,
    computes_its_weight,
    dense_weight,
    execution_device,
    is_plain,
)
from lowrank_ext.nn.call_arguments import input_name


class WrappedBase(Adapter):
    """Holds the base and computes its output.

    Attributes:
        weight: the base's Parameter, frozen, [N, K], or [K, N] with ``fan_in_fan_out``
            (transformers' Conv1D). None, as bias, when ``base_layer`` holds the base.
        bias: the base's Parameter, frozen, [N], or None.
        base_layer: a base that is more than a plain dense linear, or one that was borrowed.
    """

    # The family of the bases that the class wraps.
    family: ClassVar[str] = LINEAR
    svd_inits: ClassVar[tuple[str, ...]] = ()

    out_features: int
    init: str
    fan_in_fan_out: bool
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    base_layer: nn.Module | None

    def tensor(self, name: str) -> Any:
        """The attribute ``name``, a Parameter or None. nn.Module's own look-up takes a microsecond,
        of which each call would need nine."""
        parameters = self._parameters
        return parameters[name] if name in parameters else getattr(self, name)

    def _make_base(
        self, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        n, k = self.out_features, self.in_features
        self.weight = nn.Parameter(torch.empty(n, k, device=device, dtype=dtype), False)
        empty = torch.empty(n, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty, False))
        self.base_layer = None
        self._borrows = False
        self.input_name = "input"

    def _take_base(self, base: nn.Module) -> None:
        plain = is_plain(base)
        if self.init in self.svd_inits and not computes_its_weight(base):
            raise ValueError(
                f"{type(self).__name__}: init must be one without an SVD of the base weight for a "
                f"{type(base).__name__} that is not x weightᵀ + bias, got {self.init!r}"
            )
        self._borrows = False
        self.register_parameter("weight", base._parameters["weight"] if plain else None)
        self.register_parameter("bias", base._parameters.get("bias") if plain else None)
        self.base_layer = None if plain else base
        self.input_name = input_name(base)

    def borrow(self, base: nn.Module) -> None:
        """Leave ``base``, of which this module was made, to another module that registers it.

        Called before ``reset_adapter``. Several adapters can then share one base, which has its own
        place in state dicts; ``base_layer`` refers to it.
        """
        self.weight, self.bias = None, None
        self._modules.pop("base_layer", None)
        vars(self)["base_layer"] = base  # by nn.Module's own way it would become a submodule
        self._borrows = True

    def _base_dtype_and_device(self) -> tuple[torch.dtype | None, torch.device]:
        weight = self.base_parameter
        dtype = None if weight is None else weight.dtype
        return dtype, execution_device(self if self.base_layer is None else self.base_layer)

    @property
    def base_parameter(self) -> nn.Parameter | None:
        """The Parameter that holds the base weight; None when the base has no dense one."""
        return self.weight if self.base_layer is None else dense_weight(self.base_layer)

    @property
    def base_bias(self) -> nn.Parameter | None:
        """The Parameter that holds the base's bias, if it has one."""
        return (self if self.base_layer is None else self.base_layer)._parameters.get("bias")

    @property
    def mergeable_parameter(self) -> nn.Parameter | None:
        """``base_parameter`` if the output is x weightᵀ + bias with what is written to it."""
        if self.base_layer is None:
            return self._parameters.get("weight")  # none if parametrized, pruned: writes are lost
        return self.base_parameter if computes_its_weight(self.base_layer) else None

    def _require_weight(self, action: str) -> nn.Parameter:
        weight = self.base_parameter
        if weight is None:
            raise TypeError(
                f"{type(self).__name__}.{action}: the base must have a floating-point weight "
                f"[out_features, in_features], got {type(self.base_layer).__name__}"
            )
        return weight

    def base_weight(self) -> Tensor:
        """View of the stored base weight, [N, K]: merged or residual, if that is its state."""
        return self.as_matrix(self._require_weight("base_weight"))

    def as_matrix(self, weight: Tensor) -> Tensor:
        """View of a weight in the base's layout as [N, K]."""
        return weight.t() if self.fan_in_fan_out else weight

    def in_layout(self, matrix: Tensor) -> Tensor:
        """View of a matrix [N, K] in the base's layout."""
        return matrix.t() if self.fan_in_fan_out else matrix

    def base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base's output for x, and what else it takes, with its present weight."""
        if self.base_layer is not None:
            y: Tensor = self.base_layer(x, *args, **kwargs)
            return y
        assert self.weight is not None
        return F.linear(x, self.as_matrix(self.weight), self.bias)

    def fusible_base(self) -> tuple[Tensor | None, nn.Parameter | None]:
        """Weight [N, K] and bias of a base that the op can compute with the branch; else None."""
        base = self.base_layer
        if base is None:
            weight, bias = self.tensor("weight"), self.tensor("bias")
        elif self._borrows and is_plain(base):
            weight, bias = base._parameters["weight"], base._parameters["bias"]
        else:
            return None, None
        assert weight is not None
        return self.as_matrix(weight), bias
