"""What torch.compile does not trace into. Imported by traced code only: the mark imports dynamo."""

from contextvars import ContextVar
from typing import TypeVar

import torch

Frame = TypeVar("Frame")


@torch.compiler.disable(
    reason="ResLoRA: the chain's owner runs outside of the compiled function; compile the whole "
    "model to have one graph"
)
def untraced_frame(current: ContextVar[Frame | None]) -> Frame | None:
    """The frame of this thread or task, whatever the compiler knows of it."""
    return current.get()
