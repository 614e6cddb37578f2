"""What transformers and diffusers ask of a model that carries adapters, for models of ``adapt``.

``save_pretrained`` writes the adapter instead of a model that plain code would read without it, and
transformers' Trainer takes the adapters over a quantized base for what trains. The methods are set
on the model itself: its class, and so its name in files and pickles, stays.
"""

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lowrank_ext.adapter_files import CONFIG_NAME
from lowrank_ext.sharding import is_sharded
from lowrank_ext.wrappers import is_whole, unwrapped

_CHECKPOINT = "checkpoint-"  # how the Trainer's directories begin
_NAME = "default"
_FLAG = "_hf_peft_config_loaded"
_DISABLED = "lowrank_disabled"  # whether disable_adapters has been called
# An attribute that AdapterTrainer sets: its Trainer reads adapter files again.
RESUMES = "lowrank_resumes"


def follow_protocol(model: nn.Module) -> None:
    """Set the methods on a model that ``adapt`` has changed, if it is of a library with them."""
    model = unwrapped(model)
    if callable(getattr(model, "save_pretrained", None)):
        vars(model)["save_pretrained"] = partial(_save_pretrained, model)
    if _is_of_transformers(model):
        vars(model)[_FLAG] = True
        for name, method in _METHODS.items():
            vars(model)[name] = partial(method, model)


def leave_protocol(model: nn.Module) -> None:
    """Undo ``follow_protocol``."""
    for name in ("save_pretrained", _FLAG, *_METHODS, _DISABLED, RESUMES):
        vars(unwrapped(model)).pop(name, None)


def _is_of_transformers(model: nn.Module) -> bool:
    kinds = ((cls.__module__, cls.__name__) for cls in type(model).__mro__)
    return ("transformers.modeling_utils", "PreTrainedModel") in kinds


def _save_pretrained(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    *args: Any,
    **options: Any,
) -> None:
    """The adapter's files, as ``lr.save_adapter``; of a merged model the plain model.

    A sharded model is written as a whole, from the state dict that the Trainer has gathered.

    Raises:
        ValueError: push_to_hub is set for a model that is not merged, or the directory of a merged
            one holds an adapter; or as ``save_adapter``.
    """
    from lowrank_ext.adapt import adapted_modules  # which imports this file
    from lowrank_ext.checkpoint.save import save_adapter

    merged = all(module.merged for module in adapted_modules(model, "save_pretrained").values())
    sharded = not is_whole(model) or any(is_sharded(p) for p in model.parameters())
    if merged and (Path(save_directory) / CONFIG_NAME).exists():
        raise ValueError(
            f"save_pretrained: {save_directory} must hold no adapter, which would be applied again "
            "to the merged model; got one, give another directory"
        )
    if merged or sharded:
        _save_whole(model, save_directory, is_main_process, *args, **options)
        return
    if options.get("push_to_hub"):
        raise ValueError(
            "save_pretrained: push_to_hub must be False for a model with adapters, got True; save "
            "them and upload the directory by huggingface_hub.upload_folder, or merge first"
        )
    if not is_main_process:
        return
    if Path(save_directory).name.startswith(_CHECKPOINT) and not hasattr(model, RESUMES):
        warnings.warn(
            "save_pretrained: the Trainer's checkpoint holds the adapter, and transformers' own "
            "Trainer cannot resume from it; use lr.AdapterTrainer, or make the "
            "model by peft.get_peft_model(model, lr.peft_config(config))",
            stacklevel=2,
        )
    save_adapter(model, save_directory)


def _save_whole(model: nn.Module, *args: Any, **options: Any) -> None:
    loaded = vars(model).pop(_FLAG, None)
    try:
        type(model).save_pretrained(model, *args, **options)  # type: ignore[attr-defined]
    finally:
        if loaded is not None:
            vars(model)[_FLAG] = loaded


# ---- transformers' methods of models with adapters


def _active_adapters(model: nn.Module) -> list[str]:
    return [_NAME]


def _disable_adapters(model: nn.Module) -> None:
    """The base model until ``enable_adapters``, see ``lr.disable_adapter``."""
    from lowrank_ext.disabling import switch_off

    _enable_adapters(model)
    switch_off(model)
    vars(model)[_DISABLED] = True


def _enable_adapters(model: nn.Module) -> None:
    from lowrank_ext.adapt import adapted_modules
    from lowrank_ext.disabling import switch_on

    modules = adapted_modules(model, "enable_adapters")
    # A copy of a model that is switched off has the mark, and its adapters on.
    if vars(model).pop(_DISABLED, False) and any(module.blocks for module in modules.values()):
        switch_on(model, modules)


def _one_adapter(name: str, model: nn.Module, *args: Any, **options: Any) -> None:
    raise ValueError(
        f"{name}: a model of lr.adapt has one adapter, without a name; for more make it by "
        "peft.get_peft_model(model, lr.peft_config(config))"
    )


_METHODS: dict[str, Callable[..., Any]] = {
    "active_adapters": _active_adapters,
    "disable_adapters": _disable_adapters,
    "enable_adapters": _enable_adapters,
    **{
        name: partial(_one_adapter, name)
        for name in (
            *("add_adapter", "load_adapter", "set_adapter", "delete_adapter"),
            *("get_adapter_state_dict", "enable_peft_hotswap"),
        )
    },
}
