"""`lowrank-ext recursive uptrain`: trains a converted model, with or without a teacher."""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import Dataset, default_collate

import lowrank_ext as lr
from lowrank_ext.cli.comparison import reporter
from lowrank_ext.cli.data.blocks import TokenBlocks, load_blocks, text_batch
from lowrank_ext.cli.display import Display, make_display
from lowrank_ext.cli.environment import environment
from lowrank_ext.cli.errors import UserError, as_user_error
from lowrank_ext.cli.files import (
    MEBIBYTE,
    check_outside,
    check_replaced,
    exists,
    prepare_output,
    read_json,
    require_free_space,
    write_bytes,
    write_json,
)
from lowrank_ext.cli.interrupts import StopRequest
from lowrank_ext.cli.log import LOG, log_file
from lowrank_ext.cli.methods import Entry
from lowrank_ext.cli.models import (
    CausalLM,
    LoadedModel,
    check_context,
    check_vocabulary,
    dtype_name,
    find_model,
    is_recursive,
    load_model,
    resolve_dtype,
)
from lowrank_ext.cli.recursive.convert import save
from lowrank_ext.cli.recursive.models import (
    has_source,
    load_recursive,
    num_bytes,
    num_loops,
    numel,
    read_source,
    write_source,
)
from lowrank_ext.cli.recursive.pictures import loss_picture
from lowrank_ext.cli.recursive.settings import UptrainSettings
from lowrank_ext.cli.report import human_count
from lowrank_ext.cli.settings import Settings
from lowrank_ext.cli.stopping import at_once, stop_if_requested
from lowrank_ext.cli.training.checkpoints import checkpoints, remove_checkpoints
from lowrank_ext.cli.training.evaluation import Batch
from lowrank_ext.cli.training.plan import Plan
from lowrank_ext.cli.training.run import TrainingRun
from lowrank_ext.files import printable

COMMAND = "recursive uptrain"
_NAME = "uptrain"
_SETTINGS = "settings.json"
_BEFORE = "held_out_before.json"
# A value, two AdamW moments and an fp32 master of each parameter, in two checkpoints while the old
# one is replaced, and the result.
_BYTES_PER_PARAMETER = 2 * 4 * 4 + 4


class Uptrained(Entry):
    """A recursive model, every parameter of which trains.

    Args:
        directory: where it was loaded from, whose record of the source its own directories get.
    """

    saved_name = "model"

    def __init__(self, name: str, directory: Path) -> None:
        super().__init__(name)
        self._has_source = has_source(directory)
        self._source = read_source(directory) if self._has_source else None

    def _build(self, model: CausalLM, settings: Settings) -> CausalLM:
        return model.train().requires_grad_(True)

    def _save(self, model: CausalLM, tokenizer: Any, directory: Path) -> None:
        save(model, tokenizer, directory)
        if self._has_source:
            write_source(directory, self._source)

    def _load(self, model: CausalLM, settings: Settings, path: Path) -> CausalLM:
        return self._build(lr.recursive.load(path), settings)


class TextRows(Dataset[Batch]):
    """Blocks of tokens [num_blocks, seq_len] as rows, every token of which is trained."""

    def __init__(self, blocks: Tensor) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> Batch:
        return text_batch(self.blocks[index])


@dataclass
class Text:
    """What a TrainingRun reads of the text."""

    train: TextRows
    text_digest: str

    def digest(self) -> str:
        """Identifies the tokens."""
        return self.text_digest


@dataclass
class Job:
    """What a run works with."""

    settings: UptrainSettings
    out: Path
    resume: bool
    console: Console
    stop: StopRequest
    loaded: LoadedModel
    teacher: CausalLM | None
    corpus: TokenBlocks
    text_digest: str
    held_out: list[Tensor]


def run(settings: UptrainSettings, out: Path, resume: bool, console: Console) -> None:
    """The whole command. Raises UserError for bad input and Interrupted after a clean stop."""
    if not resume:
        settings = with_teacher(settings)
        check_outside(out, settings.text)
        has_run = exists(f"--out {out}", out / _SETTINGS)
        inputs = [settings.directory, *settings.text]
        if settings.loss != "ce":
            inputs.append(find_model(settings.teacher).location)
        check_replaced(out, [out / Uptrained.saved_name], has_run, inputs)
    prepare_output(out)
    with log_file(out / "uptrain.log", resumed=resume), StopRequest() as stop:
        with at_once(out if resume else None, stop, COMMAND), stop.leaving_at_any_point():
            job = prepare(settings, out, resume, console, stop)
        with at_once(out, stop, COMMAND):
            train(job)


