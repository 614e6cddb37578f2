"""--fsdp: the processes share the model's parameters, frozen and trained ones (torch's FSDP2).

Every process reads the base into its host's memory, adapts it and keeps its part. A layer is
gathered where it runs; frozen weights keep their dtype, so a bf16 base costs bf16.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lowrank_ext import registry
from lowrank_ext.cli.errors import UserError
from lowrank_ext.cli.processes import num_processes

if TYPE_CHECKING:
    from lowrank_ext.cli.settings import Settings


def check_fsdp(settings: "Settings") -> None:
    """Raises UserError for what --fsdp cannot be combined with."""
    if num_processes() == 1:
        raise UserError(
            "--fsdp shares the model among several processes, got one; start them by torchrun "
            "--nproc-per-node N -m lowrank_ext finetune …; a run is continued by one with --no-fsdp"
        )
    if settings.compare:
        raise UserError("--fsdp trains one method, got --compare; give --method")
    staged = {recipe.name for recipe in registry.recipes() if recipe.training.stages}
    known = [recipe.name for recipe in registry.recipes() if recipe.name not in staged]
    if settings.methods[0] not in known:
        raise UserError(
            f"--fsdp: --method must be one of {', '.join(known)}, got {settings.methods[0]}"
        )
    for option, refused in (
        ("--quantize", settings.quantize is not None),
        ("--compile", settings.compile),
        ("--early-stop", settings.early_stop is not None),
        ("--dtype fp16", settings.dtype == "fp16"),
        (f"--optimizer {settings.optimizer}", settings.optimizer != "adamw"),
    ):
        if refused:
            raise UserError(f"{option} and --fsdp do not go together; give one of them")


def shard(model: Any, device: torch.device) -> None:
    """Shares the parameters of a model, which are on the CPU, among all processes, in place.

    Raises:
        UserError: the model does not name its layers, what trains is not of one dtype, or
            transformers is too old to train a model that is shared already.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import PreTrainedModel

    if not hasattr(PreTrainedModel, "is_distributed_loading_by_transformers"):
        raise UserError("--fsdp needs a newer transformers: pip install -U transformers")
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.requires_grad}
    if len(dtypes) > 1:
        raise UserError(
            f"--fsdp: what trains must have one dtype, got {' and '.join(sorted(dtypes))}; give "
            "--dtype fp32 or --adapter-dtype base"
        )
    mesh = init_device_mesh(device.type, (num_processes(),))
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # transformers' Trainer then leaves the model as it is.
    model._is_distributed_loading_by_transformers = True


def _layers(model: Any) -> list[nn.Module]:
    """The model's transformer layers, which are gathered one after another."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise UserError(
            f"--fsdp: {type(model).__name__} does not say which of its modules are layers "
            "(_no_split_modules)"
        )
    return layers
