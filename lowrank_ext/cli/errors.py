"""Errors of the command line tool, which are shown as one line without a traceback."""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class UserError(Exception):
    """Bad input. `main` prints the message as one line on stderr and exits with code 2."""


class Interrupted(Exception):
    """The user stopped the run and it has been saved. Exit code 130."""


def one_line(error: BaseException) -> str:
    """The message of an error without line breaks; its type when it has no message."""
    text = " ".join(str(error).split())
    return text or type(error).__name__


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
