"""Wrappers that torch and others put around modules: paths and keys without their names.

``torch.compile``, DDP, FSDP, activation checkpointing and AveragedModel register the module they
wrap as a child of theirs (``_orig_mod``, ``module``, …). A canonical path leaves these names out: a
model has the same paths, and its files the same keys, however its parts are wrapped. A wrapper is
told by its class: a user's own child called ``module`` keeps its name.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

# Class, by its full name (nothing is imported to find out) -> the child that it wraps.
_CHILDREN = {
    "torch._dynamo.eval_frame.OptimizedModule": "_orig_mod",
    "torch.nn.parallel.data_parallel.DataParallel": "module",
    "torch.nn.parallel.distributed.DistributedDataParallel": "module",
    "torch.optim.swa_utils.AveragedModel": "module",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel": (
        "_fsdp_wrapped_module"
    ),
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper.ActivationWrapper": (
        "_checkpoint_wrapped_module"
    ),
    "deepspeed.runtime.engine.DeepSpeedEngine": "module",
}
# Names that other tools leave in the keys of files.
_PRIVATE = frozenset(name for name in _CHILDREN.values() if name.startswith("_"))
_COMPILED = "torch._dynamo.eval_frame.OptimizedModule"
_FSDP1 = "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel"
# Wrappers that have taken over the parameters inside them: none may be added or replaced.
_OWNERS = {
    _FSDP1,
    "torch.nn.parallel.distributed.DistributedDataParallel",
    "deepspeed.runtime.engine.DeepSpeedEngine",
}


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside all wrappers around it; ``module`` itself where there are none."""
    while (child := _child_of(module)) is not None:
        inner = module._modules[child]
        assert inner is not None
        module = inner
    return module


def named_modules(
    model: nn.Module, prefix: str = "", remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """``model.named_modules()`` with canonical paths; wrappers themselves are left out."""
    return _walk(model, prefix, set() if remove_duplicate else None)


def _walk(
    module: nn.Module, path: str, seen: set[nn.Module] | None
) -> Iterator[tuple[str, nn.Module]]:
    module = unwrapped(module)
    if seen is not None:
        if module in seen:
            return
        seen.add(module)
    yield path, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{path}.{name}" if path else name, seen)


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module at the canonical ``path``.

    Raises:
        AttributeError: there is none.
    """
    module = unwrapped(model)
    for part in path.split(".") if path else ():
        child = module._modules.get(part)
        if child is None:
            raise AttributeError(f"{type(module).__name__} has no module {part!r} of {path!r}")
        module = unwrapped(child)
    return module


def canonical_name(model: nn.Module, name: str) -> str:
    """``name``, of a module or tensor inside ``model``, without the names of wrappers."""
    module: nn.Module | None = model
    kept = []
    for part in name.split("."):
        # A wrapper may have dropped its own child's name, as activation checkpointing does.
        while module is not None and (child := _child_of(module)) is not None:
            module = module._modules[child]
            if part == child:
                break
        else:
            module = None if module is None else module._modules.get(part)
            kept.append(part)
    return ".".join(kept)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """``module.state_dict()`` with canonical keys."""
    return {canonical_name(module, key): t for key, t in module.state_dict().items()}


def without_private_names(name: str) -> str:
    """``name``, of a file, without the names that wrappers give to a child and users do not."""
    return ".".join(part for part in name.split(".") if part not in _PRIVATE)


def replace_wrapped(wrapper: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in place of the child ``name``, of a wrapper or of any other module."""
    wrapper._modules[name] = module
    if _kind(wrapper) == _COMPILED and name == "_orig_mod":
        # Its forward is bound to the old child; made again as when unpickled.
        wrapper.__setstate__(wrapper.__getstate__())


def check_may_change(model: nn.Module, caller: str) -> None:
    """Raise ValueError where a wrapper has taken over parameters of ``model``."""
    for module in model.modules():
        if _kind(module) in _OWNERS:
            raise ValueError(
                f"{caller}: model must not be inside {type(module).__name__}, which trains the "
                f"parameters it was made with; call {caller} before wrapping"
            )


def is_whole(model: nn.Module) -> bool:
    """Whether FSDP1 has sharded no parameter of ``model``."""
    return not any(_kind(module) == _FSDP1 for module in model.modules())


def check_whole(model: nn.Module, caller: str) -> None:
    """Raise ValueError where FSDP1 has sharded parameters of ``model``."""
    if not is_whole(model):
        raise ValueError(
            f"{caller}: model must not be sharded by FullyShardedDataParallel; call {caller} "
            "before wrapping"
        )


def whole_parameters(model: nn.Module) -> AbstractContextManager[None]:
    """A ``with`` block in which the parameters that FSDP1 has sharded are whole, on every rank."""
    if is_whole(model):
        return nullcontext()
    from torch.distributed.fsdp import FullyShardedDataParallel

    whole: AbstractContextManager[None] = FullyShardedDataParallel.summon_full_params(
        model, writeback=False
    )
    return whole


def _kind(module: nn.Module) -> str | None:
    """Full name of the wrapper's class, a key of _CHILDREN, or None."""
    module_class: Any = type(module)  # hashable, which mypy does not see
    return _kind_of_class(module_class)


@lru_cache(maxsize=1024)  # paths are walked often, and a model has few classes
def _kind_of_class(module_class: type[nn.Module]) -> str | None:
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in module_class.__mro__)
    return next((name for name in names if name in _CHILDREN), None)


def _child_of(module: nn.Module) -> str | None:
    """Name of the child that ``module`` wraps, or None."""
    kind = _kind(module)
    return None if kind is None else _CHILDREN[kind]
