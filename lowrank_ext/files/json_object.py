"""JSON objects from files: strict, and bounded in size, depth and numbers."""

import json
import math
import re
from pathlib import Path
from typing import Any

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
    """The JSON object in ``data``; messages begin with ``where``, and name the key.

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
            parse_constant=_Refused,
        )
    except _FieldError as error:
        raise ValueError(f"{where}: {error}") from None
    except ValueError as error:  # broken JSON or broken UTF-8
        raise ValueError(f"{where} must be JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold an object, got {quoted(value, 40)}")
    return value


class _FieldError(ValueError):
    """A key, or the value of one, is refused."""


class _Refused(str):
    """The text of a number that no field can hold."""


def _check_depth(text: str) -> None:
    depth = 0
    for match in _TOKENS.finditer(text):
        first = text[match.start()]
        depth += (first in "[{") - (first in "]}")
        if depth > _MAX_DEPTH:
            raise ValueError(f"it must have at most {_MAX_DEPTH} levels, got more")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise _FieldError(f"key {quoted(key)} must appear once, got it again")
        if (refused := _refused_in(value)) is not None:
            raise _FieldError(
                f"{quoted(key)[1:-1]} must be finite, an integer of at most 64 bits, got "
                f"{quoted(str(refused), 40)}"
            )
        values[key] = value
    return values


def _refused_in(value: Any) -> _Refused | None:
    """Objects inside have been checked already."""
    if isinstance(value, list):
        return next((found for v in value if (found := _refused_in(v)) is not None), None)
    return value if isinstance(value, _Refused) else None


def _int(text: str) -> int | _Refused:
    value = int(text) if len(text) <= 20 else 2**64
    return value if value in _INT64 else _Refused(text)


def _float(text: str) -> float | _Refused:
    value = float(text)
    return value if math.isfinite(value) else _Refused(text)
