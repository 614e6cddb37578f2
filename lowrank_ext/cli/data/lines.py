"""Lines of a text or JSON lines file, each read up to a limit."""

import itertools
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from lowrank_ext.cli.errors import UserError
from lowrank_ext.cli.files import MEBIBYTE

MAX_LINE_BYTES = 16 * MEBIBYTE
BOM = "\ufeff"


class Line(NamedTuple):
    """A text and the number of its line, from 1."""

    number: int
    text: str


def lines_of(file: BinaryIO, name: str) -> Iterator[Line]:
    """The lines that are not blank, without a byte order mark. Only line feeds end them: splitlines
    would also split at form feeds and other separators inside a text. Raises UserError for a line
    of more than 16 MiB."""
    for number in itertools.count(1):
        raw = file.readline(MAX_LINE_BYTES + 1)
        if not raw:
            return
        if len(raw) > MAX_LINE_BYTES:
            limit = f"{MAX_LINE_BYTES // MEBIBYTE} MiB"
            raise UserError(f"{name}: line {number} must be at most {limit}, got more; split it")
        text = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        if text.strip():
            yield Line(number, text)
