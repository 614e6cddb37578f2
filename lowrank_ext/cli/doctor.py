"""`lowrank-ext doctor`: versions, CPU, CUDA, and every op against its definition."""

import json
import math
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from lowrank_ext import ops, reference
from lowrank_ext.cli.display import make_console
from lowrank_ext.cli.environment import environment

# All pairs that the ops accept: (dtype of x, weight and base_out; dtype of the adapter).
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
NUM_EXPERTS, TOP_K, NUM_ADAPTERS = 5, 2, 4
SCALING = 0.7
OPS = ("lowrank_linear", "lowrank_add", "multi_lowrank_add", "moe_route", "moe_lowrank_add")

Inputs = dict[str, Tensor]


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
        """Whether the error is below the limit; false for NaN."""
        return self.forward_error <= self.limit and self.gradient_error <= self.limit


def run(as_json: bool) -> bool:
    """Prints the report; True when every op passed."""
    checks = [
        check_op(op, base, adapter, dropout)
        for op in OPS
        for base, adapter in DTYPES
        for dropout in DROPOUTS
        # moe_route has neither an adapter nor dropout.
        if op != "moe_route" or (base == adapter and dropout == 0)
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
    """Errors of the op's outputs and gradients against the reference in fp64 on the same rounded
    inputs."""
    inputs = make_inputs(op, base, adapter)
    exact_inputs = {name: tensor.double() for name, tensor in inputs.items()}
    got = forward_and_gradients(ops, op, inputs, dropout)
    exact = forward_and_gradients(reference, op, exact_inputs, dropout)
    errors = {name: relative_error(got[name], exact[name]) for name in exact}
    forward = worst_of([error for name, error in errors.items() if name not in inputs])
    worst = max(inputs, key=lambda name: worst_of([errors[name]]))
    names = (op, _name(base), _name(adapter))
    return Check(*names, dropout, forward, errors[worst], worst, error_limit(base))


def worst_of(errors: list[float]) -> float:
    """The largest error; NaN counts as infinite, because max() may skip it."""
    return max(math.inf if math.isnan(error) else error for error in errors)


def error_limit(dtype: torch.dtype) -> float:
    """Largest error allowed, relative to the largest entry of the exact tensor.

    bf16 and fp16 round every stored tensor, the [M, r] ones between the products included, and
    accumulate in fp32; fp32 and fp64 round with every addition.
    """
    units = 4 if dtype.itemsize == 2 else 16
    return units * torch.finfo(dtype).eps


def make_inputs(op: str, base: torch.dtype, adapter: torch.dtype) -> Inputs:
    """All differentiable arguments of the op, the optional ones included."""
    generator = torch.Generator().manual_seed(0)

    def draw(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).div(math.sqrt(shape[-1])).to(dtype)

    if op == "moe_route":
        return {"router_logits": draw(base, NUM_ROWS, NUM_EXPERTS)}
    inputs = {"x": draw(base, NUM_ROWS, IN_FEATURES)}
    if op == "lowrank_linear":
        inputs["weight"] = draw(base, OUT_FEATURES, IN_FEATURES)
        inputs["bias"] = draw(base, OUT_FEATURES)
    else:
        inputs = {"base_out": draw(base, NUM_ROWS, OUT_FEATURES), **inputs}
    stack = {"multi_lowrank_add": (NUM_ADAPTERS,), "moe_lowrank_add": (NUM_EXPERTS,)}.get(op, ())
    inputs["lora_a"] = draw(adapter, *stack, RANK, IN_FEATURES)
    inputs["lora_b"] = draw(adapter, *stack, OUT_FEATURES, RANK)
    if op == "moe_lowrank_add":
        inputs["router_weight"] = draw(adapter, NUM_EXPERTS, IN_FEATURES)
    elif op != "multi_lowrank_add":
        inputs["core"] = draw(adapter, RANK, RANK)
        inputs["rank_scale"] = draw(adapter, RANK)
        inputs["out_scale"] = draw(adapter, OUT_FEATURES)
    return inputs


def call_op(namespace: ModuleType, op: str, inputs: Inputs, dropout: float) -> Inputs:
    """The differentiable outputs of the op in lowrank_ext.ops or lowrank_ext.reference."""
    function = getattr(namespace, op)
    drawn = {"dropout_p": dropout, "seed": torch.tensor([1234567], dtype=torch.int64)}
    if op == "moe_route":
        weights, _, _, balance_loss, *_ = function(**inputs, top_k=TOP_K)
        return {"weights": weights, "balance_loss": balance_loss}
    if op == "moe_lowrank_add":
        y, balance_loss, *_ = function(**inputs, top_k=TOP_K, scaling=SCALING, **drawn)
        return {"y": y, "balance_loss": balance_loss}
    if op == "multi_lowrank_add":
        ids = torch.arange(NUM_ROWS) % (NUM_ADAPTERS + 1) - 1
        scaling = torch.linspace(0.5, 2, NUM_ADAPTERS)
        ranks = torch.arange(NUM_ADAPTERS) * RANK // (NUM_ADAPTERS - 1)
        return {"y": function(**inputs, adapter_ids=ids, scaling=scaling, ranks=ranks, **drawn)}
    return {"y": function(**inputs, scaling=SCALING, **drawn)}


def forward_and_gradients(namespace: ModuleType, op: str, inputs: Inputs, dropout: float) -> Inputs:
    """The outputs and the gradient of every input, by name."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    outputs = call_op(namespace, op, leaves, dropout)
    generator = torch.Generator().manual_seed(1)
    douts = [
        torch.randn(y.shape, generator=generator).to(next(iter(inputs.values())).dtype).to(y.dtype)
        for y in outputs.values()
    ]
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), douts)
    named = {name: output.detach() for name, output in outputs.items()}
    return named | dict(zip(leaves, gradients, strict=True))


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
