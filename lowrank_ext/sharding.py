"""DTensors, the tensors that FSDP2 shards: this rank's part, the whole, and their layout."""

from typing import Any, TypeAlias

import torch.distributed as dist
from torch import Tensor, nn

# The process groups over which a tensor is sharded; () where every rank has all of it.
Groups: TypeAlias = "tuple[dist.ProcessGroup, ...]"


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "full_tensor")


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor on the CPU, contiguous, without its graph."""
    return full_tensor(tensor).cpu().contiguous()


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a DTensor on its device, for which every rank must call this; any other tensor
    as it is; without their graph."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach()


def shard_groups(parameter: nn.Parameter) -> Groups:
    """The groups of ranks that hold different parts of ``parameter``."""
    if (layout := _layout(parameter)) is None:
        return ()
    mesh, placements = layout
    return tuple(mesh.get_group(dim) for dim, how in enumerate(placements) if how.is_shard())


def gathered_like(local: Tensor, like: nn.Parameter) -> Tensor:
    """The whole of a tensor that is sharded like ``like``, a copy on the CPU."""
    if (layout := _layout(like)) is None:
        return local.cpu().clone()
    from torch.distributed.tensor import DTensor

    divided = DTensor.from_local(local, *layout, shape=like.shape, stride=like.stride())
    return divided.full_tensor().cpu().clone()


def local_part_like(whole: Tensor, like: nn.Parameter) -> Tensor:
    """This rank's part of a whole tensor, sharded like ``like``."""
    return local_part(divided_like(whole, like))


def divided_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same on every rank, as a DTensor that is sharded like ``like``; as it is
    where ``like`` is not sharded."""
    if (layout := _layout(like)) is None:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), *layout)


def _layout(parameter: Any) -> tuple[Any, Any] | None:
    """Device mesh and placements of a DTensor; None for any other tensor."""
    divided = hasattr(parameter, "device_mesh")
    return (parameter.device_mesh, parameter.placements) if divided else None
