"""peft_config: a config of this library as one of PEFT."""

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, PeftConfig
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from lowrank_ext.config import AdapterConfig, config_names, plain
from lowrank_ext.integrations.peft import accelerated_class_for
from lowrank_ext.integrations.peft_tuner.config import config_class_for
from lowrank_ext.integrations.peft_tuner.registration import register_with_peft
from lowrank_ext.nn.experts import no_branches_because
from lowrank_ext.nn.quantized import keep_unpacked
from lowrank_ext.registry import method_for, method_of


def peft_config(config: AdapterConfig, **fields: Any) -> PeftConfig:
    """``config`` as a PeftConfig, for ``peft.get_peft_model`` and ``peft_config=`` of TRL.

    The model then trains, saves and loads as any PeftModel, on this library's modules. A LoRAConfig
    becomes PEFT's own LoraConfig whose layers over nn.Linear run on the fused ops as after
    ``lr.accelerate``.

    Args:
        config: the method's, such as ``LaMDAConfig``.
        fields: further fields of PEFT's: task_type, base_model_name_or_path, revision.

    Raises:
        ImportError: PEFT is not installed, or older than 0.21.
        TypeError: config is of no method, or a field is not known.
        ValueError: adapter_dtype is not float32: PEFT decides it (autocast_adapter_dtype); or a
            LoRA has init="pissa", after which PEFT's disable_adapter does not give the base model.

    Examples:
        >>> model = peft.get_peft_model(model, lr.peft_config(lr.LaMDAConfig(r=32)))
        >>> trainer = trl.SFTTrainer(model, peft_config=lr.peft_config(lr.LaMDAConfig(r=32)))
    """
    method = method_of(config) if isinstance(config, AdapterConfig) else None
    if method is None:
        way_out = "; give it to PEFT as it is" if isinstance(config, PeftConfig) else ""
        raise TypeError(
            f"peft_config: config must be a {config_names()}, got {type(config).__name__}{way_out}"
        )
    if config.adapter_dtype != "float32":
        raise ValueError(
            "peft_config: adapter_dtype must be 'float32', got "
            f"{config.adapter_dtype!r}; for the base's dtype give get_peft_model "
            "autocast_adapter_dtype=False"
        )
    own = _fields_of(config)
    if taken := sorted(fields.keys() & own.keys()):
        raise TypeError(f"peft_config: {taken[0]} is config's own, got it again")
    register_with_peft()
    if config.peft_type == "LORA":
        return _lora_config(config, own, fields)
    return config_class_for(method)(**own, **fields)


def _fields_of(config: AdapterConfig) -> dict[str, Any]:
    """The fields of PEFT's that ``config`` sets."""
    numbers = {
        "r": config.r,
        "lora_alpha": config.alpha,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
    }
    own = {name: plain(getattr(config, name)) for name in config.own_fields}
    return {
        **numbers,
        "lora_dropout": config.dropout,
        "use_rslora": config.rslora,
        "target_modules": _names(config.target_modules),
        "exclude_modules": _names(config.exclude_modules),
        "layers_to_transform": _names(config.layers_to_transform),
        "layers_pattern": _names(config.layers_pattern),
        "modules_to_save": list(config.modules_to_save) or None,
        **own,
    }


def _names(names: Any) -> Any:
    return names if names is None or isinstance(names, str) else list(names)


def _lora_config(
    config: AdapterConfig, own: dict[str, Any], fields: Mapping[str, Any]
) -> LoraConfig:
    if config.init == "pissa":
        raise ValueError(
            "peft_config: init must be 'kaiming' or 'gaussian' for LoRA, which PEFT trains, got "
            "'pissa': PEFT's disable_adapter leaves its residual weight as it is, so references of "
            "DPO would be another model; use lr.adapt, or LaMDAConfig"
        )
    if config.alpha is None:  # alpha is then each module's own rank
        own["lora_alpha"] = config.r
        ranks = {k: r for k, r in config.rank_pattern.items() if k not in config.alpha_pattern}
        own["alpha_pattern"] = {**config.alpha_pattern, **ranks}  # the first match counts
    own["target_parameters"] = list(config.target_parameters) or None
    options, _ = method_for(config, "peft_config").file_format.fields(config, own)
    made = LoraConfig(**own, **options, **fields)
    made._register_custom_module({nn.Module: _accelerated})  # type: ignore[dict-item]  # calls it
    return made


def _accelerated(
    target: nn.Module, adapter_name: str, parameter_name: str | None = None, **options: Any
) -> nn.Module | None:
    """PEFT's LoRA layer on the fused ops; None, for PEFT to go on, over any but a plain linear and
    stacked weights of experts."""
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if parameter_name is not None:
        if no_branches_because(base, parameter_name):
            return None
        options["parameter_name"] = parameter_name
        return accelerated_class_for(lora.ParamWrapper)(target, adapter_name, **options)
    if type(base) is not nn.Linear:
        keep_unpacked(base, "peft_config")
        return None
    return accelerated_class_for(lora.Linear)(target, adapter_name, **options)
