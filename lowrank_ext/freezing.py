"""Interface and helpers of freezing schedules; each method has its own schedule."""

import warnings
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor, nn

from lowrank_ext.nn.low_rank_linear import LowRankLinear


class FreezingSchedule(Protocol):
    """Freezes parts of a model's adapters while it trains: ``step()`` once per optimizer step.

    Attributes:
        before_optimizer: whether ``step`` is called before ``optimizer.step()`` or after it.
        has_statistics: whether ``state_dict()`` holds tensors beside ``numbers()``.
    """

    before_optimizer: ClassVar[bool]
    has_statistics: ClassVar[bool]

    @classmethod
    def check_options(cls, owner: str, options: Mapping[str, Any]) -> None:
        """Raise ValueError, naming ``owner`` and the argument, for an invalid option.

        Args:
            options: eta, bucket, start, decay and window; a schedule checks those that it takes.
        """
        ...

    @classmethod
    def for_training(
        cls, model: nn.Module, total_steps: int, options: Mapping[str, Any], optimizer: Any
    ) -> Self | None:
        """The schedule with these options; None if the model has no module of its method."""
        ...

    def step(self) -> None: ...
    def numbers(self) -> dict[str, Any]:
        """The part of the state that JSON can hold."""
        ...

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
    def remove(self) -> None:
        """Remove all hooks from the model."""
        ...


class ScheduledLinear(LowRankLinear):
    """Base class of modules whose lora_b a schedule freezes: says where none does.

    Attributes:
        awaits_schedule: True, after ``adapt``, of one module of a model, until a schedule is made
            for the model.
    """

    schedule_name: ClassVar[str]
    awaits_schedule = False
    _has_trained = False  # whether a backward has come through the module since

    @classmethod
    def connect(cls, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, cls) and module.lora_b.requires_grad:
                module.awaits_schedule = True
                return

    def unmerged_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = super().unmerged_output(x, *args, **kwargs)
        if self.awaits_schedule and self.training and self.lora_b.requires_grad:
            self._watch_training(y)
        return y

    def _watch_training(self, y: Tensor) -> None:
        """Warn at the first call in training after a backward: a single one is no training."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return
        if self._has_trained:
            self.awaits_schedule = False
            warnings.warn(
                f"{type(self).__name__}: the model trains without a {self.schedule_name}, so "
                "nothing is frozen; make one before the training, with transformers' Trainer by "
                "callbacks=[lr.FreezeCallback()]",
                stacklevel=5,  # past forward and torch's call of it
            )
        elif y.requires_grad:
            y.register_hook(self._note_backward)

    def _note_backward(self, gradient: Tensor) -> None:
        self._has_trained = True


def check_positive(owner: str, name: str, value: object) -> int:
    """``value`` as an int >= 1, or ValueError naming ``owner`` and the argument."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{owner}: {name} must be an integer of at least 1, got {value!r}")
    return value


def check_fraction(owner: str, name: str, value: object) -> float:
    """``value`` as a float in [0, 1], or ValueError naming ``owner`` and the argument."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{owner}: {name} must be a number from 0 to 1, got {value!r}")
    return float(value)


def exact(fraction: float) -> Fraction:
    """``fraction`` as the decimal number it is written as: 0.1 of 30 steps are exactly 3 steps."""
    return Fraction(repr(float(fraction)))


def frozen_may_leave() -> bool:
    """Whether a frozen tensor may lose requires_grad.

    False where torch.distributed is initialized: DDP's reducer and FSDP2's groups are built for a
    fixed set of trainable parameters.
    """
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


def stop_training(parameter: nn.Parameter, optimizer: torch.optim.Optimizer | None) -> None:
    """Takes a frozen parameter out of autograd and its state out of the optimizer."""
    parameter.requires_grad_(False)
    parameter.grad = None
    if optimizer is not None:
        optimizer.state.pop(parameter, None)
