"""ResidualBase: a base weight that lacks the branch from which the adapter starts."""

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lowrank_ext.nn.base_layer import plain_module
from lowrank_ext.nn.quantized import dequantized_weight, is_quantized
from lowrank_ext.nn.wrapped_base import WrappedBase


class ResidualBase(WrappedBase):
    """Takes the initial branch out of the base weight, and puts it back.

    Attributes:
        residual_taken: whether it has been taken out.
        start_scaling: the scaling that it had then; ``scaling`` may be set to another afterwards.
    """

    # Tensors that rebuild a residual base: buffers with the branch's start, and constant tensors.
    residual_starts: ClassVar[tuple[str, ...]] = ()
    residual_constants: ClassVar[tuple[str, ...]] = ()

    residual_taken: bool
    scaling: float
    start_scaling: float
    unmerged_weight: Tensor | None

    def adapter_tensors(self) -> dict[str, Tensor]:
        """The adapter's tensors by name: parameters, then persistent buffers."""
        raise NotImplementedError

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

    def packed(self, name: str, tensor: Tensor) -> Tensor:
        """``tensor``, the adapter's ``name``, as a matrix for files."""
        return tensor

    def unpacked(self, name: str, tensor: Tensor) -> Tensor:
        """The inverse of ``packed``, for a tensor in the shape that files have or in the own."""
        return tensor.view_as(self.adapter_tensors()[name])

    @torch.no_grad()
    def fill(self, values: Mapping[str, Tensor], beside: Self | None = None) -> None:
        """Copy ``values`` into the adapter's tensors, by attribute, in the shapes of files or in
        their own, and take the residual that they define.

        Args:
            beside: another adapter over the same base weight, which lacks its start already.
        """
        own = self.adapter_tensors()
        values = {name: self.unpacked(name, value) for name, value in values.items()}
        starts = [name for name in self.residual_starts if name in values]
        # Training never changes the initial factors, so equal factors mean an equal residual base.
        holder = self if beside is None else beside
        taken = bool(starts) and holder.starts_as(values)
        if starts and not taken:
            self.restore_base()
        for name, value in values.items():
            if own[name].is_meta and not value.is_meta:
                self._assign(name, value)
            else:
                own[name].copy_(value)
        if taken:
            self.residual_taken, self.start_scaling = True, holder.start_scaling
        elif starts:
            self.take_residual()

    def starts_as(self, values: Mapping[str, Tensor]) -> bool:
        """Whether the base weight lacks the start that ``values`` define."""
        own = self.adapter_tensors()
        defining = (*self.residual_starts, *self.residual_constants)
        return self.residual_taken and all(
            torch.equal(own[name], values[name].to(own[name])) for name in defining
        )

    def _assign(self, name: str, tensor: Tensor) -> None:
        """Put ``tensor`` in place of one on the meta device."""
        parameter = self._parameters.get(name)
        if parameter is None:
            self._buffers[name] = tensor
        else:
            self._parameters[name] = nn.Parameter(tensor, parameter.requires_grad)

    @torch.no_grad()
    def restore_base(self) -> None:
        """Undo ``take_residual``: restore the base weight, to one rounding of its dtype."""
        if self.residual_taken:
            self._add_to_weight(self._require_weight("restore_base"), self._initial_delta())
            self.residual_taken = False

    def _add_to_weight(self, weight: Tensor, delta: Tensor) -> None:
        weight.copy_(weight.to(delta.dtype) + self.in_layout(delta))

    def original_linear(self) -> nn.Linear:
        """A linear with a copy of the weight before adaptation, and no bias."""
        weight = nn.Parameter(self.original_weight(), requires_grad=False)
        plain = plain_module((weight.shape[1], weight.shape[0]), weight, None, conv1d=False)
        assert isinstance(plain, nn.Linear)
        return plain

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
