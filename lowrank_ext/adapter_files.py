"""The two files of an adapter: ``adapter_config.json`` and ``adapter_model.safetensors``.

They are replaced as a pair. Both are written and synced under random names. Then, under a lock that
excludes other savers, the config gets a waiting name, which holds the digest of its weights;
renaming the weights is the commit; and the config is renamed. A reader that finds a waiting config
with the digest of the present weights takes it. So the process may die at any point: either the old
pair or the new pair can be read. A save may have more files, companions, which are handled like the
config.

Any number of threads and processes may save into one directory: the last one's files stay, all of
one save. A reader beside them gets the files of one save: it opens the weights, reads the other
files, and begins again where the weights have been replaced meanwhile. Where the file system has no
locks, savers at the same moment may leave the config of one beside the weights of another.
"""

import hashlib
import json
import os
import secrets
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import safetensors.torch
from torch import Tensor

from lowrank_ext.files import (
    TensorFile,
    clean_errors,
    locked,
    new_file,
    open_file,
    read_json_object,
    sync_directory,
    write_file,
)

__all__ = [
    "AdapterFiles",
    "Companion",
    "check_can_hold_adapter",
    "open_adapter_files",
    "serialized",
    "write_adapter_files",
    "write_tensor_file",
]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_READ_ATTEMPTS = 100

# Content of a companion file, given the digest of the weights it belongs to.
Companion: TypeAlias = Callable[[str], bytes]


class AdapterFiles(NamedTuple):
    """Content of the files of one save.

    Attributes:
        caller: for messages.
        config_path, weights_path: for messages.
        config: the JSON object.
        tensors: on the meta device, so shapes and dtypes, until ``with_values``.
        metadata: of the tensor file.
        weights: the open tensor file.
        companion: an open companion, if asked for.
    """

    caller: str
    config_path: Path
    weights_path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    weights: TensorFile
    companion: TensorFile | None

    def with_values(self) -> "AdapterFiles":
        """The same with tensors on the CPU. Called once all shapes and dtypes have been checked.

        Raises:
            ValueError: the file was truncated meanwhile, or a tensor is not finite.
        """
        return self._replace(tensors=self.weights.read())


def write_adapter_files(
    where: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    companions: Mapping[str, Companion] = MappingProxyType({}),
) -> None:
    """Replace the pair and its companions in the directory ``where``, created if missing.

    Tensors must be contiguous, on the CPU and share no memory. The same input gives the same bytes.
    Links at the names of the files are replaced, not followed.

    Raises:
        OSError: a file cannot be written. The old pair is left as it was.
    """
    weights = serialized(tensors, metadata)
    digest = hashlib.sha256(weights).hexdigest()
    others = {name: companion(digest) for name, companion in companions.items()}
    others[CONFIG_NAME] = json.dumps(config, indent=2, sort_keys=True).encode()
    where.mkdir(parents=True, exist_ok=True)
    made: list[Path] = []
    try:
        for name, data in {**others, WEIGHTS_NAME: weights}.items():
            made.append(new_file(where / name, data))
        with locked(where):
            _finish_interrupted(where, list(others))
            waiting = _commit(where, list(others), digest, made)
            # If a rename fails, readers take the files that still have waiting names.
            for name, path in waiting.items():
                path.replace(where / name)
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        raise
    sync_directory(where)


def _commit(where: Path, names: list[str], digest: str, made: list[Path]) -> dict[str, Path]:
    """Give the files ``made`` of ``names`` waiting names, then rename the weights, the last one."""
    for name in (*names, WEIGHTS_NAME):
        if (where / name).is_dir():
            raise IsADirectoryError(f"{where / name} must be a file, got a directory")
    token = secrets.token_hex(8)
    waiting = {name: where / f".{name}.{digest}.{token}" for name in names}
    try:
        for temporary, path in zip(made, waiting.values(), strict=False):
            temporary.replace(path)
        made[-1].replace(where / WEIGHTS_NAME)
    except BaseException:
        for path in waiting.values():
            path.unlink(missing_ok=True)
        raise
    return waiting


def _finish_interrupted(where: Path, names: list[str]) -> None:
    """Do the renames that a save left undone when its process died."""
    for name in names:
        if (interrupted := _waiting(where, name)) is not None:
            interrupted.replace(where / name)


def _waiting(where: Path, name: str, weights: TensorFile | None = None) -> Path | None:
    """The file ``name`` of the present weights, if a save ended before it was renamed."""
    if not any(where.glob(f".{name}.*")):
        return None
    digest = weights.digest() if weights is not None else _digest(where / WEIGHTS_NAME)
    return next(iter(sorted(where.glob(f".{name}.{digest}.*"))), None)


