"""BalanceLossMixin: GOAT's balance loss in transformers' Trainer."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lowrank_ext.methods.goat.balance import balance_loss
from lowrank_ext.methods.goat.token_mask import token_mask

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # users mix it into the Trainer; transformers is not imported here


class BalanceLossMixin(Trainer):  # type: ignore[misc]  # untyped base
    """Adds GOAT's ``lowrank_ext.balance_loss`` to the loss of any transformers Trainer.

    Each micro-batch of an accumulated step adds its share. Tokens that a two-dimensional
    ``attention_mask`` of the batch masks out do not count (see ``lowrank_ext.token_mask``). The
    logged training loss includes it; evaluation is unchanged.

    Raises:
        ValueError: when training begins for a model without a GOATLinear.
        RuntimeError: when a step begins under nn.DataParallel, whose replicas keep their losses.

    Examples:
        >>> class BalancedTrainer(lr.BalanceLossMixin, Trainer): ...
        >>> BalancedTrainer(model, args, train_dataset=data).train()
    """

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Tensor:
        if self.args.n_gpu > 1:
            raise RuntimeError(
                "BalanceLossMixin: training must use at most one GPU per process, got "
                f"{self.args.n_gpu}; start it with torchrun"
            )
        mask = inputs.get("attention_mask")
        counted = None
        if isinstance(mask, Tensor) and mask.dim() == 2:
            counted = mask.to(self.args.device).bool()
        # Around backward too, in which activation checkpointing reruns forward.
        with token_mask(counted):
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        result = super().compute_loss(
            model, inputs, return_outputs, num_items_in_batch=num_items_in_batch, **kwargs
        )
        if not model.training:
            return result
        balance = balance_loss(model)
        if self._divided_already(num_items_in_batch):
            balance = balance / self.current_gradient_accumulation_steps
        if return_outputs:
            loss, outputs = result
            return loss + balance.to(loss.device), outputs
        return result + balance.to(result.device)

    def _divided_already(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether the Trainer, by its own rule, does not divide the task's loss by the number of
        micro-batches, because it is a share of the whole accumulated step already."""
        told: bool | None = getattr(self, "loss_is_scaled_for_ga", None)
        if told is not None:
            return told
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_model or self.compute_loss_func is not None
