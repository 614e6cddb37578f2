"""One method's training, from its start or from a checkpoint, through all its stages."""

import random
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from lowrank_ext.cli.errors import UserError
from lowrank_ext.cli.interrupts import StopRequest, Terminated
from lowrank_ext.cli.log import LOG
from lowrank_ext.cli.methods import Entry
from lowrank_ext.cli.models import CausalLM
from lowrank_ext.cli.processes import num_processes
from lowrank_ext.cli.training.checkpoints import (
    Identity,
    checkpoint_of_step,
    newest_steps,
    read_progress,
    restore_freezing,
)
from lowrank_ext.cli.training.evaluation import Batch, check_start, held_out_loss
from lowrank_ext.cli.training.plan import Plan
from lowrank_ext.cli.training.progress import Progress
from lowrank_ext.recipe import Stage


class Data(Protocol):
    """Rows to train on, and an identifier of them."""

    @property
    def train(self) -> Any:
        """A dataset of rows, with a length."""
        ...

    def digest(self) -> str: ...


@dataclass
class TrainingRun:
    """Everything that a training changes, and what it reads.

    Attributes:
        entry: the method.
        model: adapted, on its device.
        plan: its numbers.
        settings: what recipes read (``recipe.Run``).
        corpus: rows to train on.
        collate: makes a batch of rows.
        held_out: the batches of all evaluations.
        directory: where checkpoints go.
        tokenizer: saved with whole models.
        stop: the signals.
        on_step: called after a step with the progress.
        on_checkpoint: called with the directory of a new checkpoint.
        trainer_class: of each stage, with the method's mixin; None: FinetuneTrainer.
        stopped: whether a signal has ended it.
    """

    entry: Entry
    model: CausalLM
    plan: Plan
    settings: Any
    corpus: Data
    collate: Callable[[list[Any]], Batch]
    held_out: list[Batch]
    directory: Path
    tokenizer: Any
    stop: StopRequest
    on_step: Callable[[Progress], None]
    on_checkpoint: Callable[[Path], None]
    trainer_class: Callable[..., Any] | None = None
    progress: Progress = field(default_factory=Progress)
    saved_step: int = -1
    stopped: bool = False

    def __post_init__(self) -> None:
        self.training = self.entry.training
        self.freezing = self.training.schedule(self.model, self.settings)
        self.progress.rows_per_step = self.plan.batch * self.plan.accumulate * num_processes()
        self.identity = Identity.of(self.corpus.digest(), self.settings.to_dict())
        self._trained = self._trainable_names()
        self._trainer: Any = None
        self._checkpoint: Path | None = None
        self._generators: tuple[Any, ...] = ()
        self._update = ExitStack()

    def resume(self, path: Path) -> None:
        """Continues from a checkpoint, which the model has been loaded from."""
        progress = read_progress(path, self.identity)
        if progress.rows_per_step != self.progress.rows_per_step:
            raise UserError(
                f"cannot continue from {path}: a step of {num_processes()} processes must have "
                f"{progress.rows_per_step} rows, got {self.progress.rows_per_step}"
            )
        restore_freezing(path, self.freezing, self.entry.name)
        self.progress, self._checkpoint = progress, path
        self.saved_step = progress.step

    # Training

    def train(self) -> bool:
        """Steps until the end or until a signal; False when stopped early."""
        alone = num_processes() == 1  # several stop together, after a step
        leaving = self.stop.leaving_at_any_point() if alone else nullcontext()
        try:
            with leaving:
                self._train()
        except Terminated:
            self._save_step_before()
        finally:
            self._update.close()
            if self.freezing is not None:
                self.freezing.remove()
        return self.progress.step == self.plan.steps or self.progress.ended_early

    def _train(self) -> None:
        while not self.progress.ended_early:
            stage, first_step, steps = self._present_stage()
            if self.progress.step < first_step + steps or not self.is_evaluated:
                self._run_stage(stage, first_step, steps)
            if self.stopped or not self._begin_next_stage():
                return

    def _run_stage(self, stage: Stage | None, first_step: int, steps: int) -> None:
        self._trainer = self._new_trainer(stage, first_step, steps)
        begins = self.progress.step == first_step  # with a new optimizer
        resumed = None if begins or self._checkpoint is None else str(self._checkpoint)
        self._checkpoint = None
        self._trainer.train(resume_from_checkpoint=resumed)

    def _new_trainer(self, stage: Stage | None, first_step: int, steps: int) -> Any:
        from lowrank_ext.cli.training.trainer import FinetuneTrainer

        kind: Any = self.trainer_class or FinetuneTrainer
        if self.training.trainer_mixin is not None:
            kind = type(kind.__name__, (self.training.trainer_mixin, kind), {})
        return kind(self, stage, first_step, steps)

    def _present_stage(self) -> tuple[Stage | None, int, int]:
        """The stage that the model is in, the steps before it, and its own."""
        stages = self.training.stages
        if not stages:
            return None, 0, self.plan.steps
        present = self.training.stage_of(self.model)
        before = sum(stage.num_steps(self.settings) for stage in stages[:present])
        return stages[present], before, stages[present].num_steps(self.settings)

    def _begin_next_stage(self) -> bool:
        """Whether there is one. The end of a stage has been saved."""
        stages = self.training.stages
        if not stages or self.training.stage_of(self.model) + 1 >= len(stages):
            return False
        with self.stop.undisturbed():
            stages[self.training.stage_of(self.model) + 1].begin(self.model)
            self._trained, self._trainer = self._trainable_names(), None
        return True

    def _trainable_names(self) -> set[str]:
        """The parameters of the optimizer: those that train at the start of a stage. A freezing
        schedule takes some away later, which keep their place in its state."""
        return {name for name, p in self.model.named_parameters() if p.requires_grad}

    # Signals

    def remember_generators(self) -> None:
        """The random generators before a step, which a stop in its middle goes back to."""
        states = [random.getstate(), np.random.get_state(), torch.get_rng_state()]
        on_gpu = self.plan.device.type == "cuda"
        self._generators = (*states, torch.cuda.get_rng_state(self.plan.device) if on_gpu else None)

    def _restore_generators(self) -> None:
        python, numpy, cpu, cuda = self._generators
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, self.plan.device)

    def begin_update(self) -> None:
        """From here to `end_update` no signal leaves the step."""
        self._update.enter_context(self.stop.undisturbed())

    def end_update(self) -> None:
        self._generators = ()
        self._update.close()

    def _save_step_before(self) -> None:
        if self._trainer is None or not self._trainer.is_prepared:
            return  # nothing has been trained since the last checkpoint
        if self.saved_step == self.progress.step:
            return
        if self._generators:
            self._restore_generators()
        self._trainer._save_checkpoint(self.model)

    # What the Trainer asks for

    def parameter_groups(self, decayed: set[str]) -> list[dict[str, Any]]:
        """Groups for an optimizer, those with the run's rate first.

        Args:
            decayed: names of the parameters that weight decay shrinks.
        """
        own = self.training.parameter_groups(self.model, self.settings)
        rates: dict[int, float] = {id(p): factor for group, factor in own for p in group}
        groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
        for name, parameter in self.model.named_parameters():
            if name in self._trained:
                key = (rates.get(id(parameter), 1.0), name in decayed)
                groups.setdefault(key, []).append(parameter)
        plan = self.plan
        return [
            {
                "params": parameters,
                "lr": factor * plan.learning_rate,
                "weight_decay": plan.weight_decay if is_decayed else 0.0,
            }
            for (factor, is_decayed), parameters in sorted(
                groups.items(), key=lambda item: item[0][0] != 1.0
            )
        ]

    @property
    def is_evaluated(self) -> bool:
        """Whether the held-out loss of the present step is known."""
        held_out = self.progress.held_out
        return bool(held_out) and held_out[-1][0] == self.progress.step

    def evaluate(self) -> float:
        """The held-out loss, which the progress gets too."""
        return self.record(held_out_loss(self.model, self.held_out))

    def record(self, loss: float, scores: dict[str, float] | None = None) -> float:
        """Adds an evaluation of the present step to the progress; its loss. Raises UserError for
        one that is not finite before the first step."""
        if self.progress.step == 0:
            check_start(self.entry.name, loss, self.model)
        self.progress.held_out.append((self.progress.step, loss))
        LOG.info("held-out loss %.6f (step %d)", loss, self.progress.step)
        if scores is not None:
            self.progress.scores.append(scores)
        return loss

    def save(self, directory: Path) -> None:
        """Writes what the method saves, below `directory`."""
        self.entry.save(self.model, self.tokenizer, directory)

    def kept_checkpoints(self) -> set[int]:
        """Steps of the checkpoints that stay: the last ones, and the best with --early-stop."""
        kept = newest_steps(self.directory, self.plan.keep)
        if self.plan.early_stop is not None:
            kept.add(self.progress.best[0])
        return kept

    def load_best(self) -> int:
        """Gives the model the values of the best evaluation; its step."""
        step, _ = self.progress.best
        if step != self.progress.step:
            self.entry.reload(self.model, checkpoint_of_step(self.directory, step))
        return step
