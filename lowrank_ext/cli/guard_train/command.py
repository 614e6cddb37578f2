"""`lowrank-ext guard train`: trains a guard, reports how well it judges before and after."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from lowrank_ext.cli.adapters import INSIDE_GUARD_RUN
from lowrank_ext.cli.comparison import make_run
from lowrank_ext.cli.display import Display
from lowrank_ext.cli.errors import one_line
from lowrank_ext.cli.guard_train.labels import ANY, load_labelled
from lowrank_ext.cli.guard_train.picture import guard_picture
from lowrank_ext.cli.guard_train.settings import GuardSettings
from lowrank_ext.cli.job import Job
from lowrank_ext.cli.methods import Entry, base_dtype
from lowrank_ext.cli.models import CausalLM, resolve_adapter_dtype
from lowrank_ext.cli.settings import Settings
from lowrank_ext.cli.single_run import Evaluation, SingleRun, results_table
from lowrank_ext.cli.targets import parse_targets
from lowrank_ext.cli.training.evaluation import Batch
from lowrank_ext.cli.training.run import TrainingRun
from lowrank_ext.files import printable
from lowrank_ext.methods.lora_guard import GuardLoss, GuardModel
from lowrank_ext.methods.lora_guard.screening import pad

_ROWS = {
    "auprc": ("AUPRC", ".4f"),
    "accuracy": ("accuracy", ".1%"),
    "precision": ("precision", ".1%"),
    "recall": ("recall", ".1%"),
    "f1": ("F1", ".4f"),
}
_CAPTION = "AUPRC: area under the precision-recall curve; the others at a threshold of 0.5"


class GuardEntry(Entry):
    """A guard over the base; what `lowrank-ext guard --adapter` reads is saved.

    Args:
        categories: their names.
    """

    saved_name = INSIDE_GUARD_RUN

    def __init__(self, categories: tuple[str, ...]) -> None:
        super().__init__("guard")
        self.categories = categories

    def _build(self, model: CausalLM, settings: Settings) -> CausalLM:
        return GuardModel(
            model,
            r=settings.rank,
            alpha=settings.rank if settings.alpha is None else settings.alpha,
            targets=parse_targets(settings.targets),
            num_categories=len(self.categories),
            category_names=self.categories,
            dropout=settings.dropout_of("lora"),
            adapter_dtype=resolve_adapter_dtype(settings.adapter_dtype, base_dtype(model)),
        )

    def _save(self, model: CausalLM, tokenizer: Any, directory: Path) -> None:
        model.save_pretrained(directory)

    def _load(self, model: CausalLM, settings: Settings, path: Path) -> CausalLM:
        dtype = resolve_adapter_dtype(settings.adapter_dtype, base_dtype(model))
        return GuardModel.from_pretrained(model, path, adapter_dtype=dtype)


@dataclass
class GuardJob(Job):
    """What a run works with."""

    settings: GuardSettings
    corpus: Any  # LabelledTexts

    def collate(self, rows: list[Any]) -> Batch:
        """input_ids and attention_mask [B, T], categories [B, C]."""
        ids, mask = pad([row["input_ids"] for row in rows])
        categories = torch.stack([row["categories"] for row in rows])
        return {"input_ids": ids, "attention_mask": mask, "categories": categories}

    def all_held_out(self) -> list[Batch]:
        """All texts: a score needs safe and unsafe ones."""
        texts, size = self.corpus.held_out, self.settings.batch
        rows = [texts[index] for index in range(len(texts))]
        return [self.collate(rows[start : start + size]) for start in range(0, len(rows), size)]

    def loss_of(self, model: CausalLM, entry: Entry) -> Callable[[], Tensor]:
        from lowrank_ext.cli.guard_train.trainer import judged

        criterion = GuardLoss(self.corpus.train.labels).to(self.device)
        batch = {name: tensor.to(self.device) for name, tensor in self.batch.items()}
        return lambda: judged(model, batch, criterion)[0]


class GuardTraining(SingleRun):
    """A run of the command."""

    name, log, picture = "guard train", "guard.log", "guard.png"
    job, load = GuardJob, staticmethod(load_labelled)

    def saved_name(self, settings: GuardSettings) -> str:
        return INSIDE_GUARD_RUN

    def entry(self, job: GuardJob) -> Entry:
        return GuardEntry(job.corpus.categories)

    def make(
        self, job: GuardJob, entry: Entry, model: CausalLM, directory: Path, display: Display
    ) -> TrainingRun:
        from lowrank_ext.cli.guard_train.trainer import GuardTrainer

        job.console.print(model.summary())
        return make_run(job, entry, model, directory, display, GuardTrainer)

    def preview(self, job: GuardJob, count: int) -> None:
        """Texts with their labels."""
        rows, names = job.corpus.train, job.corpus.categories
        for index in range(min(count, len(rows))):
            row = rows[index]
            labels = [
                "unsafe" if name == ANY else name
                for name, own in zip(names, row["categories"].tolist(), strict=True)
                if own
            ]
            text = one_line(Exception(job.tokenizer.decode(row["input_ids"])))
            job.console.print(
                f"text {index + 1}: {len(row['input_ids']):,} tokens, "
                f"{', '.join(map(printable, labels)) or 'safe'}: {text}",
                markup=False,
                soft_wrap=True,
            )

    def results(self, before: Evaluation, after: Evaluation) -> Table:
        return results_table("held-out texts", _ROWS, before, after, _CAPTION)

    def draw(self, job: GuardJob, run: TrainingRun) -> bytes:
        from lowrank_ext.cli.guard_train.trainer import held_out_scores

        criterion = GuardLoss(job.corpus.train.labels).to(job.device)
        _, scores = held_out_scores(run.model, job.held_out, criterion)
        return guard_picture(job.corpus.held_out.unsafe, scores, run)
