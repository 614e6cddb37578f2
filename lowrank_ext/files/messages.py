"""Content of files in error messages: quoted, cut, without control characters."""

from collections.abc import Iterator
from contextlib import contextmanager

_VALUE_LIMIT = 200
_MESSAGE_LIMIT = 900


def printable(text: str) -> str:
    """``text`` with characters that are not printable escaped: a terminal shows it as it is."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quoted(value: object, limit: int = _VALUE_LIMIT) -> str:
    """``repr(value)``, cut to ``limit`` characters, without control characters."""
    text = repr(value[:limit] if isinstance(value, str | bytes) else value)
    cut = len(text) > limit or (isinstance(value, str | bytes) and len(value) > limit)
    return printable(text[:limit] + " …" if cut else text)


@contextmanager
def clean_errors() -> Iterator[None]:
    """A block whose ValueError and OSError have messages of less than 1,000 printable characters,
    whatever names and values of a file they repeat."""
    try:
        yield
    except (ValueError, OSError) as error:
        text = str(error)
        clean = _shortened(printable(text[:_MESSAGE_LIMIT] + text[-_MESSAGE_LIMIT:]))
        if len(text) <= _MESSAGE_LIMIT:
            clean = _shortened(printable(text))
        if clean == text:
            raise
        kind = type(error) if isinstance(error, OSError) else ValueError
        raise kind(clean) from None


def _shortened(text: str) -> str:
    """Start and end of a long text: the end of a message says what to do."""
    if len(text) <= _MESSAGE_LIMIT:
        return text
    return f"{text[: _MESSAGE_LIMIT // 2]} … {text[-_MESSAGE_LIMIT // 2 :]}"
