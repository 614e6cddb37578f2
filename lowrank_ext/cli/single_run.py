"""A command that trains one model and reports what it has measured on held-out data, on the loop
of finetune: dpo, guard train."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lowrank_ext.cli.comparison import check_adapts, display_for, start_run
from lowrank_ext.cli.data import DataOptions
from lowrank_ext.cli.display import Display, make_console
from lowrank_ext.cli.dry_run import show
from lowrank_ext.cli.environment import environment
from lowrank_ext.cli.errors import UserError, as_user_error
from lowrank_ext.cli.files import (
    check_outside,
    check_replaced,
    exists,
    prepare_output,
    write_bytes,
    write_json,
)
from lowrank_ext.cli.interrupts import StopRequest
from lowrank_ext.cli.job import Job, describe, inputs_of, load_base, make_job
from lowrank_ext.cli.log import hush_libraries, log_file
from lowrank_ext.cli.methods import Entry, base_dtype, count, trainable_parameters
from lowrank_ext.cli.models import CausalLM, check_vocabulary, dtype_name, find_model
from lowrank_ext.cli.processes import on_main_process
from lowrank_ext.cli.run_file import RUN_FILE, write_run_file
from lowrank_ext.cli.run_settings import chosen_settings
from lowrank_ext.cli.settings import Settings
from lowrank_ext.cli.stopping import at_once, stop_if_requested
from lowrank_ext.cli.training.checkpoints import remove_checkpoints
from lowrank_ext.cli.training.progress import Progress
from lowrank_ext.cli.training.run import TrainingRun


@dataclass(frozen=True)
class Evaluation:
    """What was measured on the held-out data after a step."""

    step: int
    loss: float
    scores: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-serializable."""
        return {"step": self.step, "loss": self.loss, **self.scores}


def evaluations(progress: Progress) -> list[Evaluation]:
    """All of a run, the first before its first step."""
    pairs = zip(progress.held_out, progress.scores, strict=True)
    return [Evaluation(step, loss, scores) for (step, loss), scores in pairs]


def evaluation_at(progress: Progress, step: int) -> Evaluation:
    """The last one up to a step."""
    return [each for each in evaluations(progress) if each.step <= step][-1]


