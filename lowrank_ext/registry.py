"""The methods there are: ``METHODS``, with one ``Method`` record for each.

``lowrank_ext/methods/__init__.py`` lists the folders that register one. Everything that works on
every method (adapt, checkpoint, the Trainer's callback, the command line) asks here.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from torch import nn

from lowrank_ext.adapter_format import AdapterFormat
from lowrank_ext.freezing import FreezingSchedule
from lowrank_ext.recipe import Recipe

if TYPE_CHECKING:
    from lowrank_ext.config import AdapterConfig
    from lowrank_ext.nn.low_rank_linear import LowRankLinear

__all__ = ["METHODS", "Method", "config_names", "method_of", "register"]


def _as_given(
    model: nn.Module, config: "AdapterConfig", targets: Mapping[str, nn.Module]
) -> "AdapterConfig":
    return config


CompleteConfig: TypeAlias = (
    "Callable[[nn.Module, AdapterConfig, Mapping[str, nn.Module]], AdapterConfig]"
)


@dataclass(frozen=True, kw_only=True)
class Method:
    """Everything that the library has to know of a method whose modules are LowRankLinears.

    Attributes:
        config_class: what users ask for; its ``peft_type`` names the method in files.
        module_class: what stands in the place of a linear.
        file_format: how an adapter looks in its two files.
        complete_config: from the model, the config and the targets, by path, to the config with
            what only the model can tell (LaMDA++: ranks); called by ``adapt`` before any change.
        schedule_class: what freezes parts of the adapters while they train, or None.
        recipes: what ``lowrank-ext finetune`` offers of the method.
    """

    config_class: "type[AdapterConfig]"
    module_class: "type[LowRankLinear]"
    file_format: AdapterFormat = field(default_factory=AdapterFormat)
    complete_config: "CompleteConfig" = _as_given
    schedule_class: type[FreezingSchedule] | None = None
    recipes: tuple[Recipe, ...] = ()

    @property
    def peft_type(self) -> str:
        """What adapter_config.json calls the method."""
        return self.config_class.peft_type


METHODS: dict[str, Method] = {}  # by peft_type


def register(method: Method) -> Method:
    """Add ``method``; returns it.

    Raises:
        ValueError: its peft_type, one of its recipes or what it calls a tensor in a file is taken.
    """
    if method.peft_type in METHODS:
        raise ValueError(f"register: peft_type must be new, got {method.peft_type!r} again")
    taken = {recipe.name for other in METHODS.values() for recipe in other.recipes}
    for recipe in method.recipes:
        if recipe.name in taken:
            raise ValueError(f"register: names of recipes must be new, got {recipe.name!r} again")
    for other in METHODS.values():
        method.file_format.check_beside(other.file_format)
    METHODS[method.peft_type] = method
    return method


def method_of(config: "AdapterConfig") -> Method | None:
    """The method whose config this is, or None."""
    method = METHODS.get(config.peft_type)
    return method if method is not None and type(config) is method.config_class else None


def config_names() -> str:
    """ "LoRAConfig, … or LastConfig": the configs of all methods, for messages."""
    *names, last = (method.config_class.__name__ for method in METHODS.values())
    return f"{', '.join(names)} or {last}" if names else last


def recipes() -> Iterator[Recipe]:
    """The recipes of all methods, in the order of the list."""
    for method in METHODS.values():
        yield from method.recipes
