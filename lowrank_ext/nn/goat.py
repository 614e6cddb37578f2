"""GOATLinear: a frozen linear map with a mixture of LoRA experts, and the mask of real tokens."""

import math
import weakref
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from lowrank_ext import ops
from lowrank_ext.config.goat import check_goat_options, goat_scaling
from lowrank_ext.nn.linear import LowRankLinear, top_singular_triples

# The mask of the innermost `with token_mask(...)`. Not a ContextVar: autograd may run the
# recomputation of a checkpointed forward on a thread of its own.
_token_mask: Tensor | None = None


class token_mask:  # used like a function
    """``with lr.token_mask(mask):`` only tokens where ``mask`` is true count for load balancing.

    Every GOATLinear whose input has the mask's leading dimensions uses it, with x [..., K] and mask
    [...], bool or integer (a tokenizer's attention_mask), on x's device; others count all tokens.
    It changes the balance loss and the counted load, never the output. With activation
    checkpointing backward belongs inside the block, as it runs forward once more.

    Example:
        >>> with lr.token_mask(batch["attention_mask"]):
        ...     loss = model(**batch).loss + lr.balance_loss(model)
        ...     loss.backward()
    """

    def __init__(self, mask: Tensor | None) -> None:
        if mask is not None and (mask.is_floating_point() or mask.is_complex() or mask.dim() == 0):
            raise ValueError(
                "token_mask: mask must be a bool or integer tensor of x's leading dimensions, got "
                f"{str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}"
            )
        self.mask = None if mask is None else mask.bool()
        self._outer: list[Tensor | None] = []

    def __enter__(self) -> Self:
        global _token_mask
        self._outer.append(_token_mask)
        _token_mask = self.mask
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _token_mask
        _token_mask = self._outer.pop()


def current_token_mask(x: Tensor) -> Tensor | None:
    """The mask that holds for the rows of x [..., K], if any."""
    mask = _token_mask
    return mask if mask is not None and mask.shape == x.shape[:-1] else None


