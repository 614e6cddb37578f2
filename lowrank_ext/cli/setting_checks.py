"""The checks of a run's settings, one option after another."""

from typing import TYPE_CHECKING

from lowrank_ext.cli.checks import (
    DTYPES,
    MOST_THREADS,
    check_at_least,
    check_choice,
    check_not_negative,
    check_positive,
)
from lowrank_ext.cli.data import FORMATS, PACKING, TRAIN_ON
from lowrank_ext.cli.errors import UserError
from lowrank_ext.cli.models import resolve_device
from lowrank_ext.cli.optimizers import LOGGERS, SCHEDULES, check_optimizer, require_package
from lowrank_ext.cli.quantization import QUANTIZATIONS

if TYPE_CHECKING:
    from lowrank_ext.cli.settings import Settings

ADAPTER_DTYPES = ("fp32", "bf16", "base")


def check_numbers(settings: "Settings") -> None:
    """Raises UserError for a number outside its range."""
    for option, value, least in (
        ("--rank", settings.rank, 1),
        ("--batch", settings.batch, 1),
        ("--accumulate", settings.accumulate, 1),
        ("--seq-len", settings.seq_len, 2),
        ("--eval-batches", settings.eval_batches, 1),
        ("--eval-every", settings.eval_every, 1),
        ("--early-stop", settings.early_stop, 1),
        ("--save-every", settings.save_every, 0),
        ("--keep", settings.keep, 1),
    ):
        if value is not None:
            check_at_least(option, value, least)
    check_at_least("--seed", settings.seed, 0, most=2**40)
    if settings.threads is not None:
        check_at_least("--threads", settings.threads, 1, most=MOST_THREADS)
    check_positive("--alpha", settings.alpha)
    check_positive("--lr", settings.lr)
    check_not_negative("--weight-decay", settings.weight_decay)
    check_not_negative("--clip", settings.clip)
    if settings.dropout is not None and not 0 <= settings.dropout < 1:
        raise UserError(f"--dropout must be at least 0 and below 1, got {settings.dropout}")


def check_length(settings: "Settings") -> None:
    """Raises UserError unless the run has a length, and a warm-up that fits into it."""
    if settings.given_steps is not None and settings.epochs is not None:
        raise UserError("give --steps or --epochs, not both")
    if settings.given_steps is None and settings.epochs is None:
        raise UserError("give --steps or --epochs")
    if settings.given_steps is not None:
        check_at_least("--steps", settings.given_steps, 1)
    check_positive("--epochs", settings.epochs)
    check_not_negative("--warmup", settings.warmup)
    if settings.warmup >= 1 and settings.warmup != int(settings.warmup):
        raise UserError(
            "--warmup must be a fraction of the steps below 1 or a whole number of steps, got "
            f"{settings.warmup:g}"
        )
    if settings.given_steps is not None and settings.warmup > settings.given_steps:
        raise UserError(
            f"--warmup must be at most --steps {settings.given_steps}, got {settings.warmup:g}"
        )


def check_names(settings: "Settings") -> None:
    """Raises UserError for a name that is none of those that its option takes."""
    resolve_device(settings.device)
    for option, value, choices in (
        ("--dtype", settings.dtype, DTYPES),
        ("--adapter-dtype", settings.adapter_dtype, ADAPTER_DTYPES),
        ("--quantize", settings.quantize, QUANTIZATIONS),
        ("--schedule", settings.schedule, SCHEDULES),
        ("--format", settings.format, FORMATS),
        ("--train-on", settings.train_on, TRAIN_ON),
        ("--packing", settings.packing, PACKING),
        *(("--log-to", name, LOGGERS) for name in settings.log_to),
    ):
        if value is not None:
            check_choice(option, value, choices)
    check_optimizer(settings.optimizer)
    for name in settings.log_to:
        require_package(f"--log-to {name}", name)
