"""Types of the values in a run's files, by the annotations of the dataclass that they fill."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from lowrank_ext.cli.errors import UserError
from lowrank_ext.files import quoted


def check_types(cls: type, values: Mapping[str, Any], where: str) -> None:
    """Raises UserError unless ``values`` has exactly the fields of the dataclass ``cls``, with
    values of their types; a bool is no int, an int may be a float."""
    known = {field.name for field in dataclasses.fields(cls)}
    if odd := sorted(map(str, values.keys() ^ known)):
        raise UserError(f"{where} is not from this version of lowrank-ext: {quoted(odd)[1:-1]}")
    for name, annotation in typing.get_type_hints(cls).items():
        if not has_type(values[name], annotation):
            plain = typing.get_origin(annotation) is None
            shown = annotation.__name__ if plain else str(annotation)
            raise UserError(f"{where}: {name} must be {shown}, got {quoted(values[name])}")


def has_type(value: Any, annotation: Any) -> bool:
    """Whether ``value`` is what ``annotation`` says, inside lists and mappings too; a list may
    stand for a tuple, as JSON has none."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(has_type(value, argument) for argument in arguments)
    if origin is list or (origin is tuple and arguments[-1] is Ellipsis):
        return isinstance(value, list | tuple) and all(has_type(v, arguments[0]) for v in value)
    if origin is tuple:
        fits = isinstance(value, list | tuple) and len(value) == len(arguments)
        return fits and all(map(has_type, value, arguments))
    if origin is not None and issubclass(origin, Mapping):
        of_key, of_value = arguments
        fits = isinstance(value, dict) and all(has_type(key, of_key) for key in value)
        return fits and all(has_type(v, of_value) for v in value.values())
    return type(value) is annotation or (annotation is float and type(value) is int)