class GOATLinear(LowRankLinear):
    """GOAT (Fan et al., arXiv 2502.16894), and with init="zero" a plain mixture of LoRA experts.

        p = softmax(x router_weightᵀ),    w = p of the top_k experts, renormalised
        y = x Wᵀ + bias + scaling · Σ wᵢ Bᵢ Aᵢ dropᵢ(x)   over those experts

    The router sees x without dropout.
    lora_a [E, r/E, K], lora_b [E, N, r/E] and router_weight [E, K] train.

    Inits, with W = U diag(sig) Vᵀ in fp32, q = min(K, N) // E, R = r/E and s the scaling:
        ``goat``: expert i starts from the triples i·q … i·q + R - 1:  Aᵢ = sqrt(sig / (s rho)) Vᵀ,
            Bᵢ = U sqrt(sig / (s rho)), rounded to the base's dtype, and the base weight becomes
            W - c s Σ Bᵢ Aᵢ, c being residual_factor (1/E). The buffers ``lora_a_init`` and
            ``lora_b_init`` rebuild W.
        ``goat_mini``: the same from the last R of each segment, i·q + q - R … i·q + q - 1.
        ``zero``: lora_a uniform in ±1/sqrt(K), lora_b zero, W untouched.
    The router is uniform in ±1/sqrt(K). What is random is drawn in fp32 on the CPU.

    In training mode forward leaves the balance loss of its tokens on the module, where
    ``lr.balance_loss`` collects it. It cannot be merged: which experts act depends on the input.

    Args beside LowRankLinear's: num_experts, top_k, rho, residual_factor, scale, eta,
    shared_dropout, balance_coefficient, all as in ``GOATConfig``.
    """

    inits = ("goat", "goat_mini", "zero")
    svd_inits = ("goat", "goat_mini")
    residual_inits = ("goat", "goat_mini")
    unmergeable_because = (
        "which experts act depends on the input; keep the adapter, or drop it with "
        "unload(model, merge=False)"
    )

    router_weight: nn.Parameter
    lora_a_init: Tensor
    lora_b_init: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        r: int = 16,
        alpha: float | None = None,
        rslora: bool = False,
        num_experts: int = 8,
        top_k: int = 2,
        rho: float = 10.0,
        residual_factor: float | None = None,
        scale: str = "alpha_over_re",
        eta: float = 1.0,
        shared_dropout: bool = False,
        balance_coefficient: float = 1e-3,
        **options: Any,
    ) -> None:
        check_goat_options(
            type(self).__name__,
            r,
            alpha,
            rslora,
            num_experts=num_experts,
            top_k=top_k,
            rho=rho,
            residual_factor=residual_factor,
            scale=scale,
            eta=eta,
            shared_dropout=shared_dropout,
            balance_coefficient=balance_coefficient,
        )
        # Plain numbers, set first because LowRankLinear's constructor makes the tensors.
        self.num_experts, self.top_k = num_experts, top_k
        self.expert_rank = r // num_experts
        self.rho = float(rho)
        self.residual_factor = 1 / num_experts if residual_factor is None else residual_factor
        self.scale, self.eta = scale, float(eta)
        self.shared_dropout = shared_dropout
        self.balance_coefficient = float(balance_coefficient)
        self._balance_loss: Tensor | None = None
        super().__init__(in_features, out_features, r=r, alpha=alpha, **options)

    def _scaling(self) -> float:
        return goat_scaling(self.scale, self.alpha, self.eta, self.expert_rank, self.in_features)

    def _make_adapter(self, dtype: torch.dtype, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        num_experts, rank = self.num_experts, self.expert_rank
        self.lora_a = nn.Parameter(zeros(num_experts, rank, self.in_features))
        self.lora_b = nn.Parameter(zeros(num_experts, self.out_features, rank))
        self.router_weight = nn.Parameter(zeros(num_experts, self.in_features))
        self.register_parameter("core", None)
        if self.init in self.residual_inits:
            self.register_buffer("lora_a_init", torch.zeros_like(self.lora_a))
            self.register_buffer("lora_b_init", torch.zeros_like(self.lora_b))

    def _init_adapter(self) -> None:
        self.router_weight.copy_(self._uniform(self.router_weight))
        if self.init == "zero":
            self.lora_a.copy_(self._uniform(self.lora_a))
            self.lora_b.zero_()
            return
        weight = self.base_weight()
        u, sig, v_t = top_singular_triples(weight, min(weight.shape))
        chosen = self._chosen_triples().to(weight.device)  # [E, R]
        root = (sig[chosen] / (self.scaling * self.rho)).sqrt()
        # The op rounds the adapters to x's dtype: rounded here, what the residual leaves out is
        # what the experts compute.
        self.lora_a.copy_((root.unsqueeze(-1) * v_t[chosen]).to(weight.dtype))
        self.lora_b.copy_((u.t()[chosen] * root.unsqueeze(-1)).mT.to(weight.dtype))
        self.lora_a_init.copy_(self.lora_a)
        self.lora_b_init.copy_(self.lora_b)

    def _uniform(self, like: Tensor) -> Tensor:
        bound = 1 / math.sqrt(self.in_features)
        return torch.empty(like.shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound)

    def _chosen_triples(self) -> Tensor:
        """Which singular triples each expert starts from, int64 [E, R]."""
        segment = min(self.in_features, self.out_features) // self.num_experts
        start = segment - self.expert_rank if self.init == "goat_mini" else 0
        firsts = start + segment * torch.arange(self.num_experts)
        return firsts.unsqueeze(1) + torch.arange(self.expert_rank)

    def _initial_delta(self) -> Tensor:
        # Σ Bᵢ Aᵢ as one product of [N, r] and [r, K]
        stacked_b = self.lora_b_init.double().transpose(0, 1).flatten(1)
        stacked_a = self.lora_a_init.double().flatten(0, 1)
        return self.residual_factor * self.scaling * (stacked_b @ stacked_a)

    def delta_weight(self) -> Tensor:
        """There is none: raises TypeError."""
        raise TypeError(
            f"GOATLinear.delta_weight: the branch must be one matrix, {self.unmergeable_because}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] to [..., N] in x's dtype."""
        y, loss, _, _ = ops.moe_lowrank_add(
            self.base_output(x),
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
        """Leave ``loss`` for take_balance_loss, until then or until backward has gone through it.

        Not while backward runs: this is then activation checkpointing's second forward, whose graph
        must not outlive its block. Under torch.compile neither can be seen, and dynamo refuses the
        assignment inside a checkpointed region unless told to leave it out of the second forward.
        """
        if torch.compiler.is_compiling():
            self._balance_loss = loss
        elif torch._C._current_graph_task_id() == -1:
            self._balance_loss = loss
            if loss.grad_fn is not None:
                # Weak: the node is in the loss's own graph, which must be free to go.
                module, kept = weakref.ref(self), weakref.ref(loss)
                loss.grad_fn.register_prehook(lambda gradients: _forget(module(), kept()))

    def take_balance_loss(self) -> Tensor | None:
        """The last forward's balance loss, E Σ fᵢ Pᵢ, without balance_coefficient; only once.

        None when there was no forward in training mode since the last call or backward.
        """
        loss, self._balance_loss = self._balance_loss, None
        return loss

    @torch.no_grad()
    def expert_counts(self, x: Tensor) -> Tensor:
        """How many tokens of x [..., K] the router sends to each expert, int64 [E]."""
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))  # as in the op's autocast rule
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(device, enabled=False):
            logits = x.to(wide) @ self.router_weight.to(x.dtype).to(wide).mT
        mask = current_token_mask(x)
        return ops.moe_route(logits, top_k=self.top_k, token_mask=mask).expert_counts

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle is not what ran: it has no loss to collect (nor can a graph be copied).
        return {**self.__dict__, "_balance_loss": None}

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, num_experts={self.num_experts}, top_k={self.top_k}, "
            f"balance_coefficient={self.balance_coefficient:g}"
        )


def _forget(module: GOATLinear | None, loss: Tensor | None) -> None:
    if module is not None and loss is not None and module._balance_loss is loss:
        module._balance_loss = None
