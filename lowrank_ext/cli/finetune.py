"""`lowrank-ext finetune`: load, train and measure each method from the same start, report."""

import copy
import dataclasses
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from lowrank_ext.cli.checkpoints import (
    checkpoints,
    remove_checkpoints,
    restore_trainer,
    save_checkpoint,
)
from lowrank_ext.cli.data.blocks import TokenBlocks, load_blocks
from lowrank_ext.cli.display import Display, make_display
from lowrank_ext.cli.errors import UserError
from lowrank_ext.cli.files import (
    MEBIBYTE,
    cannot_write,
    check_replaced,
    exists,
    prepare_output,
    require_free_space,
)
from lowrank_ext.cli.interrupts import StopRequest
from lowrank_ext.cli.log import LOG, log_file
from lowrank_ext.cli.measure import (
    PeakMemory,
    frozen_loss,
    interleaved_timing,
    release_memory,
    saved_bytes,
)
from lowrank_ext.cli.methods import Entry, base_dtype, count, entry, trainable_parameters
from lowrank_ext.cli.models import (
    CausalLM,
    LoadedModel,
    check_context,
    check_vocabulary,
    dtype_name,
    find_model,
    load_model,
    resolve_adapter_dtype,
    resolve_dtype,
)
from lowrank_ext.cli.report import (
    Result,
    human_count,
    read_result,
    results_table,
    write_report,
    write_result,
)
from lowrank_ext.cli.run_file import RUN_FILE, read_run_file, write_run_file
from lowrank_ext.cli.settings import Settings, option_types
from lowrank_ext.cli.stopping import at_once, stop_if_requested
from lowrank_ext.cli.training import (
    Events,
    Progress,
    Trainer,
    count_experts,
    held_out_loss,
    training_loss,
)
from lowrank_ext.files import printable

TIMING_ROUNDS = 5
_RESULT = "result.json"
# Per parameter a run writes its value, two AdamW moments, an fp32 master and up to three statistics
# of a freezing schedule; two checkpoints exist while the old one is replaced.
_BYTES_PER_STORED_PARAMETER = 2 * 4 * 7


@dataclass
class Job:
    """What all methods of a run share. `base` is never trained: methods train copies of it and are
    compared with it as the frozen model."""

    settings: Settings
    out: Path
    resume: bool
    console: Console
    stop: StopRequest
    base: CausalLM
    tokenizer: Any
    corpus: TokenBlocks
    text_digest: str
    held_out: list[Tensor]
    frozen_saved_bytes: int

    @property
    def batch(self) -> Tensor:
        """The batch of all measurements: the first one."""
        return self.corpus.train_batch(0, self.settings.batch, self.settings.seed)

    @property
    def num_parameters(self) -> int:
        return count(self.base.parameters())

    @property
    def tokens_per_step(self) -> int:
        return self.settings.batch * self.settings.seq_len

    def frozen_loss(self) -> Tensor:
        """Loss of the frozen model on `batch`."""
        return frozen_loss(self.base, self.batch)


def run(settings: Settings, out: Path, resume: bool, console: Console) -> None:
    """The whole command. Raises UserError for bad input and Interrupted after a clean stop."""
    if not resume:
        check_replaced(
            out,
            results_of(settings, out),
            exists(f"--out {out}", out / RUN_FILE),
            _inputs(settings),
        )
    prepare_output(out)
    with log_file(out / "finetune.log", append=resume), StopRequest() as stop:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        with at_once(out if resume else None, stop), stop.leaving_at_any_point():
            job = prepare(settings, out, resume, console, stop)
        results = [run_or_reuse(job, method) for method in settings.methods]
        finish(job, results)


def results_of(settings: Settings, out: Path) -> list[Path]:
    """The directories that a run writes, and replaces."""
    names = {method: entry(method).saved_name for method in settings.methods}
    return [settings.method_directory(out, method) / name for method, name in names.items() if name]


def _inputs(settings: Settings) -> list[str]:
    return [*settings.text, *([settings.model] if settings.model else [])]


def stored_settings(out: Path) -> Settings:
    """The settings of the run in `out`."""
    if not exists(f"--resume: {out}", out / RUN_FILE):
        raise UserError(f"--resume: {out} holds no run to continue")
    return Settings.from_dict(read_run_file(out / RUN_FILE, "--resume", option_types()))


