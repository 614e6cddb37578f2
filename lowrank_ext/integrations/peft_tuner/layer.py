"""A linear module with the adapters of one method, by name: what PEFT calls a tuner layer."""

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from lowrank_ext.config import AdapterConfig
from lowrank_ext.nn.base_layer import execution_device, linear_features
from lowrank_ext.nn.low_rank_linear import LowRankLinear
from lowrank_ext.nn.quantized import is_quantized
from lowrank_ext.registry import Method


class LowRankTunerLayer(nn.Module, BaseTunerLayer):
    """Takes the place of a linear module, ``base_layer``, and runs its active adapter.

    Each adapter is the method's own module over the same base, so that base and branch are one op.
    One adapter is active at a time.

    Attributes:
        base_layer: the module whose place this one has taken.
        <peft_type>_adapters: the adapters, by name.
    """

    method: ClassVar[Method]
    adapters_name: ClassVar[str]

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        features = linear_features(base_layer)
        assert features is not None  # the tuner has looked
        self.in_features, self.out_features = features
        self.base_layer = base_layer
        self.register_module(self.adapters_name, nn.ModuleDict())
        self.merged_adapters: list[str] = []
        self.dense_dtype = torch.get_default_dtype()  # of a quantized base that is made dense
        # Of adapters that do not train now: the parameters that did. Methods freeze some.
        self._trained: dict[str, list[str]] = {}
        self._awaiting: set[str] = set()
        self.train(base_layer.training)

    @property
    def adapters(self) -> nn.ModuleDict:
        adapters = self._modules[self.adapters_name]
        assert isinstance(adapters, nn.ModuleDict)
        return adapters

    def adapter(self, name: str) -> LowRankLinear:
        adapter = self.adapters[name]
        assert isinstance(adapter, LowRankLinear)
        return adapter

    def named_adapters(self) -> dict[str, LowRankLinear]:
        return {name: self.adapter(name) for name in self.adapters}

    # ---- adding and removing

    def check_beside(self, config: AdapterConfig) -> None:
        """Raise ValueError where the base weight cannot serve another adapter of ``config``.

        A residual init takes its start out of the weight that all adapters share.
        """
        module_class = self.method.module_class
        for name, other in self.named_adapters().items():
            same = (config.init, config.r) == (other.init, other.r)
            same = same and config.scaling_for("", self.in_features) == other.start_scaling
            starts = config.init in module_class.residual_inits or other.residual_taken
            if starts and not same:
                raise ValueError(
                    f"an adapter with init={config.init!r} must have rank, scaling and init of "
                    f"the adapter {name!r}, with which it shares the residual base weight, got "
                    f"r={config.r} beside r={other.r} and init={other.init!r}; use an init that "
                    "leaves the base alone, or lr.export_lora"
                )

    def add(self, name: str, config: AdapterConfig, initialize: bool) -> None:
        """Add an adapter; without ``initialize`` it is zero and waits for its values."""
        adapter = self.method.module_class.from_linear(self.base_layer, config, initialize=False)
        adapter.borrow(self.base_layer)
        other = self.with_residual()
        if initialize and other is not None:
            share_start(adapter, other)
        elif initialize:
            adapter.reset_adapter()
        else:
            self._awaiting.add(name)
        self.adapters[name] = adapter
        self.set_adapter(self.active_adapters)

    def delete_adapter(self, adapter_name: str) -> None:
        adapter = self.named_adapters().get(adapter_name)
        if adapter is not None and adapter.residual_taken:
            sharing = [a for a in self.named_adapters().values() if a.residual_taken]
            if len(sharing) == 1:
                adapter.restore_base()
        super().delete_adapter(adapter_name)
        self._trained.pop(adapter_name, None)
        self._awaiting.discard(adapter_name)

    def with_residual(self) -> LowRankLinear | None:
        """An adapter whose start has been taken out of the base weight, if there is one."""
        return next((a for a in self.named_adapters().values() if a.residual_taken), None)

    @torch.no_grad()
    def fill(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Give the adapter the values of a file, by attribute, and the base their residual."""
        adapter = self.adapter(name)
        if self.merged_adapters:
            raise ValueError(f"adapters must be unmerged to load one, got {self.merged_adapters}")
        device = execution_device(self.base_layer)
        own = adapter.adapter_tensors()
        given = {key: tensors[key].to(device, own[key].dtype) for key in own}
        holder = self.with_residual()
        if holder is not None and not holder.starts_as(given):
            others = [a for a in self.named_adapters().values() if a is not adapter]
            if any(other.residual_taken for other in others):
                raise ValueError(
                    f"the adapter {name!r} must have the residual base weight of the other "
                    "adapters, its initial factors are others; use lr.export_lora"
                )
        adapter.fill(given, holder)
        self.has_values(name)

    def has_values(self, name: str) -> None:
        """The adapter waits for its values no longer."""
        self._awaiting.discard(name)

    # ---- which adapter acts and trains

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len([name for name in names if name in self.adapters]) > 1:
            raise ValueError(
                f"set_adapter: one adapter of {self.method.peft_type} must be active, got {names}"
            )
        for name in self.adapters:
            self._set_training(name, name in names and not inference_mode)
        self._active_adapter = names

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in self.adapters:
            if name in names:
                self._set_training(name, requires_grad)

    def _set_training(self, name: str, trains: bool) -> None:
        parameters = dict(self.adapter(name).named_parameters())
        if trains:
            for key in self._trained.pop(name, ()):
                parameters[key].requires_grad_()
        elif name not in self._trained:
            self._trained[name] = [key for key, p in parameters.items() if p.requires_grad]
            for parameter in parameters.values():
                parameter.requires_grad_(False)

    def enable_adapters(self, enabled: bool) -> None:
        self._disable_adapters = not enabled

    # ---- merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put adapters into the base weight; inf and nan are refused, as with ``safe_merge``."""
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.adapters]
        residual = [n for n in (*self.merged_adapters, *names) if self.adapter(n).residual_taken]
        if len(residual) > 1:
            raise ValueError(
                "one adapter must be merged over a residual base weight, which lacks the start of "
                f"all of them once, got {residual}"
            )
        for name in names:
            self.check_valued(name)
            self.adapter(name).merge()
            self.merged_adapters.append(name)

    def merge_new(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        """``merge`` without PEFT's warning of adapters that are merged already."""
        names = self.active_adapters if adapter_names is None else adapter_names
        if new := [name for name in names if name not in self.merged_adapters]:
            self.merge(safe_merge, new)

    def unmerge(self, keep: int = 0) -> None:
        """Unmerge all but the first ``keep`` of the merged adapters."""
        while (
            len(self.merged_adapters) > keep
        ):  # the last one first: each keeps the weight it found
            self.adapter(self.merged_adapters.pop()).unmerge()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base module, with adapters merged in or as it was before the first adapter; a
        quantized one becomes dense where an adapter is merged."""
        if merge and is_quantized(self.base_layer):
            names = self.active_adapters if adapter_names is None else adapter_names
            names = [name for name in names if name in self.adapters]
            if len(names) > 1:
                raise ValueError(f"one adapter must be merged into a quantized base, got {names}")
            if names:
                self.check_valued(names[0])
                return self.adapter(names[0]).to_linear(True, self.dense_dtype)
            merge = False
        if merge:
            self.merge_new(safe_merge, adapter_names)
        else:
            self.unmerge()
            if (residual := self.with_residual()) is not None:
                residual.restore_base()
        base: nn.Module = self.base_layer
        return base

    # ---- forward

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., K] to [..., N] in x's dtype. Further arguments go to the base."""
        if self._disable_adapters:
            self.unmerge()
        active = [name for name in self.active_adapters if name in self.adapters]
        if self._disable_adapters or not (active or self.merged_adapters):
            residual = self.with_residual()
            if residual is not None:
                return residual.disabled_output(x, *args, **kwargs)
            base_out: Tensor = self.base_layer(x, *args, **kwargs)
            return base_out
        acting = (self.merged_adapters or active)[0]
        self.check_valued(acting)
        y: Tensor = self.adapters[acting](x, *args, **kwargs)
        return y

    def check_valued(self, name: str) -> None:
        """Raise RuntimeError where the adapter waits for the values of a file."""
        if name in self._awaiting:
            raise RuntimeError(
                f"the adapter {name!r} has no values: its config is from a file, whose values "
                "peft.PeftModel.from_pretrained(base, directory) or lr.load_adapter loads, and "
                "from_pretrained of transformers only for LoRA; for a new adapter make the config "
                "by lr.peft_config"
            )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if f"{prefix}base_layer.weight" not in state_dict:
            return
        for name, adapter in self.named_adapters().items():
            own = f"{prefix}{self.adapters_name}.{name}."
            if any(own + start in state_dict for start in adapter.residual_starts):
                adapter.residual_taken = True  # the weight that came along is the residual
                self.has_values(name)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        adapter = self.adapter(adapter_name)
        if not any(tensor.is_meta for tensor in adapter.adapter_tensors().values()):
            adapter.to(execution_device(self.base_layer) if device is None else device)


@torch.no_grad()
def share_start(adapter: LowRankLinear, other: LowRankLinear) -> None:
    """Start ``adapter`` where ``other`` started: it lacks the same branch in the base weight."""
    held = other.adapter_tensors()
    for name in (*other.residual_starts, *other.residual_constants):
        adapter.adapter_tensors()[name].copy_(held[name])
    adapter.begin_at_start()
    adapter.residual_taken, adapter.start_scaling = True, other.start_scaling


@functools.cache
def layer_class_for(method: Method) -> type[LowRankTunerLayer]:
    """The tuner layer of ``method``."""
    adapters_name = f"{method.peft_type.lower()}_adapters"
    name = f"{method.module_class.__name__}Layer"  # PEFT tells linear layers by "Linear"
    members = {
        "method": method,
        "adapters_name": adapters_name,
        "adapter_layer_names": (adapters_name,),
        "__module__": __name__,
    }
    made = type(name, (LowRankTunerLayer,), members)
    globals()[name] = made  # where pickle looks
    return made