class SingleRun(ABC):
    """One run of such a command.

    Attributes:
        name: as users type it.
        log, picture: names of files in --out.
        job: its kind.
        load: gets DataOptions, a tokenizer and a console; the data, like `load_corpus`.
    """

    name: ClassVar[str]
    log: ClassVar[str]
    picture: ClassVar[str]
    job: ClassVar[type[Job]]
    load: ClassVar[Callable[..., Any]]

    @abstractmethod
    def saved_name(self, settings: Any) -> str:
        """Name of the directory that the result is saved to."""

    @abstractmethod
    def entry(self, job: Any) -> Entry:
        """What is trained."""

    @abstractmethod
    def make(
        self, job: Any, entry: Entry, model: CausalLM, directory: Path, display: Display
    ) -> TrainingRun:
        """The training of a model that the entry has built."""

    @abstractmethod
    def preview(self, job: Any, count: int) -> None:
        """Prints the first examples as the model sees them."""

    @abstractmethod
    def results(self, before: Evaluation, after: Evaluation) -> Table:
        """The table at the end."""

    @abstractmethod
    def draw(self, job: Any, run: TrainingRun) -> bytes:
        """The picture, a PNG."""

    def chosen(self, kind: type[Settings], context: typer.Context, options: Any) -> None:
        """The command, as its options say. Raises UserError for bad input and Interrupted after a
        clean stop.

        Args:
            kind: its settings.
            options: those beside the settings.
        """
        console, out, resume = make_console(), options["out"], options["resume"]
        if options["dry_run"] and resume:
            raise UserError("give --dry-run or --resume, not both")
        settings = chosen_settings(kind, context, options["config"], out, resume, console)
        if options["dry_run"]:
            self.estimate(settings, out, console, options["preview"])
        else:
            self.run(settings, out, resume, console, options["preview"])

    def estimate(self, settings: Settings, out: Path, console: Console, preview: int) -> None:
        """--dry-run: the table of the data, and what would train at which cost."""
        hush_libraries()
        with warnings.catch_warnings(), StopRequest() as stop, at_once(None, stop):
            warnings.simplefilter("ignore")  # there is no log for those of libraries
            with stop.leaving_at_any_point():
                job = self.prepare(settings, out, False, console, stop)
                if preview:
                    self.preview(job, preview)
                show(job, console, [self.entry(job)])

    def prepare(
        self, settings: Settings, out: Path, resume: bool, console: Console, stop: StopRequest
    ) -> Job:
        """Loads model and data, with all checks that are possible before the first step."""
        loaded, device = load_base(settings, console)
        corpus = self.load(DataOptions.of(settings), loaded.tokenizer, console)
        check_vocabulary(loaded.model, corpus.largest_id)
        job = make_job(self.job, settings, out, resume, console, stop, loaded, corpus, device)
        self.describe(job)
        return job

    def describe(self, job: Any) -> None:
        """Prints what is trained, and the table of the data."""
        describe(job)

    def run(
        self, settings: Settings, out: Path, resume: bool, console: Console, preview: int
    ) -> None:
        """Trains, or goes on with it."""
        if not resume:
            check_outside(out, [*settings.text, *settings.eval])
            has_run = exists(f"--out {out}", out / RUN_FILE)
            check_replaced(out, [out / self.saved_name(settings)], has_run, inputs_of(settings))
        prepare_output(out)
        with log_file(out / self.log, resumed=resume), StopRequest() as stop:
            with at_once(out if resume else None, stop, self.name), stop.leaving_at_any_point():
                job = self.prepare(settings, out, resume, console, stop)
                if preview:
                    self.preview(job, preview)
                check_adapts(job, [self.entry(job)])
            on_main_process(lambda: self._store_settings(job))
            with at_once(out, stop, self.name):
                self._train(job)

    def _store_settings(self, job: Job) -> None:
        """Stores the settings; of an earlier run that is not resumed, removes checkpoints first."""
        if not job.resume:
            remove_checkpoints(job.out)
        write_run_file(job.out, job.settings.to_dict(), self.name)

    def _train(self, job: Job) -> None:
        """Trains from the start or from the last checkpoint, saves, reports."""
        entry, steps = self.entry(job), job.settings.steps
        with display_for(job, entry) as display:
            with job.stop.leaving_at_any_point():
                run = start_run(job, entry, job.out, display, self.make, _record_trainable)
            finished = run.train()
            saved_step = run.progress.step
            if finished and job.settings.early_stop is not None:
                saved_step = run.load_best()
            run.save(job.out)
            stop_if_requested(job.stop, job.out, entry.name, run.progress.step, steps, self.name)
            before, after = evaluations(run.progress)[0], evaluation_at(run.progress, saved_step)
            display.phase(f"held-out loss {before.loss:.4f} > {after.loss:.4f}")
        on_main_process(lambda: self._finish(job, run, saved_step))

    def _finish(self, job: Job, run: TrainingRun, saved_step: int) -> None:
        """Writes the report and the picture; prints what was gained and written."""
        out = job.out
        before, after = evaluations(run.progress)[0], evaluation_at(run.progress, saved_step)
        with as_user_error("the report cannot be written", ValueError):  # inf and nan
            write_json(out / "report.json", self._report(job, run, saved_step))
        write_bytes(out / self.picture, self.draw(job, run))
        job.console.print()
        job.console.print(self.results(before, after))
        for name in (run.entry.saved_name, "report.json", self.picture, self.log):
            job.console.print(f"wrote {out / str(name)}", markup=False, soft_wrap=True)

    def _report(self, job: Job, run: TrainingRun, saved_step: int) -> dict[str, Any]:
        progress, settings = run.progress, job.settings
        return {
            "settings": settings.to_dict(),
            "model": {
                "name": find_model(settings.model).name,
                "dtype": dtype_name(base_dtype(job.base)),
                "device": str(job.device),
                "parameters": job.num_parameters,
                "data": job.corpus.report.to_dict(),
            },
            "environment": environment(),
            "method": run.entry.name,
            "learning_rate": run.plan.learning_rate,
            "trainable_at_start": progress.trainable_at_start,
            "trainable_at_end": count(trainable_parameters(run.model)),
            "seconds": sum(progress.step_seconds),
            "step_seconds": progress.step_seconds,
            "losses": progress.losses,
            "skipped_steps": progress.skipped_steps,
            "ended_early": progress.ended_early,
            "held_out": [each.to_dict() for each in evaluations(progress)],
            "held_out_before": evaluations(progress)[0].to_dict(),
            "held_out_after": evaluation_at(progress, saved_step).to_dict(),
            "saved_step": saved_step,
            "saved_to": str(job.out / str(run.entry.saved_name)),
        }


def _record_trainable(job: Job, run: TrainingRun, display: Display) -> None:
    """The Trainer evaluates before the first step, by the loss that it trains with."""
    run.progress.trainable_at_start = count(trainable_parameters(run.model))


def results_table(
    what: str, rows: dict[str, tuple[str, str]], before: Evaluation, after: Evaluation, caption: str
) -> Table:
    """The loss and each score, before and after training.

    Args:
        what: heading of the first column.
        rows: label and format of each score, by its name.
    """
    table = Table(
        caption=Text(caption), caption_justify="left", box=box.SIMPLE_HEAD, show_edge=False
    )
    table.add_column(what)
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_row("loss", f"{before.loss:.4f}", f"{after.loss:.4f}")
    for name, (label, kind) in rows.items():
        table.add_row(label, *(format(each.scores[name], kind) for each in (before, after)))
    return table
