"""One method of a fine-tuning run: trained from the common start, measured, saved."""

import statistics
from collections.abc import Callable, Iterable
from operator import truediv
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank_ext.cli.display import Display, make_display
from lowrank_ext.cli.files import MEBIBYTE, exists, require_free_space
from lowrank_ext.cli.job import Job, rows_per_step
from lowrank_ext.cli.log import LOG
from lowrank_ext.cli.measure import PeakMemory, Timing, interleaved_timing, saved_bytes
from lowrank_ext.cli.methods import Entry, count, trainable_parameters
from lowrank_ext.cli.models import CausalLM
from lowrank_ext.cli.processes import on_main_process
from lowrank_ext.cli.quantization import keep_from_ddp
from lowrank_ext.cli.report import Result
from lowrank_ext.cli.run_file import RUN_FILE
from lowrank_ext.cli.sharded import shard
from lowrank_ext.cli.stopping import stop_if_requested
from lowrank_ext.cli.training.checkpoints import checkpoints
from lowrank_ext.cli.training.evaluation import check_start, count_experts, held_out_loss
from lowrank_ext.cli.training.progress import Progress
from lowrank_ext.cli.training.run import TrainingRun
from lowrank_ext.files import printable

TIMING_ROUNDS = 5
# Per parameter a run writes its value, two AdamW moments, an fp32 master and up to three statistics
# of a freezing schedule; two checkpoints exist while the old one is replaced.
_BYTES_PER_STORED_PARAMETER = 4 * 7


def run_frozen(job: Job, entry: Entry) -> Result:
    """Measures the base model: held-out loss, and the cost of forward + backward."""
    with display_for(job, entry) as display, job.stop.leaving_at_any_point():
        display.phase("evaluating")
        loss = held_out_loss(job.base, job.held_out)
        check_start(entry.name, loss, job.base)
        display.phase("measuring")
        result = on_main_process(lambda: measure_frozen(job, entry, loss))
        display.phase(f"held-out loss {loss:.4f}")
    stop_if_requested(job.stop, job.out, entry.name, 0, job.settings.steps)
    return result


def measure_frozen(job: Job, entry: Entry, loss: float) -> Result:
    """Measures the time of the base model, whose held-out loss is known."""
    with PeakMemory(job.device) as peak:
        # The frozen model is timed in both roles, hence half the rounds.
        timing = interleaved_timing(
            job.frozen_loss, job.frozen_loss, TIMING_ROUNDS // 2, lambda: job.stop.requested
        )
    milliseconds = statistics.mean((timing.milliseconds, timing.frozen_milliseconds))
    return Result(
        method=entry.name,
        learning_rate=0.0,
        trainable_at_start=0,
        trainable_at_end=0,
        saved_bytes_at_start=job.frozen_saved_bytes,
        saved_bytes_at_end=job.frozen_saved_bytes,
        frozen_saved_bytes=job.frozen_saved_bytes,
        peak_bytes=peak.num_bytes,
        peak_source=peak.source,
        forward_backward_ms=milliseconds,
        frozen_forward_backward_ms=milliseconds,
        forward_backward_ratio=1.0,
        optimizer_ms=None,
        tokens_per_second=None,
        skipped_steps=0,
        rows_per_step=rows_per_step(job.settings),
        held_out=[(0, loss)],
        losses=[],
        ended_early=False,
        saved_step=0,
        expert_load_at_start=None,
        expert_load_at_end=None,
        saved_to=None,
    )


def run_method(job: Job, entry: Entry, directory: Path) -> Result:
    """Trains one method from the common start or from its checkpoint, saves and measures it."""
    with display_for(job, entry) as display:
        with job.stop.leaving_at_any_point():
            run = start_run(job, entry, directory, display)
        with PeakMemory(job.device) as peak:
            finished = run.train()
        saved_step = run.progress.step
        if finished and job.settings.early_stop is not None:
            saved_step = run.load_best()
            report_best(run, saved_step, display)
        run.save(directory)
        stop_if_requested(job.stop, job.out, entry.name, run.progress.step, job.settings.steps)
        display.phase("measuring")
        with job.stop.leaving_at_any_point():
            result = measured(job, run, peak, saved_step)
        before, after = result.held_out[0][1], result.held_out_after
        display.phase(f"held-out loss {before:.4f} > {after:.4f}")
    stop_if_requested(job.stop, job.out, entry.name, run.progress.step, job.settings.steps)
    return result


