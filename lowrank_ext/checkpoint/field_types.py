"""Types of the fields in adapter_config.json, checked once, before any of them is used."""

from collections.abc import Collection, Mapping
from typing import Any

from lowrank_ext.checks import did_you_mean
from lowrank_ext.files import check_pattern, quoted

_MAX_ENTRIES = 65_536
_NONE = type(None)
_NAMES = (str, list, _NONE)
# PEFT's fields that are read here, and the types of their values.
_TYPES: dict[str, tuple[type, ...]] = {
    "peft_type": (str, _NONE),
    "r": (int,),
    "lora_alpha": (int, float),
    "lora_dropout": (int, float, _NONE),
    "use_rslora": (bool, _NONE),
    "fan_in_fan_out": (bool, _NONE),
    "inference_mode": (bool, _NONE),
    "rank_pattern": (dict, _NONE),
    "alpha_pattern": (dict, _NONE),
    "modules_to_save": (list, _NONE),
    "target_modules": _NAMES,
    "target_parameters": (list, _NONE),
    "exclude_modules": _NAMES,
    "layers_to_transform": (int, list, _NONE),
    "layers_pattern": _NAMES,
    "init_lora_weights": (bool, str, _NONE),
    "trainable_token_indices": (list, dict, _NONE),
    "bias": (str, _NONE),
    "lora_bias": (bool, _NONE),
    "use_dora": (bool, _NONE),
}
# Lists of numbers; others are lists of names.
_NUMBERS = ("layers_to_transform", "trainable_token_indices")
_PHRASES: dict[tuple[type, ...], str] = {
    (str,): "a string",
    (int,): "an int",
    (bool,): "a bool",
    (int, float): "a number",
    (dict,): "an object",
    (list,): "a list of names",
    (str, list): "a name or a list of names",
    (int, list): "an int or a list",
    (list, dict): "a list or an object",
    (bool, str): "a bool or a string",
}
_PATTERNS = ("rank_pattern", "alpha_pattern")


def check_field_types(fields: Mapping[str, Any], selectors: Collection[str], where: str) -> None:
    """Raise ValueError where a field of PEFT's has a value of another type, holds too much, or a
    regular expression that may take forever to match.

    Args:
        selectors: further fields that hold names or a regular expression.
    """
    for key, kinds in {**_TYPES, **dict.fromkeys(selectors, _NAMES)}.items():
        value = fields.get(key)
        if key in fields and type(value) not in kinds:
            phrase = _PHRASES[tuple(kind for kind in kinds if kind is not _NONE)]
            raise ValueError(f"{where}: {key} must be {phrase}, got {quoted(value)}")
        if isinstance(value, list) and key not in _NUMBERS:
            odd = next((name for name in value if not isinstance(name, str) or not name), None)
            if odd is not None:
                raise ValueError(f"{where}: {key} must be a list of names, got {quoted(value)}")
        if isinstance(value, list | dict) and len(value) > _MAX_ENTRIES:
            raise ValueError(
                f"{where}: {key} must have at most {_MAX_ENTRIES} entries, got {len(value)}"
            )
        is_regex = key in _PATTERNS or (kinds is _NAMES and isinstance(value, str))
        if is_regex and value:
            check_pattern(value, f"{where}: {key}")


def check_own_fields(fields: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raise ValueError for a field that no version of this library writes."""
    for key in fields:
        if key not in known:
            raise ValueError(f"{where}: {quoted(key)} is no field{did_you_mean(key, known)}")
