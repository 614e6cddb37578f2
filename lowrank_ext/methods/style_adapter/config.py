"""Configuration of StyleAdapter's style path: choices that the paper leaves open."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import torch

from lowrank_ext.checks import (
    check_choice,
    check_finite,
    check_flag,
    check_rank,
    did_you_mean,
    normalized_adapter_dtype,
)


@dataclass(kw_only=True, frozen=True)
class StylePathConfig:
    """The style half of two-path cross-attention (StyleAdapter, arXiv 2309.01770).

    Attributes:
        style_dim: size of a style token; None stands for that of a text token.
        share_query: both paths use the text path's queries; with False the style path has its own
            query projection, which starts as a copy of the text path's.
        share_out: both paths use the text path's output projection; with False the style path has
            its own, which starts as a copy.
        lam: ``"layer"``, one λ for each attention layer, or ``"global"``, one for all.
        lam_init: initial λ. With 0 the output starts as the base model's, and while λ is 0 only λ
            has a nonzero gradient.
        init: of the key and value projections. ``"text"``: copies of the text path's, which needs
            style_dim to be a text token's size. ``"random"``: uniform in ±1/sqrt(style_dim).
            ``"zero"``: random keys and zero values, so the output starts as the base model's.
        adapter_dtype: of the style path's weights, ``"base"`` or a floating dtype, by name or as
            ``torch.dtype``. With a float64 base they are always float64. λ is never narrower than
            float32.

    Raises:
        ValueError: an argument is out of range; the message names it.
        TypeError: an argument has the wrong type.
    """

    peft_type: ClassVar[str] = "STYLE_ADAPTER"
    inits: ClassVar[tuple[str, ...]] = ("text", "random", "zero")

    style_dim: int | None = None
    share_query: bool = True
    share_out: bool = True
    lam: str = "layer"
    lam_init: float = 1.0
    init: str = "text"
    adapter_dtype: torch.dtype | str = "float32"

    def __post_init__(self) -> None:
        owner = type(self).__name__
        if self.style_dim is not None:
            check_rank(self.style_dim, owner, "style_dim")
        check_flag(self.share_query, owner, "share_query")
        check_flag(self.share_out, owner, "share_out")
        check_choice(self.lam, ("layer", "global"), owner, "lam")
        check_finite(self.lam_init, owner, "lam_init")
        check_choice(self.init, self.inits, owner, "init")
        dtype = normalized_adapter_dtype(self.adapter_dtype, owner)
        object.__setattr__(self, "adapter_dtype", dtype)

    def to_dict(self) -> dict[str, Any]:
        """All fields and ``peft_type`` as values that JSON can hold."""
        return {"peft_type": self.peft_type, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config that ``to_dict`` described.

        Raises:
            ValueError: ``peft_type`` is another one, or a key is no field.
        """
        values = dict(values)
        peft_type = values.pop("peft_type", cls.peft_type)
        if peft_type != cls.peft_type:
            raise ValueError(
                f"{cls.__name__}.from_dict: peft_type must be {cls.peft_type!r}, got {peft_type!r}"
            )
        fields = cls.__dataclass_fields__
        for key in values:
            if key not in fields or key in ("peft_type", "inits"):
                raise ValueError(
                    f"{cls.__name__}.from_dict: {key!r} is not a field{did_you_mean(key, fields)}"
                )
        return cls(**values)
