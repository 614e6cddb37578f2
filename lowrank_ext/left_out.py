"""What ``adapt`` does not adapt although it computes a product: weights that no linear module holds
or whose module is not called.

All of it is found from the model's structure and classes; nothing is run.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from types import FunctionType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lowrank_ext.nn.base_layer import Adapter, family_of, linear_features
from lowrank_ext.nn.low_rank_linear import LowRankLinear
from lowrank_ext.wrappers import named_modules

_FUSED = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
# Uses of ``self.child.weight`` that do not read its values.
_METADATA = {
    "device",
    "dim",
    "dtype",
    "element_size",
    "grad",
    "is_cuda",
    "is_floating_point",
    "is_meta",
    "is_quantized",
    "layout",
    "ndim",
    "numel",
    "quant_state",
    "requires_grad",
    "shape",
    "size",
}
_TESTS = {"getattr", "hasattr", "isinstance", "type"}


class LeftOut(NamedTuple):
    """A module whose weights stay as they are: why, and which."""

    path: str
    module: nn.Module
    because: str
    weights: list[Tensor]


class Reader(NamedTuple):
    """The function that reads a weight, and whether its class also calls the module."""

    function: str
    calls_too: bool


def left_out(model: nn.Module) -> list[LeftOut]:
    """Weights of the model that multiply its activations outside of calls of linear modules."""
    return [*_stacked(model), *_fused(model), *_never_called(model)]


def _stacked(model: nn.Module) -> Iterator[LeftOut]:
    """Modules that hold matrices of several experts in one parameter [E, ..., ...]."""
    convolutions = (module for module in model.modules() if isinstance(module, _ConvNd))
    others = {inner for convolution in convolutions for inner in convolution.modules()}
    adapters = (m for m in model.modules() if isinstance(m, LowRankLinear))
    adapted = {id(adapter.base_parameter) for adapter in adapters}
    for path, module in named_modules(model):
        if isinstance(module, Adapter) or module in others:
            continue
        own = [p for p in module._parameters.values() if p is not None]
        stacked = [p for p in own if p.dim() >= 3 and p.shape[0] > 1]
        weights: list[Tensor] = [p for p in stacked if id(p) not in adapted]
        if weights:
            place = path.removesuffix(".base_layer")  # the rest of experts adapted in part
            yield LeftOut(place, module, "stacked weights, which no linear module holds", weights)


def _fused(model: nn.Module) -> Iterator[LeftOut]:
    """torch's own modules with matrices that no linear module of theirs multiplies."""
    for path, module in named_modules(model):
        if isinstance(module, _FUSED):
            weights: list[Tensor] = [p for p in module.parameters() if p.dim() == 2]
            yield LeftOut(
                path, module, f"matrices that {type(module).__name__} multiplies itself", weights
            )


def _never_called(model: nn.Module) -> Iterator[LeftOut]:
    found = readers(model)
    for path, module in named_modules(model):
        never = module in found and not found[module].calls_too
        if never and linear_features(module) is not None:
            weights: list[Tensor] = list(module.parameters(recurse=False))
            because = f"weights that {found[module].function} reads itself"
            yield LeftOut(path, module, because, weights)


def readers(model: nn.Module) -> dict[nn.Module, Reader]:
    """The modules, of any family, whose weight is read in place of a call, and by whom."""
    found: dict[nn.Module, Reader] = {}
    for owner in model.modules():
        # adapt switches torch's own fused path off; nn.MultiheadAttention is one of _FUSED.
        if isinstance(owner, nn.TransformerEncoderLayer | nn.MultiheadAttention):
            continue
        for name, child in owner._modules.items():
            if child is not None and family_of(child) is not None:
                owner_class: Any = type(owner)
                if (reader := _readers_in(owner_class).get(name)) is not None:
                    found[child] = reader
    return found


@functools.lru_cache(maxsize=1024)
def _readers_in(owner: type[nn.Module]) -> Mapping[str, Reader]:
    """The children whose weight is read in a call of the module: by ``forward`` or by a function of
    the class that it uses. What a user calls beside it, such as diffusers' ``fuse_projections``,
    does not count."""
    reads: dict[str, str] = {}
    used = {"forward"}
    waiting = ["forward"]
    while waiting:
        name = waiting.pop()
        for cls, function in _functions(owner, name):
            for child, is_read in _children_in(function):
                if is_read:
                    reads.setdefault(child, f"{cls.__name__}.{name}")
                elif child not in used:
                    used.add(child)
                    waiting.append(child)
    return {child: Reader(function, child in used) for child, function in reads.items()}


def _functions(owner: type[nn.Module], name: str) -> Iterator[tuple[type, FunctionType]]:
    """The function of this name and those that it overrides, which it may call."""
    for cls in owner.__mro__[: owner.__mro__.index(nn.Module)]:
        member = vars(cls).get(name)
        function = inspect.unwrap(member) if callable(member) else None
        if isinstance(function, FunctionType):
            yield cls, function


def _children_in(function: FunctionType) -> Iterator[tuple[str, bool]]:
    """Each use of ``self.child`` in the function: whether it reads ``self.child.weight``, or may
    call the child. Attributes and tests of it are neither; without source nothing is found."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return
    users = {used: node for node in ast.walk(tree) for used in ast.iter_child_nodes(node)}
    for child in users:
        if not isinstance(child, ast.Attribute) or not _is_name(child.value, {"self"}):
            continue
        use = users[child]
        reads = isinstance(use, ast.Attribute) and use.attr == "weight"
        user = users[use] if reads else use
        tested = isinstance(user, ast.Call) and _is_name(user.func, _TESTS)
        looked_at = isinstance(user, ast.Attribute) and (not reads or user.attr in _METADATA)
        if not tested and not looked_at:
            yield child.attr, reads


def _is_name(node: ast.AST, names: set[str]) -> bool:
    return isinstance(node, ast.Name) and node.id in names
