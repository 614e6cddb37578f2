"""Experts of a mixture whose matrices are stacked in parameters [E, ..., ...], as transformers 5
holds them: which of them can carry low-rank branches, and the forward with the branches.

    y[t] = Σ_k gates[t, k] · down(act(up(x[t]))),     each projection with expert e = ids[t, k]:
    up(x) = x W[e]ᵀ + bias[e] + Σ scaling · (x lora_a[e]ᵀ) lora_b[e]ᵀ      and down alike

Rows are sorted by expert, so that a projection of all experts is one grouped product, and its
branch one ``multi_lowrank_add``. No matrix lora_b lora_a is made.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ext import ops
from lowrank_ext.nn.autocast import without_autocast
from lowrank_ext.ops._registration import HALF_DTYPES

_INTERFACE = "transformers.integrations.moe"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT = 16  # bytes: of the rows that torch's grouped product reads


class ExpertBranch(NamedTuple):
    """A low-rank branch for each expert of one stacked weight."""

    lora_a: Tensor  # [E, r, in_features]
    lora_b: Tensor  # [E, out_features, r]
    scaling: float


class StackedLinear(nn.Module):
    """One stacked weight of an experts module, seen as a linear module for each expert.

    It holds no parameter: ``weight`` is the one that the experts module has at the moment.

    Attributes:
        experts, name: the module and the name of its parameter.
        in_features, out_features: K and N of each expert.
        stack: (E,), the leading dimension of the parameter.
        transposed: whether the parameter is [E, K, N], not [E, N, K].
    """

    experts: Any

    def __init__(self, experts: nn.Module, name: str) -> None:
        super().__init__()
        vars(self)["experts"] = experts  # by nn.Module's own way it would become a submodule
        self.name = name
        self.transposed = bool(self.experts.is_transposed)
        num_experts, first, second = experts.get_parameter(name).shape
        self.stack = (num_experts,)
        in_and_out = (first, second) if self.transposed else (second, first)
        self.in_features, self.out_features = in_and_out
        self.training = experts.training

    @property
    def weight(self) -> nn.Parameter | None:
        """The stacked parameter; None where it is parametrized."""
        weight: nn.Parameter | None = self.experts._parameters.get(self.name)
        return weight


def no_branches_because(experts: Any, name: str) -> str:
    """Why the parameter ``name`` of a module cannot carry branches; "" where it can."""
    kind = type(experts).__name__
    if not has_interface(experts):
        return f"one of a {kind}, which has no experts interface of transformers 5"
    if name not in projections(experts):
        return f"one of a {kind}, whose stacked weights are {' and '.join(projections(experts))}"
    weight = experts._parameters.get(name)
    if type(weight) is not nn.Parameter or weight.dtype not in _DTYPES or weight.dim() != 3:
        what = "computed" if weight is None else f"{weight.dtype} {list(weight.shape)}"
        return f"one of a {kind} that must be a floating parameter [E, ..., ...] and is {what}"
    own = vars(experts)
    if any(own[f"_{when}_hooks"] for when in ("forward", "forward_pre", "backward")):
        return f"one of a {kind} with hooks, which would not run; set them after adapting"
    if "forward" in own:
        return f"one of a {kind} with a forward of its own on the module, such as a device hook's"
    if experts._is_expert_parallel:
        return f"one of a {kind} whose experts lie on several devices"
    return ""


def has_interface(module: nn.Module) -> bool:
    """Whether the module's forward is the one that ``use_experts_implementation`` makes: a product,
    a gate or an activation, a product, for stacked weights of known names and layouts."""
    forward: Any = type(module).forward
    made = getattr(forward, "__globals__", {}).get("__name__") == _INTERFACE
    return made and hasattr(module, "_is_expert_parallel")


def projections(experts: Any) -> tuple[str, str]:
    """Names of the stacked weights: of the projection up, with the gate's if there is one, and of
    the projection down."""
    return ("gate_up_proj" if experts.has_gate else "up_proj"), "down_proj"


def experts_output(
    experts: Any,
    branches: Mapping[str, Sequence[ExpertBranch]],
    x: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
) -> Tensor:
    """Output of an experts module with branches on its stacked weights, [T, hidden], in x's dtype.

    Computed as by transformers' "grouped_mm", whatever implementation the model is set to; there
    with the same bits where all branches are zero.

    Args:
        experts: a module for which ``no_branches_because`` has nothing to say.
        branches: for each stacked weight by name; names may be missing.
        x: [T, hidden].
        expert_ids: integers [T, top_k], from 0 to E - 1.
        gates: [T, top_k], weights of the experts' outputs.
    """
    top_k = expert_ids.shape[-1]
    ids, order = expert_ids.reshape(-1).long().sort()
    counted = torch.arange(experts.num_experts, device=ids.device)
    ends = torch.searchsorted(ids, counted, right=True).to(torch.int32)
    up, down = projections(experts)
    rows = _projected(experts, up, branches.get(up, ()), x[order // top_k], ids, ends)
    rows = experts._apply_gate(rows) if experts.has_gate else experts.act_fn(rows)
    rows = _projected(experts, down, branches.get(down, ()), rows, ids, ends)
    if getattr(experts, "has_post_expert_norm", False):
        rows = experts.post_expert_norm(rows)
    rows = rows * gates.reshape(-1)[order].unsqueeze(-1)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    return rows[place].view(len(x), top_k, rows.shape[-1]).sum(dim=1).to(x.dtype)


def _projected(
    experts: Any, name: str, branches: Sequence[ExpertBranch], x: Tensor, ids: Tensor, ends: Tensor
) -> Tensor:
    """One projection of rows x [S, K], sorted by expert: ids [S], the last row of each ends [E]."""
    weight = getattr(experts, name)  # also where it is parametrized
    x = x.to(weight.dtype)
    y = _grouped_product(x, weight if experts.is_transposed else weight.mT, ends)
    if experts.has_bias:
        y = y + getattr(experts, f"{name}_bias")[ids]
    for branch in branches:
        lora_a, lora_b = (_beside(y, factor) for factor in (branch.lora_a, branch.lora_b))
        scaling = torch.full((len(lora_a),), branch.scaling, dtype=torch.float64, device=y.device)
        with without_autocast(y.device):  # which leaves the product alone, too
            y = ops.multi_lowrank_add(y, x, lora_a, lora_b, ids, scaling)
    return y


def _beside(y: Tensor, factor: Tensor) -> Tensor:
    """The factor in a dtype that the op takes beside y."""
    kept = factor.dtype == torch.float32 and y.dtype in HALF_DTYPES
    return factor if kept else factor.to(y.dtype)


def _grouped_product(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x[s] weight[e] for the rows s of each expert e; x [S, K], weight [E, K, N]."""
    dtypes = (torch.bfloat16,) if torch.compiler.is_compiling() else (*HALF_DTYPES, torch.float32)
    aligned = all(size * x.element_size() % _ALIGNMENT == 0 for size in weight.shape[1:])
    if aligned and x.dtype in dtypes:
        return F.grouped_mm(x, weight, offs=ends)
    y: Tensor = torch.ops.transformers.grouped_mm_fallback.default(x, weight, ends)
    return y
