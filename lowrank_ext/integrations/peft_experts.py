"""AcceleratedExperts: the forward that ``lr.accelerate`` gives to PEFT's wrappers of stacked expert
weights (``target_parameters``)."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lowrank_ext.integrations.peft_layer import AcceleratedLoRA, adapter_not_covered, say
from lowrank_ext.nn.base_layer import is_hooked
from lowrank_ext.nn.experts import ExpertBranch, experts_output, no_branches_because


class AcceleratedExperts(AcceleratedLoRA):
    """Mix-in before PEFT's ParamWrapper: ``experts_output`` with the branches of all wrappers.

    PEFT nests a wrapper for each weight, and each adds lora_B lora_A of all experts to its weight
    for the call. Here the outermost wrapper runs the experts module with a branch for every active
    adapter of every wrapper inside; the others are not called. PEFT's own forward runs for disabled
    and merged adapters, and where ``experts_not_covered`` gives a reason.
    """

    prefix = ""  # PEFT looks for wrappers by the name of their class

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of the experts module, [T, hidden] in x's dtype."""
        wrappers = list(_wrappers(self))
        switched_off = any(wrapper.disable_adapters or wrapper.merged for wrapper in wrappers)
        active = [(w, name) for w in wrappers for name in w.active_adapters if name in w.lora_A]
        if switched_off or not active:
            return self._peft_forward(x, *args, **kwargs)
        because = experts_not_covered(self) or _call_not_covered(x, args, kwargs)
        because = because or next(filter(None, (adapter_not_covered(*each) for each in active)), "")
        if because:
            say(because)
            return self._peft_forward(x, *args, **kwargs)
        branches: dict[str, list[ExpertBranch]] = {}
        for wrapper, name in active:
            branches.setdefault(wrapper.parameter_name, []).append(_branch(wrapper, name))
        return experts_output(wrappers[-1].base_layer, branches, x, *args)


def experts_not_covered(wrapper: nn.Module) -> str:
    """Why a ParamWrapper keeps PEFT's forward, by itself or by those inside, or ""."""
    wrappers = list(_wrappers(wrapper))
    experts = wrappers[-1].base_layer
    if "forward" in vars(wrapper):
        return "a forward was put on the layer itself"
    if any(is_hooked(inside) for inside in (*wrappers[1:], experts)):
        return "hooks, or a forward, were put on a module inside of it"
    for each in wrappers:
        if because := no_branches_because(experts, each.parameter_name):
            return f"adapts {because}"
        if each.num_experts == 1:
            return "adapts a stack of one expert"
    return ""


def _call_not_covered(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    if len(args) != 2 or kwargs:
        return "a call of the experts by other arguments than x, indices and weights"
    return "inputs on the meta device" if x.is_meta else ""


def _wrappers(wrapper: Any) -> Iterator[Any]:
    """The wrapper and those inside of it."""
    while hasattr(wrapper, "parameter_name"):
        yield wrapper
        wrapper = wrapper.base_layer


def _branch(wrapper: Any, name: str) -> ExpertBranch:
    """An adapter of a wrapper: PEFT's lora_A [E r, K] and lora_B [N, r E] as stacks."""
    lora_a, lora_b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
    stacked_a = lora_a.unflatten(0, (wrapper.num_experts, -1))
    stacked_b = lora_b.unflatten(1, (-1, wrapper.num_experts)).permute(2, 0, 1)
    return ExpertBranch(stacked_a, stacked_b.contiguous(), wrapper.scaling[name])
