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
from lowrank_ext.cli.errors import UserError
from lowrank_ext.cli.models import find_model, resolve_device
from lowrank_ext.cli.optimizers import (
    LOGGERS,
    LOGGERS_WITH_NAMES,
    OPTIMIZERS,
    SCHEDULES,
    check_optimizer,
    require_package,
    takes_betas,
    takes_eps,
)
from lowrank_ext.cli.quantization import NOT_QUANTIZED, QUANTIZATIONS
from lowrank_ext.cli.targets import parse_layers, parse_targets
from lowrank_ext.files import quoted

if TYPE_CHECKING:
    from lowrank_ext.cli.settings import Settings

ADAPTER_DTYPES = ("fp32", "bf16", "base")
FLASH = "flash_attention_2"
ATTENTIONS = ("auto", "sdpa", "eager", FLASH)


def check_numbers(settings: "Settings") -> None:
    """Raises UserError for a number outside its range."""
    for option, value, least in (
        ("--rank", settings.rank, 1),
        ("--batch", settings.batch, 1),
        ("--accumulate", settings.accumulate, 1),
        ("--eval-batches", settings.eval_batches, 1),
        ("--eval-every", settings.eval_every, 1),
        ("--early-stop", settings.early_stop, 1),
        ("--save-every", settings.save_every, 0),
        ("--keep", settings.keep, 1),
        ("--log-every", settings.log_every, 1),
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
    check_positive("--eps", settings.eps)
    check_positive("--neftune", settings.neftune)
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
    if settings.revision is not None:
        find_model(settings.model, settings.revision)
    for option, value, choices in (
        ("--dtype", settings.dtype, DTYPES),
        ("--adapter-dtype", settings.adapter_dtype, ADAPTER_DTYPES),
        ("--quantize", settings.quantize, (NOT_QUANTIZED, *QUANTIZATIONS)),
        ("--attention", settings.attention, ATTENTIONS),
        ("--schedule", settings.schedule, SCHEDULES),
        *(("--log-to", name, tuple(LOGGERS)) for name in settings.log_to),
    ):
        if value is not None:
            check_choice(option, value, choices)
    check_optimizer(settings.optimizer)
    for name in settings.log_to:
        module, package = LOGGERS[name]
        require_package(f"--log-to {name}", package, module)


def check_combinations(settings: "Settings") -> None:
    """Raises UserError for an option that another one leaves without effect."""
    for option, value, takes in (
        ("--betas", settings.betas, takes_betas),
        ("--eps", settings.eps, takes_eps),
    ):
        if value and not takes(settings.optimizer):
            known = ", ".join(name for name in OPTIMIZERS if takes(name))
            raise UserError(f"{option} is of {known}; the run has --optimizer {settings.optimizer}")
    if settings.min_lr and settings.schedule != "cosine":
        raise UserError(f"--min-lr is of --schedule cosine, got {settings.schedule}")
    if settings.log_every > 1 and not settings.log_to:
        raise UserError("--log-every is of --log-to, which the run has not")
    if settings.run_name is not None and not set(LOGGERS_WITH_NAMES) & set(settings.log_to):
        raise UserError(
            f"--run-name is of --log-to {', '.join(LOGGERS_WITH_NAMES)}; the run has "
            f"{', '.join(settings.log_to) or 'none'}"
        )
    if settings.neftune is not None and settings.compile:
        raise UserError("--neftune adds noise by a hook, which --compile leaves out; give one")


def check_layers(settings: "Settings") -> None:
    """Raises UserError for --layers that are no numbers, or without names in --targets: PEFT's
    rules."""
    if parse_layers(settings.layers) is None or not settings.adapter_recipes():
        return
    if isinstance(parse_targets(settings.targets), str):
        raise UserError(
            "--layers needs names in --targets, as in --targets q_proj,v_proj, got --targets "
            f"{settings.targets}"
        )


def check_rates(settings: "Settings") -> None:
    """Raises UserError for --betas and --min-lr that are no rates."""
    if settings.betas:
        try:
            betas = [float(beta) for beta in settings.betas]
        except ValueError:
            betas = []
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise UserError(
                "--betas must be two numbers of at least 0 and below 1, as 0.9,0.95, got "
                f"{quoted(','.join(settings.betas))}"
            )
    if not 0 <= settings.min_lr < 1:
        raise UserError(
            "--min-lr must be a fraction of the peak, at least 0 and below 1, got "
            f"{settings.min_lr}"
        )
