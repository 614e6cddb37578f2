"""New files under random names that are then renamed, and locks between savers."""

import errno
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_LOCK_SECONDS = 60.0


def new_file(path: Path, data: bytes) -> Path:
    """Write ``data`` into a new file beside ``path`` and sync it; returns the new file.

    Its name is random, and a file, link or FIFO of that name is never opened (O_EXCL).

    Raises:
        OSError: it cannot be written. It has been removed then.
    """
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise  # somebody else's
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def write_file(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path``, whole, or leave what was there. A link at ``path`` is replaced, not
    followed.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = new_file(path, data)
    try:
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """A block that one saver into ``directory`` runs at a time, of all threads and processes.

    The lock ends with its process. Without effect where the system or the file system has no
    locks.

    Raises:
        TimeoutError: another saver has held the lock for a minute.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EINTR):
                    break  # a file system without locks
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{directory} must not be locked by another saver, waited "
                    f"{_LOCK_SECONDS:.0f} seconds"
                )
            time.sleep(0.002)
        yield
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Make renames in the directory ``path`` last."""
    if os.name == "posix":  # elsewhere a directory cannot be opened
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
