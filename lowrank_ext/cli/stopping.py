"""How a run that a signal has stopped ends: what is saved, and the command that continues it."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lowrank_ext.cli.errors import Interrupted
from lowrank_ext.cli.interrupts import StopRequest, Terminated

FINETUNE = "finetune"


def stop_if_requested(
    stop: StopRequest, out: Path, name: str, step: int, steps: int, command: str = FINETUNE
) -> None:
    """Raises Interrupted, with the command that resumes the run, if a signal has stopped it, or
    another of its processes."""
    if stop.agree():
        done = f"stopped {name} after step {step} of {steps}, everything is saved"
        raise Interrupted(f"{done}; {how_to_resume(out, command)}", stop.exit_code)


def how_to_resume(out: Path, command: str = FINETUNE) -> str:
    """The command that continues the run in `out`."""
    return f"continue with: lowrank-ext {command} --resume --out {shlex.quote(str(out))}"


@contextmanager
def at_once(out: Path | None, stop: StopRequest, command: str = FINETUNE) -> Iterator[None]:
    """A block that SIGTERM may leave at any point: nothing in it remains to be saved.

    Args:
        out: the directory of the run, None before it has one.
    """
    try:
        yield
    except Terminated:
        rest = "nothing was trained yet" if out is None else how_to_resume(out, command)
        raise Interrupted(f"stopped; {rest}", stop.exit_code) from None
