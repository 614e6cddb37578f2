"""A safetensors file: the header first, checked; values on demand, never mapped into memory.

A file that is truncated while it is mapped ends the process by SIGBUS. Here every tensor is read
into memory of its own by plain reads from one open file, so a rename of another file over its path
changes nothing. Peak memory is that of the tensors, and one mask of a tensor's size.
"""

import hashlib
import math
import os
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_ext.files.json_object import parse_json_object
from lowrank_ext.files.messages import quoted
from lowrank_ext.files.reading import open_file

_MAX_HEADER_BYTES = 16 * 2**20
_MAX_NAME = 1_000
_PIECE = 2**20
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


class TensorFile:
    """An open safetensors file.

    Attributes:
        path: of the file.
        specs: a meta tensor, so shape and dtype without values, by name.
        metadata: texts by name.

    Raises:
        OSError: the file is missing, cannot be read or is no regular file.
        ValueError: the header is damaged or does not describe the whole file.
    """

    def __init__(self, path: Path, caller: str) -> None:
        self.path = path
        self._where = f"{caller}: {path}"
        self._file = open_file(path, caller)
        try:
            self._size = os.fstat(self._file.fileno()).st_size
            header = self._header()
            self.metadata = self._checked_metadata(header.pop("__metadata__", {}))
            self._starts: dict[str, int] = {}
            self.specs = {name: self._spec(name, entry) for name, entry in header.items()}
            self._check_covered()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._file.close()

    def read(self) -> dict[str, Tensor]:
        """All tensors, on the CPU.

        Raises:
            ValueError: the file has become shorter, or a floating-point tensor is not finite.
        """
        return {name: self.read_one(name) for name in self.specs}

    def digest(self) -> str:
        """SHA-256 of the file."""
        self._file.seek(0)
        return hashlib.file_digest(self._file, "sha256").hexdigest()

    def is_current(self) -> bool:
        """Whether the path still leads to this file."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path))
        except OSError:
            return False

    def read_one(self, name: str) -> Tensor:
        """The tensor ``name``, on the CPU.

        Raises:
            ValueError: as ``read``.
        """
        spec = self.specs[name]
        if not spec.numel():
            return torch.empty(spec.shape, dtype=spec.dtype)
        data = bytearray(spec.numel() * spec.element_size())
        self._file.seek(self._starts[name])
        self._fill(memoryview(data))
        if spec.dtype is torch.bool:  # a byte may be neither 0 nor 1
            return torch.frombuffer(data, dtype=torch.uint8).reshape(spec.shape).bool()
        tensor = torch.frombuffer(data, dtype=spec.dtype).reshape(spec.shape)
        if not is_finite(tensor):
            raise ValueError(
                f"{self._where}: {quoted_name(name)} must be finite, got inf or nan; where that is "
                "meant, save torch.nan_to_num of it"
            )
        return tensor

    def _fill(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            count = self._file.readinto(view[done : done + _PIECE])
            if not count:
                raise self._damaged("it was truncated while being read")
            done += count

    def _damaged(self, problem: str) -> ValueError:
        return ValueError(f"{self._where} must be a whole safetensors file: {problem}")

    def _header(self) -> dict[str, Any]:
        """The header's object; sets where the values begin."""
        if self._size < 8:
            raise self._damaged(f"it has {self._size} bytes, no header")
        start = bytearray(8)
        self._fill(memoryview(start))
        (length,) = struct.unpack("<Q", start)
        if length > min(self._size - 8, _MAX_HEADER_BYTES):
            raise self._damaged(f"its header must fit, got {length} of {self._size} bytes")
        text = bytearray(length)
        self._fill(memoryview(text))
        self._first = 8 + length
        try:
            return parse_json_object(bytes(text), "header")
        except ValueError as error:
            raise self._damaged(str(error)) from None

    def _checked_metadata(self, metadata: object) -> dict[str, str]:
        if metadata is None:
            return {}
        if not isinstance(metadata, dict) or not all(isinstance(t, str) for t in metadata.values()):
            raise self._damaged(f"__metadata__ must hold texts, got {quoted(metadata)}")
        return metadata

    def _spec(self, name: str, entry: object) -> Tensor:
        """A meta tensor; notes where the values begin."""
        shown = quoted_name(name)
        if len(name) > _MAX_NAME:
            raise self._damaged(f"a name must have at most {_MAX_NAME} characters, got {shown}")
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise self._damaged(
                f"{shown} must have dtype, shape and data_offsets, got {quoted(entry)}"
            )
        dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
        if dtype is None:
            raise self._damaged(
                f"{shown} must have a dtype among {', '.join(_DTYPES)}, got "
                f"{quoted(entry['dtype'], 40)}"
            )
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
            raise self._damaged(
                f"{shown} must have sizes as shape and two data_offsets, got {quoted(shape)} and "
                f"{quoted(offsets)}"
            )
        # torch computes strides also of empty tensors.
        if len(shape) > 64 or math.prod(max(size, 1) for size in shape) >= 2**60:
            raise self._damaged(f"{shown} must have a shape that fits, got {quoted(shape)}")
        begin, end = offsets
        num_bytes = math.prod(shape) * dtype.itemsize
        if end - begin != num_bytes or self._first + end > self._size:
            raise self._damaged(
                f"{shown} must be {num_bytes} bytes inside the file, got data_offsets {begin} to "
                f"{end} of {self._size - self._first}"
            )
        self._starts[name] = self._first + begin
        return torch.empty(shape, dtype=dtype, device="meta")

    def _check_covered(self) -> None:
        """Raise unless the tensors lie one after the other and fill the file."""
        at = self._first
        for name in sorted(self._starts, key=lambda name: (self._starts[name], name)):
            spec = self.specs[name]
            if self._starts[name] != at and spec.numel():
                raise self._damaged(f"{quoted_name(name)} must begin where another ends")
            at += spec.numel() * spec.element_size()
        if at != self._size:
            raise self._damaged(f"its tensors must fill it, got {self._size - at} bytes more")


def quoted_name(name: str) -> str:
    """A tensor's name, without quotes where it is an ordinary one."""
    return name if name.isprintable() and len(name) <= 200 else quoted(name)


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are; True for integers."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    wide = tensor.float() if tensor.element_size() == 1 else tensor
    return bool(torch.isfinite(wide).all())


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)
