"""GOATLinear: a frozen linear map with a mixture of LoRA experts."""

import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ext import ops
from lowrank_ext.methods.goat.config import GOATConfig
from lowrank_ext.methods.goat.token_mask import current_token_mask
from lowrank_ext.nn.autocast import autocast_dtype, without_autocast
from lowrank_ext.nn.init import top_singular_triples
from lowrank_ext.nn.low_rank_linear import LowRankLinear


class GOATLinear(LowRankLinear):
    """GOAT (Fan et al., arXiv 2502.16894), and with init="zero" a plain mixture of LoRA experts.

        p = softmax(x router_weightᵀ),    w = p of the top_k experts, renormalized
        y = x Wᵀ + bias + scaling · Σ wᵢ Bᵢ Aᵢ dropᵢ(x)   over those experts

    The router sees x without dropout.
    lora_a [E, r/E, K], lora_b [E, N, r/E] and router_weight [E, K] train.

    Inits, with W = U diag(sig) Vᵀ in fp32, q = min(K, N) // E, R = r/E and s the scaling:

    - ``goat``: expert i starts from the triples i·q … i·q + R - 1:  Aᵢ = sqrt(sig / (s rho)) Vᵀ,
      Bᵢ = U sqrt(sig / (s rho)), rounded to the base's dtype, and the base weight becomes
      W - c s Σ Bᵢ Aᵢ, c being residual_factor (1/E). The buffers ``lora_a_init`` and
      ``lora_b_init`` rebuild W.
    - ``goat_mini``: the same from the last R of each segment, i·q + q - R … i·q + q - 1.
    - ``zero``: lora_a uniform in ±1/sqrt(K), lora_b zero, W untouched.

    The router is uniform in ±1/sqrt(K). Random numbers are drawn in fp32 on the CPU.

    In training mode forward stores the balance loss of its tokens on the module, where
    ``lr.balance_loss`` collects it. The module cannot be merged: its experts depend on the input.

    Attributes:
        num_experts, top_k, shared_dropout, balance_coefficient: as in ``GOATConfig``.
        residual_factor: as in ``GOATConfig``, never None.
        expert_rank: r / num_experts.
    """

    config_class = GOATConfig
    svd_inits = ("goat", "goat_mini")
    residual_inits = ("goat", "goat_mini")
    residual_starts = ("lora_a_init", "lora_b_init")
    unmergeable_because = (
        "which experts act depends on the input; keep the adapter, or drop it with "
        "unload(model, merge=False)"
    )

    config: GOATConfig
    router_weight: nn.Parameter
    lora_a_init: Tensor
    lora_b_init: Tensor

    def _make_adapter(self, dtype: torch.dtype, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        config = self.config
        self.num_experts, self.top_k = config.num_experts, config.top_k
        self.expert_rank = self.r // config.num_experts
        self.residual_factor = config.taken_out
        self.shared_dropout = config.shared_dropout
        self.balance_coefficient = float(config.balance_coefficient)
        self._balance_loss: Tensor | None = None
        num_experts, rank = self.num_experts, self.expert_rank
        self.lora_a = nn.Parameter(zeros(num_experts, rank, self.in_features))
        self.lora_b = nn.Parameter(zeros(num_experts, self.out_features, rank))
        self.router_weight = nn.Parameter(zeros(num_experts, self.in_features))
        self.register_parameter("core", None)
        if self.init in self.residual_inits:
            self.register_buffer("lora_a_init", torch.zeros_like(self.lora_a))
            self.register_buffer("lora_b_init", torch.zeros_like(self.lora_b))

    def _init_adapter(self) -> None:
        if self.init == "zero":
            self.router_weight.copy_(self._uniform(self.router_weight))
            self.lora_a.copy_(self._uniform(self.lora_a))
            self.lora_b.zero_()
            return
        weight = self.base_weight()
        u, sig, v_t = top_singular_triples(weight, min(weight.shape))
        chosen = self._chosen_triples().to(weight.device)  # [E, R]
        root = (sig[chosen] / (self.scaling * self.config.rho)).sqrt()
        # Rounded as by the op, so that the residual lacks exactly what the experts compute.
        self.lora_a_init.copy_((root.unsqueeze(-1) * v_t[chosen]).to(weight.dtype))
        self.lora_b_init.copy_((u.t()[chosen] * root.unsqueeze(-1)).mT.to(weight.dtype))
        self.begin_at_start()

    def begin_at_start(self) -> None:
        self.router_weight.copy_(self._uniform(self.router_weight))
        self.lora_a.copy_(self.lora_a_init)
        self.lora_b.copy_(self.lora_b_init)

    def _uniform(self, like: Tensor) -> Tensor:
        bound = 1 / math.sqrt(self.in_features)
        return torch.empty(like.shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound)

    def _chosen_triples(self) -> Tensor:
        """Indices of the singular triples from which each expert starts, int64 [E, R]."""
        segment = min(self.in_features, self.out_features) // self.num_experts
        start = segment - self.expert_rank if self.init == "goat_mini" else 0
        firsts = start + segment * torch.arange(self.num_experts)
        return firsts.unsqueeze(1) + torch.arange(self.expert_rank)

    def start_branch(self) -> dict[str, Any]:
        # Σ Bᵢ Aᵢ as one product of [N, r] and [r, K]
        lora_a = self.lora_a_init.flatten(0, 1)
        lora_b = self.lora_b_init.transpose(0, 1).flatten(1)
        scaling = self.residual_factor * self.start_scaling
        return {"lora_a": lora_a, "lora_b": lora_b, "scaling": scaling}

    def delta_weight(self) -> Tensor:
        """Raises TypeError: the branch is no single matrix."""
        raise TypeError(
            f"GOATLinear.delta_weight: the branch must be one matrix, {self.unmergeable_because}"
        )

    def unmerged_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y, loss, _, _ = ops.moe_lowrank_add(
            self.base_output(x, *args, **kwargs),
            x,
            self.router_weight,
            self.lora_a,
            self.lora_b,
            top_k=self.top_k,
            scaling=self.scaling,
            dropout_p=self.dropout if self.training else 0.0,
            shared_dropout=self.shared_dropout,
            token_mask=current_token_mask(x) if self.training else None,
        )
        if self.training and self.balance_coefficient > 0:
            self._keep(loss)
        return y

    def _keep(self, loss: Tensor) -> None:
        """Store ``loss`` until take_balance_loss or a backward through it.

        A forward that runs during backward is activation checkpointing's second one: its loss is
        not stored, as its graph must not outlive the block. Under torch.compile this cannot be
        detected, and dynamo refuses the assignment in a checkpointed region unless it is configured
        to skip it in the second forward.
        """
        if torch.compiler.is_compiling():
            self._balance_loss = loss
        elif torch._C._current_graph_task_id() == -1:
            self._balance_loss = loss
            if loss.grad_fn is not None:
                # Weak references: the hook is in the loss's graph and must not keep it alive.
                module, kept = weakref.ref(self), weakref.ref(loss)
                loss.grad_fn.register_prehook(lambda gradients: _forget(module(), kept()))

    def take_balance_loss(self) -> Tensor | None:
        """The last forward's balance loss, E Σ fᵢ Pᵢ, without balance_coefficient.

        None if no forward in training mode has run since the last call or backward.
        """
        loss, self._balance_loss = self._balance_loss, None
        return loss

    @torch.no_grad()
    def expert_counts(self, x: Tensor) -> Tensor:
        """How many tokens of x [..., K] the router sends to each expert, int64 [E]."""
        cast = autocast_dtype(x.device)
        if cast is not None and x.dtype != torch.float64:
            x = x.to(cast)  # as by the op's autocast rule
        wide = torch.promote_types(x.dtype, torch.float32)
        with without_autocast(x.device):
            logits = x.to(wide) @ self.router_weight.to(x.dtype).to(wide).mT
        mask = current_token_mask(x)
        return ops.moe_route(logits, top_k=self.top_k, token_mask=mask).expert_counts

    def __getstate__(self) -> dict[str, Any]:
        # A copy has run no forward, so it has no loss; and a graph cannot be copied.
        return {**self.__dict__, "_balance_loss": None}

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"balance_coefficient={self.balance_coefficient:g}"
        )


def _forget(module: GOATLinear | None, loss: Tensor | None) -> None:
    if module is not None and loss is not None and module._balance_loss is loss:
        module._balance_loss = None
