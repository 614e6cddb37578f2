"""Errors of the command line tool, which are shown as one line without a traceback."""

import difflib
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lowrank_ext.files import printable

_LONGEST_LINE = 1_000
_PACKAGE = Path(__file__).parents[1]


class UserError(Exception):
    """Bad input. `main` prints the message as one line on stderr and exits with code 2."""


class Interrupted(Exception):
    """A signal stopped the run and it has been saved."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def one_line(error: BaseException) -> str:
    """The message of an error on one line of at most 1,000 characters, those that would control a
    terminal escaped; its type when it has no message."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) > _LONGEST_LINE:  # the end of a message often says what to do
        text = f"{text[: _LONGEST_LINE // 2]} … {text[-_LONGEST_LINE // 2 :]}"
    return printable(text)


def place_of(error: BaseException) -> str:
    """File and line of this package in which an error was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(_PACKAGE)] or frames
    return f"{Path(own[-1].filename).name}, line {own[-1].lineno}"


def near_matches(name: str, known: Sequence[str]) -> str:
    """``" (did you mean lora?)"`` or an empty string."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f" (did you mean {', '.join(near)}?)" if near else ""


@contextmanager
def as_user_error(what: str, *kinds: type[BaseException]) -> Iterator[None]:
    """Turns the given kinds of exception into ``UserError("<what>: <message>")``."""
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raise UserError(f"{what}: {one_line(error)}") from error
