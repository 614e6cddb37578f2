"""`lowrank-ext doctor`: versions, CPU, CUDA, and every op against its definition."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from lowrank_ext import ops, reference
from lowrank_ext.cli.display import make_console
from lowrank_ext.cli.environment import environment

# (dtype of x, weight and base_out; dtype of the adapter): all that the ops accept.
DTYPES = (
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
)
DROPOUTS = (0.0, 0.25)
NUM_ROWS, IN_FEATURES, OUT_FEATURES, RANK = 37, 96, 80, 9
SCALING = 0.7


@dataclass(frozen=True)
class Check:
    """One op at one pair of dtypes, with or without dropout."""

    op: str
    dtype: str
    adapter_dtype: str
    dropout: float
    forward_error: float
    gradient_error: float
    worst_gradient: str
    limit: float

    @property
    def passed(self) -> bool:
        """A NaN error fails too: it is not below the limit."""
        return self.forward_error <= self.limit and self.gradient_error <= self.limit


def run(as_json: bool) -> bool:
    """Prints the report; True when every op passed."""
    checks = [
        check_op(op, base, adapter, dropout)
        for op in ("lowrank_linear", "lowrank_add")
        for base, adapter in DTYPES
        for dropout in DROPOUTS
    ]
    passed = all(check.passed for check in checks)
    if as_json:
        rows = [asdict(check) | {"passed": check.passed} for check in checks]
        report = {"environment": environment(), "checks": rows, "passed": passed}
        print(json.dumps(report, indent=2))
    else:
        _print_report(checks, passed)
    return passed


def check_op(op: str, base: torch.dtype, adapter: torch.dtype, dropout: float) -> Check:
    """The op's output and all gradients against the reference in fp64 on the same, already
    rounded, inputs."""
    inputs = make_inputs(op, base, adapter)
    exact_inputs = {name: tensor.double() for name, tensor in inputs.items()}
    dout = torch.randn(NUM_ROWS, OUT_FEATURES, generator=torch.Generator().manual_seed(1)).to(base)
    got = forward_and_gradients(getattr(ops, op), inputs, dout, dropout)
    exact = forward_and_gradients(getattr(reference, op), exact_inputs, dout.double(), dropout)
    errors = {name: relative_error(got[name], exact[name]) for name in exact}
    forward = errors.pop("output")
    # max() passes over NaN depending on the order, so NaN counts as infinite here.
    worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    names = (op, _name(base), _name(adapter))
    return Check(*names, dropout, forward, errors[worst], worst, error_limit(base))


def error_limit(dtype: torch.dtype) -> float:
    """Largest error allowed, relative to the largest entry of the exact tensor.

    Half sizes are rounded where they are stored, the [M, r] tensors between the products included,
    and accumulate in fp32; fp32 and fp64 round with every addition.
    """
    units = 4 if dtype.itemsize == 2 else 16
    return units * torch.finfo(dtype).eps


def make_inputs(op: str, base: torch.dtype, adapter: torch.dtype) -> dict[str, Tensor]:
    """Every differentiable argument of the op, the optional ones included."""
    generator = torch.Generator().manual_seed(0)

    def draw(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).div(math.sqrt(shape[-1])).to(dtype)

    first: dict[str, Tensor] = {"x": draw(base, NUM_ROWS, IN_FEATURES)}
    if op == "lowrank_linear":
        first["weight"] = draw(base, OUT_FEATURES, IN_FEATURES)
        first["bias"] = draw(base, OUT_FEATURES)
    else:
        first = {"base_out": draw(base, NUM_ROWS, OUT_FEATURES), **first}
    return first | {
        "lora_a": draw(adapter, RANK, IN_FEATURES),
        "lora_b": draw(adapter, OUT_FEATURES, RANK),
        "core": draw(adapter, RANK, RANK),
        "rank_scale": draw(adapter, RANK),
        "out_scale": draw(adapter, OUT_FEATURES),
    }


def forward_and_gradients(
    op: Callable[..., Tensor], inputs: dict[str, Tensor], dout: Tensor, dropout: float
) -> dict[str, Tensor]:
    """The output and the gradient of every input, by name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    seed = torch.tensor([1234567], dtype=torch.int64)
    output = op(**leaves, scaling=SCALING, dropout_p=dropout, seed=seed)
    gradients = torch.autograd.grad(output, list(leaves.values()), dout)
    return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}


def relative_error(got: Tensor, exact: Tensor) -> float:
    """max |got - exact| / max |exact|."""
    return float((got.double() - exact).abs().max() / exact.abs().max())


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _print_report(checks: list[Check], passed: bool) -> None:
    console = make_console()
    console.print(_environment_table(environment()))
    console.print(_checks_table(checks))
    failed = sum(not check.passed for check in checks)
    verdict = f"{failed} of {len(checks)} checks failed"
    console.print("all ops agree with the reference" if passed else verdict)


def _environment_table(facts: dict[str, Any]) -> Table:
    table = Table(show_header=False, box=None)
    for name, value in facts.items():
        table.add_row(name.replace("_", " "), _shown(value))
    return table


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _checks_table(checks: list[Check]) -> Table:
    title = "ops against reference.py in float64 (largest relative error)"
    table = Table(title=title, title_justify="left")
    for name in ("op", "dtype", "adapter", "dropout", "forward", "gradients", "worst", "limit", ""):
        table.add_column(name, no_wrap=True)
    for check in checks:
        table.add_row(
            check.op,
            check.dtype,
            check.adapter_dtype,
            f"{check.dropout:g}",
            f"{check.forward_error:.1e}",
            f"{check.gradient_error:.1e}",
            check.worst_gradient,
            f"{check.limit:.1e}",
            "ok" if check.passed else "FAILED",
        )
    return table
