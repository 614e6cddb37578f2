"""Gains of norms, seen from the linears that read them.

A linear that reads a norm multiplies by its gain: y = W diag(g) n. Layers of a position share one
gain g', so an adapter that is to give back W_l diag(g_l) has to make up for the gain too.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lowrank_ext.methods.recursive.structure import Decoder


def norms_before_linears(decoder: Decoder) -> dict[str, str]:
    """Path of the norm whose output a linear reads, by path of the linear in a layer.

    Found by one call of the model on two tokens, in which outputs of norms and inputs of linears
    are compared. A linear that reads anything else is left out.
    """
    layer = decoder.layers[0]
    outputs: list[tuple[str, Tensor]] = []
    found: dict[str, str] = {}

    def keep(path: str, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.append((path, output))

    def compare(path: str, arguments: tuple[Any, ...]) -> None:
        for norm, output in outputs:
            if arguments and arguments[0] is output:
                found[path] = norm

    with without_hooks(decoder.model):
        for path, module in layer.named_modules():
            if is_norm(module):
                hook = lambda m, args, out, p=path: keep(p, out)  # noqa: E731
                module.register_forward_hook(hook)
            elif type(module) is nn.Linear:
                pre_hook = lambda m, args, p=path: compare(p, args)  # noqa: E731
                module.register_forward_pre_hook(pre_hook)
        _call_once(decoder.model)
    return found


@contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Forward hooks of all modules are as before after this block, in which there are none."""
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    before = [
        (module, kind, dict(getattr(module, kind))) for module in model.modules() for kind in kinds
    ]
    for module, kind, _ in before:
        getattr(module, kind).clear()
    try:
        yield
    finally:
        for module, kind, hooks in before:
            getattr(module, kind).clear()
            getattr(module, kind).update(hooks)


def is_norm(module: nn.Module) -> bool:
    """Whether the module has a gain, ``weight`` [D], perhaps a bias [D], and nothing else."""
    parameters = dict(module.named_parameters())
    return (
        not list(module.children())
        and "weight" in parameters
        and set(parameters) <= {"weight", "bias"}
        and all(parameter.dim() == 1 for parameter in parameters.values())
    )


@torch.no_grad()
def _call_once(model: nn.Module) -> None:
    """In evaluation mode, so that nothing is drawn; every module's mode is as before after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    tokens = torch.zeros(1, 2, dtype=torch.int64, device=embedding.weight.device)
    try:
        model(input_ids=tokens, use_cache=False)
    finally:
        for module, mode in modes:
            module.training = mode


def gain_of(norm: nn.Module, parameters: Mapping[str, Tensor]) -> Tensor:
    """The gain [D] of a norm with these parameters, in fp32 (fp64 for fp64), up to signs and a
    factor that do not depend on them.

    Measured on a row of 1 and -1, so that it does not matter whether it is weight or 1 + weight.
    """
    wide = torch.promote_types(parameters["weight"].dtype, torch.float32)
    values = {name: value.detach().to(wide) for name, value in parameters.items()}
    if "bias" in values:
        values["bias"] = torch.zeros_like(values["bias"])
    row = torch.ones_like(values["weight"])
    row[::2] = -1
    gain: Tensor = functional_call(norm, values, (row.unsqueeze(0),))
    return gain.squeeze(0)
