"""Every module under torch's transforms and functional_call against its definition, in fp64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from module_cases import (
    ALL_METHODS,
    BASES,
    IN,
    OUT,
    RANK,
    Int8Linear,
    Method,
    branch,
    randomize,
)
from torch import Tensor, nn
from torch.func import functional_call
from transform_cases import TRANSFORMS, assert_same

from lowrank_ext import reference
from lowrank_ext.nn import LowRankLinear, MultiLoRALinear

# One of each class, and of each shortcut.
METHODS = list({(m.module, m.shortcut): m for m in reversed(ALL_METHODS)}.values())


class Definition(nn.Module):
    """y = x Wᵀ + bias + branch in plain torch, of the very Parameters of a module of ours."""

    def __init__(self, module: LowRankLinear, base: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.base, Int8Linear):
            y = self.base(x)
        else:
            y = F.linear(x, self.module.base_weight(), self.module.bias)
        return y + branch(self.module, x)


class Ours(Definition):
    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def adapted(method: Method, base: nn.Module) -> LowRankLinear:
    module = method.module.from_linear(
        base, r=RANK, init=method.init, adapter_dtype="base", **method.options(RANK)
    )
    randomize(module.double())
    return module.eval()


def as_function(module: nn.Module, names: list[str]) -> Any:
    def run(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(module, dict(zip(names, values, strict=True)), (x,))

    return run


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_module_as_its_definition(method: Method, transform: str) -> None:
    """Of x and all Parameters that train."""
    base = BASES["linear"](torch.float64)
    module = adapted(method, base)
    names = [f"module.{name}" for name, p in module.named_parameters() if p.requires_grad]
    x = torch.randn(4, IN, dtype=torch.float64)
    tensors = [x, *(module.get_parameter(name[7:]).detach() for name in names)]
    run = TRANSFORMS[transform]
    ours = run(as_function(Ours(module, base), names), tensors)
    assert_same(ours, run(as_function(Definition(module, base), names), tensors))


@pytest.mark.parametrize("kind", ["conv1d", "int8"])
@pytest.mark.parametrize("transform", ["jvp", "grad", "vmap_grad", "double_backward"])
def test_other_bases(kind: str, transform: str) -> None:
    base = BASES[kind](torch.float64)
    module = adapted(next(m for m in METHODS if m.init == "kaiming" and not m.shortcut), base)
    names = ["module.lora_a", "module.lora_b"]
    tensors = [torch.randn(4, IN).double(), module.lora_a.detach(), module.lora_b.detach()]
    run = TRANSFORMS[transform]
    ours = run(as_function(Ours(module, base), names), tensors)
    assert_same(ours, run(as_function(Definition(module, base), names), tensors))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_base_whose_weight_is_a_plain_tensor(kind: str) -> None:
    """RF-41: functional_call puts a Tensor where the Parameter was; FSDP1 removes the Parameter."""
    base = BASES[kind](torch.float64)
    module = adapted(next(m for m in METHODS if m.init == "kaiming" and not m.shortcut), base)
    x = torch.randn(4, IN, dtype=torch.float64)
    expected = module(x)
    held = {name: p.detach().clone() for name, p in module.named_parameters()}
    torch.testing.assert_close(functional_call(module, held, (x,)), expected)
    for name, tensor in held.items():
        delattr(module, name)
        setattr(module, name, tensor)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_adapters_by_row(transform: str) -> None:
    base = BASES["linear"](torch.float64)
    module = MultiLoRALinear.from_linear(base).eval()
    for name in ("a", "b"):
        module.add(name, torch.randn(RANK, IN).double(), torch.randn(OUT, RANK).double(), 1.5)
    ids = torch.tensor([0, 1, -1, 1])

    def ours(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        return functional_call(module, {"lora_a": lora_a, "lora_b": lora_b}, (x, ids))

    def definition(x: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        y = F.linear(x, base.weight, base.bias)
        return reference.multi_lowrank_add(y, x, lora_a, lora_b, ids, module.scaling)

    tensors = [torch.randn(4, IN).double(), module.lora_a.detach(), module.lora_b.detach()]
    run = TRANSFORMS[transform]
    assert_same(run(ours, tensors), run(definition, tensors))


def graphs_compiled() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_changed_scaling_does_not_compile_again(method: Method) -> None:
    """RF-34: one graph for the first number, one for all others."""
    module = adapted(method, BASES["linear"](torch.float32))
    randomize(module.float())
    x = torch.randn(4, IN)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for scaling in (2.0, 0.5, 1 / 3, 8.0, 1.0, 0.1, 3.0, 1e-3):
        module.scaling = scaling
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-5)
    assert graphs_compiled() <= 2
