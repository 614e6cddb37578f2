"""`lowrank-ext dpo`: trains on pairs, reports the rewards before and after."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.table import Table
from torch import Tensor

from lowrank_ext.cli.comparison import display_for, make_run
from lowrank_ext.cli.data import pad_id_of
from lowrank_ext.cli.data.preview import preview_sequences
from lowrank_ext.cli.display import Display
from lowrank_ext.cli.dpo import picture
from lowrank_ext.cli.dpo.pairs import load_pairs
from lowrank_ext.cli.dpo.settings import DpoSettings
from lowrank_ext.cli.errors import UserError
from lowrank_ext.cli.job import Job
from lowrank_ext.cli.methods import Entry, entry
from lowrank_ext.cli.models import CausalLM
from lowrank_ext.cli.single_run import Evaluation, SingleRun, results_table
from lowrank_ext.cli.training.evaluation import Batch, on_device_of
from lowrank_ext.cli.training.run import TrainingRun

_ROWS = {
    "chosen_reward": ("reward of chosen answers", ".4f"),
    "rejected_reward": ("reward of rejected answers", ".4f"),
    "margin": ("margin", ".4f"),
    "accuracy": ("chosen above rejected", ".1%"),
    "chosen_log_probability": ("log-probability of chosen answers", ".4f"),
    "rejected_log_probability": ("log-probability of rejected answers", ".4f"),
}
_CAPTION = (
    "reward: beta times the log-ratio of model and reference, which are the same before the first "
    "step; chosen above rejected: share of the pairs whose chosen answer has the larger reward"
)


@dataclass
class DpoJob(Job):
    """What a run works with; `base` is the reference."""

    settings: DpoSettings
    corpus: Any  # Pairs

    def collate(self, rows: list[Any]) -> Batch:
        """TRL's batch: input_ids, attention_mask and completion_mask, the chosen ones first."""
        from trl.trainer.dpo_trainer import DataCollatorForPreference

        batch: Batch = DataCollatorForPreference(pad_token_id=pad_id_of(self.tokenizer))(rows)
        return batch

    def loss_of(self, model: CausalLM, entry: Entry) -> Callable[[], Tensor]:
        """TRL's, which needs its trainer, and that a directory."""
        from lowrank_ext.cli.dpo.trainer import trainer_with

        kind = trainer_with(self.base.eval())
        with TemporaryDirectory() as directory:
            display = display_for(self, entry)
            run = make_run(self, entry, model, Path(directory), display, kind)
            trainer = kind(run, None, 0, self.settings.steps)
        inputs = on_device_of(model, self.batch)
        return lambda: trainer.loss_of_pairs(inputs)


class Dpo(SingleRun):
    """A run of the command."""

    name, log, picture = "dpo", "dpo.log", "rewards.png"
    job, load = DpoJob, staticmethod(load_pairs)

    def saved_name(self, settings: DpoSettings) -> str:
        return str(entry(settings.methods[0]).saved_name)

    def entry(self, job: DpoJob) -> Entry:
        return entry(job.settings.methods[0])

    def describe(self, job: DpoJob) -> None:
        super().describe(job)
        settings = job.settings
        job.console.print(
            f"loss {settings.loss}, beta {settings.beta:g}, learning rate "
            f"{settings.learning_rate(settings.methods[0]):g}; the reference is the model "
            f"{'without its' if settings.adapter is None else 'with the given'} adapter",
            markup=False,
            soft_wrap=True,
        )

    def make(
        self, job: DpoJob, entry: Entry, model: CausalLM, directory: Path, display: Display
    ) -> TrainingRun:
        """Raises UserError for an adapter on the head."""
        from lowrank_ext.cli.dpo.trainer import trainer_with

        if hasattr(model.get_output_embeddings(), "base_layer"):
            raise UserError(
                "--targets: must leave the output embeddings out, whose weight TRL reads without "
                "an adapter"
            )
        reference = reference_of(job, entry).requires_grad_(False).eval()
        return make_run(job, entry, model, directory, display, trainer_with(reference))

    def preview(self, job: DpoJob, count: int) -> None:
        preview_sequences(job.corpus.sequences(count), job.tokenizer, job.console)

    def results(self, before: Evaluation, after: Evaluation) -> Table:
        return results_table("held-out pairs", _ROWS, before, after, _CAPTION)

    def draw(self, job: DpoJob, run: TrainingRun) -> bytes:
        return picture.rewards_picture(run.progress)


def reference_of(job: DpoJob, entry: Entry) -> CausalLM:
    """The model that the run begins with: the base, or with --adapter the base with it."""
    adapter = job.settings.adapter
    if adapter is None:
        return job.base
    return entry.begin_with(job.training_copy(entry), job.settings, Path(adapter))