def extended(stored: Settings, steps: int, out: Path, console: Console) -> Settings:
    """The settings of the run in `out` with more steps. Raises UserError for a method whose
    schedule depends on their number, and for a finished one without its last checkpoint."""
    for method in stored.methods:
        found, directory = entry(method), stored.method_directory(out, method)
        fault = None
        if not found.training.can_be_extended:
            fault = f"what {method} freezes or begins depends on the number of steps"
        elif found.trains and (directory / _RESULT).exists() and not checkpoints(directory):
            fault = f"{directory} holds no checkpoint to continue from"
        if fault is not None:
            raise UserError(
                f"--resume: --steps was {stored.steps}, got {steps}, but {fault}; leave it out or "
                "start anew"
            )
    console.print(
        f"{steps} steps instead of {stored.steps}: from here on the learning rate is that of a run "
        f"of {steps} steps, steps taken before keep theirs",
        soft_wrap=True,
    )
    return dataclasses.replace(stored, given_steps=steps)


def prepare(
    settings: Settings, out: Path, resume: bool, console: Console, stop: StopRequest
) -> Job:
    """Loads model and text, with all checks that are possible before the first step."""
    source = find_model(settings.model)
    dtype = resolve_dtype(settings.dtype)
    resolve_adapter_dtype(settings.adapter_dtype, dtype)
    console.print(f"loading {source.name} in {dtype_name(dtype)}", markup=False)
    loaded = load_model(source, dtype)
    check_context(loaded.model, settings.seq_len)
    corpus = load_blocks(settings.text, settings.field, loaded.tokenizer, settings.seq_len)
    check_vocabulary(loaded.model, int(max(corpus.train.max(), corpus.held_out.max())))
    if resume:
        write_run_file(out, settings.to_dict())  # --steps may have been raised
    else:
        start_over(settings, out)
    job = make_job(settings, out, resume, console, stop, loaded, corpus)
    describe(job)
    return job


def make_job(
    settings: Settings,
    out: Path,
    resume: bool,
    console: Console,
    stop: StopRequest,
    loaded: LoadedModel,
    corpus: TokenBlocks,
) -> Job:
    """Freezes the base model and measures the bytes that it keeps for backward."""
    base = loaded.model.requires_grad_(False)
    if settings.compile:
        base.compile()
    held_out = corpus.held_out_batches(settings.batch, settings.eval_batches)
    batch = corpus.train_batch(0, settings.batch, settings.seed)
    return Job(
        settings,
        out,
        resume,
        console,
        stop,
        base,
        loaded.tokenizer,
        corpus,
        corpus.digest(),
        held_out,
        saved_bytes(base, lambda: frozen_loss(base, batch)),
    )


def start_over(settings: Settings, out: Path) -> None:
    """Removes checkpoints and results of an earlier run, then stores the settings of this one."""
    for method in settings.methods:
        directory = settings.method_directory(out, method)
        remove_checkpoints(directory)
        (directory / _RESULT).unlink(missing_ok=True)
    write_run_file(out, settings.to_dict())


def describe(job: Job) -> None:
    """Prints two lines about model and text."""
    settings, corpus = job.settings, job.corpus
    held_out = sum(rows.numel() for rows in job.held_out)
    job.console.print(
        f"{human_count(job.num_parameters)} parameters, {torch.get_num_threads()} threads; "
        f"rank {settings.rank}, scaling {settings.scaling():g}, dropout {settings.dropout:g}, "
        f"{settings.targets}{_details(settings)}\n"
        f"{corpus.description}, {corpus.train.numel():,} tokens to train on, {held_out:,} held "
        f"out; {settings.steps} steps of {settings.batch} x {settings.seq_len} tokens",
        markup=False,
        soft_wrap=True,
    )


def _details(settings: Settings) -> str:
    """The methods' clauses for the line; equal ones appear once."""
    clauses = (recipe.describe(settings) for recipe in settings.recipes())
    return "".join(f"; {clause}" for clause in dict.fromkeys(clauses) if clause is not None)


