"""The registry of methods: ``METHODS``, with one ``Method`` record for each.

``lowrank_ext/methods/__init__.py`` lists the folders that register one. Code for all methods
(adapt, checkpoint, the Trainer's callback, the command line) looks them up here.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

import lowrank_ext.nn
from lowrank_ext.adapter_format import AdapterFormat
from lowrank_ext.config import AdapterConfig
from lowrank_ext.freezing import FreezingSchedule
from lowrank_ext.nn.base_layer import LINEAR, family_of
from lowrank_ext.nn.low_rank_linear import LowRankLinear
from lowrank_ext.recipe import Recipe

__all__ = ["METHODS", "Method", "method_for", "method_of", "recipes", "register", "unregister"]


def _as_given(
    model: nn.Module, config: AdapterConfig, targets: Mapping[str, nn.Module]
) -> AdapterConfig:
    return config


@dataclass(frozen=True, kw_only=True)
class Method:
    """Registration of a method whose modules are LowRankLinears.

    Attributes:
        config_class: the class of its options; ``peft_type`` names the method in files.
        module_class: the class of the modules that replace linear ones; public in
            ``lowrank_ext.nn``.
        other_classes: those that replace modules of other families, each of its ``family``; public
            there too.
        file_format: content of an adapter's two files.
        complete_config: takes the model, the config and the targets by path; returns the config
            with what depends on the model (LaMDA++: ranks). ``adapt`` calls it before any change.
        schedule_class: freezes parts of the adapters during training, or None.
        recipes: the names that ``--method`` of ``lowrank-ext finetune`` takes for the method.
    """

    config_class: type[AdapterConfig]
    module_class: type[LowRankLinear]
    other_classes: tuple[type[LowRankLinear], ...] = ()
    file_format: AdapterFormat = field(default_factory=AdapterFormat)
    complete_config: Callable[
        [nn.Module, AdapterConfig, Mapping[str, nn.Module]], AdapterConfig
    ] = _as_given
    schedule_class: type[FreezingSchedule] | None = None
    recipes: tuple[Recipe, ...] = ()

    @property
    def peft_type(self) -> str:
        """Name of the method in adapter_config.json."""
        return self.config_class.peft_type

    @property
    def classes(self) -> dict[str, type[LowRankLinear]]:
        """The class of the modules that replace those of a family, for all that can be adapted."""
        return {each.family: each for each in (self.module_class, *self.other_classes)}

    def class_for(self, base: nn.Module) -> type[LowRankLinear]:
        """The class of the module that replaces ``base``, which is of one of these families."""
        return self.classes[family_of(base) or LINEAR]


METHODS: dict[str, Method] = {}  # by peft_type


def register(method: Method) -> Method:
    """Add ``method``; returns it.

    Raises:
        ValueError: its peft_type, the name of its module class, of a recipe or of a tensor in a
            file is taken, it has no peft_type, or an option differs from one of the same name.
        TypeError: the module class is not made from the config class.
    """
    if not method.peft_type or method.peft_type in METHODS:
        raise ValueError(f"register: peft_type must be new, got {method.peft_type!r} again")
    for module_class in method.classes.values():
        module_name = module_class.__name__
        if getattr(module_class, "config_class", None) is not method.config_class:
            raise TypeError(
                f"register: {module_name}.config_class must be {method.config_class.__name__}"
            )
        if hasattr(lowrank_ext.nn, module_name):
            raise ValueError(f"register: the module's name must be new, got {module_name!r} again")
    taken = {recipe.name for recipe in recipes()}
    for recipe in method.recipes:
        if recipe.name in taken:
            raise ValueError(f"register: names of recipes must be new, got {recipe.name!r} again")
    _check_options(method)
    for other in METHODS.values():
        method.file_format.check_beside(other.file_format)
    METHODS[method.peft_type] = method
    AdapterConfig.registered[method.peft_type] = method.config_class
    for module_class in method.classes.values():
        setattr(lowrank_ext.nn, module_class.__name__, module_class)
    return method


def _check_options(method: Method) -> None:
    """Options of one name are one option of the command line: alike in type and default."""
    known = {option.name: option for recipe in recipes() for option in recipe.options}
    for recipe in method.recipes:
        for option in recipe.options:
            same = known.setdefault(option.name, option)
            if (option.type, option.default) != (same.type, same.default):
                raise ValueError(
                    f"register: option {option.name!r} must be {same.type.__name__} with the "
                    f"default {same.default!r} as elsewhere, got {option.type.__name__} with "
                    f"{option.default!r}"
                )


def unregister(method: Method) -> None:
    """Undo ``register``."""
    del METHODS[method.peft_type], AdapterConfig.registered[method.peft_type]
    for module_class in method.classes.values():
        delattr(lowrank_ext.nn, module_class.__name__)


def method_of(config: AdapterConfig) -> Method | None:
    """The method whose config this is, or None."""
    method = METHODS.get(config.peft_type)
    return method if method is not None and type(config) is method.config_class else None


def method_for(config: AdapterConfig, caller: str) -> Method:
    """The method whose config this is.

    Raises:
        ValueError: it is not registered, or no longer.
    """
    method = method_of(config)
    if method is None:
        raise ValueError(
            f"{caller}: the method of {type(config).__name__} must be registered, got "
            f"{', '.join(METHODS)}"
        )
    return method


def recipes() -> Iterator[Recipe]:
    """The recipes of all methods, in the order of the list."""
    for method in METHODS.values():
        yield from method.recipes
