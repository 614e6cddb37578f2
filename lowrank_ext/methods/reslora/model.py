"""ResLoRA on whole models: calls of single blocks, sizes of inputs, errors of merging."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ext.checks import check_rank
from lowrank_ext.forward_meter import ForwardMeter
from lowrank_ext.merging import merge, unmerge
from lowrank_ext.methods.reslora.chain_state import open_frame
from lowrank_ext.methods.reslora.module import ResLoRALinear
from lowrank_ext.nn.call_arguments import split_call
from lowrank_ext.targets import modules_of_kind

__all__ = ["MergeError", "reslora_call", "reslora_merge_error", "reslora_statistics"]


@contextmanager
def reslora_call(model: nn.Module) -> Iterator[None]:
    """A ``with`` block that acts as one call of the model: it starts the model's chains.

    For code that calls the blocks of a model itself. A forward of the model, or of the module that
    contains the blocks, does not need it.

    Raises:
        ValueError: the model has no ResLoRALinear.

    Examples:
        >>> with lr.reslora_call(blocks):
        ...     for block in blocks:  # an nn.ModuleList
        ...         x = block(x)
    """
    modules = modules_of_kind(model, ResLoRALinear, "reslora_call").values()
    with open_frame(frozenset(m.chain for m in modules if m.chain is not None)):
        yield


class InputSizes(ForwardMeter):
    """Measures the inputs of ResLoRALinears inside a ``with`` block; see ``reslora_statistics``.

    Attributes:
        calls: number of measured inputs of each module, by path.
    """

    def __init__(self, modules: Mapping[str, ResLoRALinear], window: int) -> None:
        super().__init__(modules)
        self.calls = dict.fromkeys(modules, 0)
        self._modules = modules
        self._sizes = {
            path: torch.zeros(window, device=m.lora_a.device) for path, m in modules.items()
        }

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        for path, module in self._modules.items():
            sizes = self._sizes[path]
            if filled := min(self.calls[path], len(sizes)):
                module.input_rms = sizes[:filled].mean()

    def _meter(self, path: str) -> Callable[..., None]:
        sizes = self._sizes[path]

        @torch.no_grad()
        def measure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = split_call(module, args, kwargs)[0]
            if x.numel():
                wide = x.to(torch.promote_types(x.dtype, torch.float32))
                # A ring buffer on the module's device, so that the host does not wait.
                sizes[self.calls[path] % len(sizes)] = wide.square().mean().sqrt()
                self.calls[path] += 1

        return measure


def reslora_statistics(model: nn.Module, window: int = 100) -> InputSizes:
    """Measures the sizes of the modules' inputs, for ``merge="input"``, inside a ``with`` block.

    Each module gets ``input_rms``: the mean over its last ``window`` calls of the root mean square
    of its input (which, unlike the norm of the released code, does not depend on the size of a
    batch). The host does not wait for the device. Works in both modes and on compiled models, which
    run eagerly in the block.

    Raises:
        ValueError: the model has no ResLoRALinear, or window is below 1.

    Examples:
        >>> with lr.reslora_statistics(model), torch.no_grad():
        ...     for batch in batches:
        ...         model(**batch)
        >>> lr.merge(model)
    """
    check_rank(window, "reslora_statistics", "window")
    return InputSizes(modules_of_kind(model, ResLoRALinear, "reslora_statistics"), window)


class MergeError(NamedTuple):
    """Relative errors |merged - exact| / |exact|: of the tensor that forward returns, and by path
    of each module's output for its inputs in the exact model."""

    output: float
    modules: dict[str, float]


@torch.no_grad()
def reslora_merge_error(model: nn.Module, forward: Callable[[], Tensor]) -> MergeError:
    """Relative errors that merging would cause; the model is as before afterwards.

    Runs ``forward`` once with the shortcuts and once with merged weights. ``block`` merges exactly,
    up to rounding. Compiled models run eagerly.

    Args:
        model: not merged, in evaluation mode.
        forward: runs the model on inputs of your choice and returns a tensor.

    Raises:
        ValueError: the model has no ResLoRALinear, is merged or in training mode with dropout; or
            as ``lowrank_ext.merge``.
        TypeError: as ``lowrank_ext.merge``.

    Examples:
        >>> error = lr.reslora_merge_error(model, lambda: model(**batch).logits)
        >>> error.output, max(error.modules.values())
    """
    modules = modules_of_kind(model, ResLoRALinear, "reslora_merge_error")
    for path, module in modules.items():
        if module.merged or (module.training and module.dropout > 0):
            state = "merged" if module.merged else "in training mode with dropout"
            raise ValueError(
                "reslora_merge_error: model must be unmerged and in evaluation mode, got "
                f"{path or 'the model'} {state}"
            )
    deltas = {path: module.delta_weight() for path, module in modules.items()}
    squares: dict[str, Tensor] = {
        path: torch.zeros(2, dtype=torch.float64, device=m.lora_a.device)
        for path, m in modules.items()
    }
    handles = [
        module.register_forward_hook(_comparison(deltas[path], squares[path]), with_kwargs=True)
        for path, module in modules.items()
    ]
    with torch.compiler.set_stance("force_eager"):
        try:
            exact = forward().double()
        finally:
            for handle in handles:
                handle.remove()
        merge(model)
        try:
            merged = forward().double()
        finally:
            unmerge(model)
    return MergeError(
        _relative((merged - exact).norm(), exact.norm()),
        {path: _relative(*pair.sqrt()) for path, pair in squares.items()},
    )


def _comparison(delta: Tensor, squares: Tensor) -> Callable[..., None]:
    """A hook that adds |y_merged - y|² and |y|² of each call to ``squares``."""

    def compare(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor
    ) -> None:
        assert isinstance(module, ResLoRALinear)
        x, args, kwargs = split_call(module, args, kwargs)
        merged = (
            module.base_output(x, *args, **kwargs).double() + F.linear(x.to(delta), delta).double()
        )
        squares.add_(torch.stack([(merged - y.double()).square().sum(), y.double().square().sum()]))

    return compare


def _relative(error: Tensor, size: Tensor) -> float:
    return (error / size).item() if error > 0 else 0.0
