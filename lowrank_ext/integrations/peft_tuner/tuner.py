"""A BaseTuner for each method: puts adapters on a model, and names their tensors in files."""

import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers
from torch import Tensor, nn

from lowrank_ext.adapt import (
    check_options,
    check_ranks,
    check_values,
    replace_modules,
    set_fused_encoders,
)
from lowrank_ext.adapt_warnings import adapt_warnings
from lowrank_ext.config import ALL_LINEAR, AdapterConfig
from lowrank_ext.integrations.peft_tuner.combining import (
    checked_weights,
    fill_with_sum,
    summed_config,
)
from lowrank_ext.integrations.peft_tuner.config import LowRankPeftConfig
from lowrank_ext.integrations.peft_tuner.layer import LowRankTunerLayer, layer_class_for
from lowrank_ext.left_out import left_out
from lowrank_ext.merging import check_mergeable, dense_dtype, forget_quantization
from lowrank_ext.nn.quantized import check_4bit_rows, is_quantized, keep_unpacked
from lowrank_ext.registry import Method
from lowrank_ext.targets import check_adaptable

_PREFIX = "base_model.model."


class LowRankTuner(BaseTuner):
    """Adapters of one method, under PEFT's rules for names, activity, saving and loading.

    What the method needs of the whole model is done around PEFT's own injection: ranks that depend
    on all weights, chains of modules, checks before the first change.
    """

    method: ClassVar[Method]
    tuner_layer_cls: type[LowRankTunerLayer]
    target_module_mapping = {}  # noqa: RUF012  # as in PEFT's tuners

    _config: AdapterConfig  # of the adapter that is being injected
    _unloads = False
    _plain: dict[nn.Module, nn.Module]  # what has taken the place of unloaded layers

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        config: LowRankPeftConfig = self.peft_config[adapter_name]
        self._check_name(adapter_name)
        check_4bit_rows(model, type(self).__name__)
        self._prepare(model, config)
        keep_unpacked(model, type(self).__name__)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._replace_everywhere(model)
        self.method.module_class.connect(model)
        set_fused_encoders(model, on=False)

    def _check_name(self, adapter_name: str) -> None:
        """PEFT tells adapters by their name within keys."""
        if adapter_name == self.tuner_layer_cls.adapters_name:
            raise ValueError(f"{type(self).__name__}: an adapter must not be called {adapter_name}")

    def _prepare(self, model: nn.Module, config: LowRankPeftConfig) -> None:
        """Check all modules, and complete the config by what depends on them."""
        missing = left_out(model) if config.target_modules == ALL_LINEAR else []
        if not config.is_complete:
            config.add_heads(model)
        targets = self._targets(model, config)
        own = config.adapter_config(list(targets) if config.is_complete else ())
        own = self.method.complete_config(model, own, self._as_before_adapters(model, targets))
        check_ranks(own, targets)
        check_options(model, own, self.method, targets)
        check_values(model, own, self.method, targets)
        if not config.awaits_values:
            for text in list(adapt_warnings(model, own, targets, missing)):
                warnings.warn(f"{type(self).__name__}: {text}", stacklevel=2)
        for path, module in model.named_modules():
            if path in targets and isinstance(module, self.tuner_layer_cls):
                try:
                    module.check_beside(own.for_module(path))
                except ValueError as error:
                    raise ValueError(f"{type(self).__name__}: {path}: {error}") from None
        config.set_numbers(own, targets)
        self._config = own

    def _targets(self, model: nn.Module, config: LowRankPeftConfig) -> dict[str, nn.Module]:
        """The linear modules that the config selects by PEFT's rules, by path."""
        config = _maybe_include_all_linear_layers(config, model)
        inside = tuple(
            f"{path}."
            for path, module in model.named_modules()
            if isinstance(module, self.tuner_layer_cls)
        )
        found = {}
        for path, module in model.named_modules():
            if not path or path.startswith(inside):
                continue
            if self._check_target_module_exists(config, path):
                ours = isinstance(module, self.tuner_layer_cls)
                found[path] = module.base_layer if ours else module
                check_adaptable(path, found[path], type(self).__name__)
        return found

    def _as_before_adapters(
        self, model: nn.Module, targets: Mapping[str, nn.Module]
    ) -> dict[str, nn.Module]:
        """The targets; of residual base weights copies as they were before the first adapter."""
        residuals = {layer.base_layer: layer.with_residual() for _, layer in _layers(model)}
        return {
            path: module if (holder := residuals.get(module)) is None else holder.original_linear()
            for path, module in targets.items()
        }

    def _create_and_replace(
        self,
        peft_config: LowRankPeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        ours = isinstance(target, self.tuner_layer_cls)
        layer = target if ours else self.tuner_layer_cls(target)
        assert isinstance(layer, LowRankTunerLayer)
        parent._modules[target_name] = layer
        config = self._config.for_module(current_key)
        layer.add(adapter_name, config, initialize=not peft_config.awaits_values)
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, False)

    def _replace_everywhere(self, model: nn.Module) -> None:
        """Put each layer wherever its base module is registered besides: PEFT finds it once."""
        found = [m for m in model.modules() if isinstance(m, self.tuner_layer_cls)]
        layers: dict[nn.Module | None, nn.Module] = {m.base_layer: m for m in found}
        for parent in list(model.modules()):
            if not isinstance(parent, self.tuner_layer_cls):
                for name, child in parent._modules.items():
                    if child in layers:
                        parent._modules[name] = layers[child]

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "cat",
    ) -> None:
        """Add the adapter Σ weight · adapter, of the summed rank: exact, to one rounding of lora_b.

        Over a residual base (LaMDA's SVD start) the adapters share lora_a, and the rank stays. As
        in PEFT the new adapter is not active. The adapters may be of different modules.

        Raises:
            ValueError: combination_type is not "cat", which alone is exact; adapters of the method
                have no sum (GOAT, ResLoRA), one is unknown, has modules_to_save or another init; or
                adapter_name is taken. Nothing is added.
            RuntimeError: an adapter has no values yet.
        """
        if combination_type != "cat":
            raise ValueError(
                "add_weighted_adapter: combination_type must be 'cat', which is exact, got "
                f"{combination_type!r}; for others write LoRAs by lr.export_lora"
            )
        by_name = checked_weights(self, adapters, weights, adapter_name)
        layers = {
            path.removeprefix("model."): layer
            for path, layer in _layers(self)
            if by_name.keys() & layer.adapters.keys()
        }
        for layer in layers.values():
            for name in by_name.keys() & layer.adapters.keys():
                layer.check_valued(name)
        config = summed_config(self.peft_config[next(iter(by_name))], layers, by_name)
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except BaseException:
            del self.peft_config[adapter_name]
            raise
        for layer in layers.values():
            fill_with_sum(layer, adapter_name, by_name, self.method.file_format)
        config.awaits_values = False

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"{type(self).__name__}: adapter_names must be None, an adapter for each sample is "
                "what lr.AdapterBank computes"
            )
        yield

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """float32 adapters, or with ``autocast_adapter_dtype=False`` of the base's dtype."""
        for _, layer in _layers(self.model):
            if adapter_name in layer.adapters:
                adapter = layer.adapter(adapter_name)
                base = adapter.base_parameter
                if not autocast_adapter_dtype and base is not None:
                    adapter.to(base.dtype)

    def _check_merge_allowed(self) -> None:
        """Raise before the first weight is written, as ``lr.merge``."""
        super()._check_merge_allowed()
        active = {
            path: layer.adapter(name)
            for path, layer in _layers(self.model)
            for name in layer.active_adapters
            if name in layer.adapters and not (self._unloads and is_quantized(layer.base_layer))
        }
        check_mergeable(self.model, active, "merge_adapter")

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """As PEFT's; where a layer raises, all weights have the bits that they had before."""
        with self._all_or_none():
            super().merge_adapter(adapter_names, safe_merge)

    @contextmanager
    def _all_or_none(self) -> Iterator[None]:
        """On an exception inside, what has been merged inside is unmerged."""
        merged = {layer: len(layer.merged_adapters) for _, layer in _layers(self.model)}
        try:
            yield
        except BaseException:
            for layer, count in merged.items():
                layer.unmerge(keep=count)
            raise

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        parent._modules[child_name] = new_module  # it has its own weight, PEFT would set child's
        self._plain[child] = new_module

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:  # PEFT says None, and gives the model
        dtype = dense_dtype(self.model)
        had_quantized = any(is_quantized(layer.base_layer) for _, layer in _layers(self.model))
        for _, layer in _layers(self.model):
            layer.dense_dtype = dtype
        self._unloads, self._plain = True, {}
        try:
            if merge:
                self._merge_before_unloading(safe_merge, adapter_names)
            super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        finally:
            self._unloads = False
        replace_modules(self.model, self._plain)  # where they are registered besides
        set_fused_encoders(self.model, on=True)
        self.method.module_class.disconnect(self.model)
        if had_quantized:
            forget_quantization(self.model)
        return self.model

    def _merge_before_unloading(self, safe_merge: bool, adapter_names: list[str] | None) -> None:
        """Merge all but quantized layers, or none, before the first module is replaced."""
        self._check_merge_allowed()
        with self._all_or_none():
            for _, layer in _layers(self.model):
                if not is_quantized(layer.base_layer):
                    layer.merge_new(safe_merge, adapter_names)

    # ---- files

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: LowRankPeftConfig,
        adapter_name: str,
        state_dict: Mapping[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        found = {}
        for path, layer in _layers(model):
            if adapter_name in layer.adapters:
                layer.check_valued(adapter_name)
                prefix = f"{path}.{layer.adapters_name}.{adapter_name}."
                for attribute in _stored(layer, adapter_name):
                    key = prefix + attribute
                    # A merged adapter is in no state dict: that is its base's.
                    kept = layer.adapter(adapter_name).adapter_tensors()[attribute]
                    found[key] = state_dict[key] if key in state_dict else kept.detach()
        return found

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        path, marker, attribute = key.rpartition(f".{cls.tuner_layer_cls.adapters_name}.")
        own = f"{adapter_name}."
        if not marker or not attribute.startswith(own):
            return str(super()._remove_adapter_name_from_key(key, adapter_name))
        return f"{path}.{cls.method.file_format.kind_of(attribute.removeprefix(own))}"

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: LowRankPeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """Gives adapters and residual base weights their values; returns all by the model's keys,
        so that PEFT misses none."""
        file_format = cls.method.file_format
        mapped = dict(state_dict)
        values: dict[LowRankTunerLayer, dict[str, Tensor]] = {}
        for path, layer in _layers(model):
            if adapter_name not in layer.adapters:
                continue
            values[layer] = {}
            place = path.removeprefix(_PREFIX)
            for attribute in _stored(layer, adapter_name):
                key = f"{place}.{file_format.kind_of(attribute)}"
                key = key if key in mapped else _PREFIX + key  # bare in a model injected into
                values[layer][attribute] = _taken(mapped, key, layer, adapter_name, attribute)
        odd = [key for key in mapped if file_format.kind_in(key) is not None]
        if odd:
            raise ValueError(
                f"{cls.__name__}: the file must hold tensors of the model's adapters alone, got "
                f"{odd[0]}{f' and {len(odd) - 1} more' if len(odd) > 1 else ''}"
            )
        for path, layer in _layers(model):
            if layer in values:
                layer.fill(adapter_name, values[layer])
                prefix = f"{path}.{layer.adapters_name}.{adapter_name}."
                mapped |= {prefix + name: tensor for name, tensor in values[layer].items()}
        config.awaits_values = False
        return mapped


def _stored(layer: LowRankTunerLayer, name: str) -> list[str]:
    """Attributes of an adapter that files hold."""
    adapter = layer.adapter(name)
    shapes = adapter.config.adapter_shapes(adapter.r, adapter.in_features, adapter.out_features)
    return list(shapes)


def _taken(
    tensors: dict[str, Tensor], key: str, layer: LowRankTunerLayer, name: str, attribute: str
) -> Tensor:
    """The tensor of a file, removed from ``tensors``."""
    if key not in tensors:
        raise ValueError(f"{type(layer).__name__}: the file must hold {key}, which is missing")
    tensor, expected = tensors.pop(key), layer.adapter(name).adapter_tensors()[attribute].shape
    if tensor.shape != expected:
        raise ValueError(
            f"{type(layer).__name__}: {key} must be {list(expected)}, got {list(tensor.shape)}"
        )
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{type(layer).__name__}: {key} must be finite, got inf or nan")
    return tensor


def _layers(model: nn.Module) -> Iterator[tuple[str, LowRankTunerLayer]]:
    for path, module in model.named_modules():
        if isinstance(module, LowRankTunerLayer):
            yield path, module


@functools.cache
def tuner_class_for(method: Method) -> type[LowRankTuner]:
    """The tuner of ``method``."""
    layer_class = layer_class_for(method)
    name = f"{method.module_class.__name__.removesuffix('Linear')}Model"
    members = {
        "method": method,
        "prefix": layer_class.adapters_name.removesuffix("adapters"),
        "tuner_layer_cls": layer_class,
        "__module__": __name__,
    }
    made = type(name, (LowRankTuner,), members)
    globals()[name] = made  # where pickle looks
    return made
