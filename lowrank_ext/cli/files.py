"""Atomic writing of files and directories: to a temporary name, fsynced, renamed."""

import errno
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from lowrank_ext.cli.errors import UserError, as_user_error, one_line
from lowrank_ext.files import read_json_object, write_file

MEBIBYTE = 2**20
_MAX_JSON_BYTES = 64 * MEBIBYTE  # the losses of a million steps


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file atomically: on failure an old one is unchanged."""
    with cannot_write(path):
        write_file(path, data)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON."""
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises UserError naming the file when it is missing or damaged."""
    with as_user_error("cannot read", OSError, ValueError):
        return read_json_object(path, "--resume", _MAX_JSON_BYTES)


def require_file(what: str, path: Path) -> None:
    """Raises UserError unless `path` is a regular file that can be opened, and says what it is."""
    flags = os.O_RDONLY | os.O_NONBLOCK  # a FIFO would be waited for
    with _as_fault(what, "file"):
        descriptor = os.open(path, flags)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise UserError(f"{what}: must be a regular file")
        finally:
            os.close(descriptor)


def require_directory(what: str, path: Path) -> None:
    """Raises UserError unless `path` is a directory that can be listed."""
    with _as_fault(what, "directory"), os.scandir(path):
        pass


def exists(what: str, path: Path) -> bool:
    """Whether there is a file or directory. Raises UserError when that cannot be told."""
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise _unreadable(what, error) from None
    return True


@contextmanager
def _as_fault(what: str, kind: str) -> Iterator[None]:
    """Tells what does not exist from what cannot be read."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{what}: no such {kind}") from None
    except NotADirectoryError:
        fault = "must be a directory" if kind == "directory" else "no such file"
        raise UserError(f"{what}: {fault}") from None
    except (OSError, ValueError) as error:
        raise _unreadable(what, error) from None


def _unreadable(what: str, error: OSError | ValueError) -> UserError:
    """ValueError: what is no name of a file."""
    why = error.strerror if isinstance(error, OSError) else None
    return UserError(f"{what}: cannot be read: {why or one_line(error)}")


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Yields a temporary directory to fill, which replaces `path` on success."""
    with cannot_write(path):
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        with cannot_write(path):
            yield temporary
            sync_tree(temporary)
            temporary.chmod(0o755)
            replace_directory(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def replace_directory(source: Path, target: Path) -> None:
    """Renames `source` to `target`. A directory cannot be renamed over one that has files, so what
    is there is moved aside first; of a link the link, and what it points to stays."""
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
    try:
        old = aside / target.name
        if os.path.lexists(target):
            os.rename(target, old)
        try:
            os.rename(source, target)
        except BaseException:  # Ctrl-C too
            if os.path.lexists(old):
                os.rename(old, target)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def open_log(path: Path, resumed: bool) -> TextIO:
    """The log of a run, to append to: what an earlier run has logged stays. Never one that a link
    leads to, or that has another name too: a new run puts a file in its place, a resumed one must
    have one."""
    with cannot_write(path):
        if not resumed and os.path.lexists(path) and not _is_alone(path.lstat()):
            path.unlink()
        how = os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK
        file = os.open(path, os.O_WRONLY | os.O_CREAT | how, 0o644)
        if not _is_alone(os.fstat(file)):
            os.close(file)
            raise OSError(errno.EEXIST, "it must be a regular file without another link to it")
        return os.fdopen(file, "a", encoding="utf-8", errors="backslashreplace")


def _is_alone(found: os.stat_result) -> bool:
    """Whether it is a file, of one name."""
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1


def sync_tree(directory: Path) -> None:
    """Makes every file below the directory last."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


@contextmanager
def cannot_write(path: Path) -> Iterator[None]:
    """Turns a failed write (full disk, missing permission) into a UserError that names the path.

    torch.save and safetensors raise their own exceptions, which are recognized by name.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or one_line(error)}") from error
    except Exception as error:
        if type(error).__name__ == "SafetensorError" or "inline_container" in str(error):
            raise UserError(f"cannot write {path}: {one_line(error)}") from error
        raise


def check_replaced(
    out: Path, results: Iterable[Path], has_run: bool, inputs: Iterable[str]
) -> None:
    """Raises UserError where a new run into `out` would replace, as its results, directories that
    no run has made, or that hold its own inputs, or would write beside the files of an input.

    Args:
        results: the directories that the run will write, its checkpoints beside them.
        has_run: whether an earlier run has left its settings in `out`.
        inputs: paths that the run reads; others are no files, as ids of models.
    """
    read = [Path(os.path.realpath(each)) for each in inputs if os.path.exists(each)]
    results = list(results)
    written = {Path(os.path.realpath(each)) for each in (out, *(path.parent for path in results))}
    for path in read:
        if path in written:
            raise UserError(f"--out {out}: it holds the input {path}; give another directory")
    for result in results:
        if not os.path.lexists(result):
            continue
        real = Path(os.path.realpath(result))
        for path in read:
            if real in (path, *path.parents):
                raise UserError(f"--out {out}: the run would replace its own input {path}")
        if not has_run and not (result.is_dir() and not any(result.iterdir())):
            raise UserError(
                f"--out {out}: {result.relative_to(out)} is there, and no run has written it; "
                "give another directory"
            )


def check_outside(out: Path, data: Iterable[str]) -> None:
    """Raises UserError where `out` lies in a directory of data, whose files are all read: the run
    would train on its own log, and not find its data again."""
    real = Path(os.path.realpath(out))
    for each in data:
        if os.path.isdir(each) and Path(os.path.realpath(each)) in (real, *real.parents):
            raise UserError(
                f"--out {out}: must be outside of {each}, all files of which are data; give "
                "another directory"
            )


def prepare_output(out: Path) -> None:
    """Creates the output directory and proves that a file can be written there."""
    with cannot_write(out):
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as file:
            file.write(b"x")


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """A block in which no other run writes to `out`. The system unlocks what a process has locked
    when it ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows has none
        yield
        return
    with cannot_write(out):
        directory = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out {out}: another run is writing there") from None
        yield
    finally:
        os.close(directory)


def require_free_space(out: Path, num_bytes: int) -> None:
    """Raises UserError when the disk of `out` has fewer than `num_bytes` free."""
    free = shutil.disk_usage(out).free
    if free < num_bytes:
        raise UserError(
            f"no disk space in {out}: the run needs about {num_bytes / MEBIBYTE:.0f} MiB, "
            f"{free / MEBIBYTE:.0f} MiB are free"
        )
