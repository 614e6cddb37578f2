"""Autocast by the device of a tensor, on devices without it, such as meta, too."""

from contextlib import AbstractContextManager, nullcontext

import torch


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A block in which autocast leaves the operations on ``device`` alone."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype to which autocast casts on ``device``, or None where it is off."""
    available = torch.amp.is_autocast_available(device.type)
    on = available and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if on else None
