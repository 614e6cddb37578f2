"""ResidualBase: a base weight that lacks the branch from which the adapter starts."""

from typing import Any

import torch
from torch import Tensor

from lowrank_ext.nn.quantized import dequantized_weight, is_quantized
from lowrank_ext.nn.wrapped_base import WrappedBase


class ResidualBase(WrappedBase):
    """Takes the initial branch out of the base weight, and puts it back.

    Attributes:
        residual_taken: whether it has been taken out.
        start_scaling: the scaling that it had then; ``scaling`` may be set to another afterwards.
    """

    residual_taken: bool
    scaling: float
    start_scaling: float
    unmerged_weight: Tensor | None

    def start_branch(self) -> dict[str, Any]:
        """lora_a [R, K], lora_b [N, R], scaling and perhaps core [R, R] of the initial branch,
        which the base weight lacks. Residual inits only."""
        raise NotImplementedError

    def begin_at_start(self) -> None:
        """Make the branch the one from which the buffers of a residual init say it starts."""
        raise NotImplementedError

    def _initial_delta(self) -> Tensor:
        """scaling · lora_b core lora_a of ``start_branch``, fp64 [N, K]."""
        start = self.start_branch()
        lora_a, lora_b = start["lora_a"].double(), start["lora_b"].double()
        if "core" in start:
            lora_b = lora_b @ start["core"].double()
        delta: Tensor = start["scaling"] * (lora_b @ lora_a)
        return delta

    @torch.no_grad()
    def take_residual(self) -> None:
        """Subtract the initial branch from the base weight: W ← round(fp64(W) - initial branch).

        Part of ``reset_adapter``; a loader calls it after filling the buffers of a residual init.
        """
        if not self.residual_taken:
            self.start_scaling = self.scaling
            self._add_to_weight(self._require_weight("take_residual"), -self._initial_delta())
            self.residual_taken = True

    @torch.no_grad()
    def restore_base(self) -> None:
        """Undo ``take_residual``: restore the base weight, to one rounding of its dtype."""
        if self.residual_taken:
            self._add_to_weight(self._require_weight("restore_base"), self._initial_delta())
            self.residual_taken = False

    def _add_to_weight(self, weight: Tensor, delta: Tensor) -> None:
        weight.copy_(weight.to(delta.dtype) + self.in_layout(delta))

    @torch.no_grad()
    def original_weight(self) -> Tensor:
        """Copy of the weight before adaptation, [N, K]; with a residual init to one rounding."""
        if self.base_layer is not None and is_quantized(self.base_layer):
            dense = dequantized_weight(self.base_layer)
            assert dense is not None
            return dense
        stored = self._require_weight("original_weight")
        unmerged = stored if self.unmerged_weight is None else self.unmerged_weight
        weight = self.as_matrix(unmerged)
        if not self.residual_taken:
            return weight.clone()
        return (weight.double() + self._initial_delta()).to(weight.dtype)