def stored_settings(out: Path) -> UptrainSettings:
    """The settings of the run in `out`."""
    if not exists(f"--resume: {out}", out / _SETTINGS):
        raise UserError(f"--resume: {out} holds no run to continue")
    return UptrainSettings.from_dict(read_json(out / _SETTINGS))


def extended(stored: UptrainSettings, steps: int, console: Console) -> UptrainSettings:
    """The settings with more steps."""
    console.print(
        f"{steps} steps instead of {stored.steps}: from here on the learning rate is that of a run "
        f"of {steps} steps, steps taken before keep theirs",
        soft_wrap=True,
    )
    return dataclasses.replace(stored, steps=steps)


def with_teacher(settings: UptrainSettings) -> UptrainSettings:
    """The settings with a teacher: without --teacher the model that the recursive one was converted
    from. Raises UserError where nothing says which that was, or it is gone."""
    directory = Path(settings.directory)
    # What is wrong with a directory that holds no recursive model, `load_recursive` says.
    if settings.loss == "ce" or settings.teacher is not None or not is_recursive(directory):
        return settings
    if not has_source(directory):
        raise UserError(
            f"{directory} does not say which model it was converted from; give --teacher, or train "
            "without one by --loss ce"
        )
    source = read_source(directory)
    if source is not None and os.path.isabs(source) and not exists("--teacher", Path(source)):
        raise UserError(
            f"{directory} was converted from {source}, which is gone; say by --teacher where that "
            "model is"
        )
    return dataclasses.replace(settings, teacher=source)


def prepare(
    settings: UptrainSettings, out: Path, resume: bool, console: Console, stop: StopRequest
) -> Job:
    """Loads models and text, with all checks that are possible before the first step."""
    dtype = resolve_dtype(settings.dtype)
    console.print(f"loading {settings.directory} in {dtype_name(dtype)}", markup=False)
    loaded = load_recursive(Path(settings.directory), settings.dtype)
    teacher = None if settings.loss == "ce" else _load_teacher(settings, loaded, console)
    for model in (loaded.model, teacher):
        if model is not None:
            check_context(model, settings.seq_len)
    corpus = load_blocks(settings.text, settings.field, loaded.tokenizer, settings.seq_len)
    check_vocabulary(loaded.model, int(max(corpus.train.max(), corpus.held_out.max())))
    require_free_space(out, 16 * MEBIBYTE + _BYTES_PER_PARAMETER * numel(loaded.model))
    if not resume:
        remove_checkpoints(out)
        (out / _BEFORE).unlink(missing_ok=True)
    write_json(out / _SETTINGS, settings.to_dict())
    held_out = corpus.held_out_batches(settings.batch, settings.eval_batches)
    job = Job(
        settings,
        out,
        resume,
        console,
        stop,
        loaded,
        teacher,
        corpus,
        corpus.digest(),
        held_out,
    )
    _describe(job)
    return job


def _load_teacher(settings: UptrainSettings, loaded: LoadedModel, console: Console) -> CausalLM:
    source = find_model(settings.teacher)
    console.print(f"loading the teacher {source.name}", markup=False)
    teacher = load_model(source, resolve_dtype(settings.dtype)).model.eval().requires_grad_(False)
    own, given = (
        model.get_output_embeddings().weight.shape[0] for model in (loaded.model, teacher)
    )
    if own != given:
        raise UserError(
            f"--teacher {source.name} must have the model's vocabulary of {own} tokens, got {given}"
        )
    return teacher


def _describe(job: Job) -> None:
    settings, model, corpus = job.settings, job.loaded.model, job.corpus
    held_out = sum(rows.numel() for rows in job.held_out)
    exits = f", exits {settings.exits:g} ({settings.exit_loss})" if settings.exits else ""
    job.console.print(
        f"{human_count(numel(model))} stored parameters in {num_loops(model)} loops, "
        f"{num_bytes(model) / MEBIBYTE:,.1f} MiB; loss {settings.loss}{exits}, learning rate "
        f"{settings.lr:g}, {torch.get_num_threads()} threads\n"
        f"{corpus.description}, {corpus.train.numel():,} tokens to train on, {held_out:,} held "
        f"out; {settings.steps} steps of {settings.batch} x {settings.seq_len} tokens",
        markup=False,
        soft_wrap=True,
    )


