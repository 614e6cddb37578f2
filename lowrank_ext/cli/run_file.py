"""run.yaml: the options of a run in a file, as --config reads it and as it is written to --out."""

import re
import shlex
import sys
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowrank_ext import __version__
from lowrank_ext.cli.errors import UserError, as_user_error, near_matches, one_line
from lowrank_ext.cli.files import write_bytes
from lowrank_ext.files import quoted, read_bytes

RUN_FILE = "run.yaml"
MAX_BYTES = 2**18  # PyYAML reads that much in a few seconds
# Options of the command line that say what is done, and are no part of a run.
_NOT_STORED = ("out", "resume", "config", "preview", "dry_run")

# YAML 1.1 reads 1e-3 as a text, 010 as 8, 1:30 as 90, and the text on as true. Here a value is what
# its option takes, or it is refused.
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(r"[-+]?([0-9]{1,40}(\.[0-9]{0,40})?|\.[0-9]{1,40})([eE][-+]?[0-9]{1,4})?")
_BOOLS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NULLS = ("", "~", "null", "Null", "NULL")
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}


@dataclass(frozen=True)
class _Scalar:
    text: str
    is_plain: bool  # without quotes
    line: int


def read_run_file(path: Path, option: str, types: Mapping[str, Any]) -> dict[str, Any]:
    """The options in a file, by their names with underscores; a list becomes a tuple.

    Args:
        path: a YAML mapping of names, with dashes or underscores, to values or lists of values.
        option: under which the file was given, for messages.
        types: of all options, by name.

    Raises:
        UserError: the file cannot be read, is no such mapping, names an unknown option or one
            twice, or has a value of another type.
    """
    where = f"{option} {path}"
    with as_user_error("cannot read", OSError, ValueError):
        data = read_bytes(path, option, MAX_BYTES)
    values: dict[str, Any] = {}
    for key, value in _entries(data, where):
        name = key.text.replace("-", "_")
        place = f"{where}: line {key.line}"
        if name in _NOT_STORED:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{place}: {name} is no part of a run; give {flag} on the command line")
        if name not in types:
            raise UserError(
                f"{place}: unknown option {quoted(key.text)}{near_matches(name, list(types))}"
            )
        if name in values:
            raise UserError(f"{place}: {name} stands there twice")
        values[name] = _typed(value, types[name], f"{place}: {name}")
    return values


def read_some_options(path: Path, types: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options in the file of a finished run that `types` names; the file of any
    command may be read, and options of its own are passed over. Raises UserError as
    `read_run_file`."""
    with as_user_error("cannot read", OSError, ValueError):
        data = read_bytes(path, "the run's", MAX_BYTES)
    named = ((key.text, key.line, value) for key, value in _entries(data, str(path)))
    return {
        name: _typed(value, types[name], f"{path}: line {line}: {name}")
        for name, line, value in named
        if name in types
    }


def write_run_file(out: Path, values: Mapping[str, Any], command: str = "finetune") -> None:
    """Writes the options of a run of `command` to `out`/run.yaml, below its command line."""
    yaml = _import_yaml()
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    text = yaml.safe_dump(listed, sort_keys=False, allow_unicode=True, width=2**20)
    line = one_line(Exception(shlex.join(["lowrank-ext", *sys.argv[1:]])))
    head = (
        f"# lowrank-ext {__version__}: {line}\n"
        f"# Again: lowrank-ext {command} --config {RUN_FILE} --out ANOTHER\n"
    )
    write_bytes(out / RUN_FILE, (head + text).encode())


def _import_yaml() -> Any:
    with as_user_error("run.yaml needs `pip install PyYAML`", ImportError):
        import yaml
    return yaml


def _entries(data: bytes, where: str) -> Iterator[tuple[_Scalar, _Scalar | list[_Scalar]]]:
    """Keys and values, from PyYAML's events: these need no memory and no depth of their own,
    whatever the file says."""
    yaml = _import_yaml()
    try:
        events = yaml.parse(data.decode(), Loader=yaml.SafeLoader)
        yield from _mapping(events, yaml, where)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f"line {mark.line + 1}: "
        problem = getattr(error, "problem", None) or one_line(error)
        raise UserError(f"{where}: {line}must be YAML: {quoted(problem)[1:-1]}") from None


def _mapping(
    events: Iterator[Any], yaml: Any, where: str
) -> Iterator[tuple[_Scalar, _Scalar | list[_Scalar]]]:
    next(events)  # the start of the stream
    if isinstance(next(events), yaml.StreamEndEvent):
        raise UserError(f"{where}: must hold options, as in `rank: 16`, got nothing")
    _check_plain(start := next(events), where)
    if not isinstance(start, yaml.MappingStartEvent):
        raise UserError(f"{where}: must be a mapping of options, as in `rank: 16`")
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        key, value = _scalar(event, yaml, where), next(events)
        _check_plain(value, where)
        if not isinstance(value, yaml.SequenceStartEvent):
            yield key, _scalar(value, yaml, where)
            continue
        items = []
        while not isinstance(item := next(events), yaml.SequenceEndEvent):
            items.append(_scalar(item, yaml, where))
        yield key, items
    next(events)  # the end of the document
    if not isinstance(next(events), yaml.StreamEndEvent):
        raise UserError(f"{where}: must be one document, got several")


def _scalar(event: Any, yaml: Any, where: str) -> _Scalar:
    _check_plain(event, where)
    line = event.start_mark.line + 1
    if not isinstance(event, yaml.ScalarEvent):
        raise UserError(f"{where}: line {line}: must be a value or a list of values, got more")
    return _Scalar(event.value, event.style is None, line)


def _check_plain(event: Any, where: str) -> None:
    """Raises UserError for aliases, anchors and tags: what they stand for is not in the line."""
    if getattr(event, "anchor", None) is not None or getattr(event, "tag", None) is not None:
        line = event.start_mark.line + 1
        raise UserError(f"{where}: line {line}: must have no anchor, alias or tag")


def _typed(value: _Scalar | list[_Scalar], annotation: Any, what: str) -> Any:
    """The value as `annotation` says: str, int, float, bool, tuple[str, ...], or one of them or
    None. A text may stand for a tuple of texts."""
    options = typing.get_args(annotation)
    optional = type(None) in options
    kind = options[0] if optional else annotation
    is_list = typing.get_origin(kind) is tuple
    if isinstance(value, list):
        if is_list and not any(_is_null(item) for item in value):
            return tuple(item.text for item in value)
        found = f"a list of {len(value)}"
    elif _is_null(value):
        if optional or is_list:
            return None if optional else ()
        found = "null"
    else:
        if is_list or kind is str:
            return value.text
        if value.is_plain and (converted := _converted(value.text, kind)) is not None:
            return converted
        found = quoted(value.text)
    wanted = "a text or a list of texts" if is_list else _KINDS[kind]
    raise UserError(f"{what} must be {wanted}{' or null' * optional}, got {found}")


def _is_null(value: _Scalar) -> bool:
    return value.is_plain and value.text in _NULLS


def _converted(text: str, kind: type) -> int | float | bool | None:
    if kind is bool:
        return _BOOLS.get(text.lower())
    pattern = _INT if kind is int else _FLOAT
    return kind(text) if pattern.fullmatch(text) else None
