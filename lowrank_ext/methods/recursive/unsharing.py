"""An ordinary model of L layers from a recursive one."""

import copy
from typing import Any

import torch
from torch import nn

from lowrank_ext.methods.recursive.files import without_init
from lowrank_ext.methods.recursive.model import CONFIG_KEY, Loops
from lowrank_ext.methods.recursive.relaxed_linear import RelaxedLinear
from lowrank_ext.methods.recursive.source_checks import check_bare


@torch.inference_mode(False)  # whose tensors could not train
@torch.no_grad()
def unshare(model: nn.Module) -> Any:
    """A model of the source's class with L separate layers, for plain transformers and servers.

        W_l = W' + lora_b_l lora_a_l, summed in fp32 and rounded once

    Returns:
        A new model that shares no memory with ``model``, on its devices, in its mode, with a
        gradient where that one has it.

    Raises:
        TypeError: the model is not recursive.
        ValueError: it carries adapters of ``lowrank_ext.adapt`` or PEFT.

    Examples:
        >>> lr.recursive.unshare(model).save_pretrained("plain")
    """
    caller = "unshare"
    recursive: Any = Loops(model, caller).decoder.model
    check_bare(recursive, caller)
    config = copy.deepcopy(recursive.config)
    delattr(config, CONFIG_KEY)
    plain = without_init(type(recursive).own_class, config, recursive.dtype)
    for path, module in recursive.named_modules():
        own = plain.get_submodule(path)
        for name, buffer in module._buffers.items():
            own._buffers[name] = None if buffer is None else buffer.clone()
        for name, parameter in module._parameters.items():
            target = own._parameters.get(name)
            if target is None or parameter is None:
                continue  # an adapter's
            is_merged = isinstance(module, RelaxedLinear) and name == "weight"
            target.data = module.merged_weight() if is_merged else parameter.detach().clone()
            target.requires_grad_(parameter.requires_grad)
    plain.generation_config = copy.deepcopy(recursive.generation_config)
    plain.tie_weights()
    return plain.train(recursive.training)
