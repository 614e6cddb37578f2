"""Callbacks for transformers' Trainer."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from lowrank_ext.freezing import FreezeSchedule, check_fraction, check_positive

__all__ = ["FreezeCallback"]


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
