"""Configuration of ResLoRA."""

from dataclasses import dataclass
from typing import Any, ClassVar

from lowrank_ext.checks import check_choice, check_flag
from lowrank_ext.config import AdapterConfig

SHORTCUTS = ("input", "block", "middle")
MERGES = ("weight", "input")


@dataclass(kw_only=True, frozen=True)
class ResLoRAConfig(AdapterConfig):
    """ResLoRA: LoRA with shortcuts from the same projection in earlier blocks.

    (Shi et al., arXiv 2402.18039.) The modules of one name in consecutive blocks form a chain.
    Module n computes, with x its input, A and B its lora_a and lora_b and s its scaling:

        input   y_n = W x_n + bias + s B_n A_n drop(x_n + x_{n-1}),  2 x_0 for the first module
        block   y_n = W x_n + bias + Σ_{j=0..m} s_{n-j} B_{n-j} A_{n-j} drop_j(x_n)
        middle  y_n = W x_n + bias + s B_n Σ_{j=0..m} A_{n-j} drop(x_{n-j})

    with m = min(pre_num, n). Gradients flow through the shortcuts. The parameters are LoRA's. A
    chain breaks where in or out features change (``middle``: or the rank).

    Attributes:
        shortcut: ``"input"``, ``"block"`` or ``"middle"``.
        pre_num: number of earlier blocks in the sums, at least 1, or -1 for all; ``"input"`` does
            not use it and reaches one.
        shared_dropout: one dropout mask for all terms of ``"block"`` instead of one for each.
        merge: how a merged weight estimates the input of an earlier block as a multiple of this
            block's. ``"weight"``: from the norms of the merged weights. ``"input"``: from the sizes
            of the inputs that ``lr.reslora_statistics`` measured. ``"block"`` merges exactly and
            needs no estimate.
    """

    peft_type: ClassVar[str] = "RESLORA"
    inits: ClassVar[tuple[str, ...]] = ("kaiming",)
    own_fields: ClassVar[tuple[str, ...]] = ("shortcut", "pre_num", "shared_dropout", "merge")

    init: str = "kaiming"
    shortcut: str = "input"
    pre_num: int = 4
    shared_dropout: bool = False
    merge: str = "weight"

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        check_choice(self.shortcut, SHORTCUTS, owner, "shortcut")
        if isinstance(self.pre_num, bool) or not isinstance(self.pre_num, int):
            raise TypeError(f"{owner}: pre_num must be an int, got {self.pre_num!r}")
        if self.pre_num < 1 and self.pre_num != -1:
            raise ValueError(
                f"{owner}: pre_num must be at least 1, or -1 for all, got {self.pre_num}"
            )
        check_flag(self.shared_dropout, owner, "shared_dropout")
        check_choice(self.merge, MERGES, owner, "merge")

    def must_agree(self) -> dict[str, Any]:
        used = {} if self.shortcut == "input" else {"pre_num": self.pre_num}
        return {"shortcut": self.shortcut, **used}
