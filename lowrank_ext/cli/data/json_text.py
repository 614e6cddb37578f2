"""JSON to values: whatever JSON may hold becomes a value whose strings are text, or a UserError
that names its place."""

import json
import re
from collections.abc import Iterator
from typing import Any

from lowrank_ext.cli.data.lines import Line
from lowrank_ext.cli.errors import UserError, one_line
from lowrank_ext.files import quoted

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_SPACE = re.compile(r"[ \t\r\n]*")


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text. Raises UserError for what is no JSON, is nested too deeply, names a
    key twice, or has strings that are no text (half a surrogate pair)."""
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise _not_json(where, error) from error
    _check_text(value, text, where)
    return value


def parse_json_file(text: str, name: str) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each element of a list, or of values that follow each other. One
    value is parsed at a time, so that a signal is heard between two."""
    decoder = json.JSONDecoder(object_pairs_hook=_without_repeats)
    at, line, counted = _skip(text, 0), 1, 0
    is_list = text.startswith("[", at)
    at = _skip(text, at + 1) if is_list else at
    while at < len(text):
        line, counted = line + text.count("\n", counted, at), at
        where = f"{name}: line {line}"
        if is_list and text.startswith("]", at):
            if _skip(text, at + 1) != len(text):
                raise UserError(f"{where} is not JSON of text: more follows the end of the list")
            return
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            raise _not_json(where, error) from error
        _check_text(value, text[at:end], where)
        yield line, value
        at = _skip(text, end)
        if is_list and text.startswith(",", at):
            at = _skip(text, at + 1)
            if text.startswith("]", at):
                raise UserError(f"{where} is not JSON of text: nothing follows a comma")
        elif is_list and not text.startswith("]", at):
            raise UserError(f"{where} is not JSON of text: the list does not go on or end after it")
    if is_list:
        raise UserError(f"{name} is not JSON of text: the list has no end")


def json_record(line: Line, name: str) -> Any:
    """The value of a line of JSON lines."""
    return parse_json(line.text, f"{name}: line {line.number}")


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found is not None else at


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{quoted(twice)} is there twice")
    return found


def _check_text(value: Any, source: str, where: str) -> None:
    """Only escapes make half a surrogate pair: a text without them is not looked at again."""
    if _SURROGATE.search(source) is None:
        return
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise _not_json(where, error) from error


def _not_json(where: str, error: BaseException) -> UserError:
    return UserError(f"{where} is not JSON of text: {one_line(error)}")
