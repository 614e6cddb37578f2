"""What torch.compile does not trace into. Imported by traced code only: the mark imports dynamo."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lowrank_ext.methods.reslora.chain_state import Frame


@torch.compiler.disable(
    reason="ResLoRA: the chain's owner runs outside of the compiled function; compile the whole "
    "model to have one graph"
)
def untraced_frame(current: ContextVar[Frame | None]) -> Frame | None:
    return current.get()