def train(job: Job) -> None:
    """Trains from the start or from the last checkpoint, saves, measures, reports."""
    settings, stop = job.settings, job.stop
    with make_display(job.console, _NAME, settings.steps) as display:
        with stop.leaving_at_any_point():
            trainer, before = start(job, display)
        trainer.train()
        step = trainer.progress.step
        trainer.save(job.out)
        stop_if_requested(stop, job.out, _NAME, step, settings.steps, COMMAND)
        display.phase("evaluating")
        with stop.leaving_at_any_point():
            after = lr.recursive.evaluate(trainer.model, job.held_out).to_dict()
        display.phase(f"held-out loss {before['losses'][-1]:.4f} > {after['losses'][-1]:.4f}")
    stop_if_requested(stop, job.out, _NAME, step, settings.steps, COMMAND)
    finish(job, trainer, before, after)


def start(job: Job, display: Display) -> tuple[TrainingRun, dict[str, Any]]:
    """A training from the last checkpoint or a new one; and what was measured before its first
    step."""
    settings, entry = job.settings, Uptrained(_NAME, Path(job.settings.directory))
    found = checkpoints(job.out) if job.resume else []
    display.phase("continuing" if found else "evaluating")
    torch.manual_seed(settings.seed)
    own = cast(Settings, settings)  # recipes read steps, seed and seq_len
    if found:
        run = make_run(job, entry, entry.load(job.loaded.model, own, found[-1]), display)
        run.resume(found[-1])
        before = read_json(job.out / _BEFORE)
        _check_measured(before, num_loops(run.model), job.out / _BEFORE)
    else:
        before = lr.recursive.evaluate(job.loaded.model, job.held_out).to_dict()
        write_json(job.out / _BEFORE, before)
        run = make_run(job, entry, entry.build(job.loaded.model, own), display)
        run.evaluate()
    LOG.info("from step %d, learning rate %g", run.progress.step, settings.lr)
    return run, before


def make_run(job: Job, entry: Entry, model: CausalLM, display: Display) -> TrainingRun:
    """The training of the model with the loss of uptraining."""
    from lowrank_ext.cli.recursive.trainer import UptrainTrainer

    settings = job.settings
    return TrainingRun(
        entry=entry,
        model=model,
        plan=Plan(
            steps=settings.steps,
            batch=settings.batch,
            seed=settings.seed,
            learning_rate=settings.lr,
            save_every=settings.save_every,
        ),
        settings=settings,
        corpus=Text(TextRows(job.corpus.train), job.text_digest),
        collate=default_collate,
        held_out=[text_batch(tokens) for tokens in job.held_out],
        directory=job.out,
        tokenizer=job.loaded.tokenizer,
        stop=job.stop,
        on_step=reporter(display),
        on_checkpoint=lambda path: LOG.info("saved %s", printable(str(path))),
        trainer_class=lambda *stage: UptrainTrainer(*stage, teacher=job.teacher),
    )


def _check_measured(values: dict[str, Any], loops: int, path: Path) -> None:
    losses = values.get("losses")
    fits = isinstance(losses, list) and len(losses) == loops
    if not fits or not all(isinstance(value, float) for value in losses or ()):
        raise UserError(f"{path}: losses must hold a number for each of the {loops} loops")


def finish(job: Job, trainer: TrainingRun, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Writes the report and the picture; prints what was gained and written."""
    progress, settings, out = trainer.progress, job.settings, job.out
    report = {
        "settings": settings.to_dict(),
        "model": {
            "recursive": trainer.model.recursive_config.to_dict(),
            "stored_parameters": numel(trainer.model),
            "stored_bytes": num_bytes(trainer.model),
            "dtype": dtype_name(trainer.model.dtype),
            "teacher": None if settings.loss == "ce" else find_model(settings.teacher).name,
            "train_tokens": job.corpus.train.numel(),
            "held_out_tokens": after["num_tokens"],
        },
        "environment": environment(),
        "seconds": sum(progress.step_seconds),
        "step_seconds": progress.step_seconds,
        "losses": progress.losses,
        "held_out": progress.held_out,
        "skipped_steps": progress.skipped_steps,
        "held_out_before": before,
        "held_out_after": after,
    }
    with as_user_error("the losses cannot be written", ValueError):
        write_json(out / "report.json", report)
    write_bytes(out / "loss.png", loss_picture(progress, before, after, settings.loss))
    for loop, (first, last) in enumerate(zip(before["losses"], after["losses"], strict=True)):
        job.console.print(f"loop {loop}: held-out loss {first:.4f} > {last:.4f}", markup=False)
    for name in ("model", "report.json", "loss.png", "uptrain.log"):
        job.console.print(f"wrote {out / name}", markup=False, soft_wrap=True)