def run_or_reuse(job: Job, method: str) -> Result:
    """The stored result if a resumed run has one, else a new one. Raises Interrupted when the user
    stops."""
    directory = job.settings.method_directory(job.out, method)
    found = entry(method)
    if job.resume and (directory / _RESULT).is_file():
        result = read_result(directory / _RESULT)
        if not found.trains or len(result.losses) == job.settings.steps:
            job.console.print(f"{method}: already finished", markup=False)
            return result
    with cannot_write(directory):
        directory.mkdir(parents=True, exist_ok=True)
    release_memory()
    with at_once(job.out, job.stop):
        result = run_method(job, found, directory) if found.trains else run_frozen(job, found)
    write_result(directory / _RESULT, result)
    if not found.training.can_be_extended:
        remove_checkpoints(directory)
    LOG.info("%s: finished, held-out loss %.6f", method, result.held_out[-1][1])
    return result


def run_frozen(job: Job, entry: Entry) -> Result:
    """Measures the base model: held-out loss, and the cost of forward + backward."""
    with display_for(job, entry) as display, job.stop.leaving_at_any_point():
        display.phase("evaluating")
        loss = held_out_loss(job.base, job.held_out)
        display.phase("measuring")
        with PeakMemory() as peak:
            # The frozen model is timed in both roles, hence half the rounds.
            timing = interleaved_timing(
                job.frozen_loss, job.frozen_loss, TIMING_ROUNDS // 2, lambda: job.stop.requested
            )
        milliseconds = statistics.mean((timing.milliseconds, timing.frozen_milliseconds))
        display.phase(f"held-out loss {loss:.4f}")
    stop_if_requested(job.stop, job.out, entry.name, 0, job.settings.steps)
    return Result(
        method=entry.name,
        learning_rate=0.0,
        trainable_at_start=0,
        trainable_at_end=0,
        saved_bytes_at_start=job.frozen_saved_bytes,
        saved_bytes_at_end=job.frozen_saved_bytes,
        frozen_saved_bytes=job.frozen_saved_bytes,
        peak_rss_bytes=peak.num_bytes,
        peak_rss_source=peak.source,
        forward_backward_ms=milliseconds,
        frozen_forward_backward_ms=milliseconds,
        forward_backward_ratio=1.0,
        optimizer_ms=None,
        tokens_per_second=None,
        skipped_steps=0,
        held_out=[(0, loss)],
        losses=[],
        expert_load_at_start=None,
        expert_load_at_end=None,
        saved_to=None,
    )


def run_method(job: Job, entry: Entry, directory: Path) -> Result:
    """Trains one method from the common start or from its checkpoint, saves and measures it."""
    with display_for(job, entry) as display:
        with job.stop.leaving_at_any_point():
            trainer = start_trainer(job, entry, directory, display)
        with PeakMemory() as peak:
            events = events_for(job.tokenizer, job.text_digest, job.stop, directory, display)
            trainer.train(job.corpus, job.held_out, events)
        entry.save(trainer.model, job.tokenizer, directory)
        stop_if_requested(job.stop, job.out, entry.name, trainer.progress.step, job.settings.steps)
        display.phase("measuring")
        with job.stop.leaving_at_any_point():
            result = measure_method(job, trainer, peak, directory)
        display.phase(f"held-out loss {result.held_out[0][1]:.4f} > {result.held_out[-1][1]:.4f}")
    stop_if_requested(job.stop, job.out, entry.name, trainer.progress.step, job.settings.steps)
    return result


def start_trainer(job: Job, entry: Entry, directory: Path, display: Display) -> Trainer:
    """A trainer from a checkpoint, or a new one, evaluated and measured before its first step."""
    settings = job.settings
    found = checkpoints(directory) if job.resume else []
    display.phase("continuing" if found else "preparing")
    torch.manual_seed(settings.seed)
    # A deep copy shares nothing with the frozen model and is not compiled yet.
    base = copy.deepcopy(job.base)
    if found:
        trainer = restore_trainer(entry, base, settings, found[-1], job.text_digest)
    else:
        trainer = Trainer(entry, entry.build(base, settings), settings)
    require_free_space(job.out, bytes_to_write(job, trainer.model))
    if settings.compile:
        trainer.model.compile()
    if not found:
        torch.manual_seed(settings.seed)  # dropout must not depend on the draws of the init
        record_start(job, trainer, display)
    LOG.info(
        "%s: from step %d, learning rate %g",
        entry.name,
        trainer.progress.step,
        settings.learning_rate(entry.name),
    )
    return trainer


def bytes_to_write(job: Job, model: CausalLM) -> int:
    """An upper estimate of the disk space of adapter and checkpoints."""
    added = count(model.parameters()) - job.num_parameters
    trained = count(trainable_parameters(model))
    return 16 * MEBIBYTE + _BYTES_PER_STORED_PARAMETER * max(added, trained)


