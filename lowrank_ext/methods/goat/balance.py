"""Load balancing of expert routers: the loss that a training loop adds, and the load itself.

(The mix-in for transformers' Trainer: ``trainer.py``.)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ext.forward_meter import ForwardMeter
from lowrank_ext.methods.goat.module import GOATLinear
from lowrank_ext.nn.call_arguments import split_call
from lowrank_ext.targets import modules_of_kind

__all__ = ["ExpertLoad", "balance_loss", "expert_load"]


def balance_loss(model: nn.Module) -> Tensor:
    """Sum over the model's GOATLinears of balance_coefficient · E Σ fᵢ Pᵢ, a scalar to add.

    fᵢ is the share of tokens routed to expert i (Σ f = top_k, no gradient), Pᵢ its mean
    probability: with even load a module adds balance_coefficient · top_k. The loss is that of each
    module's last forward in training mode, and is collected once: not again by a second call, nor
    after a backward through it. So call it after every forward that gets a backward, and divide the
    sum of both losses when accumulating gradients. A second forward by activation checkpointing
    (use_reentrant=False) adds nothing; in evaluation mode the sum is zero. Each rank of a
    data-parallel run balances its own tokens.

    Under torch.compile checkpointed blocks need
    ``torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True``.

    Raises:
        ValueError: the model has no GOATLinear.
        RuntimeError: gradients are enabled, but were not when a module ran, as in reentrant
            checkpointing: its router would never be balanced.

    Examples:
        >>> loss = model(**batch).loss + lr.balance_loss(model)
        >>> loss.backward()
    """
    total: Tensor | None = None
    modules = modules_of_kind(model, GOATLinear, "balance_loss")
    for path, module in modules.items():
        loss = module.take_balance_loss()
        if loss is None:
            continue
        if torch.is_grad_enabled() and module.router_weight.requires_grad > loss.requires_grad:
            raise RuntimeError(
                f"balance_loss: {path or 'the model'} must have run with gradients enabled, got a "
                "loss without one; activation checkpointing needs use_reentrant=False"
            )
        weighted = module.balance_coefficient * loss
        total = weighted if total is None else total + weighted.to(total.device)
    if total is None:
        return torch.zeros((), device=next(iter(modules.values())).router_weight.device)
    return total


class ExpertLoad(ForwardMeter):
    """Counts the tokens of each expert inside a ``with`` block; see ``expert_load``.

    Attributes:
        counts: for every GOATLinear, by path, the tokens that chose each expert, int64 [E].
    """

    def __init__(self, modules: dict[str, GOATLinear]) -> None:
        super().__init__(modules)
        self.counts = {
            path: torch.zeros(m.num_experts, dtype=torch.int64, device=m.router_weight.device)
            for path, m in modules.items()
        }

    def _meter(self, path: str) -> Callable[..., None]:
        counts = self.counts[path]

        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            assert isinstance(module, GOATLinear)
            counts.add_(module.expert_counts(split_call(module, args, kwargs)[0]))

        return count

    def shares(self) -> dict[str, Tensor]:
        """Counts relative to an even share, fp32 [E] by path: 1 for every expert when balanced."""
        return {path: c * (len(c) / c.sum().clamp(min=1)) for path, c in self.counts.items()}


def expert_load(model: nn.Module) -> ExpertLoad:
    """Counts the tokens of each expert of each GOATLinear, over all forwards in a ``with`` block.

    Works in both modes and on compiled models, which run eagerly in the block; honors
    ``lr.token_mask``.

    Raises:
        ValueError: the model has no GOATLinear.

    Examples:
        >>> with lr.expert_load(model) as load:
        ...     model(**batch)
        >>> load.counts["model.layers.0.self_attn.q_proj"]
    """
    return ExpertLoad(modules_of_kind(model, GOATLinear, "expert_load"))
