"""RecursiveConfig: into how many loops a model is folded, and how its loops may differ."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from lowrank_ext.checks import (
    check_choice,
    check_count,
    check_regex,
    did_you_mean,
    matches_names,
    matching_pattern,
    normalized_names,
)
from lowrank_ext.config import ALL_LINEAR
from lowrank_ext.option_names import check_options

TIED_STARTS = ("average", "stepwise", "lower")
LORA_STARTS = ("svd", "zero")


@dataclass(kw_only=True, frozen=True)
class RecursiveConfig:
    """Options of ``lowrank_ext.recursive.convert``.

    Attributes:
        num_loops: B, how often the block of K = L / B stored layers runs; divides the number L of
            layers of the model.
        init: which weights the stored layers get. ``"average"``: the mean of the layers that share
            a position, in fp32. ``"stepwise"``: layers round(i (L - 1) / (K - 1)), the first and
            the last among them. ``"lower"``: the first K layers.
        rank: rank of the adapter that each loop has beside each tied linear: a number for all, or
            a mapping from names or regular expressions, matched as PEFT's rank_pattern, to numbers;
            linears that no key matches get none. 0: no adapters, a pure recursion. Above
            min(in_features, out_features) it is that.
        lora_init: ``"svd"``: the best approximation of this rank of the difference between the
            layer's weight and the tied one, gains of norms included. ``"zero"``: adapters that add
            nothing at first.
        targets: which linears of the block get adapters: names, one regular expression, or
            ``"all-linear"``, matched within a layer (``"q_proj"``, ``"mlp.up_proj"``).

    Raises:
        ValueError: an option is out of range; the message names it.
        TypeError: an option has the wrong type.

    Source: Relaxed Recursive Transformers, Bae et al. 2024 (arXiv 2410.20672), sections 2.2, 2.3.
    """

    num_loops: int
    init: str = "average"
    rank: int | Mapping[str, int] = 0
    lora_init: str = "svd"
    targets: str | Sequence[str] = ALL_LINEAR

    def __new__(cls, *args: Any, **options: Any) -> Self:
        check_options(options, [f.name for f in fields(cls)], cls.__name__)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_count(self.num_loops, 1, owner, "num_loops")
        check_choice(self.init, TIED_STARTS, owner, "init")
        check_choice(self.lora_init, LORA_STARTS, owner, "lora_init")
        if isinstance(self.rank, Mapping):
            for key, rank in self.rank.items():
                if not isinstance(key, str):
                    raise TypeError(f"{owner}: rank must have names as keys, got {key!r}")
                check_regex(key, owner, "rank")
                check_count(rank, 0, owner, f"rank[{key!r}]")
            object.__setattr__(self, "rank", dict(self.rank))
        else:
            check_count(self.rank, 0, owner, "rank")
        targets = normalized_names(self.targets, owner, "targets")
        if not targets:
            raise ValueError(f"{owner}: targets must name at least one linear, got none")
        object.__setattr__(self, "targets", targets)

    def rank_for(self, path: str, in_features: int, out_features: int) -> int:
        """Rank of the adapters of the linear at ``path`` within a layer; 0 for none."""
        return min(self.asked_rank(path), in_features, out_features)

    def asked_rank(self, path: str) -> int:
        """The same for a linear of any size."""
        if self.targets != ALL_LINEAR and not matches_names(path, self.targets):
            return 0
        if not isinstance(self.rank, Mapping):
            return self.rank
        key = matching_pattern(self.rank, path)
        return 0 if key is None else self.rank[key]

    @property
    def is_relaxed(self) -> bool:
        """Whether any linear may have adapters."""
        ranks = self.rank.values() if isinstance(self.rank, Mapping) else [self.rank]
        return any(rank > 0 for rank in ranks)

    @property
    def starts_from_svd(self) -> bool:
        """Whether adapters start from what tying takes away."""
        return self.is_relaxed and self.lora_init == "svd"

    def to_dict(self) -> dict[str, Any]:
        """All fields as values that JSON can hold."""
        values = asdict(self)
        if not isinstance(self.targets, str):
            values["targets"] = list(self.targets)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config that ``to_dict`` described.

        Raises:
            ValueError: a key is no field, or num_loops is missing.
        """
        names = [f.name for f in fields(cls)]
        for key in values:
            if key not in names:
                raise ValueError(
                    f"{cls.__name__}.from_dict: {key!r} is not a field{did_you_mean(key, names)}"
                )
        if "num_loops" not in values:
            raise ValueError(f"{cls.__name__}.from_dict: num_loops must be given, got none")
        return cls(**values)
