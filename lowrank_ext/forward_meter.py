"""ForwardMeter: forward hooks that are active inside a ``with`` block."""

from collections.abc import Callable, Mapping
from typing import Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class ForwardMeter:
    """Base class of meters, which read the inputs of modules inside a ``with`` block.

    Compiled models run eagerly there, because compiled code lacks hooks that were added later.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._watched = modules
        self._handles: list[RemovableHandle] = []
        self._eager = torch.compiler.set_stance("force_eager")

    def _meter(self, path: str) -> Callable[..., None]:
        """The pre-forward hook, with keyword arguments, of the module at ``path``."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._eager.__enter__()
        self._handles = [
            module.register_forward_pre_hook(self._meter(path), with_kwargs=True)
            for path, module in self._watched.items()
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._eager.__exit__(*exception)
