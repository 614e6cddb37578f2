"""Biases of the base model that train with the adapters: PEFT's ``bias="lora_only"`` and "all"."""

from collections.abc import Collection, Mapping

from torch import Tensor, nn

from lowrank_ext.config import AdapterConfig
from lowrank_ext.nn.base_layer import Adapter
from lowrank_ext.nn.token_rows import WithRows
from lowrank_ext.targets import modules_named
from lowrank_ext.wrappers import named_modules

_KEPT = "base_layer."  # PEFT keeps the base of every adapted module there
_KEPT_BY_ROWS = f"token_adapter.{_KEPT}"  # and that of a module with trained rows here


def base_biases(
    model: nn.Module,
    config: AdapterConfig,
    adapted: Collection[str],
    with_rows: Collection[str] = (),
) -> dict[str, nn.Parameter]:
    """The biases that ``config`` trains, by their names in PEFT's files.

    Modules of modules_to_save train and are saved whole; theirs are not among these.

    Args:
        adapted: paths of the modules that carry adapters, or will.
        with_rows: paths of plain modules that will have trained rows.
    """
    if config.base_biases == "none":
        return {}
    whole = modules_named(model, config.modules_to_save)
    found: dict[str, nn.Parameter] = {}
    modules = dict(named_modules(model))
    rows = {*with_rows, *(path for path, m in modules.items() if isinstance(m, WithRows))}
    inside = tuple(f"{path}." for path in (*adapted, *rows))
    for path, module in modules.items():
        base = getattr(module, "base_layer", None) if isinstance(module, Adapter) else module
        base = module if base is None else base
        if path in adapted:
            bias, key = base._parameters.get("bias"), f"{path}.{_KEPT}bias"
        elif config.base_biases == "all" and path in rows:
            bias, key = base._parameters.get("bias"), f"{path}.{_KEPT_BY_ROWS}bias"
        elif config.base_biases == "all" and module not in whole and not path.startswith(inside):
            bias, key = module._parameters.get("bias"), f"{path}.bias".lstrip(".")
        else:
            continue
        if bias is not None and bias.is_floating_point():
            found[key] = bias
    return found


def without_peft_copies(names: Mapping[str, Tensor], saved: Collection[str]) -> dict[str, Tensor]:
    """``names`` without the copies of biases inside of modules_to_save, which PEFT writes beside
    the modules themselves with ``bias="all"``."""
    copies = tuple(
        f"{path}.{kind}." for path in saved for kind in ("original_module", "modules_to_save")
    )
    return {name: tensor for name, tensor in names.items() if not name.startswith(copies)}
