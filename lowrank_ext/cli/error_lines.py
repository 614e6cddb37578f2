"""Errors as one line on stderr and an exit code."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from lowrank_ext.cli.errors import Interrupted, UserError, one_line, place_of
from lowrank_ext.cli.interrupts import EXIT_INTERRUPTED, StoppedAtOnce

EXIT_FAULT = 1
EXIT_BAD_INPUT = 2


@contextmanager
def errors_as_lines(prints_result: bool = False) -> Iterator[None]:
    """One line on stderr for whatever is raised. Exit code 2 for bad input, and for files that the
    system refuses; 130 for Ctrl-C, 143 for SIGTERM; 1 for a fault of this program.

    prints_result: what the command is for goes to standard output, which must not be closed.
    """
    try:
        if prints_result and sys.stdout is None:
            raise UserError("standard output is closed, where the result would go")
        yield
    except (BrokenPipeError, typer.Exit):  # click's own
        raise
    except (UserError, OSError) as error:
        typer.echo(f"error: {one_line(error)}", err=True)
        raise typer.Exit(EXIT_BAD_INPUT) from None
    except Interrupted as stopped:
        typer.echo(one_line(stopped), err=True)
        raise typer.Exit(stopped.exit_code) from None
    except KeyboardInterrupt as stopped:
        typer.echo("stopped at once; what was complete before is kept", err=True)
        code = stopped.exit_code if isinstance(stopped, StoppedAtOnce) else EXIT_INTERRUPTED
        raise typer.Exit(code) from None
    except Exception as error:
        where = f"unexpected {type(error).__name__} in {place_of(error)}"
        typer.echo(f"error: {where}: {one_line(error)}", err=True)
        raise typer.Exit(EXIT_FAULT) from None


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """What is said to users in the block (UserWarning), each once, as a line on stderr after it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    said = [each.message for each in caught if each.category is UserWarning]
    for text in dict.fromkeys(one_line(Exception(message)) for message in said):
        typer.echo(f"warning: {text}", err=True)
