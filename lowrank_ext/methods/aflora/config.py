"""Configuration of AFLoRA."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from lowrank_ext.checks import check_number, matches_names, normalized_names
from lowrank_ext.config import AdapterConfig


@dataclass(kw_only=True, frozen=True)
class AFLoRAConfig(AdapterConfig):
    """AFLoRA: the projections train until they are frozen one by one, two vectors always train.

    (Liu et al., arXiv 2403.13269.)
    y = x Wᵀ + bias + scaling · out_scale ⊙ ((rank_scale ⊙ drop(x) lora_aᵀ) lora_bᵀ).
    ``lr.AdaptiveFreezeSchedule``, which takes the schedule's options, decides when each projection
    is frozen; without it nothing is frozen.

    Attributes:
        alpha: None, the default, gives a scaling of 1, as in the released code for GLUE; the
            released code for LLaMA scales by alpha / r = 2.
        init: ``"kaiming"``: lora_a uniform in ±sqrt(6/K) and lora_b in ±sqrt(6/r), rank_scale
            rank_scale_init, out_scale zero.
        rank_scale_init: initial value of all entries of rank_scale, above 0.
        live_modules: the adapted modules whose lora_a and lora_b train at first, named as in
            target_modules; in the others only the vectors train. None, the default, stands for all,
            as in the released code for LLaMA. The code for GLUE trains projections of the
            feed-forward layers only, which it finds by in_features != out_features; with
            grouped-query attention k and v match that too, so name the modules.
    """

    peft_type: ClassVar[str] = "AFLORA"
    inits: ClassVar[tuple[str, ...]] = ("kaiming",)
    own_fields: ClassVar[tuple[str, ...]] = ("init", "rank_scale_init", "live_modules")
    selectors: ClassVar[tuple[str, ...]] = ("live_modules",)

    init: str = "kaiming"
    rank_scale_init: float = 0.1
    live_modules: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        # out_scale starts at zero: with rank_scale zero too, all gradients would stay zero.
        check_number(self.rank_scale_init, owner, "rank_scale_init", positive=True)
        if self.live_modules is not None:
            self._set("live_modules", normalized_names(self.live_modules, owner, "live_modules"))

    def is_live(self, path: str) -> bool:
        """Whether the projections of the module at ``path`` train at first."""
        return self.live_modules is None or matches_names(path, self.live_modules)

    def adapter_shapes(self, r: int, in_features: int, out_features: int) -> dict[str, list[int]]:
        return {
            **super().adapter_shapes(r, in_features, out_features),
            "rank_scale": [r],
            "out_scale": [out_features],
        }

    def for_module(self, path: str) -> Self:
        return replace(super().for_module(path), live_modules=None if self.is_live(path) else ())