def _digest(path: Path) -> str:
    if not path.is_file():
        return "none"
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensor_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replace the safetensors file ``path`` as a whole; its directory is created if missing.

    Tensors as for ``write_adapter_files``.

    Raises:
        OSError: it cannot be written. An old file is left as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, serialized(tensors, {}))


@contextmanager
def open_adapter_files(
    where: Path, caller: str, companion: str | None = None
) -> Iterator[AdapterFiles]:
    """A block with the files in the directory ``where``, all of one save.

    The block checks what the files say, then calls ``with_values``, then changes the model. Its
    ValueErrors and OSErrors get printable messages of less than 1,000 characters.

    Raises:
        FileNotFoundError: one of the files is missing.
        OSError: one of them cannot be read or is no regular file.
        ValueError: one of them is damaged. All name the file.
    """
    with clean_errors():
        _check_holds_adapter(where, caller)
        files = _one_save(where, caller, companion)
        with closing(files.weights), closing(files.companion or files.weights):
            yield files


def _one_save(where: Path, caller: str, companion: str | None) -> AdapterFiles:
    """The files of one save, however often others save meanwhile."""
    missing = 0
    for _ in range(_READ_ATTEMPTS):
        with ExitStack() as opened:
            try:
                weights = opened.enter_context(closing(TensorFile(where / WEIGHTS_NAME, caller)))
            except FileNotFoundError:
                open_file(where / CONFIG_NAME, caller).close()  # named first where both are missing
                raise
            try:
                files = _beside(weights, where, caller, companion)
            except FileNotFoundError:
                missing += 1  # a waiting file may have been renamed before it was opened
                if missing == 3:
                    raise
                continue
            if files.companion is not None:
                opened.enter_context(closing(files.companion))
            if weights.is_current():
                opened.pop_all()  # open_adapter_files closes
                return files
    raise OSError(f"{caller}: {where} must hold still for a moment, got a new save at each read")


def _beside(weights: TensorFile, where: Path, caller: str, companion: str | None) -> AdapterFiles:
    config_path = _waiting(where, CONFIG_NAME, weights) or where / CONFIG_NAME
    config = read_json_object(config_path, caller)
    other = None
    if companion is not None:
        other = TensorFile(_waiting(where, companion, weights) or where / companion, caller)
    return AdapterFiles(
        caller=caller,
        config_path=config_path,
        weights_path=weights.path,
        config=config,
        tensors=dict(weights.specs),
        metadata=weights.metadata,
        weights=weights,
        companion=other,
    )


def _check_holds_adapter(where: Path, caller: str) -> None:
    """Raise where ``where`` is no directory of an adapter, but something that users take for one.

    Raises:
        FileNotFoundError: there is nothing, as for the name of a repository on the Hub, or PEFT's
            old ``adapter_model.bin`` alone.
        NotADirectoryError: it is a file.
    """
    if os.path.isfile(where):
        inside = where.name in (CONFIG_NAME, WEIGHTS_NAME)
        way_out = f"pass {where.parent}" if inside else f"one with {CONFIG_NAME} and {WEIGHTS_NAME}"
        raise NotADirectoryError(
            f"{caller}: path must be the directory of an adapter, got the file {where}; {way_out}"
        )
    if not os.path.exists(where):
        named = not where.is_absolute() and len(where.parts) == 2 and where.parts[0] != ".."
        from_hub = f"; from the Hugging Face Hub: huggingface_hub.snapshot_download('{where}')"
        raise FileNotFoundError(f"{caller}: {where} does not exist{from_hub if named else ''}")
    if not os.path.lexists(where / CONFIG_NAME) and not os.path.lexists(where / WEIGHTS_NAME):
        named_ones = sorted(path.parent.name for path in where.glob(f"*/{CONFIG_NAME}"))
        if named_ones:
            raise FileNotFoundError(
                f"{caller}: {where / CONFIG_NAME} does not exist, but adapters are in its "
                f"directories {', '.join(named_ones)}"
            )
    old = where / "adapter_model.bin"
    if os.path.isfile(old) and not os.path.lexists(where / WEIGHTS_NAME):
        raise FileNotFoundError(
            f"{caller}: {where / WEIGHTS_NAME} does not exist, and {old.name} is a pickle, which "
            "can run code and is not read; load it by peft.PeftModel.from_pretrained(model, path) "
            "and save it again by save_pretrained(path)"
        )


def check_can_hold_adapter(where: Path, caller: str) -> None:
    """Raise NotADirectoryError where ``where``, or a directory above it, is a file."""
    for path in (where, *where.parents):
        if os.path.isdir(path):
            return
        if os.path.lexists(path):
            raise NotADirectoryError(f"{caller}: path must be a directory, got the file {path}")


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
