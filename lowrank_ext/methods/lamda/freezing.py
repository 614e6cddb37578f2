"""LaMDA's gradual freezing of lora_b.

(The Trainer's callback: lowrank_ext/integrations/transformers.py.) Columns of lora_b are frozen in
order, from column 0 (the largest singular value with the SVD inits) up. After optimizer step t of T
the first ``min(r, floor(r · t / (eta · T)))`` columns are frozen, all of them once t >= eta · T
(LaMDA, arXiv 2406.12832, where eta = 0.3). A frozen column never changes again. Zeroing its
gradient is not enough (momentum and weight decay still move it), so a copy of its values is written
back after every optimizer step.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowrank_ext.freezing import (
    check_fraction,
    check_positive,
    exact,
    frozen_may_leave,
    stop_training,
)
from lowrank_ext.methods.lamda.module import LaMDALinear
from lowrank_ext.sharding import local_part
from lowrank_ext.targets import modules_of_kind

__all__ = ["FreezeSchedule", "num_frozen_columns"]


def num_frozen_columns(step: int, rank: int, total_steps: int, eta: float, bucket: int = 1) -> int:
    """Columns of lora_b that are frozen after ``step`` optimizer steps.

    ``floor(rank · step / (eta · total_steps))``, rounded down to a multiple of ``bucket``; ``rank``
    from ``step >= eta · total_steps`` on.
    """
    freezing_steps = exact(eta) * total_steps
    if step >= freezing_steps:
        return rank
    return math.floor(rank * step / freezing_steps) // bucket * bucket


def _columns(tensor: Tensor, stop: int) -> Tensor:
    """View of the first ``stop`` columns; for a DTensor sharded on dim 0, of its local rows."""
    return local_part(tensor)[:, :stop]


def _check_rows_only(name: str, lora_b: Tensor) -> None:
    for placement in getattr(lora_b, "placements", ()):
        if not (placement.is_replicate() or placement.is_shard(0)):
            raise ValueError(
                f"FreezeSchedule: {name}.lora_b must be replicated or sharded on dim 0, "
                f"got {placement}"
            )


class _FrozenColumns:
    """The frozen columns of one module's lora_b: how many, and the values they keep."""

    def __init__(self, module: LaMDALinear) -> None:
        self.module = module
        self.count = 0
        self.values: Tensor | None = None  # [N, count], local rows under DTensor
        self._hook: RemovableHandle | None = None

    def freeze(self, count: int) -> None:
        """Keeps the present values of the first ``count`` columns from now on."""
        if count != self.count or self.values is None:
            self.count = count
            self.values = _columns(self.module.lora_b, count).clone()

    def restore(self) -> None:
        if self.values is not None:
            _columns(self.module.lora_b, self.count).copy_(self.values)

    def mask_gradients(self) -> None:
        """Zeroes the frozen columns of new gradients, so that clipping counts live columns only."""
        if self._hook is None:
            # Of the hooks on a parameter, FSDP2 calls this one on sharded parameters.
            self._hook = self.module.lora_b.register_post_accumulate_grad_hook(self._mask)

    def _mask(self, lora_b: Tensor) -> None:
        if lora_b.grad is not None:
            with torch.no_grad():
                _columns(lora_b.grad, self.count).zero_()

    def unmask_gradients(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def release(self, optimizer: torch.optim.Optimizer | None) -> None:
        """All columns are frozen: end the training of lora_b and drop the copy of its values."""
        self.unmask_gradients()
        stop_training(self.module.lora_b, optimizer)
        self.values = None

    def reset(self) -> None:
        self.count = 0
        self.values = None
        self.module.lora_b.requires_grad_(True)


class FreezeSchedule:
    """Freezes the columns of every trainable lora_b of the model's LaMDALinears, step by step.

    Args:
        model: a model adapted with LaMDA. Modules whose lora_b is not trainable are left alone.
        total_steps: T, the optimizer steps of the whole training.
        eta: fraction of T after which all columns are frozen; 0 freezes them at once.
        bucket: columns are frozen in multiples of this, for graphs that are captured or compiled.
        optimizer: if given, its state for a lora_b is dropped when all columns are frozen.

    Call ``step`` once after each ``optimizer.step()``; between the two, frozen columns may hold
    values that the optimizer has changed. Once all columns of a module are frozen, its lora_b has
    requires_grad False and grad None, and autograd does no work for it. Where torch.distributed is
    initialized it keeps requires_grad (see ``frozen_may_leave``), its gradient is zero, and its
    values are still restored.

    Build it after ``fully_shard``; a lora_b that is a DTensor must be replicated or sharded on
    dim 0. To resume, load the model's weights first, then call ``load_state_dict``: the saved
    lora_b holds the frozen values.

    Raises:
        ValueError: an argument is out of range, the model has no LaMDALinear, or a lora_b would be
            frozen at once (eta = 0) while it is all zero, so that its module could never train.

    Examples:
        >>> schedule = FreezeSchedule(model, total_steps=1000, optimizer=optimizer)
        >>> for batch in batches:
        ...     model(**batch).loss.backward()
        ...     optimizer.step()
        ...     schedule.step()
        ...     optimizer.zero_grad()
    """

    before_optimizer: ClassVar[bool] = False
    has_statistics: ClassVar[bool] = False

    def __init__(
        self,
        model: nn.Module,
        total_steps: int,
        *,
        eta: float = 0.3,
        bucket: int = 1,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        self.total_steps = check_positive("FreezeSchedule", "total_steps", total_steps)
        self.eta = check_fraction("FreezeSchedule", "eta", eta)
        self.bucket = check_positive("FreezeSchedule", "bucket", bucket)
        self.optimizer = optimizer
        self.step_count = 0
        self._frozen = {name: _FrozenColumns(module) for name, module in _scheduled(model)}
        if self.eta == 0:
            self._check_not_zero()
        self._freeze()

    @classmethod
    def check_options(cls, owner: str, options: Mapping[str, Any]) -> None:
        """Raise ValueError, naming ``owner`` and the argument, for an invalid option."""
        check_fraction(owner, "eta", options["eta"])
        check_positive(owner, "bucket", options["bucket"])

    @classmethod
    def for_training(
        cls, model: nn.Module, total_steps: int, options: Mapping[str, Any], optimizer: Any
    ) -> Self | None:
        """The schedule of ``model`` with eta and bucket; None where it has no LaMDALinear."""
        if not any(isinstance(module, LaMDALinear) for module in model.modules()):
            return None
        eta, bucket = options["eta"], options["bucket"]
        return cls(model, total_steps, eta=eta, bucket=bucket, optimizer=optimizer)

    def _check_not_zero(self) -> None:
        for name, frozen in self._frozen.items():
            if not frozen.module.lora_b.any():
                raise ValueError(
                    f"FreezeSchedule: eta must be above 0 for {name}, whose lora_b is all zero, "
                    "got 0"
                )

    @torch.no_grad()
    def step(self) -> None:
        """Restores the frozen columns bit for bit, then freezes the columns that are due."""
        for frozen in self._frozen.values():
            frozen.restore()
        self.step_count += 1
        self._freeze()

    @torch.no_grad()
    def _freeze(self) -> None:
        release = frozen_may_leave()
        for frozen in self._frozen.values():
            rank = frozen.module.r
            frozen.freeze(
                num_frozen_columns(self.step_count, rank, self.total_steps, self.eta, self.bucket)
            )
            if frozen.count < rank or not release:
                frozen.mask_gradients()
            else:
                frozen.release(self.optimizer)

    def num_frozen(self) -> dict[str, int]:
        """Frozen columns by module path."""
        return {name: frozen.count for name, frozen in self._frozen.items()}

    def remove(self) -> None:
        """Removes the gradient hooks from the model; frozen columns are no longer restored."""
        for frozen in self._frozen.values():
            frozen.unmask_gradients()
        self._frozen.clear()

    def state_dict(self) -> dict[str, int | float]:
        """Plain numbers. The frozen values are those in the model's own state."""
        return self.numbers()

    def numbers(self) -> dict[str, int | float]:
        """The part of the state that JSON can hold: all of it."""
        return {
            "step": self.step_count,
            "total_steps": self.total_steps,
            "eta": self.eta,
            "bucket": self.bucket,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues the saved schedule with the columns that the model holds now."""
        expected = self.state_dict().keys()
        if state.keys() != expected:
            raise ValueError(
                f"FreezeSchedule: state must have the keys {sorted(expected)}, got {sorted(state)}"
            )
        step = state["step"]
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"FreezeSchedule: step must be an integer of at least 0, got {step!r}")
        total_steps = check_positive("FreezeSchedule", "total_steps", state["total_steps"])
        eta = check_fraction("FreezeSchedule", "eta", state["eta"])
        bucket = check_positive("FreezeSchedule", "bucket", state["bucket"])
        self.step_count, self.total_steps, self.eta, self.bucket = step, total_steps, eta, bucket
        for frozen in self._frozen.values():
            frozen.reset()
        self._freeze()


def _scheduled(model: nn.Module) -> Iterator[tuple[str, LaMDALinear]]:
    modules = modules_of_kind(model, LaMDALinear, "FreezeSchedule")
    for name, module in modules.items():
        module.awaits_schedule = False
        if module.lora_b.requires_grad:
            _check_rows_only(name, module.lora_b)
            yield name, module
