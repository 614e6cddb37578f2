"""Activation checkpointing of a model whose embeddings are frozen."""

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class HookHandles:
    """Removes several hooks at once: by ``remove()`` or at the end of a ``with`` block."""

    def __init__(self, handles: list[RemovableHandle]) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def prepare_for_checkpointing(model: nn.Module) -> HookHandles:
    """Let gradients reach the adapters through reentrant activation checkpointing.

    Reentrant checkpointing differentiates a block only if one of its inputs requires a gradient,
    which the output of a frozen embedding does not. A hook makes the output of the input embeddings
    require one; the embedding weights stay frozen. Call it before or after switching checkpointing
    on. With ``use_reentrant=False`` it is not needed and only costs an input gradient.

    The embeddings are what ``model.get_input_embeddings()`` returns, else every nn.Embedding.

    Returns:
        A handle whose ``remove()`` removes the hooks; also a context manager.

    Raises:
        ValueError: the model has no embedding; make the input tensor require a gradient instead.
    """
    embeddings = _input_embeddings(model)
    if not embeddings:
        raise ValueError(
            f"prepare_for_checkpointing: model must have input embeddings, got a "
            f"{type(model).__name__} with none; call requires_grad_() on its input instead"
        )
    return HookHandles([module.register_forward_hook(_require_grad) for module in embeddings])


def _require_grad(module: nn.Module, args: Any, output: Any) -> None:
    if torch.is_grad_enabled() and isinstance(output, Tensor) and not output.requires_grad:
        output.requires_grad_()


def _input_embeddings(model: nn.Module) -> list[nn.Module]:
    get_embeddings = getattr(model, "get_input_embeddings", None)
    if callable(get_embeddings):
        try:
            found = get_embeddings()
        except NotImplementedError:  # raised by transformers where it finds none
            found = None
        if isinstance(found, nn.Module):
            return [found]
    return [m for m in model.modules() if isinstance(m, nn.Embedding)]
