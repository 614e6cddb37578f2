"""Names of optimizers and learning rate schedules: those of transformers' that need no arguments
of their own."""

from importlib.util import find_spec

from lowrank_ext.cli.errors import UserError, near_matches

OWN_OPTIMIZER = "adamw"  # on fp32 values, see Optimizer in training.py

_BITSANDBYTES = (
    "adamw_8bit",
    "adamw_bnb_8bit",
    "ademamix",
    "ademamix_8bit",
    "lion_32bit",
    "lion_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "rmsprop_bnb",
    "rmsprop_bnb_32bit",
    "rmsprop_bnb_8bit",
)

# The package that each needs, beside torch and transformers. Those of transformers that are left
# out need target modules (galore, apollo), update within backward (lomo), evaluate at other weights
# than they train (schedule_free), run on other devices (xla, npu), or need packages with few users.
OPTIMIZERS: dict[str, str | None] = {
    **dict.fromkeys(
        (OWN_OPTIMIZER, "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad")
    ),
    "rmsprop": None,
    **dict.fromkeys(_BITSANDBYTES, "bitsandbytes"),
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), "torchao"),
}

# Left out: those that need the steps of each part, or look at the loss. cosine takes --min-lr.
SCHEDULES = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
)

# Where transformers sends losses, and the module and the package that each needs. kubeflow is left
# out: a server that starts runs asks for it.
LOGGERS = {
    "azure_ml": ("azureml", "azureml-sdk"),
    "clearml": ("clearml", "clearml"),
    "codecarbon": ("codecarbon", "codecarbon"),
    "comet_ml": ("comet_ml", "comet-ml"),
    "dagshub": ("dagshub", "dagshub"),
    "dvclive": ("dvclive", "dvclive"),
    "flyte": ("flytekit", "flytekit"),
    "mlflow": ("mlflow", "mlflow"),
    "neptune": ("neptune", "neptune"),
    "swanlab": ("swanlab", "swanlab"),
    "tensorboard": ("tensorboard", "tensorboard"),
    "trackio": ("trackio", "trackio"),
    "wandb": ("wandb", "wandb"),
}
# Those of them that call a run by the name of --run-name.
LOGGERS_WITH_NAMES = ("comet_ml", "mlflow", "swanlab", "trackio", "wandb")


def takes_betas(optimizer: str) -> bool:
    """Whether --betas are of this optimizer."""
    return takes_eps(optimizer) or "lion" in optimizer


def takes_eps(optimizer: str) -> bool:
    """Whether --eps is of this optimizer."""
    return "adamw" in optimizer or "ademamix" in optimizer


def check_optimizer(name: str) -> None:
    """Raises UserError, with near matches, for an unknown name and for one whose package is not
    installed."""
    if name not in OPTIMIZERS:
        raise UserError(
            f"--optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}"
            f"{near_matches(name, list(OPTIMIZERS))}"
        )
    package = OPTIMIZERS[name]
    if package is not None:
        require_package(f"--optimizer {name}", package)


def require_package(what: str, package: str, module: str | None = None) -> None:
    """Raises UserError unless the package is installed.

    Args:
        module: what it is imported as, if by another name.
    """
    if find_spec(module or package) is None:
        raise UserError(f"{what} needs the package {package}: pip install {package}")
