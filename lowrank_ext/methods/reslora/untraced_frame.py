"""Getter that torch.compile calls without tracing it; imported while tracing only, because its
decorator imports torch._dynamo."""

from contextvars import ContextVar
from typing import TypeVar

import torch

Frame = TypeVar("Frame")


@torch.compiler.disable(
    reason="ResLoRA: the chain's owner runs outside of the compiled function; compile the whole "
    "model to have one graph"
)
def untraced_frame(current: ContextVar[Frame | None]) -> Frame | None:
    """The current frame of this thread or task, read outside of the compiled graph."""
    return current.get()
