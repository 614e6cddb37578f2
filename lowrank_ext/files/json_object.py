"""JSON objects from files: strict, and bounded in size, depth and numbers."""

import json
import math
import re
from pathlib import Path
from typing import Any, NoReturn

from lowrank_ext.files.messages import quoted
from lowrank_ext.files.reading import read_bytes

MAX_BYTES = 4 * 2**20
_MAX_DEPTH = 32
# Strings, possibly cut off, and brackets outside of them. Possessive: no backtracking.
_TOKENS = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)
_INT64 = range(-(2**63), 2**63)


def read_json_object(path: Path, caller: str, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in the file ``path``.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: as ``parse_json_object``, or the file is longer than ``max_bytes``.
    """
    return parse_json_object(read_bytes(path, caller, max_bytes), f"{caller}: {path}")


def parse_json_object(data: bytes | str, where: str) -> dict[str, Any]:
    """The JSON object in ``data``; messages begin with ``where``.

    Raises:
        ValueError: the text is no JSON, no object, deeper than 32 levels, repeats a key, or holds
            NaN, an infinity, or an integer beyond 64 bits.
    """
    try:
        text = data if isinstance(data, str) else data.decode()
        _check_depth(text)
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_int,
            parse_float=_float,
            parse_constant=_constant,
        )
    except ValueError as error:  # broken JSON or broken UTF-8
        raise ValueError(f"{where} must be JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold an object, got {quoted(value, 40)}")
    return value


def _check_depth(text: str) -> None:
    depth = 0
    for match in _TOKENS.finditer(text):
        first = text[match.start()]
        depth += (first in "[{") - (first in "]}")
        if depth > _MAX_DEPTH:
            raise ValueError(f"it must have at most {_MAX_DEPTH} levels, got more")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {quoted(twice)} must appear once, got it again")
    return values


def _int(text: str) -> int:
    value = int(text) if len(text) <= 20 else 2**64
    if value not in _INT64:
        raise ValueError(f"an integer must have at most 64 bits, got {quoted(text, 40)}")
    return value


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"a number must be finite, got {quoted(text, 40)}")
    return value


def _constant(name: str) -> NoReturn:
    raise ValueError(f"a number must be finite, got {name}")
