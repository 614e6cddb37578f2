"""What plugs into transformers' Trainer."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from lowrank_ext.balance import balance_loss
from lowrank_ext.freezing import FreezeSchedule, check_fraction, check_positive
from lowrank_ext.nn.goat import token_mask

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # a mix-in: what it is mixed into is the Trainer

__all__ = ["BalanceLossMixin", "FreezeCallback"]


class BalanceLossMixin(Trainer):  # type: ignore[misc]  # untyped base
    """Adds GOAT's :func:`lowrank_ext.balance_loss` to the loss of any transformers Trainer.

    Each micro-batch of an accumulated step adds its share. Tokens that a two-dimensional
    ``attention_mask`` of the batch masks out do not count (see ``lowrank_ext.token_mask``). The
    training loss that is logged includes it; evaluation is left alone.

    Raises:
        ValueError: when training begins for a model without a GOATLinear.
        RuntimeError: when a step begins under nn.DataParallel, whose replicas keep their losses.

    Example:
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
        # Around backward too, in which activation checkpointing runs forward once more.
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
        """Whether the task's loss is a share of the whole accumulated step, which the Trainer then
        does not divide by the number of micro-batches: its own rule."""
        told: bool | None = getattr(self, "loss_is_scaled_for_ga", None)
        if told is not None:
            return told
        by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_model or self.compute_loss_func is not None


class FreezeCallback(TrainerCallback, ExportableState):  # type: ignore[misc]  # untyped bases
    """LaMDA's :class:`lowrank_ext.FreezeSchedule` inside transformers' Trainer.

    T is the Trainer's number of optimizer steps. The schedule is saved in the Trainer's checkpoints
    and on resume goes on as it was planned at the start: the saved values come before the
    arguments, so that no frozen column is freed when the resumed run has another length.

    Raises:
        ValueError: an argument is out of range, or when training begins for a model without a
            LaMDALinear.

    Example: ``Trainer(model, args, train_dataset=data, callbacks=[FreezeCallback(eta=0.3)])``
    """

    def __init__(self, eta: float = 0.3, bucket: int = 1) -> None:
        self.eta = check_fraction("FreezeCallback", "eta", eta)
        self.bucket = check_positive("FreezeCallback", "bucket", bucket)
        self.schedule: FreezeSchedule | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        saved = _saved_schedule(state)
        self._detach()
        schedule = FreezeSchedule(
            model, state.max_steps, eta=self.eta, bucket=self.bucket, optimizer=optimizer
        )
        if state.global_step > 0:
            schedule.load_state_dict(saved or {**schedule.state_dict(), "step": state.global_step})
        self.schedule = schedule
        if state.stateful_callbacks is not None:
            # Without an entry from the resumed checkpoint the Trainer fails to save one.
            state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.schedule is not None:
            self.schedule.step()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._detach()

    def _detach(self) -> None:
        if self.schedule is not None:
            self.schedule.remove()
            self.schedule = None

    def state(self) -> dict[str, Any]:
        """Arguments and the schedule's numbers, which the Trainer puts in trainer_state.json."""
        schedule = None if self.schedule is None else self.schedule.state_dict()
        return {
            "args": {"eta": self.eta, "bucket": self.bucket},
            "attributes": {"saved_schedule": schedule},
        }


def _saved_schedule(state: TrainerState) -> dict[str, Any] | None:
    """The schedule in a resumed checkpoint.

    Read from the Trainer's state and not from the callback's attributes, which the Trainer restores
    only with ``restore_callback_states_from_checkpoint``.
    """
    if state.global_step == 0:
        return None
    saved = (state.stateful_callbacks or {}).get(FreezeCallback.__name__, {})
    return saved.get("attributes", {}).get("saved_schedule")
