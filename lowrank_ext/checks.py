"""Checks of single options, with the messages that users see; names matched by PEFT's rules."""

import difflib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import torch

ADAPTER_DTYPES = ("base", "float32", "bfloat16", "float16", "float64")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'a' or 'b'?"`` for the known names nearest to ``name``, or nothing."""
    if len(name) > 200:  # the comparison takes the product of the lengths
        return ""
    near = difflib.get_close_matches(name, list(dict.fromkeys(known)), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


def with_article(name: str) -> str:
    """``"a LoRALinear"``, ``"an AFLoRALinear"``."""
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def either(names: Iterable[str]) -> str:
    """``"a"``, ``"a, b or c"``."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def matching_pattern(keys: Iterable[str], path: str) -> str | None:
    """First key that applies to ``path`` by PEFT's rule, or None."""
    return _matcher(tuple(keys)).first(path)


class _Matcher:
    """Keys by kind: plain names are looked up, regular expressions tried. The work for a path does
    not grow with the number of names, of which LaMDA++ writes one for each module."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = keys
        self._paths: dict[str, int] = {}  # ^name: the whole path
        self._ends: dict[str, int] = {}  # name: the whole path or its end after a dot
        self._regexes: list[tuple[int, str, re.Pattern[str]]] = []
        for index, key in enumerate(keys):
            text = key.removeprefix("^")
            if text and _WORD.fullmatch(_ESCAPED.sub("", text)):
                table = self._paths if key.startswith("^") else self._ends
                table.setdefault(text.replace("\\", ""), index)
            else:
                # An unescaped dot is any character, but the last name must be there.
                end = key.rpartition(".")[2] if _WORD.fullmatch(key.replace(".", "")) else ""
                self._regexes.append((index, end, re.compile(rf"(.*\.)?({key})$")))

    def first(self, path: str) -> str | None:
        parts = path.split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts)))
        found = [self._ends[end] for end in ends if end in self._ends]
        if path in self._paths:
            found.append(self._paths[path])
        limit = min(found, default=len(self._keys))
        for index, end, regex in self._regexes:
            if index > limit:
                break
            if path.endswith(end) and regex.match(path):
                return self._keys[index]
        return self._keys[limit] if found else None


_WORD = re.compile(r"[\w-]*")
_ESCAPED = re.compile(r"\\[.-]")
_matcher = lru_cache(maxsize=64)(_Matcher)


def matches_names(path: str, names: str | Sequence[str]) -> bool:
    """Whether ``names`` select ``path``: a regular expression that matches all of it, or names, one
    of which is ``path`` or its end after a dot."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def in_layers(
    path: str,
    names: str | Sequence[str],
    layers: int | Sequence[int] | None,
    patterns: str | Sequence[str] | None,
) -> bool:
    """Whether PEFT's layers_to_transform and layers_pattern leave ``path`` among the modules that
    target_modules ``names`` match."""
    if isinstance(names, str) or path in names or layers is None or layers == []:
        return True
    index = layer_index(path, patterns)
    return index is not None and index in ([layers] if isinstance(layers, int) else layers)


def layer_index(path: str, patterns: str | Sequence[str] | None) -> int | None:
    """Number of the layer that ``path`` lies in: the first that follows a name among ``patterns``.

    A path may hold more numbers behind it: T5's ``decoder.block.1.layer.0.SelfAttention.q``.
    """
    if not patterns:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", path)
        return None if found is None else int(found.group(1))
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = re.match(rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.", path)
        if found is not None:
            return int(found["index"])
    return None


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


def check_scaling(scaling: float, owner: str) -> None:
    """Raise unless the ops, which take it in float32, would neither lose nor overflow it."""
    check_alpha(scaling, owner, "scaling")
    limits = torch.finfo(torch.float32)
    if not limits.tiny <= scaling <= limits.max:
        raise ValueError(
            f"{owner}: scaling must be from {limits.tiny:.3g} to {limits.max:.3g}, as float32 "
            f"holds, got {scaling:g}"
        )


def check_dropout(dropout: object, owner: str) -> None:
    check_probability(dropout, owner, "dropout")
    if dropout == 1:
        raise ValueError(
            f"{owner}: dropout must be below 1, which would drop the whole branch, got {dropout}"
        )


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
    if not isinstance(names, Iterable) or isinstance(names, Mapping | bytes):
        raise TypeError(f"{owner}: {argument} must be a name, or several, got {names!r}")
    # The order of a set differs between processes; sorted, the config does not.
    ordered = tuple(sorted(names) if isinstance(names, set | frozenset) else names)
    for name in ordered:
        if not isinstance(name, str) or not name:
            raise TypeError(f"{owner}: {argument} must hold non-empty strings, got {name!r}")
    return ordered


def normalized_layers(layers: int | Iterable[int] | None, owner: str) -> tuple[int, ...] | None:
    """layers_to_transform as a tuple, in ascending order where it is a set."""
    if layers is None:
        return None
    if not isinstance(layers, int | Iterable) or isinstance(layers, str | bytes | Mapping):
        raise TypeError(
            f"{owner}: layers_to_transform must be a layer's number, or several, got {layers!r}"
        )
    several = [layers] if isinstance(layers, int) else layers
    ordered = tuple(sorted(several) if isinstance(several, set | frozenset) else several)
    for index in ordered:
        check_count(index, 0, owner, "layers_to_transform")
    if not ordered:
        raise ValueError(
            f"{owner}: layers_to_transform must name at least one layer, got none; None stands for "
            "all"
        )
    return ordered


def check_regex(pattern: str, owner: str, argument: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{owner}: {argument} must be a valid regular expression, got {pattern!r}: {error}"
        ) from None


def check_count(value: object, least: int, owner: str, name: str) -> None:
    """Raise unless ``value`` is an int of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{owner}: {name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{owner}: {name} must be at least {least}, got {value}")


def normalized_token_indices(
    value: object, owner: str
) -> tuple[int, ...] | dict[str, tuple[int, ...]] | None:
    """trainable_token_indices as a tuple, or a mapping from names to tuples; None where it is
    empty."""
    name = "trainable_token_indices"
    if value is None or (isinstance(value, Sequence | Mapping) and len(value) == 0):
        return None
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or not key:
                raise TypeError(f"{owner}: {name} must have names as keys, got {key!r}")
        return {key: _token_indices(ids, owner, f"{name}[{key!r}]") for key, ids in value.items()}
    return _token_indices(value, owner, name)


def _token_indices(value: object, owner: str, name: str) -> tuple[int, ...]:
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise TypeError(f"{owner}: {name} must be a sequence of tokens, got {value!r}")
    tokens = tuple(value)
    if not tokens:
        raise ValueError(f"{owner}: {name} must name at least one token, got none")
    for token in tokens:
        check_count(token, 0, owner, name)
    if len(set(tokens)) < len(tokens):
        twice, _ = Counter(tokens).most_common(1)[0]
        raise ValueError(f"{owner}: {name} must name each token once, got {twice} again")
    return tokens
