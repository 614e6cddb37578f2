"""transformers' Trainer as the loop of our commands: one stage of a TrainingRun."""

import math
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import set_seed

from lowrank_ext.cli.errors import UserError, as_user_error
from lowrank_ext.cli.models import why_not_finite
from lowrank_ext.cli.processes import summed
from lowrank_ext.cli.training.checkpoints import save_checkpoint
from lowrank_ext.cli.training.optimizer import MasterAdamW, forget_frozen
from lowrank_ext.cli.training.order import RowOrder
from lowrank_ext.cli.training.plan import ADAMW, training_arguments
from lowrank_ext.files import quoted
from lowrank_ext.integrations.transformers import AdapterTrainer
from lowrank_ext.recipe import Stage
from lowrank_ext.sharding import full_tensor

if TYPE_CHECKING:
    from lowrank_ext.cli.training.run import TrainingRun


class FinetuneTrainer(AdapterTrainer):
    """The steps of one stage of a run; a run without stages is one.

    Beyond transformers' Trainer: rows in an order that depends on seed and position alone, a loss
    reported without the method's extra loss, an end at a loss or gradient that is not finite,
    checkpoints that are complete or not there, and a stop at a signal.

    Args:
        run: model, data and progress.
        stage: None in a run without stages.
        first_step: steps of the run before this stage.
        steps: those of this stage.
    """

    def __init__(
        self, run: "TrainingRun", stage: Stage | None, first_step: int, steps: int
    ) -> None:
        self.run, self.stage, self.first_step = run, stage, first_step
        self.optimizer: Any  # made when training begins
        self.control: TrainerControl
        self.is_prepared = False
        super().__init__(callbacks=[RunCallback(self)], **self.trainer_options(steps))
        self.remove_callback(PrinterCallback)
        self.task_loss = torch.zeros((), device=self.args.device)
        self.num_tokens = 0
        if self.args.world_size > 1:  # dropout differs between the processes
            set_seed((run.plan.seed + self.args.process_index) % 2**32)

    def trainer_options(self, steps: int) -> dict[str, Any]:
        """What the Trainer is made with, for a stage of ``steps``."""
        return {
            "model": self.run.model,
            "args": training_arguments(self.run.plan, steps, self.run.directory),
            "train_dataset": self.run.corpus.train,
            "data_collator": self.run.collate,
        }

    # Data

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        rows = self.run.progress.rows_per_step
        return RowOrder(
            len(self.run.corpus.train),
            self.run.plan.seed,
            self.first_step * rows,
            self.args.max_steps * rows,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> Any:
        """Batches as their stage transforms them, whose labels the Trainer counts here."""
        batches = map(self._staged, epoch_iterator)
        return super().get_batch_samples(batches, num_batches, device)

    def _staged(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch as its stage transforms it, every tensor in the same way."""
        if self.stage is None:
            return inputs
        batch, settings, step = self.stage.batch, self.run.settings, self.run.progress.step
        changed = {
            name: batch(tensor.cpu(), settings, step).to(tensor.device)
            for name, tensor in inputs.items()
        }
        if "position_ids" in inputs and not torch.equal(
            changed["position_ids"], inputs["position_ids"]
        ):
            del changed["position_ids"]  # tokens out of order have no documents
        return changed

    # Optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            groups = self.run.parameter_groups(set(self.get_decay_parameter_names(self.model)))
            self.optimizer = self._new_optimizer(groups)
        return self.optimizer

    def _new_optimizer(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        plan = self.run.plan
        if plan.optimizer == ADAMW:
            own = {"betas": plan.betas, "eps": plan.eps}
            return MasterAdamW(groups, **{k: v for k, v in own.items() if v is not None})
        with as_user_error(f"--optimizer {plan.optimizer}", Exception):
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            optimizer: torch.optim.Optimizer = kind(groups, **options)
        return optimizer

    # Loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **options: Any,
    ) -> Any:
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch, **options)
        self.task_loss += loss.detach() / self._micro_batches_of(num_items_in_batch)
        return loss

    def _micro_batches_of(self, num_items_in_batch: Tensor | int | None) -> int:
        """By how much the Trainer divides a loss: one that is a share of the step already, by 1."""
        shares = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return 1 if shares else self.current_gradient_accumulation_steps

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **options: Any
    ) -> Tensor:
        self.num_tokens += num_tokens(inputs)
        loss: Tensor = super().training_step(model, inputs, *arguments, **options)
        return loss

    def take_tokens(self) -> int:
        """The tokens that the step has read so far, over all processes; begins a new sum."""
        total = int(summed(torch.tensor(self.num_tokens)).item())
        self.num_tokens = 0
        return total

    def take_task_loss(self) -> float:
        """The task's loss of the step so far, a mean over processes; begins a new sum."""
        total = summed(self.task_loss.double().cpu()) / self.args.world_size
        self.task_loss.zero_()
        return total.item()

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Called once per step, before its update."""
        norm = super()._get_grad_norm(model, grad_norm)
        norm = full_tensor(norm) if isinstance(norm, Tensor) else norm  # of shares, every process's
        # A scaled gradient may overflow occasionally; that step is skipped.
        if self.accelerator.scaler is None:
            self._check_finite("loss", self.task_loss.item())
            self._check_finite("gradient", float(norm))
        return norm

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            help_text = "try a smaller --lr or --alpha"
            raise UserError(
                f"{self.run.entry.name}: the {what} is not finite at step "
                f"{self.run.progress.step + 1}; {why_not_finite(self.run.model, help_text)}"
            )

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        if "loss" in logs:
            recent = self.run.progress.losses[-self.run.plan.log_every :]
            logs = {**logs, "loss": statistics.mean(recent)}
        super().log(logs, *args, **options)

    # Evaluation and checkpoints

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """The held-out loss, as `eval_loss`; also in the run's progress."""
        metrics = {"eval_loss": self.measure()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def measure(self) -> float:
        """The held-out loss, which the run's progress gets too."""
        return self.run.evaluate()

    def _save_checkpoint(self, model: nn.Module, trial: Any = None) -> None:
        with self.run.stop.undisturbed():
            self.run.on_checkpoint(save_checkpoint(self))
            self.run.saved_step = self.run.progress.step

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.run.plan.fsdp:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = self.optimizer.state_dict()  # every process takes part in gathering
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: the run has loaded the model before it made the Trainer."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with as_user_error(f"cannot continue from {checkpoint}", Exception):
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None:
                self._follow_schedule()

    def _follow_schedule(self) -> None:
        """The rates of the schedule at this step: the stored ones are of another one where the
        run has more steps now. torch takes any state, so the step is checked."""
        at = self.lr_scheduler.last_epoch
        updates = self.state.global_step - self.run.progress.skipped_steps
        if type(at) is not int or at not in (updates, self.state.global_step):
            raise ValueError(f"scheduler.pt must be of step {updates}, got {quoted(at)}")
        if isinstance(self.lr_scheduler, torch.optim.lr_scheduler.LambdaLR):
            rates = [
                base * factor(self.lr_scheduler.last_epoch)
                for base, factor in zip(
                    self.lr_scheduler.base_lrs, self.lr_scheduler.lr_lambdas, strict=True
                )
            ]
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with as_user_error(f"cannot continue from {checkpoint}", Exception):
            super()._load_rng_state(checkpoint)

    def _init_training_state(self, *args: Any, **options: Any) -> Any:
        with as_user_error("cannot continue from trainer_state.json", Exception):
            trained = super()._init_training_state(*args, **options)
            expected = self.run.progress.step - self.first_step
            if self.state.global_step != expected:
                raise ValueError(
                    f"global_step must be {expected}, got {quoted(self.state.global_step)}"
                )
        return trained

    def synchronize(self) -> None:
        """Waits for the GPU, so that a time is that of the work."""
        if self.args.device.type == "cuda":
            torch.cuda.synchronize(self.args.device)


def num_tokens(batch: dict[str, Any]) -> int:
    """Tokens of a batch without the padding that its attention_mask tells."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


class RunCallback(TrainerCallback):  # type: ignore[misc]  # untyped base
    """Keeps the run's progress, freezes what the method freezes, and decides what is due."""

    def __init__(self, trainer: FinetuneTrainer) -> None:
        self.trainer, self.run = trainer, trainer.run
        self.started = self.updating = 0.0

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        run, step = self.run, self.run.progress.step
        if (step == 0 or run.plan.is_evaluated(step)) and not run.is_evaluated:
            self.trainer.evaluate()  # before the first step, or a stop has cut it off
        self.trainer.is_prepared = True

    def on_step_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.run.remember_generators()
        self.started = time.perf_counter()

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.synchronize()
        self.updating = time.perf_counter()
        self.run.begin_update()
        if self.run.freezing is not None and self.run.freezing.before_optimizer:
            self.run.freezing.step()  # before the update, which frozen parameters must not get

    def on_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.run.freezing is not None:
            if not self.run.freezing.before_optimizer:
                self.run.freezing.step()  # writes frozen values back
            forget_frozen(self.trainer.optimizer)

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        self.trainer.synchronize()
        now, progress = time.perf_counter(), self.run.progress
        progress.losses.append(self.trainer.take_task_loss())
        progress.tokens.append(self.trainer.take_tokens())
        progress.step_seconds.append(now - self.started)
        progress.optimizer_seconds.append(now - self.updating)
        progress.skipped_steps += self.trainer.accelerator.optimizer_step_was_skipped
        progress.step += 1
        state.epoch = progress.step * progress.rows_per_step / len(self.run.corpus.train)
        self.run.on_step(progress)
        self.run.end_update()
        self._decide(control, state)
        return control

    def _decide(self, control: TrainerControl, state: TrainerState) -> None:
        run, step = self.run, self.run.progress.step
        run.stopped = stopped = run.stop.agree()
        ends = state.global_step >= state.max_steps
        control.should_evaluate = run.plan.is_evaluated(step)
        every = run.plan.save_every
        control.should_save = ends or stopped or bool(every and step % every == 0)
        control.should_training_stop = ends or stopped

    def on_evaluate(
        self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        run = self.run
        patience = run.plan.early_stop
        if patience is not None and run.progress.step > 0:
            is_best = run.progress.best[0] == run.progress.step
            gives_up = run.progress.evaluations_without_gain() >= patience
            run.progress.ended_early = gives_up and run.progress.step < run.plan.steps
            control.should_save = control.should_save or is_best or gives_up
            control.should_training_stop = control.should_training_stop or gives_up
        return control
