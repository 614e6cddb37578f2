"""Recipes: a method's options, learning rate, schedule and stages for ``lowrank-ext finetune``.

``command_line.py`` in a method's folder makes them; the command line reads them from the registry.
"""

import math
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from lowrank_ext.config import AdapterConfig
from lowrank_ext.freezing import FreezingSchedule

DROPOUT = 0.05  # before lora_a, unless a recipe or the user says otherwise

_REGEX_CHARACTERS = re.compile(r"[*+?()\[\]{}|\\^$]")
# Parameters, and their learning rate relative to the run's.
ParameterGroup = tuple[list[nn.Parameter], float]


class Run(Protocol):
    """The properties of a run that a recipe may read."""

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


def _any_value(value: Any, options: Mapping[str, Any]) -> str | None:
    return None


@dataclass(frozen=True, kw_only=True)
class Option:
    """An option of the command line. Methods may share one: same name, type, default and check.

    Attributes:
        name: as in Python, ``freeze_eta`` for ``--freeze-eta``.
        type: of its value, beside which the default may be None; a bool has --name and --no-name.
        help: its meaning for this method, one sentence.
        shown_default: text in the help in place of the default's value.
        check: takes the value and the options of all methods; returns the fault ("must be at least
            1"), or None. What the method's config refuses needs no check here.
    """

    name: str
    type: type
    default: Any
    help: str
    check: Callable[[Any, Mapping[str, Any]], str | None] = _any_value
    shown_default: str | None = None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One of several consecutive parts of a training.

    Attributes:
        begin: turns the model of the previous stage into this one's.
        num_steps: its optimizer steps.
        batch: maps a batch of tokens [B, T], at a step of the run, to the model's input.
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


def never(run: Run) -> bool:
    """``changes_base`` of a method that leaves the base's tensors alone."""
    return False


def _nothing(run: Run) -> str | None:
    return None


def _no_groups(model: nn.Module, run: Run) -> list[ParameterGroup]:
    return []


def _no_schedule(model: nn.Module, run: Run) -> FreezingSchedule | None:
    return None


def _first_stage(model: nn.Module) -> int:
    return 0


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a training loop does for a method beyond minimizing the loss with one learning rate.

    Attributes:
        parameter_groups: parameters with their own learning rates.
        schedule: makes the schedule that freezes parts of the model during training, or None.
        stages: in their order; empty for a training without stages.
        stage_of: index of the stage that the model is in.
        extra_loss: loss term of the last forward, added to the task's loss.
        trainer_mixin: a class that adds it in transformers' Trainer; needed beside extra_loss.
        expert_load: counts the tokens of each expert in a ``with`` block; None without experts.
    """

    parameter_groups: Callable[[nn.Module, Run], list[ParameterGroup]] = _no_groups
    schedule: Callable[[nn.Module, Run], FreezingSchedule | None] = _no_schedule
    stages: tuple[Stage, ...] = ()
    stage_of: Callable[[nn.Module], int] = _first_stage
    extra_loss: Callable[[nn.Module], Tensor] | None = None
    trainer_mixin: type | None = None
    expert_load: Callable[[nn.Module], AbstractContextManager[CountedLoad]] | None = None

    @property
    def can_be_extended(self) -> bool:
        """Whether a run can get more steps later: not when tensors are frozen, or a stage begins,
        after a part of its steps."""
        return self.schedule is _no_schedule and not self.stages


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One name that ``--method`` takes.

    Attributes:
        name: the name.
        learning_rate: a value that works on the default model and text (r = 16, scaling 1).
        dropout: the default of --dropout.
        config: makes the config from the fields that all configs share and the run.
        options: the method's own options.
        check: returns the fault of the run as a whole ("--rank must be …"), or None.
        training: the method's additions to the training loop.
        describe: returns a clause for the line that describes the run, or None.
        changes_base: whether the method changes the base's tensors in place, as a start that takes
            its part out of the weight does.
    """

    name: str
    learning_rate: float
    dropout: float = DROPOUT
    config: Callable[[dict[str, Any], Run], AdapterConfig]
    options: tuple[Option, ...] = ()
    check: Callable[[Run], str | None] = _nothing
    training: Training = field(default_factory=Training)
    describe: Callable[[Run], str | None] = _nothing
    changes_base: Callable[[Run], bool] = never


def always(run: Run) -> bool:
    """``changes_base`` of a method whose start is taken out of the weight."""
    return True


def at_least(least: int) -> Callable[[Any, Mapping[str, Any]], str | None]:
    """A check of an option that may be None."""

    def check(value: Any, options: Mapping[str, Any]) -> str | None:
        return None if value is None or value >= least else f"must be at least {least}"

    return check


def init_option(help: str) -> Option:
    """``--init`` of a method, with its names in ``help``; which are right says the config."""
    return Option(name="init", type=str, default=None, help=help, shown_default="the method's own")


SHARED_DROPOUT = Option(
    name="shared_dropout",
    type=bool,
    default=False,
    help="goat, moe-lora, reslora-bs: one dropout mask for all terms of a module.",
)


def one_of(choices: Collection[str]) -> Callable[[Any, Mapping[str, Any]], str | None]:
    """A check of an option that must be one of ``choices``."""

    def check(value: Any, options: Mapping[str, Any]) -> str | None:
        if value in choices:
            return None
        return f"must be one of {', '.join(choices)}"

    return check


def above_zero(value: Any, options: Mapping[str, Any]) -> str | None:
    """A check of an option that may be None: a positive number."""
    if value is None or (value > 0 and math.isfinite(value)):
        return None
    return "must be a positive number"


def parse_modules(text: str) -> str | list[str]:
    """Modules as options name them: ``all-linear``, a regular expression when a character says so,
    else names separated by commas."""
    if text == "all-linear" or _REGEX_CHARACTERS.search(text):
        return text
    return [name.strip() for name in text.split(",") if name.strip()]


def given(run: Run, *names: str, **renamed: str) -> dict[str, Any]:
    """Fields of a config from the options of these names that are not None; by keywords from
    options of another name."""
    pairs = {**{name: name for name in names}, **renamed}
    values = {field: run.options[option] for field, option in pairs.items()}
    return {field: value for field, value in values.items() if value is not None}


def fraction_above_zero(value: Any, options: Mapping[str, Any]) -> str | None:
    """A check: 0 < value <= 1."""
    return None if 0 < value <= 1 else "must be above 0 and at most 1"
