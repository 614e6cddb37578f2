"""`lowrank-ext finetune`: load, train and measure each method from the same start, report."""

import warnings
from pathlib import Path

import torch
from rich.console import Console

from lowrank_ext.cli.comparison import check_adapts, run_frozen, run_method
from lowrank_ext.cli.dry_run import show
from lowrank_ext.cli.files import (
    cannot_write,
    check_outside,
    check_replaced,
    exists,
    prepare_output,
)
from lowrank_ext.cli.interrupts import StopRequest
from lowrank_ext.cli.job import Job, inputs_of, prepare, rows_per_step
from lowrank_ext.cli.log import LOG, hush_libraries, log_file
from lowrank_ext.cli.measure import release_memory
from lowrank_ext.cli.methods import Entry, base_dtype, entry
from lowrank_ext.cli.models import dtype_name, find_model, resolve_device
from lowrank_ext.cli.processes import connect, on_main_process
from lowrank_ext.cli.quantization import num_quantized
from lowrank_ext.cli.report import Result, read_result, results_table, write_report, write_result
from lowrank_ext.cli.run_file import RUN_FILE, write_run_file
from lowrank_ext.cli.run_settings import RESULT
from lowrank_ext.cli.settings import Settings
from lowrank_ext.cli.stopping import at_once
from lowrank_ext.cli.training.checkpoints import remove_checkpoints


def run(settings: Settings, out: Path, resume: bool, console: Console, preview: int = 0) -> None:
    """The whole command. Raises UserError for bad input and Interrupted after a clean stop.

    Args:
        preview: number of examples that are printed as the model sees them.
    """
    connect(resolve_device(settings.device))
    on_main_process(lambda: prepare_directory(settings, out, resume))
    with log_file(out / "finetune.log", resumed=resume), StopRequest() as stop:
        with at_once(out if resume else None, stop), stop.leaving_at_any_point():
            job = prepare(settings, out, resume, console, stop)
            if preview:
                job.corpus.preview(preview, console)
            check_adapts(job, map(entry, settings.methods))
        store_settings(job)
        results = [run_or_reuse(job, method) for method in settings.methods]
        on_main_process(lambda: finish(job, results))


def prepare_directory(settings: Settings, out: Path, resume: bool) -> None:
    """Makes `out`. Raises UserError where the run cannot write, or would replace what is not of a
    run."""
    if not resume:
        check_outside(out, [*settings.text, *settings.eval])
        check_replaced(
            out,
            results_of(settings, out),
            exists(f"--out {out}", out / RUN_FILE),
            inputs_of(settings),
        )
    prepare_output(out)


def estimate(settings: Settings, out: Path, console: Console, preview: int = 0) -> None:
    """--dry-run: the table of the data, and what would train at which cost."""
    hush_libraries()
    with warnings.catch_warnings(), StopRequest() as stop, at_once(None, stop):
        warnings.simplefilter("ignore")  # there is no log for those of libraries
        with stop.leaving_at_any_point():
            job = prepare(settings, out, False, console, stop)
            if preview:
                job.corpus.preview(preview, console)
            show(job, console, [entry(method) for method in settings.methods])


def results_of(settings: Settings, out: Path) -> list[Path]:
    """The directories that a run writes, and replaces."""
    names = {method: entry(method).saved_name for method in settings.methods}
    return [settings.method_directory(out, method) / name for method, name in names.items() if name]


def store_settings(job: Job) -> None:
    """Stores the settings; of an earlier run that is not resumed, removes checkpoints and results
    first."""

    def store() -> None:
        if not job.resume:
            for method in job.settings.methods:
                directory = job.settings.method_directory(job.out, method)
                remove_checkpoints(directory)
                (directory / RESULT).unlink(missing_ok=True)
        write_run_file(job.out, job.settings.to_dict())  # --steps may have been raised

    on_main_process(store)


def run_or_reuse(job: Job, method: str) -> Result:
    """The stored result if a resumed run has one, else a new one. Raises Interrupted when the user
    stops."""
    directory = job.settings.method_directory(job.out, method)
    found = entry(method)
    stored = on_main_process(lambda: stored_result(job, found, directory))
    if stored is not None:
        job.console.print(f"{method}: already finished", markup=False)
        return stored
    release_memory()
    with at_once(job.out, job.stop):
        result = run_method(job, found, directory) if found.trains else run_frozen(job, found)
    on_main_process(lambda: write_result(directory / RESULT, result))
    if not found.training.can_be_extended:
        on_main_process(lambda: remove_checkpoints(directory))
    LOG.info("%s: finished, held-out loss %.6f", method, result.held_out_after)
    return result


def stored_result(job: Job, entry: Entry, directory: Path) -> Result | None:
    """The result of a method that a resumed run has finished; else its directory is made."""
    if job.resume and (directory / RESULT).is_file():
        result = read_result(directory / RESULT)
        finished = len(result.losses) == job.settings.steps or result.ended_early
        if not entry.trains or finished:
            return result
    with cannot_write(directory):
        directory.mkdir(parents=True, exist_ok=True)
    return None


def finish(job: Job, results: list[Result]) -> None:
    """Writes the report, prints the table and what was written."""
    settings = job.settings
    model = {
        "name": find_model(settings.model).name,
        "dtype": dtype_name(base_dtype(job.base)),
        "device": str(job.device),
        "quantize": settings.quantize,
        "parameters": job.num_parameters,
        "quantized_parameters": num_quantized(job.base),
        "weight_bytes": job.weight_bytes,
        "data": job.corpus.report.to_dict(),
    }
    paths = write_report(job.out, settings, model, results)
    where = f"{torch.get_num_threads()} threads" if job.device.type == "cpu" else str(job.device)
    linears = "" if settings.quantize is None else f", linears {settings.quantize}"
    title = (
        f"{model['name']}, {model['dtype']}{linears}, adapters {settings.adapter_dtype}, rank "
        f"{settings.rank}, dropout {settings.dropout_text()}, "
        f"{rows_per_step(settings)} rows of at most {settings.seq_len} tokens a step, "
        f"{settings.steps} steps, {where}"
    )
    job.console.print()
    job.console.print(results_table(results, title))
    saved = [Path(result.saved_to) for result in results if result.saved_to is not None]
    for path in [*saved, *paths, job.out / "finetune.log"]:
        job.console.print(f"wrote {path}", markup=False, soft_wrap=True)
