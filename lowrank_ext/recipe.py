"""What ``lowrank-ext finetune`` has to know of a method: options, learning rate, schedule, stages.

A method's ``command_line.py`` makes these; the command line reads them from the registry.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from lowrank_ext.freezing import FreezingSchedule

if TYPE_CHECKING:
    from lowrank_ext.config import AdapterConfig

# Parameters, and their learning rate as a multiple of the run's.
ParameterGroup = tuple[list[nn.Parameter], float]


class Run(Protocol):
    """What a recipe may ask of a run."""

    @property
    def rank(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def seq_len(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def options(self) -> Mapping[str, Any]:
        """The options of all methods, by name."""
        ...


@dataclass(frozen=True, kw_only=True)
class Option:
    """An option of the command line. Methods may share one: same name, type, default and check.

    Attributes:
        name: as in Python, ``freeze_eta`` for ``--freeze-eta``.
        type: of its value; ``None`` as default is a value too.
        help: what it means for this method, one sentence.
        shown_default: what stands in the help for a default that says nothing.
        check: given the value and the options of all methods, what is wrong with it ("must be at
            least 1"), or None.
    """

    name: str
    type: type
    default: Any
    help: str
    check: Callable[[Any, Mapping[str, Any]], str | None]
    shown_default: str | None = None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of the training after which another begins.

    Attributes:
        begin: turn the model of the stage before into this one's.
        num_steps: its optimizer steps.
        batch: what the model gets for a batch of tokens [B, T] at a step of the run.
    """

    num_steps: Callable[[Run], int]
    begin: Callable[[nn.Module], object]
    batch: Callable[[Tensor, Run, int], Tensor]


class CountedLoad(Protocol):
    """Tokens that each expert got."""

    @property
    def counts(self) -> Mapping[str, Tensor]:
        """int64 [E], by module path."""
        ...


def _nothing(run: Run) -> str | None:
    return None


def _no_groups(model: nn.Module) -> list[ParameterGroup]:
    return []


def _no_schedule(model: nn.Module, run: Run) -> FreezingSchedule | None:
    return None


def _first_stage(model: nn.Module) -> int:
    return 0


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a training loop does for a method beyond minimizing the loss with one learning rate.

    Attributes:
        parameter_groups: parameters with learning rates of their own.
        schedule: what freezes parts of the model while it trains, or None.
        stages: in their order; none where the training is all of a piece.
        stage_of: index of the stage that the model is in.
        extra_loss: what the last forward adds to the loss.
        expert_load: counts the tokens of each expert in a ``with`` block; None without experts.
    """

    parameter_groups: Callable[[nn.Module], list[ParameterGroup]] = _no_groups
    schedule: Callable[[nn.Module, Run], FreezingSchedule | None] = _no_schedule
    stages: tuple[Stage, ...] = ()
    stage_of: Callable[[nn.Module], int] = _first_stage
    extra_loss: Callable[[nn.Module], Tensor] | None = None
    expert_load: Callable[[nn.Module], AbstractContextManager[CountedLoad]] | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One name that ``--method`` takes.

    Attributes:
        name: the name.
        learning_rate: that works on the default model and text (r = 16, scaling 1).
        config: from the fields that all configs share and the run to the config.
        options: the method's own.
        check: what is wrong with the run as a whole ("--rank must be …"), or None.
        training: what its training loop does beside the usual.
        describe: a clause for the line that describes the run, or None.
    """

    name: str
    learning_rate: float
    config: "Callable[[dict[str, Any], Run], AdapterConfig]"
    options: tuple[Option, ...] = ()
    check: Callable[[Run], str | None] = _nothing
    training: Training = field(default_factory=Training)
    describe: Callable[[Run], str | None] = _nothing


def at_least(least: int) -> Callable[[Any, Mapping[str, Any]], str | None]:
    """A check of an option that may be None."""

    def check(value: Any, options: Mapping[str, Any]) -> str | None:
        return None if value is None or value >= least else f"must be at least {least}"

    return check


def one_of(choices: Collection[str]) -> Callable[[Any, Mapping[str, Any]], str | None]:
    """A check of an option that names one of several things."""

    def check(value: Any, options: Mapping[str, Any]) -> str | None:
        if value in choices:
            return None
        return f"must be one of {', '.join(choices)}"

    return check


def fraction_above_zero(value: Any, options: Mapping[str, Any]) -> str | None:
    """A check: 0 < value <= 1."""
    return None if 0 < value <= 1 else "must be above 0 and at most 1"
