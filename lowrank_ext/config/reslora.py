"""Configuration of ResLoRA."""

from dataclasses import dataclass
from typing import Any, ClassVar

from lowrank_ext.config.base import AdapterConfig
from lowrank_ext.config.checks import check_choice

SHORTCUTS = ("input", "block", "middle")
MERGES = ("weight", "input")


@dataclass(kw_only=True, frozen=True)
class ResLoRAConfig(AdapterConfig):
    """ResLoRA: LoRA whose branches reach back to the same projection of earlier blocks.

    (Shi et al., arXiv 2402.18039.) The modules of one name in consecutive blocks are a chain, of
    which module n computes, with x its input, A and B its lora_a and lora_b and s its scaling:

        input   y_n = W x_n + bias + s B_n A_n drop(x_n + x_{n-1}),  2 x_0 for the first module
        block   y_n = W x_n + bias + Σ_{j=0..m} s_{n-j} B_{n-j} A_{n-j} drop_j(x_n)
        middle  y_n = W x_n + bias + s B_n Σ_{j=0..m} A_{n-j} drop(x_{n-j})

    with m = min(pre_num, n). Gradients flow through the shortcuts. There are no parameters beside
    LoRA's. A chain breaks where in or out features change (``middle``: or the rank).

    Attributes:
        shortcut: ``"input"``, ``"block"`` or ``"middle"``.
        pre_num: how many earlier blocks count, at least 1, or -1 for all; not used by ``"input"``,
            which has one.
        shared_dropout: one dropout mask for all terms of ``"block"`` instead of one for each.
        merge: how the input of an earlier block is estimated in a merged weight, as a multiple of
            this block's. ``"weight"``: from the norms of the merged weights. ``"input"``: from the
            sizes of the inputs, which ``lr.reslora_statistics`` has measured. ``"block"`` merges
            exactly and needs no estimate.
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
        check_reslora_options(type(self).__name__, **self._own_options())

    def must_agree(self) -> dict[str, Any]:
        used = {} if self.shortcut == "input" else {"pre_num": self.pre_num}
        return {"shortcut": self.shortcut, **used}

    def _own_options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.own_fields}

    def module_options(self, path: str) -> dict[str, Any]:
        return {**super().module_options(path), **self._own_options()}


def check_reslora_options(
    owner: str, *, shortcut: str, pre_num: int, shared_dropout: bool, merge: str
) -> None:
    """Raise ValueError or TypeError, naming the argument, for what no ResLoRALinear can be."""
    check_choice(shortcut, SHORTCUTS, owner, "shortcut")
    if isinstance(pre_num, bool) or not isinstance(pre_num, int):
        raise TypeError(f"{owner}: pre_num must be an int, got {pre_num!r}")
    if pre_num < 1 and pre_num != -1:
        raise ValueError(f"{owner}: pre_num must be at least 1, or -1 for all, got {pre_num}")
    if not isinstance(shared_dropout, bool):
        raise TypeError(f"{owner}: shared_dropout must be a bool, got {shared_dropout!r}")
    check_choice(merge, MERGES, owner, "merge")