def record_start(job: Job, trainer: Trainer, display: Display) -> None:
    """Measures before the first step, without draws from training's random generator."""
    trainer.progress.trainable_at_start = count(trainable_parameters(trainer.model))
    trainer.progress.saved_bytes_at_start = saved_bytes(
        trainer.model, lambda: training_loss(trainer.model, job.batch, trainer.training)[1]
    )
    display.phase("evaluating")
    trainer.evaluate(job.held_out)
    trainer.progress.expert_load_at_start = count_experts(
        trainer.model, job.held_out, trainer.training
    )


def events_for(
    tokenizer: Any, text_digest: str, stop: StopRequest, directory: Path, display: Display
) -> Events:
    """Events that send progress to the display and the log, and checkpoints to `directory`."""

    def on_step(progress: Progress) -> None:
        display.update(progress)
        LOG.info(
            "step %d loss %.6f %.3f s",
            progress.step,
            progress.losses[-1],
            progress.step_seconds[-1],
        )

    def on_checkpoint(trainer: Trainer) -> None:
        path = save_checkpoint(trainer, tokenizer, directory, text_digest)
        LOG.info("saved %s", printable(str(path)))

    return Events(on_step, on_checkpoint, stop)


def measure_method(job: Job, trainer: Trainer, peak: PeakMemory, directory: Path) -> Result:
    """Measures bytes and time after the last step, in training mode, on `job.batch`."""
    model, progress = trainer.model, trainer.progress

    def loss_of() -> Tensor:
        return training_loss(model, job.batch, trainer.training)[1]

    saved = saved_bytes(model, loss_of)
    timing = interleaved_timing(loss_of, job.frozen_loss, TIMING_ROUNDS, lambda: job.stop.requested)
    name = trainer.entry.saved_name
    return Result(
        method=trainer.entry.name,
        learning_rate=job.settings.learning_rate(trainer.entry.name),
        trainable_at_start=progress.trainable_at_start,
        trainable_at_end=count(trainable_parameters(model)),
        saved_bytes_at_start=progress.saved_bytes_at_start,
        saved_bytes_at_end=saved,
        frozen_saved_bytes=job.frozen_saved_bytes,
        peak_rss_bytes=peak.num_bytes,
        peak_rss_source=peak.source,
        forward_backward_ms=timing.milliseconds,
        frozen_forward_backward_ms=timing.frozen_milliseconds,
        forward_backward_ratio=timing.ratio,
        optimizer_ms=1e3 * statistics.median(progress.optimizer_seconds),
        tokens_per_second=job.tokens_per_step / statistics.median(progress.step_seconds),
        skipped_steps=progress.skipped_steps,
        held_out=progress.held_out,
        losses=progress.losses,
        expert_load_at_start=progress.expert_load_at_start,
        expert_load_at_end=count_experts(model, job.held_out, trainer.training),
        saved_to=None if name is None else str(directory / name),
    )


def display_for(job: Job, entry: Entry) -> Display:
    """The display of one method; its title counts the methods of a comparison."""
    names, name = job.settings.methods, entry.name
    title = f"[{names.index(name) + 1}/{len(names)}] {name}" if len(names) > 1 else name
    steps = job.settings.steps if entry.trains else 0
    return make_display(job.console, title, steps, job.tokens_per_step)


def finish(job: Job, results: list[Result]) -> None:
    """Writes the report, prints the table and what was written."""
    settings = job.settings
    model = {
        "name": find_model(settings.model).name,
        "dtype": dtype_name(base_dtype(job.base)),
        "parameters": job.num_parameters,
        "train_tokens": job.corpus.train.numel(),
        "held_out_tokens": sum(rows.numel() for rows in job.held_out),
    }
    paths = write_report(job.out, settings, model, results)
    title = (
        f"{model['name']}, {model['dtype']}, adapters {settings.adapter_dtype}, rank "
        f"{settings.rank}, dropout {settings.dropout:g}, batch {settings.batch} x "
        f"{settings.seq_len}, {settings.steps} steps, {torch.get_num_threads()} threads"
    )
    job.console.print()
    job.console.print(results_table(results, title))
    saved = [Path(result.saved_to) for result in results if result.saved_to is not None]
    for path in [*saved, *paths, job.out / "finetune.log"]:
        job.console.print(f"wrote {path}", markup=False, soft_wrap=True)
