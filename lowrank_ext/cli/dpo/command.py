"""`lowrank-ext dpo`: load, train on pairs, report the rewards before and after."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lowrank_ext.cli.comparison import display_for, make_run, start_run
from lowrank_ext.cli.data import pad_id_of
from lowrank_ext.cli.display import Display
from lowrank_ext.cli.dpo.pairs import load_pairs
from lowrank_ext.cli.dpo.report import LOG_NAME, evaluation_at, finish
from lowrank_ext.cli.dpo.settings import DpoSettings
from lowrank_ext.cli.errors import UserError
from lowrank_ext.cli.files import check_replaced, exists, prepare_output
from lowrank_ext.cli.interrupts import StopRequest
from lowrank_ext.cli.job import (
    Job,
    data_options,
    describe,
    held_out_batches,
    load_base,
    with_known_steps,
)
from lowrank_ext.cli.log import log_file
from lowrank_ext.cli.methods import Entry, count, entry, trainable_parameters
from lowrank_ext.cli.models import CausalLM, check_vocabulary
from lowrank_ext.cli.run_file import RUN_FILE, write_run_file
from lowrank_ext.cli.stopping import at_once, stop_if_requested
from lowrank_ext.cli.training.checkpoints import remove_checkpoints
from lowrank_ext.cli.training.evaluation import Batch
from lowrank_ext.cli.training.plan import on_main_process
from lowrank_ext.cli.training.run import TrainingRun

COMMAND = "dpo"


@dataclass
class DpoJob(Job):
    """What a run works with; `base` is the reference."""

    settings: DpoSettings
    corpus: Any  # Pairs

    @property
    def tokens_per_step(self) -> int:
        """Of both answers of all pairs."""
        return 2 * super().tokens_per_step

    def collate(self, rows: list[Any]) -> Batch:
        """TRL's batch: input_ids, attention_mask and completion_mask, the chosen ones first."""
        from trl.trainer.dpo_trainer import DataCollatorForPreference

        batch: Batch = DataCollatorForPreference(pad_token_id=pad_id_of(self.tokenizer))(rows)
        return batch


def run(settings: DpoSettings, out: Path, resume: bool, console: Console) -> None:
    """The whole command. Raises UserError for bad input and Interrupted after a clean stop."""
    found = entry(settings.methods[0])
    if not resume:
        inputs = [*settings.text, *settings.eval, *([settings.model] if settings.model else [])]
        has_run = exists(f"--out {out}", out / RUN_FILE)
        check_replaced(out, [out / str(found.saved_name)], has_run, inputs)
    prepare_output(out)
    with log_file(out / LOG_NAME, append=resume), StopRequest() as stop:
        with at_once(out if resume else None, stop, COMMAND), stop.leaving_at_any_point():
            job = prepare(settings, out, resume, console, stop)
        on_main_process(lambda: store_settings(job))
        with at_once(out, stop, COMMAND):
            train(job, found)


def store_settings(job: Job) -> None:
    """Stores the settings; of an earlier run that is not resumed, removes checkpoints first."""
    if not job.resume:
        remove_checkpoints(job.out)
    write_run_file(job.out, job.settings.to_dict(), COMMAND)


def prepare(
    settings: DpoSettings, out: Path, resume: bool, console: Console, stop: StopRequest
) -> DpoJob:
    """Loads model and pairs, with all checks that are possible before the first step."""
    loaded, device = load_base(settings, console)
    pairs = load_pairs(data_options(settings), loaded.tokenizer, console)
    check_vocabulary(loaded.model, pairs.largest_id)
    job = DpoJob(
        settings=with_known_steps(settings, len(pairs.train)),
        out=out,
        resume=resume,
        console=console,
        stop=stop,
        device=device,
        base=loaded.model.requires_grad_(False),
        tokenizer=loaded.tokenizer,
        corpus=pairs,
        held_out=[],
        frozen_saved_bytes=0,
    )
    job.held_out = held_out_batches(pairs, settings, job.collate)
    describe(job)
    console.print(
        f"loss {settings.loss}, beta {settings.beta:g}, learning rate "
        f"{settings.learning_rate(settings.methods[0]):g}; the reference is the model without its "
        "adapter",
        markup=False,
        soft_wrap=True,
    )
    return job


def train(job: DpoJob, found: Entry) -> None:
    """Trains from the start or from the last checkpoint, saves, reports."""
    steps = job.settings.steps
    with display_for(job, found) as display:
        with job.stop.leaving_at_any_point():
            run = start_run(job, found, job.out, display, make_dpo_run, record_trainable)
        finished = run.train()
        saved_step = run.progress.step
        if finished and job.settings.early_stop is not None:
            saved_step = run.load_best()
        run.save(job.out)
        stop_if_requested(job.stop, job.out, found.name, run.progress.step, steps, COMMAND)
        before, after = run.progress.held_out[0][1], evaluation_at(run.progress, saved_step).loss
        display.phase(f"held-out loss {before:.4f} > {after:.4f}")
    on_main_process(lambda: finish(job, run, saved_step))


def make_dpo_run(
    job: DpoJob, entry: Entry, model: CausalLM, directory: Path, display: Display
) -> TrainingRun:
    """The training of the adapted model. Raises UserError for an adapter on the head."""
    from lowrank_ext.cli.dpo.trainer import trainer_with

    if hasattr(model.get_output_embeddings(), "base_layer"):
        raise UserError(
            "--targets: must leave the output embeddings out, whose weight TRL reads without an "
            "adapter"
        )
    return make_run(job, entry, model, directory, display, trainer_with(job.base.eval()))


def record_trainable(job: Job, run: TrainingRun, display: Display) -> None:
    """The Trainer evaluates before the first step, by the loss that it trains with."""
    run.progress.trainable_at_start = count(trainable_parameters(run.model))
