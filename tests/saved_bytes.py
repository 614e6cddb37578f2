"""What a call keeps for backward, counted with saved_tensors_hooks."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def storages_kept(run: Callable[[], Tensor]) -> dict[int, tuple[int, torch.dtype]]:
    """Address -> (bytes of the whole storage, dtype) of all that `run` saves; each storage once."""
    kept: dict[int, tuple[int, torch.dtype]] = {}
    alive = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor.dtype)
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return kept


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def kept_beside(
    run: Callable[[], Tensor], known: list[Tensor | None]
) -> list[tuple[int, torch.dtype]]:
    """What is kept beside the storages of `known`."""
    addresses = {address(tensor) for tensor in known if tensor is not None}
    return sorted(
        (entry for where, entry in storages_kept(run).items() if where not in addresses),
        key=lambda entry: entry[0],
    )


def bytes_kept_by(module: nn.Module, x: Tensor) -> int:
    """All that the module saves, its parameters and x left out."""
    known = [*module.parameters(), *module.buffers()]
    middle = x + torch.zeros_like(x, requires_grad=True)
    return sum(size for size, _ in kept_beside(lambda: module(middle), known))
