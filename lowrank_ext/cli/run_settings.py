"""The settings of a run: of the command line, of --config, or with --resume of the run itself."""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import TypeVar

import typer
from rich.console import Console

from lowrank_ext.cli.errors import UserError
from lowrank_ext.cli.files import exists, read_json
from lowrank_ext.cli.methods import entry
from lowrank_ext.cli.resumed import check_same_settings, given_names, with_config
from lowrank_ext.cli.run_file import RUN_FILE, read_run_file
from lowrank_ext.cli.settings import Settings, option_types
from lowrank_ext.cli.start_adapter import with_adapter
from lowrank_ext.cli.training.checkpoints import checkpoints
from lowrank_ext.cli.training.progress import PROGRESS_NAME

RESULT = "result.json"  # of a method that has been trained and measured

Kind = TypeVar("Kind", bound=Settings)


def chosen_settings(
    kind: type[Kind],
    context: typer.Context,
    config: Path | None,
    out: Path,
    resume: bool,
    console: Console,
) -> Kind:
    """The settings of a command's run, checked.

    Args:
        kind: the command's settings.
        context: with the options of the command line.
        config: the file of --config.
        out: the directory of the run.
    """
    options, given = with_config(context, config, option_types(kind))
    if options.get("adapter") is not None and not resume:
        asked_how = options["quantize"]
        options = with_adapter({**options, **kind.fixed}, given)
        if (how := options["quantize"]) != asked_how:
            console.print(
                f"--quantize {how}, as in the run of --adapter; --quantize none takes the base "
                "without",
                markup=False,
                soft_wrap=True,
            )
    settings = kind.from_options(options)
    if resume:
        asked, settings = settings, stored_settings(kind, out)
        settings.check_all_read(given)
        check_same_settings(given, asked.by_option(), settings.by_option())
        if "fsdp" in given:
            settings = dataclasses.replace(settings, fsdp=asked.fsdp)
        settings = extended(settings, asked, given, out, console)
    settings.check()
    settings.check_all_read(given, set(given) - set(given_names(context)))
    return settings


def stored_settings(kind: type[Kind], out: Path) -> Kind:
    """The settings of the run in `out`."""
    if not exists(f"--resume: {out}", out / RUN_FILE):
        raise UserError(f"--resume: {out} holds no run to continue")
    return kind.from_dict(read_run_file(out / RUN_FILE, "--resume", option_types(kind)))


def ended_early(directory: Path) -> bool:
    """Whether --early-stop has ended the training whose checkpoints are in ``directory``."""
    newest = checkpoints(directory)[-1:]
    return any(read_json(path / PROGRESS_NAME).get("ended_early") is True for path in newest)


def extended(
    stored: Kind, asked: Kind, given: Collection[str], out: Path, console: Console
) -> Kind:
    """The settings of the run in `out`, with more steps or epochs where these are given. Raises
    UserError for a method whose schedule depends on their number, and for a finished one without
    its last checkpoint."""
    unit = "steps" if stored.epochs is None else "epochs"
    was, now = (settings.by_option()[unit] for settings in (stored, asked))
    if unit not in given or now == was:
        return stored
    for method in stored.methods:
        found, directory = entry(method), stored.method_directory(out, method)
        fault = None
        if not found.training.can_be_extended:
            fault = f"what {method} freezes or begins depends on the number of steps"
        elif found.trains and (directory / RESULT).exists() and not checkpoints(directory):
            fault = f"{directory} holds no checkpoint to continue from"
        elif stored.early_stop is not None and ended_early(directory):
            fault = f"--early-stop has ended {method}"
        if fault is not None:
            raise UserError(
                f"--resume: --{unit} was {was:g}, got {now:g}, but {fault}; leave it out or start "
                "anew"
            )
    console.print(
        f"{now:g} {unit} instead of {was:g}: from here on the learning rate is that of a run of "
        f"{now:g} {unit}, steps taken before keep theirs",
        soft_wrap=True,
    )
    return dataclasses.replace(stored, given_steps=asked.given_steps, epochs=asked.epochs)
