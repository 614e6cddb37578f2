"""The two files of an adapter: ``adapter_config.json`` and ``adapter_model.safetensors``.

They are replaced as a pair. Both are written under temporary names and synced. Renaming the weights
is the commit; then the config is renamed, whose temporary name holds the digest of its weights. A
reader that finds a temporary config with the digest of the present weights takes it. So the process
may die at any point: either the old pair or the new pair can be read. A save may have more files,
companions, which are handled like the config.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import safetensors
import safetensors.torch
from torch import Tensor

__all__ = [
    "AdapterFiles",
    "Companion",
    "read_adapter_files",
    "read_companion",
    "serialized",
    "write_adapter_files",
    "write_tensor_file",
]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"

# Content of a companion file, given the digest of the weights it belongs to.
Companion: TypeAlias = Callable[[str], bytes]


class AdapterFiles(NamedTuple):
    """Content of the two files; their directory and the caller, for messages."""

    caller: str
    config_path: Path
    weights_path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def write_adapter_files(
    where: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    companions: Mapping[str, Companion] = MappingProxyType({}),
) -> None:
    """Replace the pair and its companions in the directory ``where``, created if missing.

    Tensors must be contiguous, on the CPU and share no memory. The same input gives the same bytes.

    Raises:
        OSError: a file cannot be written. The old pair is left as it was.
    """
    weights = serialized(tensors, metadata)
    digest = hashlib.sha256(weights).hexdigest()
    others = {name: companion(digest) for name, companion in companions.items()}
    others[CONFIG_NAME] = json.dumps(config, indent=2, sort_keys=True).encode()
    waiting = {name: where / f".{name}.{digest}.{os.getpid()}" for name in others}
    temporary = where / f".{WEIGHTS_NAME}.{os.getpid()}"
    where.mkdir(parents=True, exist_ok=True)
    for name in others:
        if (interrupted := _interrupted_save(where, name)) is not None:
            interrupted.replace(where / name)
    try:
        for name, data in others.items():
            _write_synced(temporary, data)
            temporary.replace(waiting[name])
        _write_synced(temporary, weights)
        temporary.replace(where / WEIGHTS_NAME)
    except BaseException:
        for path in (temporary, *waiting.values()):
            path.unlink(missing_ok=True)
        raise
    # If a rename fails, readers take the files that still have temporary names.
    for name, path in waiting.items():
        path.replace(where / name)
    _sync_directory(where)


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replace the safetensors file ``path`` as a whole; its directory is created if missing.

    Tensors as for ``write_adapter_files``.

    Raises:
        OSError: it cannot be written. An old file is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, serialized(tensors, {}))


def read_adapter_files(where: Path, caller: str) -> AdapterFiles:
    """Read the pair in the directory ``where``; tensors are on the CPU.

    Raises:
        FileNotFoundError: one of the files is missing.
        ValueError: one of them is damaged. Both name the file.
    """
    weights_path = where / WEIGHTS_NAME
    config_path = _interrupted_save(where, CONFIG_NAME) or where / CONFIG_NAME
    for path in (config_path, weights_path):
        if not path.is_file():
            raise FileNotFoundError(f"{caller}: {path} does not exist")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:  # broken JSON or broken UTF-8
        raise ValueError(f"{caller}: {config_path} must be JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{caller}: {config_path} must hold an object, got {config!r:.40}")
    try:
        with safetensors.safe_open(weights_path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{caller}: {weights_path} must be a whole safetensors file: {error}"
        ) from None
    return AdapterFiles(caller, config_path, weights_path, config, tensors, metadata)


class CompanionFile(NamedTuple):
    """Path of a companion, and the digest of the weights beside it."""

    path: Path
    weights_digest: str


def read_companion(where: Path, name: str, caller: str) -> CompanionFile:
    """The companion ``name`` of the adapter in the directory ``where``.

    Raises:
        FileNotFoundError: it or the adapter's weights are missing.
    """
    path = _interrupted_save(where, name) or where / name
    for file in (where / WEIGHTS_NAME, path):
        if not file.is_file():
            raise FileNotFoundError(f"{caller}: {file} does not exist")
    return CompanionFile(path, _digest(where / WEIGHTS_NAME))


def serialized(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file with PEFT's metadata and ``metadata``."""
    plain: bytes = safetensors.torch.save(dict(tensors), {"format": "pt"})
    if not metadata:
        return plain
    # safetensors writes two or more metadata entries in random order: the header is rewritten.
    (size,) = struct.unpack("<Q", plain[:8])
    header = json.loads(plain[8 : 8 + size])
    header["__metadata__"] |= metadata
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + plain[8 + size :]


def _interrupted_save(where: Path, name: str) -> Path | None:
    """The file ``name`` of the present weights, if a save ended before it was renamed."""
    weights = where / WEIGHTS_NAME
    if not any(where.glob(f".{name}.*")) or not weights.is_file():
        return None
    return next(iter(sorted(where.glob(f".{name}.{_digest(weights)}.*"))), None)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_file(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path``, whole, or leave what was there.

    Raises:
        OSError: the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        _write_synced(temporary, data)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    if os.name == "posix":  # elsewhere a directory cannot be opened
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
