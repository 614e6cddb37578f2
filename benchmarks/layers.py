"""The adapted linear layers that the benchmarks time: ours, PEFT's and the plain torch formula.

Each is checked against the reference before it is timed.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import torch
import torch._dynamo.config
import torch.fx.experimental._config
import torch.nn.functional as F
from command import DTYPES
from timing import Candidate
from torch import Tensor, nn

from lowrank_ext import ops, reference
from lowrank_ext.nn import LoRALinear

try:
    import peft
except ImportError:
    peft = None

SCALING = 2.0


class Case(NamedTuple):
    num_rows: int
    in_features: int
    out_features: int
    rank: int
    dropout: float
    dtype: str

    @property
    def multiply_adds(self) -> int:
        return self.num_rows * self.in_features * self.out_features

    def __str__(self) -> str:
        m, k, n, r, p, dtype = self
        return f"{dtype} M={m} K={k} N={n} r={r} dropout={p}"


class Data(NamedTuple):
    """Tensors that all candidates of a case share; the adapter in fp32."""

    x: Tensor
    linear: nn.Linear
    lora_a: Tensor
    lora_b: Tensor
    dout: Tensor


def make_data(case: Case, device: str) -> Data:
    torch.manual_seed(0)
    m, k, n, r, _, name = case
    dtype = DTYPES[name]
    linear = nn.Linear(k, n, bias=False, dtype=dtype, device=device).requires_grad_(False)
    return Data(
        torch.randn(m, k, device=device).to(dtype).requires_grad_(),
        linear,
        torch.randn(r, k, device=device) / k**0.5,
        torch.randn(n, r, device=device) / r**0.5,
        torch.randn(m, n, device=device).to(dtype),
    )


# The layers


def make_ours(case: Case, data: Data, adapter_dtype: torch.dtype) -> nn.Module:
    module = LoRALinear.from_linear(
        data.linear,
        r=case.rank,
        alpha=SCALING * case.rank,
        dropout=case.dropout,
        adapter_dtype=adapter_dtype,
    )
    with torch.no_grad():
        module.lora_a.copy_(data.lora_a)
        module.lora_b.copy_(data.lora_b)
    return module.train()


class PeftFormula(nn.Module):
    """The operations of PEFT's layer, for machines without PEFT."""

    def __init__(self, case: Case, data: Data, adapter_dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = data.linear.weight
        self.dropout = nn.Dropout(case.dropout) if case.dropout else nn.Identity()
        self.lora_a = nn.Parameter(data.lora_a.to(adapter_dtype))
        self.lora_b = nn.Parameter(data.lora_b.to(adapter_dtype))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight)
        h = F.linear(self.dropout(x.to(self.lora_a.dtype)), self.lora_a)
        return (y + F.linear(h, self.lora_b) * SCALING).to(x.dtype)


def make_peft(case: Case, data: Data, adapter_dtype: torch.dtype) -> nn.Module:
    """PEFT's layer. Over a bf16 or fp16 base get_peft_model makes fp32 adapters by default."""
    if peft is None:
        return PeftFormula(case, data, adapter_dtype)
    config = peft.LoraConfig(r=case.rank, lora_alpha=SCALING * case.rank, lora_dropout=case.dropout)
    module = peft.tuners.lora.Linear(
        data.linear, "default", config, r=case.rank, lora_alpha=SCALING * case.rank
    )
    lora_a, lora_b = module.lora_A["default"], module.lora_B["default"]
    with torch.no_grad():
        lora_a.to(adapter_dtype).weight.copy_(data.lora_a)
        lora_b.to(adapter_dtype).weight.copy_(data.lora_b)
    return module.train()


def peft_name() -> str:
    """What the column "peft" measures: PEFT and its version, or the formula."""
    return "PEFT's formula in plain torch" if peft is None else f"PEFT {peft.__version__}"


