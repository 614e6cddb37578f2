"""Checks of options, each an error of one line."""

import math

from lowrank_ext.cli.errors import UserError, near_matches

DTYPES = ("auto", "bf16", "fp32", "fp16")
MOST = 2**31 - 1  # of what is counted
MOST_THREADS = 1024  # OpenMP ends the process where it cannot start as many


def check_at_least(option: str, value: int, least: int, most: int = MOST) -> None:
    """Raises UserError unless ``least <= value <= most``."""
    if value < least:
        raise UserError(f"{option} must be at least {least}, got {value}")
    if value > most:
        raise UserError(f"{option} must be at most {most}, got {value}")


def check_positive(option: str, value: float | None) -> None:
    """Raises UserError unless the value is None or a positive number."""
    if value is not None and not (value > 0 and math.isfinite(value)):
        raise UserError(f"{option} must be a positive number, got {value}")


def check_not_negative(option: str, value: float) -> None:
    """Raises UserError unless the value is 0 or a positive number."""
    if not 0 <= value < math.inf:
        raise UserError(f"{option} must be at least 0 and finite, got {value}")


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises UserError, with near matches, unless the value is one of the choices."""
    if value not in choices:
        raise UserError(
            f"{option} must be one of {', '.join(choices)}, got {value!r}"
            f"{near_matches(value, choices)}"
        )
