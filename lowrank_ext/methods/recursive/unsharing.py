"""An ordinary model of L layers from a recursive one."""

import copy
from typing import Any

import torch
from torch import nn

from lowrank_ext.methods.recursive.files import without_init
from lowrank_ext.methods.recursive.model import CONFIG_KEY, Loops
from lowrank_ext.methods.recursive.relaxed_linear import RelaxedLinear


@torch.no_grad()
def unshare(model: nn.Module) -> Any:
    """A model of the source's class with L separate layers, for plain transformers and servers.

        W_l = W' + lora_b_l lora_a_l, summed in fp32 and rounded once

    Returns:
        A new model that shares no memory with ``model``, on its devices and in its mode.

    Raises:
        TypeError: the model is not recursive.

    Examples:
        >>> lr.recursive.unshare(model).save_pretrained("plain")
    """
    decoder: Any = Loops(model, "unshare").decoder
    recursive = decoder.model
    config = copy.deepcopy(recursive.config)
    delattr(config, CONFIG_KEY)
    plain = without_init(type(recursive).own_class, config, recursive.dtype)
    merged = {
        f"{path}.weight": module
        for path, module in recursive.named_modules(remove_duplicate=False)
        if isinstance(module, RelaxedLinear)
    }
    target = plain.state_dict(keep_vars=True)
    for name, value in recursive.state_dict(keep_vars=True).items():
        if name in target:
            module = merged.get(name)
            new = value.detach().clone() if module is None else module.merged_weight()
            target[name].data = new
    plain.generation_config = copy.deepcopy(recursive.generation_config)
    plain.tie_weights()
    return plain.train(recursive.training)
