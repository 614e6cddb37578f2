"""Checks of single options, with the messages that users see; names matched by PEFT's rules."""

import difflib
import math
import re
from collections.abc import Iterable, Sequence

import torch

ADAPTER_DTYPES = ("base", "float32", "bfloat16", "float16", "float64")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'a' or 'b'?"`` for the known names nearest to ``name``, or nothing."""
    near = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def with_article(name: str) -> str:
    """``"a LoRALinear"``, ``"an AFLoRALinear"``."""
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def matching_pattern(keys: Iterable[str], path: str) -> str | None:
    """First key that applies to ``path`` by PEFT's rule, or None."""
    return next((key for key in keys if re.match(rf"(.*\.)?({key})$", path)), None)


def matches_names(path: str, names: str | Sequence[str]) -> bool:
    """Whether ``names`` select ``path``: a regular expression that matches all of it, or names, one
    of which is ``path`` or its end after a dot."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def check_rank(rank: object, owner: str, name: str) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"{owner}: {name} must be an int, got {rank!r}")
    if rank < 1:
        raise ValueError(f"{owner}: {name} must be at least 1, got {rank}")


def check_alpha(alpha: object, owner: str, name: str) -> None:
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise TypeError(f"{owner}: {name} must be a number or None, got {alpha!r}")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"{owner}: {name} must be positive and finite, got {alpha}")


def check_dropout(dropout: object, owner: str) -> None:
    check_probability(dropout, owner, "dropout")


def check_probability(value: object, owner: str, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{owner}: {name} must be a number, got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{owner}: {name} must be between 0 and 1, got {value}")


def check_choice(value: object, choices: Sequence[str], owner: str, name: str) -> None:
    if value not in choices:
        raise ValueError(f"{owner}: {name} must be one of {list(choices)}, got {value!r}")


def check_divisible(rank: int, num_experts: int, owner: str, name: str) -> None:
    if rank % num_experts:
        raise ValueError(
            f"{owner}: {name}, the total rank, must be a multiple of num_experts={num_experts}, "
            f"got {rank}"
        )


def check_finite(value: object, owner: str, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{owner}: {name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{owner}: {name} must be finite, got {value}")


def check_number(value: object, owner: str, name: str, *, positive: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{owner}: {name} must be a number, got {value!r}")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        least = "positive" if positive else "at least 0"
        raise ValueError(f"{owner}: {name} must be {least} and finite, got {value}")


def check_flag(value: object, owner: str, name: str) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be a bool, got {value!r}")


def normalized_adapter_dtype(dtype: torch.dtype | str, owner: str) -> str:
    """The dtype's name without ``torch.``, one of ADAPTER_DTYPES."""
    name = str(dtype).removeprefix("torch.")
    check_choice(name, ADAPTER_DTYPES, owner, "adapter_dtype")
    return name


def normalized_names(
    names: str | Iterable[str], owner: str, argument: str
) -> str | tuple[str, ...]:
    if isinstance(names, str):
        check_regex(names, owner, argument)
        return names
    if not isinstance(names, Iterable):
        raise TypeError(f"{owner}: {argument} must be a name, or several, got {names!r}")
    # The order of a set differs between processes; sorted, the config does not.
    ordered = tuple(sorted(names) if isinstance(names, set | frozenset) else names)
    for name in ordered:
        if not isinstance(name, str) or not name:
            raise TypeError(f"{owner}: {argument} must hold non-empty strings, got {name!r}")
    return ordered


def check_regex(pattern: str, owner: str, argument: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{owner}: {argument} must be a valid regular expression, got {pattern!r}: {error}"
        ) from None
