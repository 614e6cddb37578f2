"""The one reader of all commands: sources to records, whatever their file format."""

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from lowrank_ext.cli.data.datasets_library import dataset_rows, parquet_rows
from lowrank_ext.cli.data.json_text import json_record, parse_json_file
from lowrank_ext.cli.data.lines import MAX_LINE_BYTES, lines_of
from lowrank_ext.cli.data.sources import (
    CSV,
    JSON,
    JSON_LINES,
    PARQUET,
    TEXT,
    Source,
    is_compressed,
)
from lowrank_ext.cli.errors import UserError, as_user_error
from lowrank_ext.files import quoted


@dataclass(frozen=True, slots=True)
class Record:
    """One document or one row.

    Attributes:
        value: the text of a text file, else what the format holds, a dictionary as a rule.
        name: of its source.
        number: of its line, from 1, in JSON and CSV, of its row elsewhere; 0 for a whole file.
    """

    value: Any
    name: str
    number: int
    unit: str = "line"

    @property
    def where(self) -> str:
        """Source and number, for messages."""
        return f"{self.name}: {self.unit} {self.number}" if self.number else self.name


def read_source(source: Source, part: str = "train") -> Iterator[Record]:
    """The records of a source in its order. Raises UserError that names file and line for what
    cannot be read.

    Args:
        part: train or evaluation, by which a dataset with splits chooses one.
    """
    if source.is_dataset:
        for number, row in dataset_rows(source, part):
            yield Record(row, source.location, number, "row")
        return
    name, is_empty = source.location, True
    with readable(source.option, name), open_binary(name) as file:
        for record in read_file(file, name, source.kind):
            is_empty = False
            yield record
    if is_empty and not source.may_be_empty:
        raise UserError(f"{source.option} {name}: the file is empty")


def read_file(file: BinaryIO, name: str, kind: str) -> Iterator[Record]:
    """The records of an open file.

    Args:
        kind: how it is read, see `file_kind`.
    """
    return _READERS[kind](file, name)


@contextmanager
def readable(option: str, name: str) -> Iterator[None]:
    """Turns what reading a file may raise into a UserError that names the file."""
    kinds = (OSError, UnicodeDecodeError, EOFError, zlib.error)
    with as_user_error(f"{option}: cannot read {name}", *kinds):
        yield


@contextmanager
def open_binary(name: str) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked if it ends in .gz."""
    with open(name, "rb") as file:
        if is_compressed(name):
            with gzip.open(file) as unpacked:
                yield cast(BinaryIO, unpacked)
        else:
            yield file


def _documents(file: BinaryIO, name: str) -> Iterator[Record]:
    text = file.read().decode("utf-8-sig")
    if "\0" in text:
        raise UserError(f"{name} is no text: it holds NUL characters")
    if text.strip():
        yield Record(text.replace("\r\n", "\n").replace("\r", "\n"), name, 0)


def _json_lines(file: BinaryIO, name: str) -> Iterator[Record]:
    for line in lines_of(file, name):
        yield Record(json_record(line, name), name, line.number)


def _json(file: BinaryIO, name: str) -> Iterator[Record]:
    for number, value in parse_json_file(file.read().decode("utf-8-sig"), name):
        yield Record(value, name, number)


def _csv(file: BinaryIO, name: str) -> Iterator[Record]:
    """Rows as dictionaries, by the names in the first one."""
    previous = csv.field_size_limit(MAX_LINE_BYTES)
    try:
        with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            delimiter = "\t" if ".tsv" in name.lower() else ","
            yield from _csv_rows(csv.reader(text, delimiter=delimiter, strict=True), name)
    finally:
        csv.field_size_limit(previous)


def _csv_rows(rows: Any, name: str) -> Iterator[Record]:
    try:
        header: list[str] = next(rows, [])
        if len(set(header)) < len(header):
            raise UserError(f"{name}: line 1: a column's name is there twice: {quoted(header)}")
        start = rows.line_num + 1
        for row in rows:
            if row and len(row) != len(header):
                raise UserError(
                    f"{name}: line {start} must have {len(header)} fields, as line 1, "
                    f"got {len(row)}"
                )
            if row:
                yield Record(dict(zip(header, row, strict=True)), name, start)
            start = rows.line_num + 1
    except csv.Error as error:
        raise UserError(f"{name}: line {rows.line_num} is not CSV: {error}") from error


def _parquet(file: BinaryIO, name: str) -> Iterator[Record]:
    for number, row in parquet_rows(file, name):
        yield Record(row, name, number, "row")


_READERS: dict[str, Callable[[BinaryIO, str], Iterator[Record]]] = {
    TEXT: _documents,
    JSON_LINES: _json_lines,
    JSON: _json,
    CSV: _csv,
    PARQUET: _parquet,
}
