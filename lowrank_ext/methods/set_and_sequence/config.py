"""Configuration of Set-and-Sequence: one basis, identity coefficients, motion residuals."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lowrank_ext.checks import check_choice, check_flag, check_probability
from lowrank_ext.config import AdapterConfig

BASES = ("down", "up")
MASK_UNITS = ("call", "sample")


@dataclass(kw_only=True, frozen=True)
class BasisLoRAConfig(AdapterConfig):
    """Set-and-Sequence: learns a clip's appearance, then its motion, over one shared basis.

    (arXiv 2502.14844.) Stage 1 ("set": unordered frames) trains a LoRA. Stage 2 ("sequence": whole
    clips), begun by ``lr.motion.begin_residual_stage``, freezes it and trains a residual on one of
    its factors, the coefficients; the other factor is the basis that both stages share. In training
    an elementwise mask drops coefficients.

    Attributes:
        basis: the factor that stage 2 keeps: ``"down"``: lora_a; the coefficients are lora_b
            [N, r] and stage 2 keeps no input for backward. ``"up"``: lora_b; the coefficients are
            lora_a [r, K].
        coef_dropout: probability of dropping a coefficient in stage 1.
        residual_coef_dropout: the same for the residual in stage 2.
        mask_rescale: multiply the coefficients that are kept by 1 / (1 - p).
        mask_per: ``"call"``: one mask in each forward of a module. ``"sample"``: one for each index
            of the input's first dimension.
        mask_identity: in stage 2, mask the sum of frozen and trained coefficients instead of the
            residual alone.
        residuals: names of the residuals, in the order of their stages; the last one trains.
            ``begin_residual_stage`` appends to it.
        init: of the basis: ``"kaiming"``, uniform in ±1/sqrt(features) (with
            ``basis="down"`` PEFT's numbers), or ``"gaussian"``, with standard deviation 1/r. The
            coefficients start at zero.
    """

    peft_type: ClassVar[str] = "SET_AND_SEQUENCE"
    inits: ClassVar[tuple[str, ...]] = ("kaiming", "gaussian")
    own_fields: ClassVar[tuple[str, ...]] = (
        "init",
        "basis",
        "coef_dropout",
        "residual_coef_dropout",
        "mask_rescale",
        "mask_per",
        "mask_identity",
        "residuals",
    )

    init: str = "kaiming"
    basis: str = "down"
    coef_dropout: float = 0.8
    residual_coef_dropout: float = 0.5
    mask_rescale: bool = True
    mask_per: str = "call"
    mask_identity: bool = False
    residuals: Sequence[str] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        check_choice(self.basis, BASES, owner, "basis")
        check_probability(self.coef_dropout, owner, "coef_dropout")
        check_probability(self.residual_coef_dropout, owner, "residual_coef_dropout")
        check_choice(self.mask_per, MASK_UNITS, owner, "mask_per")
        check_flag(self.mask_rescale, owner, "mask_rescale")
        check_flag(self.mask_identity, owner, "mask_identity")
        if isinstance(self.residuals, str):
            raise TypeError(
                f"{owner}: residuals must be a sequence of names, got {self.residuals!r}"
            )
        names: tuple[str, ...] = ()
        for name in self.residuals:
            check_residual_name(name, names, owner)
            names = (*names, name)
        self._set("residuals", names)

    @property
    def whole_modules_train(self) -> bool:
        return not self.residuals

    def adapter_shapes(self, r: int, in_features: int, out_features: int) -> dict[str, list[int]]:
        shapes = super().adapter_shapes(r, in_features, out_features)
        coefficients = shapes["lora_b" if self.basis == "down" else "lora_a"]
        return {**shapes, **{residual_attribute(name): coefficients for name in self.residuals}}

    def must_agree(self) -> dict[str, Any]:
        return {"basis": self.basis, "residuals": self.residuals}


def residual_attribute(name: str) -> str:
    """Attribute name of the Parameter of the residual ``name`` in its module."""
    return f"lora_residual_{name}"


def check_residual_name(name: object, present: Sequence[str], owner: str) -> None:
    """Raise unless ``name`` is valid and new. It becomes part of state-dict keys and of keys in
    files, hence no dots."""
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ValueError(
            f"{owner}: the name of a residual must consist of letters, digits, _ and -, "
            f"got {name!r}"
        )
    if name in present:
        raise ValueError(f"{owner}: the name of a residual must be new, got {name!r} again")
