"""Errors as one line on stderr and an exit code."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from lowrank_ext.cli.errors import Interrupted, UserError, one_line, place_of
from lowrank_ext.cli.interrupts import EXIT_INTERRUPTED, StoppedAtOnce
from lowrank_ext.cli.processes import first_to_end, is_main_process

EXIT_FAULT = 1
EXIT_BAD_INPUT = 2


@contextmanager
def errors_as_lines(prints_result: bool = False) -> Iterator[None]:
    """One line on stderr for whatever is raised. Exit code 2 for bad input, and for files that the
    system refuses; 130 for Ctrl-C, 143 for SIGTERM; 1 for a fault of this program. Of several
    processes the first that ends says why, and all have its code.

    prints_result: what the command is for goes to standard output, which must not be closed.
    """
    try:
        if prints_result and sys.stdout is None:
            raise UserError("standard output is closed, where the result would go")
        yield
    except (BrokenPipeError, typer.Exit):  # click's own
        raise
    except (UserError, OSError) as error:
        raise _end(f"error: {one_line(error)}", EXIT_BAD_INPUT) from None
    except Interrupted as stopped:
        raise _end(one_line(stopped), stopped.exit_code) from None
    except KeyboardInterrupt as stopped:
        code = stopped.exit_code if isinstance(stopped, StoppedAtOnce) else EXIT_INTERRUPTED
        raise _end("stopped at once; what was complete before is kept", code) from None
    except Exception as error:
        where = f"unexpected {type(error).__name__} in {place_of(error)}"
        raise _end(f"error: {where}: {one_line(error)}", EXIT_FAULT) from None


def _end(line: str, exit_code: int) -> typer.Exit:
    """The end of the program, with one line on stderr."""
    is_first, exit_code = first_to_end(exit_code)
    if is_first:
        typer.echo(line, err=True)
    return typer.Exit(exit_code)


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """What is said to users in the block (UserWarning), each once, as a line on stderr after it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    if not is_main_process():
        return
    said = [each.message for each in caught if each.category is UserWarning]
    for text in dict.fromkeys(one_line(Exception(message)) for message in said):
        typer.echo(f"warning: {text}", err=True)
