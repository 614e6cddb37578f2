"""Exit rules: after which loop a token leaves the model.

A rule sees the rows that have just ended a loop that is not the last; a row that it lets go gets
its next token from that loop's logits.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lowrank_ext.checks import check_choice, check_count, check_finite

# What stands for keys and values of the loops that a token has not run.
SKIPPED = ("backfill", "copy", "share-first")
MEASURES = ("top_probability", "margin", "entropy")


class ExitRows(NamedTuple):
    """The rows that a rule decides on.

    Attributes:
        loop: the loop that they have just ended, 0-based.
        requests: the id of each row's request.
        indices: which generated token of its request each row leads to, from 0.
        logits: [R, V], or None for a rule that needs none.
        earlier: argmax of each row's logits after the loop before, or None after loop 0.
    """

    loop: int
    requests: Sequence[object]
    indices: Sequence[int]
    logits: Tensor | None
    earlier: Tensor | None


class ExitRule(Protocol):
    """Decides which rows exit.

    Attributes:
        needs_logits: whether ``exits`` reads ``logits``: the head runs after every loop then.
    """

    needs_logits: bool

    def exits(self, rows: ExitRows) -> Tensor:
        """bool [R]: the rows that exit after ``rows.loop``."""
        ...


@dataclass(frozen=True)
class FixedDepth:
    """Every token exits after loop ``loop`` (0-based)."""

    loop: int
    needs_logits = False

    def __post_init__(self) -> None:
        check_count(self.loop, 0, "FixedDepth", "loop")

    def exits(self, rows: ExitRows) -> Tensor:
        return torch.full((len(rows.requests),), rows.loop >= self.loop)


@dataclass(frozen=True)
class ForcedExits:
    """Tokens exit where a table says, whatever the logits are: for measurements.

    Attributes:
        loops: of each request, by id, the exit loop of each of its tokens; the last entry stands
            for all tokens after it.
    """

    loops: Mapping[object, Sequence[int]]
    needs_logits = False

    def __post_init__(self) -> None:
        for request, loops in self.loops.items():
            if not isinstance(loops, list | tuple) or not loops:
                raise ValueError(
                    f"ForcedExits: loops must hold at least one loop for request {request!r}, got "
                    f"{loops!r}"
                )
            for loop in loops:
                check_count(loop, 0, "ForcedExits", f"loops[{request!r}]")

    def exits(self, rows: ExitRows) -> Tensor:
        return torch.tensor(
            [self._at(*row) <= rows.loop for row in zip(rows.requests, rows.indices, strict=True)]
        )

    def _at(self, request: object, index: int) -> int:
        if request not in self.loops:
            raise ValueError(
                f"ForcedExits: loops must hold every request, got none for {request!r}"
            )
        loops = self.loops[request]
        return loops[min(index, len(loops) - 1)]


@dataclass(frozen=True)
class Confidence:
    """A token exits after the first loop whose distribution p is sure enough.

        top_probability:  max p >= threshold
        margin:           the difference of the two largest p >= threshold
        entropy:          -sum p log p <= threshold, in nats

    Attributes:
        measure: one of these.
        thresholds: one for each loop but the last, or one for all of them; None at a loop: no token
            exits there.

    Source: CALM, Schuster et al. 2022 (arXiv 2207.07061), section 3.4; Bae et al. 2024.
    """

    measure: str
    thresholds: Sequence[float | None]
    needs_logits = True

    def __post_init__(self) -> None:
        check_choice(self.measure, MEASURES, "Confidence", "measure")
        if not isinstance(self.thresholds, list | tuple):
            raise TypeError(
                f"Confidence: thresholds must be a sequence of numbers, got {self.thresholds!r}"
            )
        if not self.thresholds:
            raise ValueError("Confidence: thresholds must have at least one entry, got none")
        for value in self.thresholds:
            if value is None:
                continue
            check_finite(value, "Confidence", "thresholds")
            if value < 0 or (value > 1 and self.measure != "entropy"):
                limits = "at least 0" if self.measure == "entropy" else "from 0 to 1"
                raise ValueError(
                    f"Confidence: thresholds of {self.measure} must be {limits}, got {value}; None "
                    "for a loop after which no token exits"
                )
        object.__setattr__(self, "thresholds", tuple(self.thresholds))

    def exits(self, rows: ExitRows) -> Tensor:
        assert rows.logits is not None
        threshold = self.thresholds[min(rows.loop, len(self.thresholds) - 1)]
        if threshold is None:
            return torch.zeros(len(rows.requests), dtype=torch.bool)
        scores = confidence(rows.logits, self.measure)
        sure = scores <= threshold if self.measure == "entropy" else scores >= threshold
        return sure.cpu()


@dataclass(frozen=True)
class Agreement:
    """A token exits after the first loop whose most likely token is that of the loop before."""

    needs_logits = True

    def exits(self, rows: ExitRows) -> Tensor:
        assert rows.logits is not None
        if rows.earlier is None:
            return torch.zeros(len(rows.requests), dtype=torch.bool)
        return (rows.logits.argmax(-1) == rows.earlier).cpu()


def check_rule(rule: object, num_loops: int, owner: str) -> None:
    """Raise TypeError for what is no rule, and ValueError for one that does not fit a model of so
    many loops. None is no exits."""
    if rule is None:
        return
    if not callable(getattr(rule, "exits", None)) or not hasattr(rule, "needs_logits"):
        raise TypeError(f"{owner}: the exit rule must have exits and needs_logits, got {rule!r}")
    if isinstance(rule, FixedDepth) and rule.loop >= num_loops:
        raise ValueError(
            f"{owner}: loop must be at most {num_loops - 1}, the last one, got {rule.loop}"
        )
    if isinstance(rule, ForcedExits):
        last = max((max(loops) for loops in rule.loops.values()), default=0)
        if last >= num_loops:
            raise ValueError(
                f"{owner}: loops must be at most {num_loops - 1}, the last one, got {last}"
            )
    if isinstance(rule, Confidence) and len(rule.thresholds) not in (1, num_loops - 1):
        raise ValueError(
            f"{owner}: thresholds must be one, or {num_loops - 1} for a model of {num_loops} "
            f"loops, got {len(rule.thresholds)}"
        )


def exit_decisions(rule: ExitRule, rows: ExitRows) -> Tensor:
    """bool [R] on the CPU: which of the rows exit.

    Raises:
        TypeError: the rule gives anything but a bool for each row.
    """
    found = rule.exits(rows)
    count = len(rows.requests)
    if not isinstance(found, Tensor) or found.dtype != torch.bool or found.shape != (count,):
        got = (
            f"{found.dtype} {list(found.shape)}"
            if isinstance(found, Tensor)
            else type(found).__name__
        )
        raise TypeError(
            f"{type(rule).__name__}.exits must give a bool tensor [{count}], one for each row, "
            f"got {got}"
        )
    return found.cpu()


def confidence(logits: Tensor, measure: str) -> Tensor:
    """A score for each row of ``logits`` [..., V], in fp32: see ``Confidence``."""
    log_p = torch.log_softmax(logits.float(), dim=-1)
    if measure == "entropy":
        return -(log_p.exp() * log_p).sum(-1)
    top = log_p.topk(2, dim=-1).values.exp()
    return top[..., 0] if measure == "top_probability" else top[..., 0] - top[..., 1]


def oracle_loops(logits: Sequence[Tensor]) -> Tensor:
    """The first loop whose most likely token is that of the last, int64 [...].

    Args:
        logits: [..., V] after each loop.
    """
    tokens = torch.stack([each.argmax(-1) for each in logits])
    return (tokens == tokens[-1]).int().argmax(0)