def start_run(
    job: Job,
    entry: Entry,
    directory: Path,
    display: Display,
    make: Callable[..., TrainingRun] | None = None,
    begin: Callable[[Job, TrainingRun, Display], None] | None = None,
) -> TrainingRun:
    """A training from a checkpoint, or a new one, measured before its first step.

    Args:
        make: makes it of the adapted model; None: `make_run`.
        begin: measures a new one; None: `record_start`.
    """
    found = checkpoints(directory) if job.resume else []
    display.phase("continuing" if found else "preparing")
    model = adapted_model(job, entry, found[-1] if found else None)
    require_free_space(job.out, bytes_to_write(job, model))
    if job.settings.fsdp:
        shard(model, job.device)
    else:
        keep_from_ddp(model)
    if job.settings.compile:
        model.compile()
    run = (make or make_run)(job, entry, model, directory, display)
    if found:
        run.resume(found[-1])
    else:
        (begin or record_start)(job, run, display)
    LOG.info(
        "%s: from step %d, learning rate %g",
        entry.name,
        run.progress.step,
        job.settings.learning_rate(entry.name),
    )
    return run


def adapted_model(job: Job, entry: Entry, checkpoint: Path | None = None) -> CausalLM:
    """The model of a method, new or from a checkpoint, in training mode."""
    torch.manual_seed(job.settings.seed)
    model = job.training_copy(entry)
    # With --fsdp the model is the base itself.
    state = TensorState(() if job.settings.fsdp else job.base.parameters())
    if checkpoint is not None:
        model = entry.load(model, job.settings, checkpoint)
    elif job.settings.adapter is not None:
        model = entry.begin_with(model, job.settings, Path(job.settings.adapter))
    else:
        model = entry.build(model, job.settings)
    state.check_unchanged(entry.name)
    if job.settings.gradient_checkpointing:
        checkpoint_activations(model)
    return model.train()


def check_adapts(job: Job, entries: Iterable[Entry]) -> None:
    """Builds the model of every entry where a new run is about to replace an earlier one in `out`:
    what cannot be adapted is said while that is still whole. With --fsdp the base can be adapted
    once alone, and it is not done."""
    if job.resume or job.settings.fsdp or not exists(f"--out {job.out}", job.out / RUN_FILE):
        return
    for each in entries:
        if each.trains:
            require_free_space(job.out, bytes_to_write(job, adapted_model(job, each)))


class TensorState:
    """Notices when a tensor is written to: methods share the frozen model's."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.tensors = list(tensors)
        self.states = self._states()

    def _states(self) -> list[tuple[int, int, bool]]:
        return [(t.data_ptr(), t._version, t.requires_grad) for t in self.tensors]

    def check_unchanged(self, method: str) -> None:
        """Raises RuntimeError where a method has changed what it shares with the frozen model."""
        if self._states() != self.states:
            raise RuntimeError(f"{method} has changed the frozen model, which it must copy first")


def checkpoint_activations(model: CausalLM) -> None:
    """Layers keep their input alone for backward."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is not None:
        enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:  # the name before transformers 5.20
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def make_run(
    job: Job,
    entry: Entry,
    model: CausalLM,
    directory: Path,
    display: Display,
    trainer_class: Callable[..., Any] | None = None,
) -> TrainingRun:
    """The training of a model that the method has adapted, by finetune's trainer or another."""
    return TrainingRun(
        entry=entry,
        model=model,
        plan=job.plan(entry.name),
        settings=job.settings,
        corpus=job.corpus,
        collate=job.collate,
        held_out=job.held_out,
        directory=directory,
        tokenizer=job.tokenizer,
        stop=job.stop,
        on_step=reporter(display),
        on_checkpoint=lambda path: LOG.info("saved %s", printable(str(path))),
        trainer_class=trainer_class,
    )


