"""Export as an ordinary LoRA of the same rank, for PEFT or for diffusers."""

import os
from pathlib import Path

import torch
from torch import Tensor, nn

from lowrank_ext.adapter_files import write_tensor_file
from lowrank_ext.checkpoint import save_as_lora
from lowrank_ext.checks import check_choice
from lowrank_ext.methods.set_and_sequence.module import BasisLoRALinear
from lowrank_ext.methods.set_and_sequence.stages import adapted_config, basis_modules
from lowrank_ext.sharding import is_sharded

# The name that diffusers looks for in a directory.
DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"


def export_lora(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    format: str = "peft",
    component: str = "transformer",
) -> None:
    """Write identity and residuals at their present scales into ``path``, as one ordinary LoRA.

    They share the basis, so the rank of their sum is that of each. The model is not changed.

    Args:
        path: a directory, created if missing.
        format: ``"peft"``: adapter_config.json and adapter_model.safetensors, for
            ``PeftModel.from_pretrained`` and ``lr.load_adapter``. ``"diffusers"``:
            pytorch_lora_weights.safetensors, for ``load_lora_weights`` of a pipeline and
            ``load_lora_adapter`` of a model; the scaling is multiplied into lora_B, because not
            every version of diffusers reads it from that file.
        component: name of the model in its pipeline, the prefix of the keys for diffusers.

    Raises:
        ValueError: the model was not adapted with BasisLoRAConfig, format is neither of the two, or
            the file cannot hold the adapter (modules_to_save in diffusers' format, sharded
            weights).
        OSError: the files cannot be written. The directory holds what it held before.

    Examples:
        >>> lr.motion.export_lora(model, "dance", format="diffusers")
        >>> pipeline.load_lora_weights("dance")
    """
    caller = "export_lora"
    check_choice(format, ("peft", "diffusers"), caller, "format")
    config = adapted_config(model, caller)
    modules = basis_modules(model, caller)
    for where, module in modules.items():
        if is_sharded(module.lora_a):
            raise ValueError(f"{caller}: {where} must not be sharded")
    if format == "peft":
        save_as_lora(model, path, caller)
        return
    if config.modules_to_save:
        raise ValueError(
            f"{caller}: modules_to_save must be empty for format='diffusers', got "
            f"{list(config.modules_to_save)}"
        )
    tensors: dict[str, Tensor] = {}
    for where, module in modules.items():
        lora_a, lora_b = _factors(module)
        tensors[f"{component}.{where}.lora_A.weight"] = lora_a
        tensors[f"{component}.{where}.lora_B.weight"] = lora_b
    write_tensor_file(Path(path) / DIFFUSERS_NAME, tensors)


@torch.no_grad()
def _factors(module: BasisLoRALinear) -> tuple[Tensor, Tensor]:
    """lora_a and scaling · lora_b on the CPU, copies."""
    lora_a, lora_b = module.branch_factors(training=False)
    scaled = module.scaling * lora_b if module.scaling != 1 else lora_b
    return lora_a.cpu().clone().contiguous(), scaled.cpu().clone().contiguous()
