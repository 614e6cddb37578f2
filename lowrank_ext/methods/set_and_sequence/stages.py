"""The stages of a model adapted with BasisLoRAConfig, and the scales of their coefficients."""

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from lowrank_ext.methods.set_and_sequence.config import BasisLoRAConfig
from lowrank_ext.methods.set_and_sequence.module import BasisLoRALinear
from lowrank_ext.targets import modules_of_kind
from lowrank_ext.wrappers import unwrapped

Model = TypeVar("Model", bound=nn.Module)


def begin_residual_stage(
    model: Model, name: str = "motion", *, coef_dropout: float | None = None
) -> Model:
    """Freeze everything in ``model`` and add a residual ``name`` to every module; returns it.

    Only the new residuals train, from zero; the basis, the identity, earlier residuals and
    modules_to_save never change. Earlier residuals get scale 0. Make a new optimizer afterwards,
    and wrap the model (DDP, FSDP) after this call.

    Args:
        model: adapted with ``lr.adapt(model, lr.BasisLoRAConfig(...))``, or loaded.
        name: letters, digits, _ and -.
        coef_dropout: of the new stage; None: the config's ``residual_coef_dropout``.

    Raises:
        ValueError: the model was not adapted with BasisLoRAConfig or is merged, the name is taken
            or invalid, or coef_dropout is no probability. Nothing has changed then.

    Examples:
        >>> lr.motion.begin_residual_stage(model, name="dance")
        >>> optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    """
    caller = "begin_residual_stage"
    config = adapted_config(model, caller)
    modules = basis_modules(model, caller)
    for module in modules.values():
        module.check_new_residual(name, coef_dropout, caller)
    config = dataclasses.replace(
        config,
        residuals=(*config.residuals, name),
        residual_coef_dropout=(
            config.residual_coef_dropout if coef_dropout is None else coef_dropout
        ),
    )
    for parameter in model.parameters():
        # An optimizer would still apply a remaining gradient.
        parameter.requires_grad_(False).grad = None
    for module in modules.values():
        module.begin_residual_stage(name, coef_dropout=coef_dropout)
    unwrapped(model).lowrank_config = config  # type: ignore[assignment]
    return model


def set_scales(
    model: Model,
    *,
    identity: float | None = None,
    motion: float | Mapping[str, float] | None = None,
) -> Model:
    """Set the scales of identity and residuals in every module of ``model``; returns it.

    ``identity`` is the factor of the coefficients of stage 1, ``motion`` that of the residuals: a
    number for all of them, or numbers by name, where the others keep theirs. Both start at 1; a new
    stage sets the earlier residuals to 0. With motion 0 the output is that of stage 1, bit for bit;
    with both 0 it is the base model's. Scales are not saved with the adapter.

    Raises:
        ValueError: the model has no BasisLoRALinear or is merged, a name is unknown, motion is
            given before a residual stage, or a number is not finite. Nothing has changed then.
        TypeError: a scale is no number. Nothing has changed then.

    Examples:
        >>> lr.motion.set_scales(model, identity=0.6, motion={"dance": 1.0, "wave": 0.5})
    """
    caller = "set_scales"
    modules = basis_modules(model, caller).values()
    scales = [module.checked_scales(identity, motion, caller) for module in modules]
    for module, (identity_scale, residual_scales) in zip(modules, scales, strict=True):
        module.identity_scale, module.residual_scales = identity_scale, residual_scales
    return model


def basis_modules(model: nn.Module, caller: str) -> dict[str, BasisLoRALinear]:
    """Path and module of every BasisLoRALinear; raises ValueError without one."""
    return modules_of_kind(model, BasisLoRALinear, caller)


def adapted_config(model: nn.Module, caller: str) -> BasisLoRAConfig:
    """The config that ``lr.adapt`` or ``lr.load_adapter`` has stored on the model."""
    config = getattr(unwrapped(model), "lowrank_config", None)
    if not isinstance(config, BasisLoRAConfig):
        got = "no config" if config is None else f"a {type(config).__name__}"
        raise ValueError(
            f"{caller}: model must have been adapted with BasisLoRAConfig, got "
            f"a {type(model).__name__} with {got}"
        )
    return config