def reporter(display: Display) -> Callable[[Progress], None]:
    """Sends the progress after a step to the display and the log."""

    def report(progress: Progress) -> None:
        display.update(progress)
        LOG.info(
            "step %d loss %.6f %.3f s",
            progress.step,
            progress.losses[-1],
            progress.step_seconds[-1],
        )

    return report


def bytes_to_write(job: Job, model: CausalLM) -> int:
    """An upper estimate of the disk space of adapter and checkpoints."""
    added = count(model.parameters()) - job.num_parameters
    trained = count(trainable_parameters(model))
    copies = job.settings.keep + 1
    return 16 * MEBIBYTE + copies * _BYTES_PER_STORED_PARAMETER * max(added, trained)


def record_start(job: Job, run: TrainingRun, display: Display) -> None:
    """Measures before the first step, without draws from training's random generator."""
    progress = run.progress
    progress.trainable_at_start = count(trainable_parameters(run.model))
    if not job.settings.fsdp:
        progress.saved_bytes_at_start = saved_bytes(run.model, job.loss_of(run.model, run.entry))
    display.phase("evaluating")
    run.evaluate()
    progress.expert_load_at_start = count_experts(run.model, job.held_out, run.training)


def report_best(run: TrainingRun, saved_step: int, display: Display) -> None:
    """Says which step --early-stop has saved, and whether it has ended the run."""
    ended = f"ended early after step {run.progress.step}, " if run.progress.ended_early else ""
    text = f"{ended}step {saved_step} has the best held-out loss and is saved"
    display.phase(text)
    LOG.info("%s: %s", run.entry.name, text)


def measured(job: Job, run: TrainingRun, peak: PeakMemory, saved_step: int) -> Result:
    """Measures bytes and time after the last step, in training mode, on `job.batch`: the first
    process while the others wait. A sharded model has no frozen one to be compared with."""
    experts = count_experts(run.model, job.held_out, run.training)
    if job.settings.fsdp:
        return result_of(job, run, peak, saved_step, experts, None, None)

    def measure() -> Result:
        loss = job.loss_of(run.model, run.entry)
        saved = saved_bytes(run.model.train(), loss)
        stop = job.stop
        timing = interleaved_timing(loss, job.frozen_loss, TIMING_ROUNDS, lambda: stop.requested)
        return result_of(job, run, peak, saved_step, experts, saved, timing)

    return on_main_process(measure)


def result_of(
    job: Job,
    run: TrainingRun,
    peak: PeakMemory,
    saved_step: int,
    experts: dict[str, list[int]] | None,
    saved: int | None,
    timing: Timing | None,
) -> Result:
    """What a method's training has given."""
    model, progress, name = run.model, run.progress, run.entry.saved_name
    return Result(
        method=run.entry.name,
        learning_rate=run.plan.learning_rate,
        trainable_at_start=progress.trainable_at_start,
        trainable_at_end=count(trainable_parameters(model)),
        saved_bytes_at_start=progress.saved_bytes_at_start,
        saved_bytes_at_end=saved,
        frozen_saved_bytes=job.frozen_saved_bytes,
        peak_bytes=peak.num_bytes,
        peak_source=peak.source,
        forward_backward_ms=timing and timing.milliseconds,
        frozen_forward_backward_ms=timing and timing.frozen_milliseconds,
        forward_backward_ratio=timing and timing.ratio,
        optimizer_ms=1e3 * statistics.median(progress.optimizer_seconds),
        tokens_per_second=statistics.median(map(truediv, progress.tokens, progress.step_seconds)),
        skipped_steps=progress.skipped_steps,
        rows_per_step=progress.rows_per_step,
        held_out=progress.held_out,
        losses=progress.losses,
        ended_early=progress.ended_early,
        saved_step=saved_step,
        expert_load_at_start=progress.expert_load_at_start,
        expert_load_at_end=experts,
        saved_to=None if name is None else str(run.directory / name),
    )


def display_for(job: Job, entry: Entry) -> Display:
    """The display of one method; its title counts the methods of a comparison."""
    names, name = job.settings.methods, entry.name
    title = f"[{names.index(name) + 1}/{len(names)}] {name}" if len(names) > 1 else name
    steps = job.settings.steps if entry.trains else 0
    return make_display(job.console, title, steps)
