"""AdaptedExperts: an experts module of a mixture with low-rank branches on its stacked weights."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lowrank_ext.nn.base_layer import Adapter
from lowrank_ext.nn.experts import ExpertBranch, StackedLinear, experts_output
from lowrank_ext.nn.low_rank_linear import LowRankLinear
from lowrank_ext.nn.merged_weight import without_gradient


class AdaptedExperts(Adapter):
    """Stands in the place of an experts module, with an adapter for each stacked weight chosen.

    The adapters are children with the names of the weights, ``gate_up_proj`` and ``down_proj``;
    ``base_layer`` is the experts module, with its parameters. State dict: the base's keys, and
    ``<weight>.lora_a``, ``<weight>.lora_b``.
    """

    base_layer: nn.Module

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.base_layer = experts
        self.train(experts.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, hidden] to [T, hidden]; the arguments of transformers' experts modules.

        ``experts_output`` with the adapters that are neither merged nor switched off. Without one
        the experts module itself runs.
        """
        adapters = self.adapters()
        branches = {
            name: [ExpertBranch(*adapter.branch_factors(self.training), adapter.scaling)]
            for name, adapter in adapters.items()
            if not (adapter.blocks or adapter.merged)
        }
        args = hidden_states, top_k_index, top_k_weights
        y: Tensor
        y = experts_output(self.base_layer, branches, *args) if branches else self.base_layer(*args)
        merged = next((adapter for adapter in adapters.values() if adapter.merged), None)
        return y if merged is None or not self.training else without_gradient(merged, y)

    def adapters(self) -> dict[str, LowRankLinear]:
        """The adapters by the names of their weights."""
        return {
            name: module
            for name, module in self._modules.items()
            if isinstance(module, LowRankLinear)
        }

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # A merged adapter refuses: then the base's weights, too, stay as they are.
        if not any(adapter.merged for adapter in self.adapters().values()):
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def adapted_experts(adapters: Mapping[StackedLinear, LowRankLinear]) -> dict[nn.Module, nn.Module]:
    """For each experts module with some of the stacked weights: the module to put in its place."""
    places: dict[nn.Module, nn.Module] = {}
    for weight, adapter in adapters.items():
        place = places.setdefault(weight.experts, AdaptedExperts(weight.experts))
        place.add_module(weight.name, adapter)
    return places


def places_of_adapters(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """For each adapter of a stacked weight: the module that stands in the place of its base."""
    return {
        adapter: module
        for module in model.modules()
        if isinstance(module, AdaptedExperts)
        for adapter in module.adapters().values()
    }
