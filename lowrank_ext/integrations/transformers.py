"""What plugs into transformers' Trainer."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from lowrank_ext.adapter_files import write_file
from lowrank_ext.adaptive_freezing import AdaptiveFreezeSchedule
from lowrank_ext.adaptive_freezing import check_schedule as check_adaptive
from lowrank_ext.balance import balance_loss
from lowrank_ext.freezing import FreezeSchedule, check_fraction, check_positive
from lowrank_ext.nn import AFLoRALinear, LaMDALinear
from lowrank_ext.nn.goat import token_mask

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # a mix-in: what it is mixed into is the Trainer

__all__ = ["BalanceLossMixin", "FreezeCallback"]

# In a checkpoint of the Trainer: the state of AFLoRA's schedule, as torch.save writes it.
_STATISTICS = "freeze_schedule.pt"


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
    """LaMDA's and AFLoRA's schedule inside transformers' Trainer: the one that the model needs.

    T is the Trainer's number of optimizer steps. The scores of AFLoRA are of the gradients before
    they are clipped and, with fp16, unscaled (see :class:`lowrank_ext.AdaptiveFreezeSchedule`).
    The schedule is saved in the Trainer's checkpoints, AFLoRA's statistics in a file of their own
    beside the model's, and on resume goes on as it was planned at the start: the saved values come
    before the arguments, so that nothing frozen is freed when the resumed run has another length.

    Args:
        eta: fraction of T after which all is frozen.
        bucket: LaMDA's, see :class:`lowrank_ext.FreezeSchedule`.
        start, decay, window: AFLoRA's, see :class:`lowrank_ext.AdaptiveFreezeSchedule`.

    Raises:
        ValueError: an argument is out of range, or when training begins for a model with neither a
            LaMDALinear nor an AFLoRALinear.
        FileNotFoundError: when a run with AFLoRA is resumed and the statistics that belong to its
            checkpoint are neither there nor in ``args.resume_from_checkpoint``.

    Example: ``Trainer(model, args, train_dataset=data, callbacks=[FreezeCallback(eta=0.3)])``
    """

    def __init__(
        self,
        eta: float = 0.3,
        bucket: int = 1,
        start: float | None = None,
        decay: str = "cubic",
        window: int = 10,
    ) -> None:
        owner = type(self).__name__
        self.eta = check_fraction(owner, "eta", eta)
        self.bucket = check_positive(owner, "bucket", bucket)
        self.start, self.decay, self.window = start, decay, window
        check_adaptive(owner, eta, start, decay, window)
        self.schedule: FreezeSchedule | AdaptiveFreezeSchedule | None = None

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
        schedule = self._new_schedule(model, state.max_steps, optimizer)
        if state.global_step > 0:
            if saved is not None and isinstance(schedule, AdaptiveFreezeSchedule):
                saved = _read_statistics(args, state)
            schedule.load_state_dict(saved or {**schedule.state_dict(), "step": state.global_step})
        self.schedule = schedule
        if state.stateful_callbacks is not None:
            # Without an entry from the resumed checkpoint the Trainer fails to save one.
            state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def _new_schedule(
        self, model: nn.Module, total_steps: int, optimizer: Any
    ) -> FreezeSchedule | AdaptiveFreezeSchedule:
        kinds = {type(module) for module in model.modules()}
        if any(issubclass(kind, AFLoRALinear) for kind in kinds):
            return AdaptiveFreezeSchedule(
                model,
                total_steps,
                eta=self.eta,
                start=self.start,
                decay=self.decay,
                window=self.window,
                optimizer=optimizer,
                scaler=getattr(optimizer, "scaler", None),  # of accelerate's wrapper
            )
        if any(issubclass(kind, LaMDALinear) for kind in kinds):
            return FreezeSchedule(
                model, total_steps, eta=self.eta, bucket=self.bucket, optimizer=optimizer
            )
        raise ValueError(
            "FreezeCallback: model must contain a LaMDALinear or an AFLoRALinear, "
            f"got a {type(model).__name__} with neither"
        )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if isinstance(self.schedule, AdaptiveFreezeSchedule):
            self.schedule.step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if isinstance(self.schedule, FreezeSchedule):
            self.schedule.step()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not isinstance(self.schedule, AdaptiveFreezeSchedule):
            return
        saved = self.schedule.state_dict()  # on every rank: it gathers what is sharded
        directory = _checkpoint(args, state)
        # A hyperparameter search saves elsewhere, where nothing is resumed from.
        if args.should_save and directory.is_dir():
            buffer = io.BytesIO()
            torch.save(saved, buffer)
            write_file(directory / _STATISTICS, buffer.getvalue())

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
        schedule = None if self.schedule is None else self.schedule.numbers()
        names = ("eta", "bucket", "start", "decay", "window")
        return {
            "args": {name: getattr(self, name) for name in names},
            "attributes": {"saved_schedule": schedule},
        }


def _saved_schedule(state: TrainerState) -> dict[str, Any] | None:
    """The numbers of the schedule in a resumed checkpoint.

    Read from the Trainer's state and not from the callback's attributes, which the Trainer restores
    only with ``restore_callback_states_from_checkpoint``.
    """
    if state.global_step == 0:
        return None
    saved = (state.stateful_callbacks or {}).get(FreezeCallback.__name__, {})
    return saved.get("attributes", {}).get("saved_schedule")


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _read_statistics(args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
    """The state of AFLoRA's schedule that on_save wrote at this step.

    The Trainer does not tell which checkpoint it resumes from; it is nearly always its own.
    """
    told = args.resume_from_checkpoint
    directories = [*([Path(told)] if isinstance(told, str) else []), _checkpoint(args, state)]
    for directory in directories:
        if (directory / _STATISTICS).is_file():
            saved: dict[str, Any] = torch.load(directory / _STATISTICS, weights_only=True)
            if saved.get("step") == state.global_step:
                return saved
    raise FileNotFoundError(
        f"FreezeCallback: {_STATISTICS} of step {state.global_step} must be in the checkpoint that "
        f"is resumed, got none in {' or '.join(map(str, directories))}; name the checkpoint's "
        "directory in args.resume_from_checkpoint"
    )
