"""What a loader may not change when it fails: models, banks, directories, to bits and flags."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_ext as lr

_PLAIN = (str, int, float, bool, type(None), tuple, frozenset)


def snapshot(thing: nn.Module | lr.AdapterBank | Path) -> dict[str, Any]:
    """Everything of it that can be compared with ==, by name."""
    if isinstance(thing, nn.Module):
        return of_model(thing)
    if isinstance(thing, lr.AdapterBank):
        return of_bank(thing)
    return of_directory(thing)


def of_model(model: nn.Module) -> dict[str, Any]:
    """Modules, classes, attributes and hooks; identity, flags and bits of all tensors."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        found[f"{path}: module"] = id(module), type(module)
        for name, value in vars(module).items():
            found[f"{path}.{name}"] = value_of(value)
    return found


def of_bank(bank: lr.AdapterBank) -> dict[str, Any]:
    state = {name: value_of(value) for name, value in vars(bank).items() if name != "_lock"}
    return {**of_model(bank.model), "bank": state, "names": bank.names, "memory": bank.memory()}


def of_directory(path: Path) -> dict[str, Any]:
    """Names, kinds, sizes, times of change and bytes."""
    found: dict[str, Any] = {}
    for file in sorted(path.rglob("*")):
        stat = file.lstat()
        content = file.read_bytes() if file.is_file() and not file.is_symlink() else None
        link = os.readlink(file) if file.is_symlink() else None
        found[str(file)] = stat.st_ino, stat.st_mode, stat.st_mtime_ns, content, link
    return found


def value_of(value: object) -> object:
    if isinstance(value, Tensor):
        grad = None if value.grad is None else id(value.grad)
        return id(value), type(value), value.requires_grad, value.dtype, grad, bits(value)
    if isinstance(value, Mapping):
        return {
            key if isinstance(key, _PLAIN) else id(key): value_of(v) for key, v in value.items()
        }
    return value if isinstance(value, _PLAIN) else id(value)


def bits(tensor: Tensor) -> bytes:
    data = tensor.detach().cpu().contiguous().reshape(-1)
    return data.view(torch.uint8).numpy().tobytes() if data.numel() else b""
