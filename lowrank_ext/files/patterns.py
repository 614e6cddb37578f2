"""Regular expressions from files: only those that end soon on every name of a model.

Python's ``re`` tries all ways in which a pattern can be cut to fit a name, and cannot be stopped.
``_ways`` estimates their number from the parsed pattern: a sequence multiplies, alternatives add
where they can match the same text, a repetition of many characters counts as 30, of one character
or digits as 2. What PEFT's users write (``.*layers\\.\\d+\\..*q_proj``) stays below the limit; a
repetition of what matches in several ways is refused.
"""

import re
from collections import Counter
from collections.abc import Iterable
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser  # type: ignore[attr-defined]
from typing import Any

from lowrank_ext.files.messages import quoted

_MAX_LENGTH = 100_000
_MAX_GROUPS = 100  # nested ones take a level of the stack each
_MAX_WAYS = 2_000_000
_NAME = re.compile(r"\^?(?:[\w-]|\\?\.|\\-)*")  # dots, escaped or not, between words
_BROAD, _NARROW = 30, 2
_REPEATS = {op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT}


def check_pattern(patterns: str | Iterable[str], where: str) -> None:
    """Raise unless the regular expressions, all of one option, are valid and end soon.

    Raises:
        ValueError: one of them does not compile, or repeats a repetition or alternatives that can
            match the same text; or together they are too long or allow too many ways to match.
    """
    total = length = 0
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if _NAME.fullmatch(pattern):
            continue
        shown = quoted(pattern, 60)
        length += len(pattern)
        if length > _MAX_LENGTH or pattern.count("(") > _MAX_GROUPS:
            raise ValueError(
                f"{where}: patterns must have at most {_MAX_LENGTH:,} characters and {_MAX_GROUPS} "
                f"groups, got {shown}"
            )
        try:
            total += _ways(_parser.parse(pattern))
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"{where} must hold regular expressions: {error}, got {shown}"
            ) from None
        except _NestedError:
            raise ValueError(
                f"{where}: a pattern must repeat no repetition and no alternatives, which may take "
                f"forever to match, got {shown}"
            ) from None
        if total > _MAX_WAYS:
            raise ValueError(
                f"{where}: patterns must allow fewer ways to match, which may take forever, got "
                f"{shown}; use names, or fewer of .* and .+"
            )


class _NestedError(Exception):
    """A repetition of what can match in several ways."""


def _ways(tree: Any) -> int:
    """About as many ways as there are to match one name; at most a little above the limit."""
    total = 1
    for code, argument in tree:
        total = min(total * _ways_of(code, argument), 2 * _MAX_WAYS)
    return total


def _ways_of(code: Any, argument: Any) -> int:
    if code in _REPEATS:
        return _ways_of_repeat(*argument)
    if code is op.SUBPATTERN:
        return _ways(argument[-1])
    if code is op.BRANCH:
        return _ways_of_branch(argument[1])
    if code in (op.ASSERT, op.ASSERT_NOT):
        return _ways(argument[1])
    if code is op.ATOMIC_GROUP:
        return _ways(argument)
    if code is op.GROUPREF_EXISTS:
        return sum(_ways(branch) for branch in argument[1:] if branch is not None)
    return 1


def _ways_of_branch(branches: Any) -> int:
    """Plain texts match at one place together only where one begins with another."""
    texts = Counter(
        tuple(character for _, character in branch)
        for branch in branches
        if all(code is op.LITERAL for code, _ in branch)
    )
    together = max(
        (sum(texts[text[:end]] for end in range(len(text) + 1)) for text in list(texts)), default=0
    )
    others = (b for b in branches if not all(code is op.LITERAL for code, _ in b))
    return together + sum(_ways(branch) for branch in others)


def _ways_of_repeat(low: int, high: Any, body: Any) -> int:
    inner = _ways(body)
    if high == 1:
        return 1 + inner
    if inner > 1:
        raise _NestedError
    if low == high:
        return 1
    return _BROAD if _is_broad(body) else _NARROW


def _is_broad(tree: Any) -> bool:
    """Whether one repetition can match most characters of a name."""
    return any(
        code in (op.ANY, op.NOT_LITERAL)
        or (code is op.IN and not all(_is_narrow(*item) for item in argument))
        or (code is op.SUBPATTERN and _is_broad(argument[-1]))
        for code, argument in tree
    )


def _is_narrow(code: Any, argument: Any) -> bool:
    """Whether an item of a character class stands for one character, or for digits."""
    digits = code is op.RANGE and argument[0] >= ord("0") and argument[1] <= ord("9")
    return digits or code is op.LITERAL or argument is op.CATEGORY_DIGIT
