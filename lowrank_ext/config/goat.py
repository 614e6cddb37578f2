"""Configuration of GOAT and plain mixtures of LoRA experts."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from lowrank_ext.config.base import AdapterConfig
from lowrank_ext.config.checks import check_choice, check_divisible, check_number, check_rank


@dataclass(kw_only=True, frozen=True)
class GOATConfig(AdapterConfig):
    """GOAT and plain mixtures of LoRA experts: a router picks top_k of num_experts per token.

    (Fan et al., arXiv 2502.16894.) y = x Wᵀ + bias + scaling · Σ wᵢ Bᵢ Aᵢ dropᵢ(x) over the chosen
    experts, whose weights w are the router's probabilities, renormalised. The balance loss of the
    routers is added to the task's with ``lr.balance_loss``. Such an adapter cannot be merged.

    Attributes:
        r: total rank; every expert has r / num_experts of it, so num_experts must divide r (and
            every rank in rank_pattern).
        alpha: as elsewhere, None stands for r; used by scale ``"alpha_over_re"``.
        dropout: drawn anew for every expert; the router sees x without it. The paper's is 0.05.
        init: ``"goat"``: the singular triples of W are cut into num_experts segments and each
            expert starts from the top r / num_experts of its own, divided by rho. ``"goat_mini"``:
            from the last ones. Both take residual_factor times the sum of all experts out of the
            base weight. ``"zero"``: every lora_a Kaiming, every lora_b zero, W untouched: a plain
            mixture of LoRA experts.
        num_experts, top_k: 1 <= top_k <= num_experts.
        rho: what the singular values of an expert's start are divided by.
        residual_factor: c in W - c · scaling · Σ Bᵢ Aᵢ, the residual base; None stands for
            1 / num_experts, with which balanced routing leaves W as it was on average. A single
            token sees only top_k experts, so the output is not exactly the base's at the start.
        scale: ``"alpha_over_re"``, alpha / (r / num_experts), the released code's, or ``"theory"``,
            sqrt(3 · eta · in_features / (r / num_experts)), for which alpha must be None.
        eta: learning rate of full fine-tuning over the adapter's, for ``"theory"``.
        shared_dropout: one dropout mask for all experts.
        balance_coefficient: factor of each module's balance loss in ``lr.balance_loss``; 0 switches
            it off.
    """

    peft_type: ClassVar[str] = "GOAT"
    inits: ClassVar[tuple[str, ...]] = ("goat", "goat_mini", "zero")
    own_fields: ClassVar[tuple[str, ...]] = (
        *("init", "num_experts", "top_k", "rho", "residual_factor", "scale", "eta"),
        *("shared_dropout", "balance_coefficient"),
    )

    init: str = "goat"
    num_experts: int = 8
    top_k: int = 2
    rho: float = 10.0
    residual_factor: float | None = None
    scale: str = "alpha_over_re"
    eta: float = 1.0
    shared_dropout: bool = False
    balance_coefficient: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        check_goat_options(owner, self.r, self.alpha, self.rslora, **self._own_options())
        for key, rank in self.rank_pattern.items():
            check_divisible(rank, self.num_experts, owner, f"rank_pattern[{key!r}]")
        if self.scale == "theory" and self.alpha_pattern:
            raise ValueError(
                f"{owner}: alpha_pattern must be empty with scale='theory', which does not use it, "
                f"got {dict(self.alpha_pattern)!r}"
            )

    @property
    def taken_out(self) -> float:
        """residual_factor, or the number that None stands for."""
        return 1 / self.num_experts if self.residual_factor is None else self.residual_factor

    def _own_options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.own_fields if name != "init"}

    def scaling_for(self, path: str, in_features: int) -> float:
        r, alpha = self.rank_for(path), self.alpha_for(path)
        alpha = r if alpha is None else alpha
        return goat_scaling(self.scale, alpha, self.eta, r // self.num_experts, in_features)

    def adapter_shapes(self, r: int, in_features: int, out_features: int) -> dict[str, list[int]]:
        experts, rank = self.num_experts, r // self.num_experts
        a, b = [experts, rank, in_features], [experts, out_features, rank]
        starts = {} if self.init == "zero" else {"lora_a_init": a, "lora_b_init": b}
        return {"lora_a": a, "lora_b": b, "router_weight": [experts, in_features], **starts}

    def must_agree(self) -> dict[str, Any]:
        return {
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "residual_factor": self.taken_out,
        }

    def module_options(self, path: str) -> dict[str, Any]:
        return {**super().module_options(path), **self._own_options()}


def check_goat_options(
    owner: str,
    r: int,
    alpha: float | None,
    rslora: bool,
    *,
    num_experts: int,
    top_k: int,
    rho: float,
    residual_factor: float | None,
    scale: str,
    eta: float,
    shared_dropout: bool,
    balance_coefficient: float,
) -> None:
    """Raise ValueError or TypeError, naming the argument, for what no GOATLinear can be."""
    check_rank(r, owner, "r")
    check_rank(num_experts, owner, "num_experts")
    check_rank(top_k, owner, "top_k")
    if top_k > num_experts:
        raise ValueError(f"{owner}: top_k must be at most num_experts={num_experts}, got {top_k}")
    check_divisible(r, num_experts, owner, "r")
    check_number(rho, owner, "rho", positive=True)
    check_number(eta, owner, "eta", positive=True)
    check_number(balance_coefficient, owner, "balance_coefficient")
    if residual_factor is not None:
        check_number(residual_factor, owner, "residual_factor")
    check_choice(scale, ("alpha_over_re", "theory"), owner, "scale")
    if not isinstance(shared_dropout, bool):
        raise TypeError(f"{owner}: shared_dropout must be a bool, got {shared_dropout!r}")
    if rslora:
        raise ValueError(f"{owner}: rslora must be False, scale says how to scale, got True")
    if scale == "theory" and alpha is not None:
        raise ValueError(
            f"{owner}: alpha must be None with scale='theory', which does not use it, got {alpha}"
        )


def goat_scaling(scale: str, alpha: float, eta: float, expert_rank: int, in_features: int) -> float:
    """What GOAT's branch is multiplied by."""
    theory = scale == "theory"
    return math.sqrt(3 * eta * in_features / expert_rank) if theory else alpha / expert_rank
