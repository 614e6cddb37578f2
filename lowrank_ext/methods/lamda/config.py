"""Configuration of LaMDA and LaMDA++."""

from dataclasses import dataclass
from typing import ClassVar

from lowrank_ext.checks import check_choice, check_flag
from lowrank_ext.config import AdapterConfig


@dataclass(kw_only=True, frozen=True)
class LaMDAConfig(AdapterConfig):
    """LaMDA and LaMDA++: the branch has a trainable core [r, r] between frozen projections.

    (Azizi et al., arXiv 2406.12832.) lora_a never trains. lora_b trains until a freezing schedule
    (``FreezeSchedule``) has frozen its columns.

    Attributes:
        init: ``"svd_residual"``: the top-r singular triples of W, subtracted from the base weight.
            Dropout then acts on the principal part of W itself: on SmolLM2 a dropout of 0.05 raises
            the first training loss from 2.7 to 6.8, so leave it at 0 there.
            ``"svd_zero_core"``: the same projections with a zero core and W untouched.
            ``"lora"``: lora_a Kaiming, lora_b zero, core as ``nn.Linear`` starts.
        train_lora_b: False freezes lora_b from the start.
        rank_budget: None, or the quantity that LaMDA++'s rank allocation preserves: ``"rank"``
            (mean rank) or ``"params"`` (sum of squared ranks). ``adapt`` allocates the ranks and
            stores them in ``rank_pattern`` of the model's ``lowrank_config``; a non-empty
            ``rank_pattern`` is used as it is.
        direction: which weights get larger ranks, those of flat spectra (``"flat_gets_more"``) or
            of concentrated ones (``"concentrated_gets_more"``).
    """

    peft_type: ClassVar[str] = "LAMDA"
    inits: ClassVar[tuple[str, ...]] = ("svd_residual", "svd_zero_core", "lora")
    own_fields: ClassVar[tuple[str, ...]] = ("init", "train_lora_b", "rank_budget", "direction")

    init: str = "svd_residual"
    train_lora_b: bool = True
    rank_budget: str | None = None
    direction: str = "flat_gets_more"

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        check_flag(self.train_lora_b, owner, "train_lora_b")
        # With "lora" lora_b starts at zero; frozen, it would keep the core's gradient at zero.
        if self.init == "lora" and not self.train_lora_b:
            raise ValueError(
                f"{owner}: train_lora_b must be True with init='lora' (lora_b starts at zero), "
                "got False"
            )
        if self.rank_budget is not None:
            check_choice(self.rank_budget, ("rank", "params"), owner, "rank_budget")
        check_choice(
            self.direction, ("flat_gets_more", "concentrated_gets_more"), owner, "direction"
        )

    def adapter_shapes(self, r: int, in_features: int, out_features: int) -> dict[str, list[int]]:
        # svd_residual: the initial lora_b and diagonal of core, which with lora_a rebuild the
        # original base weight.
        starts = {"lora_b_init": [out_features, r], "core_init": [r]}
        return {
            **super().adapter_shapes(r, in_features, out_features),
            "core": [r, r],
            **(starts if self.init == "svd_residual" else {}),
        }