@cache
def compiled_formula(dropout: float, dynamic: bool) -> Callable[..., Tensor]:
    """The plain torch formula, compiled; `dynamic`: one graph for all sizes."""

    def formula(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        h = F.linear(F.dropout(x, dropout), lora_a)
        return F.linear(x, weight) + SCALING * F.linear(h, lora_b)

    return torch.compile(formula, fullgraph=True, dynamic=dynamic)


class Compiled(nn.Module):
    """The compiled formula on a case's tensors, adapters in the base's dtype."""

    def __init__(self, case: Case, data: Data, dynamic: bool) -> None:
        super().__init__()
        dtype = DTYPES[case.dtype]
        self.case, self.dynamic = case, dynamic
        self.weight = data.linear.weight
        self.lora_a = nn.Parameter(data.lora_a.to(dtype))
        self.lora_b = nn.Parameter(data.lora_b.to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        formula = compiled_formula(self.case.dropout if self.training else 0.0, self.dynamic)
        return formula(x, self.weight, self.lora_a, self.lora_b)


def allow_many_graphs() -> None:
    """Raise dynamo's limit of graphs, as static shapes need one each.

    In dynamic graphs let the sizes of parameters change too, and treat sizes as distinct that are
    equal by chance in one case (a rank and a number of rows).
    """
    torch._dynamo.config.recompile_limit = 10_000
    torch._dynamo.config.accumulated_recompile_limit = 10_000
    torch._dynamo.config.force_parameter_static_shapes = False
    torch.fx.experimental._config.use_duck_shape = False


def as_candidate(module: nn.Module, data: Data) -> Candidate:
    """A training step of the layer, with gradients of x and of all trainable parameters."""
    wanted = [data.x, *(p for p in module.parameters() if p.requires_grad)]

    def backward(y: Tensor) -> object:
        return torch.autograd.grad(y, wanted, data.dout)

    return Candidate(lambda: module(data.x), backward)


# Checking: only correct kernels are timed

CHECKED_ROWS = 32


class WrongResult(Exception):
    """A candidate's values differ from the reference's."""


def check(case: Case, data: Data, modules: Mapping[str, nn.Module]) -> None:
    """Check every candidate's forward without dropout, and the op's forward and backward with it.

    Only the first rows are compared: rows are independent, and with a zero upstream gradient for
    the others the adapter's gradients depend on these alone.
    """
    rows = slice(0, CHECKED_ROWS)
    weight = data.linear.weight
    adapter = (data.lora_a, data.lora_b)
    truth = _reference(data.x[rows], weight, adapter, data.dout[rows], 0.0, None)
    for name, module in modules.items():
        if name == "frozen":
            continue
        module.eval()
        with torch.no_grad():
            _compare(f"{case}: {name}", {"y": module(data.x)[rows]}, truth)
        module.train()

    seed = torch.tensor([1], device=data.x.device)
    dout = torch.zeros_like(data.dout)
    dout[rows] = data.dout[rows]
    truth = _reference(data.x[rows], weight, adapter, data.dout[rows], case.dropout, seed)
    for dtype in {torch.float32, DTYPES[case.dtype]}:
        lora_a, lora_b = (t.detach().to(dtype).requires_grad_() for t in adapter)
        y = ops.lowrank_linear(
            data.x, weight, None, lora_a, lora_b, scaling=SCALING, dropout_p=case.dropout, seed=seed
        )
        dx, dlora_a, dlora_b = torch.autograd.grad(y, (data.x, lora_a, lora_b), dout)
        got = {"y": y[rows], "dx": dx[rows], "dlora_a": dlora_a, "dlora_b": dlora_b}
        _compare(f"{case}: the op with {dtype} adapters", got, truth)


def _reference(
    x: Tensor,
    weight: Tensor,
    adapter: tuple[Tensor, Tensor],
    dout: Tensor,
    dropout: float,
    seed: Tensor | None,
) -> dict[str, Tensor]:
    wide = [t.detach().double().requires_grad_() for t in (x, *adapter)]
    y = reference.lowrank_linear(
        wide[0], weight.double(), None, *wide[1:], scaling=SCALING, dropout_p=dropout, seed=seed
    )
    grads = torch.autograd.grad(y, wide, dout.double())
    return dict(zip(("y", "dx", "dlora_a", "dlora_b"), (y.detach(), *grads), strict=True))


def _compare(what: str, got: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    for name, value in got.items():
        error = (value.double() - truth[name]).abs().max() / truth[name].abs().max()
        limit = 4 * torch.finfo(got["y"].dtype).eps ** (1 if got["y"].element_size() == 2 else 0.8)
        if not error <= limit:
            raise WrongResult(f"{what}: {name} has a relative error of {error:.2g} > {limit:.2g}")
