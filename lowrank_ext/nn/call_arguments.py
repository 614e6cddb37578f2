"""The arguments of a call of a linear module: its input x, by whatever name, and the others."""

import inspect
from typing import Any

from torch import Tensor, nn

from lowrank_ext.nn.base_layer import is_conv1d

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def input_name(base: nn.Module) -> str:
    """The base's name for its input, its forward's first parameter: ``input`` of nn.Linear."""
    if type(base) is nn.Linear:
        return "input"
    if is_conv1d(base):
        return "x"
    parameters = inspect.signature(base.forward).parameters.values()
    return next((p.name for p in parameters if p.kind in _POSITIONAL), "x")


def split_call(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """x of a call of ``module``, and the arguments beside it, which are its base's.

    x is the first argument, or named as by the base, or ``x``.

    Raises:
        TypeError: there is no x, or something beside it although the base is plain.
    """
    owner, name = f"{type(module).__name__}.forward", module.input_name
    if args:
        x, *rest = args
    else:
        rest = []
        given = name if name in kwargs else "x"
        if given not in kwargs:
            raise TypeError(f"{owner}: {name} must be given, got none")
        x = kwargs[given]
        kwargs = {key: value for key, value in kwargs.items() if key != given}
    if module.base_layer is None and (rest or kwargs):
        got = ", ".join([*(type(value).__name__ for value in rest), *kwargs])
        raise TypeError(
            f"{owner}: {name} must be the only argument, as of the plain linear module inside, "
            f"got also {got}"
        )
    return x, tuple(rest), kwargs
