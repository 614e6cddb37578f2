"""Opens regular files only, and reads them up to a limit."""

import os
import stat
from io import FileIO
from pathlib import Path
from typing import Any

import torch

from lowrank_ext.files.messages import quoted

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_file(path: Path, caller: str) -> FileIO:
    """The regular file ``path``, or the one it links to, open for reading without a buffer.

    Never waits: a FIFO is refused.

    Raises:
        OSError: it does not exist (FileNotFoundError), cannot be read, or is no regular file.
        ValueError: the path is no valid name.
    """
    # Opening a FIFO without O_NONBLOCK waits for its writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except FileNotFoundError:
        what = "is a link to a file that does not exist" if path.is_symlink() else "does not exist"
        raise FileNotFoundError(f"{caller}: {path} {what}") from None
    except OSError as error:
        why = (error.strerror or type(error).__name__).lower()
        raise type(error)(f"{caller}: {path} cannot be read: {why}") from None
    except ValueError as error:
        raise ValueError(f"{caller}: {quoted(str(path))} cannot be read: {error}") from None
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        error_type = IsADirectoryError if kind == stat.S_IFDIR else OSError
        raise error_type(
            f"{caller}: {path} must be a regular file, got {_KINDS.get(kind, 'something else')}"
        )
    return os.fdopen(descriptor, "rb", buffering=0)


def read_bytes(path: Path, caller: str, limit: int) -> bytes:
    """The content of a file of at most ``limit`` bytes.

    Raises:
        OSError: as ``open_file``.
        ValueError: the file is longer; no more than ``limit`` bytes have been read.
    """
    with open_file(path, caller) as file:
        data = bytearray()
        while piece := file.read(limit + 1 - len(data)):
            data += piece
    if len(data) > limit:
        raise ValueError(f"{caller}: {path} must have at most {limit:,} bytes, got more")
    return bytes(data)


def read_torch_file(path: Path, caller: str) -> dict[str, Any]:
    """The dictionary in a file of ``torch.save``; only tensors and plain values are read.

    Raises:
        OSError: as ``open_file``.
        ValueError: the file is damaged, or holds something else.
    """
    with open_file(path, caller) as file:
        try:
            content = torch.load(file, weights_only=True, map_location="cpu")
        except Exception as error:  # zip, pickle and torch raise many kinds
            raise ValueError(
                f"{caller}: {path} must be a whole file of torch.save: {quoted(str(error))}"
            ) from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{caller}: {path} must hold a dictionary, got {quoted(content)}")
    return content
