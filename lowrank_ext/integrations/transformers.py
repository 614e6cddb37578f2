"""transformers' Trainer for models of ``adapt``: AdapterTrainer, and FreezeCallback."""

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from lowrank_ext.adapter_files import WEIGHTS_NAME
from lowrank_ext.adapter_protocol import RESUMES
from lowrank_ext.checkpoint import load_adapter
from lowrank_ext.checks import with_article
from lowrank_ext.files import read_torch_file, write_file
from lowrank_ext.freezing import FreezingSchedule
from lowrank_ext.registry import METHODS
from lowrank_ext.wrappers import unwrapped

__all__ = ["AdapterTrainer", "FreezeCallback"]

# File in the Trainer's checkpoint with the state of a schedule that has statistics (torch.save).
_STATISTICS = "freeze_schedule.pt"
_OPTIONS = ("eta", "bucket", "start", "decay", "window")


class AdapterTrainer(Trainer):  # type: ignore[misc]  # untyped base
    """transformers' Trainer that resumes from adapter files and reloads the best of them.

    For models of ``lr.adapt``, whose ``save_pretrained`` writes the adapter: checkpoints hold
    nothing else of the model. What transformers' own Trainer does for a PeftModel alone. Other
    models, sharded ones and checkpoints with whole models are left to it. Mixes into any of its
    subclasses, those of TRL too.

    Examples:
        >>> trainer = lr.AdapterTrainer(lr.adapt(model, config), arguments, train_dataset=data)
        >>> class AdapterSFTTrainer(lr.AdapterTrainer, trl.SFTTrainer): ...
    """

    def _save(self, *args: Any, **options: Any) -> None:
        model = unwrapped(self.model)
        if hasattr(model, "lowrank_config"):
            vars(model)[RESUMES] = True
        super()._save(*args, **options)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if self._reads_adapter(resume_from_checkpoint):
            load_adapter(self.model if model is None else model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._reads_adapter(self.state.best_model_checkpoint):
            load_adapter(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    def _reads_adapter(self, directory: str) -> bool:
        whole = self.is_fsdp_enabled or self.is_deepspeed_enabled
        adapted = hasattr(unwrapped(self.model), "lowrank_config")
        return adapted and not whole and (Path(directory) / WEIGHTS_NAME).is_file()


class FreezeCallback(TrainerCallback, ExportableState):  # type: ignore[misc]  # untyped bases
    """Runs the freezing schedule of LaMDA or AFLoRA, whichever the model has, in the Trainer.

    T is the Trainer's number of optimizer steps. AFLoRA's scores use the gradients before clipping
    and, with fp16, unscaled (see ``lowrank_ext.AdaptiveFreezeSchedule``). The schedule is
    saved in the Trainer's checkpoints, AFLoRA's statistics in a separate file beside the model's.
    On resume the saved values take precedence over the arguments, so that nothing frozen is
    unfrozen when the resumed run has another length.

    Args:
        eta: fraction of T after which everything is frozen.
        bucket: LaMDA's, see ``lowrank_ext.FreezeSchedule``.
        start, decay, window: AFLoRA's, see ``lowrank_ext.AdaptiveFreezeSchedule``.

    Raises:
        ValueError: an argument is out of range, or when training begins for a model with neither a
            LaMDALinear nor an AFLoRALinear.
        FileNotFoundError: when a run with AFLoRA is resumed and the statistics of its checkpoint
            are neither there nor in ``args.resume_from_checkpoint``.

    Examples:
        >>> Trainer(model, args, train_dataset=data, callbacks=[FreezeCallback(eta=0.3)])
    """

    def __init__(
        self,
        eta: float = 0.3,
        bucket: int = 1,
        start: float | None = None,
        decay: str = "cubic",
        window: int = 10,
    ) -> None:
        self.eta, self.bucket = eta, bucket
        self.start, self.decay, self.window = start, decay, window
        for schedule_class in _schedule_classes():
            schedule_class.check_options(type(self).__name__, self._options())
        self.eta = float(eta)
        self.schedule: FreezingSchedule | None = None

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _OPTIONS}

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
            if saved is not None and schedule.has_statistics:
                saved = _read_statistics(args, state)
            schedule.load_state_dict(saved or {**schedule.state_dict(), "step": state.global_step})
        self.schedule = schedule
        if state.stateful_callbacks is not None:
            # The Trainer cannot save if the resumed checkpoint has no entry for the callback.
            state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def _new_schedule(self, model: nn.Module, total_steps: int, optimizer: Any) -> FreezingSchedule:
        for schedule_class in _schedule_classes():
            found = schedule_class.for_training(model, total_steps, self._options(), optimizer)
            if found is not None:
                return found
        scheduled = (m.module_class for m in METHODS.values() if m.schedule_class is not None)
        names = " or ".join(with_article(module_class.__name__) for module_class in scheduled)
        raise ValueError(
            f"FreezeCallback: model must contain {names}, got a {type(model).__name__} with none"
        )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.schedule is not None and self.schedule.before_optimizer:
            self.schedule.step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.schedule is not None and not self.schedule.before_optimizer:
            self.schedule.step()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.schedule is None or not self.schedule.has_statistics:
            return
        saved = self.schedule.state_dict()  # on every rank, as it gathers sharded tensors
        directory = _checkpoint(args, state)
        # A hyperparameter search saves in another directory, which is never resumed from.
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
        """Arguments and the schedule's numbers, which the Trainer saves in trainer_state.json."""
        schedule = None if self.schedule is None else self.schedule.numbers()
        return {
            "args": self._options(),
            "attributes": {"saved_schedule": schedule},
        }


def _schedule_classes() -> list[type[FreezingSchedule]]:
    """The schedule classes of all methods, in the order of the list."""
    classes = (method.schedule_class for method in METHODS.values())
    return [schedule_class for schedule_class in classes if schedule_class is not None]


def _saved_schedule(state: TrainerState) -> dict[str, Any] | None:
    """The numbers of the schedule in a resumed checkpoint.

    Read from the Trainer's state: the callback's attributes are restored only with
    ``restore_callback_states_from_checkpoint``.
    """
    if state.global_step == 0:
        return None
    saved = (state.stateful_callbacks or {}).get(FreezeCallback.__name__, {})
    return saved.get("attributes", {}).get("saved_schedule")


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _read_statistics(args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
    """The state of the schedule that on_save wrote at this step.

    The Trainer does not report the checkpoint it resumes from; nearly always it is its own.
    """
    told = args.resume_from_checkpoint
    directories = [*([Path(told)] if isinstance(told, str) else []), _checkpoint(args, state)]
    for directory in directories:
        if (directory / _STATISTICS).is_file():
            saved = read_torch_file(directory / _STATISTICS, "FreezeCallback")
            if saved.get("step") == state.global_step:
                return saved
    raise FileNotFoundError(
        f"FreezeCallback: {_STATISTICS} of step {state.global_step} must be in the checkpoint that "
        f"is resumed, got none in {' or '.join(map(str, directories))}; name the checkpoint's "
        "directory in args.resume_from_checkpoint"
    )
