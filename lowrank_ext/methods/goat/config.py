"""Configuration of GOAT and plain mixtures of LoRA experts."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from lowrank_ext.checks import (
    check_choice,
    check_divisible,
    check_flag,
    check_number,
    check_rank,
)
from lowrank_ext.config import AdapterConfig


@dataclass(kw_only=True, frozen=True)
class GOATConfig(AdapterConfig):
    """GOAT and plain mixtures of LoRA experts: a router picks top_k of num_experts per token.

    (Fan et al., arXiv 2502.16894.) y = x Wᵀ + bias + scaling · Σ wᵢ Bᵢ Aᵢ dropᵢ(x) over the chosen
    experts, whose weights w are the router's probabilities, renormalized. The balance loss of the
    routers is added to the task's with ``lr.balance_loss``. Such an adapter cannot be merged.

    Attributes:
        r: total rank; every expert has r / num_experts of it, so num_experts must divide r (and
            every rank in rank_pattern).
        alpha: as elsewhere, None stands for r; used by scale ``"alpha_over_re"``.
        dropout: drawn separately for every expert; the router sees x without it. 0.05 in the
            paper.
        init: ``"goat"``: the singular triples of W are cut into num_experts segments and each
            expert starts from the first r / num_experts of its segment, divided by rho.
            ``"goat_mini"``: from the last ones. Both subtract residual_factor times the sum of all
            experts from the base weight. ``"zero"``: every lora_a Kaiming, every lora_b zero, W
            untouched: a plain mixture of LoRA experts.
        num_experts, top_k: 1 <= top_k <= num_experts.
        rho: divisor of the singular values from which an expert starts.
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
        check_rank(self.num_experts, owner, "num_experts")
        check_rank(self.top_k, owner, "top_k")
        if self.top_k > self.num_experts:
            raise ValueError(
                f"{owner}: top_k must be at most num_experts={self.num_experts}, got {self.top_k}"
            )
        check_divisible(self.r, self.num_experts, owner, "r")
        for key, rank in self.rank_pattern.items():
            check_divisible(rank, self.num_experts, owner, f"rank_pattern[{key!r}]")
        check_number(self.rho, owner, "rho", positive=True)
        check_number(self.eta, owner, "eta", positive=True)
        check_number(self.balance_coefficient, owner, "balance_coefficient")
        if self.residual_factor is not None:
            check_number(self.residual_factor, owner, "residual_factor")
        check_flag(self.shared_dropout, owner, "shared_dropout")
        check_choice(self.scale, ("alpha_over_re", "theory"), owner, "scale")
        self._check_scale(owner)

    def _check_scale(self, owner: str) -> None:
        if self.rslora:
            raise ValueError(f"{owner}: rslora must be False, scale says how to scale, got True")
        if self.scale != "theory":
            return
        if self.alpha is not None:
            raise ValueError(
                f"{owner}: alpha must be None with scale='theory', which does not use it, "
                f"got {self.alpha}"
            )
        if self.alpha_pattern:
            raise ValueError(
                f"{owner}: alpha_pattern must be empty with scale='theory', which does not use it, "
                f"got {dict(self.alpha_pattern)!r}"
            )

    @property
    def taken_out(self) -> float:
        """residual_factor, or its default for None."""
        return 1 / self.num_experts if self.residual_factor is None else self.residual_factor

    def scaling_for(self, path: str, in_features: int) -> float:
        expert_rank = self.rank_for(path) // self.num_experts
        if self.scale == "theory":
            return math.sqrt(3 * self.eta * in_features / expert_rank)
        return self.alpha_for(path) / expert_rank

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
