"""Bases, adapted modules and models shared by the tests of modules and of model surgery."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ext import reference
from lowrank_ext.adapt import adapt
from lowrank_ext.config import AdapterConfig
from lowrank_ext.methods.aflora.config import AFLoRAConfig
from lowrank_ext.methods.goat.config import GOATConfig
from lowrank_ext.methods.lamda.config import LaMDAConfig
from lowrank_ext.methods.lora.config import LoRAConfig
from lowrank_ext.methods.reslora.config import ResLoRAConfig
from lowrank_ext.methods.set_and_sequence.config import BasisLoRAConfig
from lowrank_ext.nn import (
    AFLoRALinear,
    BasisLoRALinear,
    GOATLinear,
    LaMDALinear,
    LoRALinear,
    LowRankLinear,
    ResLoRALinear,
)

Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

IN, OUT, RANK = 12, 9, 3


class Method(NamedTuple):
    module: type[LowRankLinear]
    config: type[AdapterConfig]
    init: str
    shortcut: str = ""  # ResLoRA's

    def __str__(self) -> str:
        return f"{self.config.peft_type.lower()}-{self.shortcut or self.init}"

    def options(self, r: int) -> dict[str, Any]:
        """What the method needs beside rank r: experts of rank 1, of which all but one are chosen
        per token; coefficients without masks, which the formulas here do not have."""
        if self.shortcut:
            return {"shortcut": self.shortcut}
        if self.config is GOATConfig:
            return {"num_experts": r, "top_k": max(1, r - 1)}
        return {"coef_dropout": 0.0} if self.config is BasisLoRAConfig else {}


METHODS = [
    Method(module, config, init)
    for module, config in (
        (LoRALinear, LoRAConfig),
        (LaMDALinear, LaMDAConfig),
        (AFLoRALinear, AFLoRAConfig),
        (BasisLoRALinear, BasisLoRAConfig),
    )
    for init in module.inits
]
INPUT, BLOCK, MIDDLE = (
    Method(ResLoRALinear, ResLoRAConfig, "kaiming", shortcut)
    for shortcut in ("input", "block", "middle")
)
METHODS.append(BLOCK)
EXPERTS = [Method(GOATLinear, GOATConfig, init) for init in GOATLinear.inits]
# METHODS have one matrix as their branch; a mixture of experts has none, and cannot be merged. In a
# model ResLoRA's other two have one only in estimate.
ALL_METHODS = [*METHODS, *EXPERTS, INPUT, MIDDLE]
RESIDUAL = [m for m in METHODS if m.init in m.module.residual_inits]
RESIDUAL_EXPERTS = [m for m in EXPERTS if m.init in m.module.residual_inits]
ZERO_BRANCH = [m for m in ALL_METHODS if m not in RESIDUAL + RESIDUAL_EXPERTS]
# Methods whose output is the base's at the start, to rounding. Experts with an SVD start have it
# only on average over balanced tokens.
STARTS_AT_BASE = RESIDUAL + ZERO_BRANCH


class DoublingLinear(nn.Linear):
    """A linear with a forward of its own: its output is not a function of its weight alone."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Int8Linear(nn.Module):
    """A quantized linear: integer weight, one scale, no floating weight to merge into."""

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        codes = torch.randint(-8, 8, (out_features, in_features), dtype=torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scale", torch.tensor(0.125, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype))


def plain_linear(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    return nn.Linear(IN, OUT, bias=bias, dtype=dtype)


def negated_linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A linear with a hook that changes its output."""
    linear = plain_linear(dtype)
    linear.register_forward_hook(_negate)
    return linear


def observed_linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A linear with a hook that only looks at its output."""
    linear = plain_linear(dtype)
    linear.register_forward_hook(_look)
    return linear


def _look(module: nn.Module, args: Any, output: Tensor) -> None:
    assert output.shape[-1] == OUT


def _negate(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return -output


def conv1d(dtype: torch.dtype = torch.float32) -> Conv1D:
    conv = Conv1D(OUT, IN)
    nn.init.normal_(conv.weight)
    nn.init.normal_(conv.bias)
    return conv.to(dtype)


# Owned, mergeable, and any base at all.
PLAIN_BASES: dict[str, Callable[[torch.dtype], nn.Module]] = {
    "linear": plain_linear,
    "linear-no-bias": lambda dtype: plain_linear(dtype, bias=False),
    "conv1d": conv1d,
}
DENSE_BASES = {**PLAIN_BASES, "observed": observed_linear}
BASES = {
    **DENSE_BASES,
    "negated": negated_linear,
    "doubling": lambda dtype: DoublingLinear(IN, OUT, dtype=dtype),
    "int8": lambda dtype: Int8Linear(IN, OUT, dtype),
}


def fits(method: Method, kind: str) -> bool:
    """Whether the method's init can start from this base: an SVD needs the weight to be the map."""
    return kind in DENSE_BASES or method.init not in method.module.svd_inits


METHODS_AND_BASES = [(m, kind) for m in ALL_METHODS for kind in BASES if fits(m, kind)]


def weight_of(base: nn.Module) -> Tensor:
    """The base's weight as [N, K]."""
    weight = base.get_parameter("weight")
    return weight.t() if isinstance(base, Conv1D) else weight


@torch.no_grad()
def randomize(module: nn.Module) -> None:
    """Give what trains in the adapters below `module` values of order one that no init gives."""
    for layer in module.modules():
        if isinstance(layer, LowRankLinear):
            for name in ("lora_a", "lora_b", "core", "rank_scale", "out_scale", "router_weight"):
                tensor = getattr(layer, name, None)
                if tensor is not None and tensor.requires_grad:
                    size = tensor.shape[-1] if tensor.dim() > 1 else 1
                    tensor.copy_(torch.randn(tensor.shape) / size**0.5)


def lora_product(
    method: Method, base: nn.Module, lora_a: Tensor, lora_b: Tensor, **options: Any
) -> LowRankLinear:
    """The method's module, its core the identity and its scales ones, so that the branch is B A."""
    init = {"LAMDA": "lora"}.get(method.config.peft_type, "kaiming")
    module = method.module.from_linear(
        base,
        r=lora_a.shape[0],
        init=init,
        initialize=False,
        adapter_dtype="base",
        **method.options(lora_a.shape[0]),
        **options,
    )
    with torch.no_grad():
        module.lora_a.copy_(lora_a)
        module.lora_b.copy_(lora_b)
    neutral_middle(module)
    return module


@torch.no_grad()
def neutral_middle(module: LowRankLinear) -> None:
    """Make the core the identity and the scales ones, where there are such: the branch is B A."""
    if module.core is not None:
        module.core.copy_(torch.eye(module.r))
    for scale in (module.rank_scale, module.out_scale):
        if scale is not None:
            scale.fill_(1)


def branch(module: LowRankLinear, x: Tensor) -> Tensor:
    """The branch's definition in fp64 (no dropout), differentiable."""
    if isinstance(module, GOATLinear):
        return reference.moe_lowrank_add(
            x.new_zeros((*x.shape[:-1], module.out_features), dtype=torch.float64),
            x.double(),
            module.router_weight.double(),
            module.lora_a.double(),
            module.lora_b.double(),
            top_k=module.top_k,
            scaling=module.scaling,
        )[0]
    h = x.double() @ module.lora_a.double().mT
    if module.rank_scale is not None:
        h = h * module.rank_scale.double()
    if isinstance(module, ResLoRALinear) and module.shortcut == "input":
        h = 2 * h  # first of its chain
    if module.core is not None:
        h = h @ module.core.double().mT
    y = module.scaling * (h @ module.lora_b.double().mT)
    return y if module.out_scale is None else y * module.out_scale.double()


class Block(nn.Module):
    """Two linears and a nonlinearity, with names as in a language model."""

    def __init__(self, width: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.q_proj = nn.Linear(width, width, dtype=dtype)
        self.up_proj = nn.Linear(width, 2 * width, dtype=dtype)
        self.down_proj = nn.Linear(2 * width, width, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.q_proj(x)
        return x + self.down_proj(torch.tanh(self.up_proj(x)))


class TinyLM(nn.Module):
    """Embedding, blocks, norm and an output head, tied or not."""

    def __init__(
        self,
        width: int = 8,
        vocab: int = 11,
        tied: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width, dtype=dtype)
        self.layers = nn.ModuleList(Block(width, dtype) for _ in range(2))
        self.norm = nn.LayerNorm(width, dtype=dtype)
        self.lm_head = nn.Linear(width, vocab, bias=False, dtype=dtype)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


IDS = torch.tensor([[0, 3, 1, 7], [5, 2, 10, 4]])


def adapted_away_from_start(method: Method, model: nn.Module, **options: Any) -> nn.Module:
    """``model`` adapted with rank 4, in evaluation mode, every trained tensor moved."""
    adapt(model, method.config(r=4, init=method.init, **{**method.options(4), **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()
