"""Thresholds for the Confidence rule that keep a stated agreement with full depth."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ext.checks import check_choice, check_probability
from lowrank_ext.methods.recursive.evaluation import checked_batches, evaluating, rows_of_loops
from lowrank_ext.methods.recursive.exits import MEASURES, Confidence, confidence
from lowrank_ext.methods.recursive.model import Loops

_HELD_OUT = 4  # every fourth sequence
LEAST_SEQUENCES = _HELD_OUT


@dataclass(frozen=True)
class Agreed:
    """How the exits of a rule agree with full depth on some tokens.

    Attributes:
        exits: number of tokens by exit loop.
        agreement: for each loop but the last, the share of the tokens that exit there whose most
            likely next token is that of the last loop; None where none exits.
    """

    exits: tuple[int, ...]
    agreement: tuple[float | None, ...]

    @property
    def num_tokens(self) -> int:
        return sum(self.exits)

    @property
    def exited_agreement(self) -> float | None:
        """The share among all tokens that exit before the last loop."""
        early = sum(self.exits[:-1])
        pairs = zip(self.exits[:-1], self.agreement, strict=True)
        agreeing = sum(n * (share or 0.0) for n, share in pairs)
        return agreeing / early if early else None


@dataclass(frozen=True)
class Calibration:
    """What ``calibrate`` found.

    Attributes:
        rule: with the thresholds.
        target: the share asked for.
        fitted: on the sequences that the thresholds were chosen on: ``agreement`` is at least
            ``target`` wherever tokens exit.
        held_out: on the others, every fourth: what to expect of new text.
    """

    rule: Confidence
    target: float
    fitted: Agreed
    held_out: Agreed

    def to_dict(self) -> dict[str, Any]:
        """All fields as values that JSON can hold."""
        return asdict(self)


def calibrate(
    model: nn.Module,
    batches: Iterable[Tensor],
    *,
    measure: str = "top_probability",
    target: float = 0.95,
) -> Calibration:
    """Find a threshold for each loop, from the first to the last but one.

    Kept is this: among the fitted tokens that exit after a loop, at least ``target`` have the same
    most likely next token there as at full depth. Of all thresholds with that property, each loop
    gets the one that lets the most tokens go; None where no threshold has it. Tokens that exited
    before are not counted again. Decisions are those of a full pass, hence of an engine that
    backfills; the same input gives the same thresholds.

    Args:
        model: a recursive model; in evaluation mode during the call.
        batches: token ids, int64 [B, T], without padding; four sequences at least.
        measure: "top_probability", "margin" or "entropy".
        target: from 0 to 1.

    Raises:
        TypeError, ValueError: the model is not recursive or has one loop, an option is out of
            range, a batch is no int64 [B, T], there are fewer than four sequences, or logits are
            not finite.

    Source: CALM, Schuster et al. 2022 (arXiv 2207.07061), section 4, whose statistical test is
    replaced by a held-out measurement.
    """
    owner = "calibrate"
    num_loops = Loops(model, owner).num_loops
    if num_loops == 1:
        raise ValueError(f"{owner}: model must have at least two loops, got one")
    check_choice(measure, MEASURES, owner, "measure")
    check_probability(target, owner, "target")
    scores, agrees, sequences = _scores(model, batches, measure, owner)
    held_out = sequences % _HELD_OUT == _HELD_OUT - 1
    if not held_out.any():
        raise ValueError(
            f"{owner}: batches must hold at least {LEAST_SEQUENCES} sequences, got "
            f"{int(sequences.max()) + 1}"
        )
    sign = -1.0 if measure == "entropy" else 1.0  # then a high score is a sure one
    thresholds = _thresholds(sign * scores[:, ~held_out], agrees[:, ~held_out], target)
    return Calibration(
        Confidence(measure, [None if t is None else sign * t for t in thresholds]),
        target,
        _agreed(sign * scores[:, ~held_out], agrees[:, ~held_out], thresholds),
        _agreed(sign * scores[:, held_out], agrees[:, held_out], thresholds),
    )


def _scores(
    model: nn.Module, batches: Iterable[Tensor], measure: str, owner: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each loop but the last: scores float32 and agreement bool, both [num_loops - 1, N]; and
    the number of each token's sequence [N]."""
    scores, agrees, sequences, count = [], [], [], 0
    with evaluating(model):
        for tokens in checked_batches(model, batches, owner, 1):
            for _, logits in rows_of_loops(model, tokens):
                last = logits[-1].argmax(-1)
                found = torch.stack([confidence(each, measure) for each in logits[:-1]])
                if not (found.isfinite().all() and logits[-1].isfinite().all()):
                    raise ValueError(f"{owner}: logits must be finite, got inf or nan")
                scores.append(found.cpu())
                agrees.append(torch.stack([each.argmax(-1) == last for each in logits[:-1]]).cpu())
            rows, length = tokens.shape
            sequences.append(torch.arange(count, count + rows).repeat_interleave(length))
            count += rows
    return torch.cat(scores, 1), torch.cat(agrees, 1), torch.cat(sequences)


def _thresholds(scores: Tensor, agrees: Tensor, target: float) -> list[float | None]:
    """The loosest threshold of each loop; high scores are sure."""
    staying = torch.ones(scores.shape[1], dtype=torch.bool)
    found: list[float | None] = []
    for own, agree in zip(scores, agrees, strict=True):
        threshold = _loosest(own[staying], agree[staying], target)
        found.append(threshold)
        if threshold is not None:
            staying &= own < threshold
    return found


def _loosest(scores: Tensor, agrees: Tensor, target: float) -> float | None:
    """The least score such that of all at least as high the share ``target`` agrees."""
    if scores.numel() == 0:
        return None
    ordered, order = scores.sort(descending=True, stable=True)
    numbers = torch.arange(1, ordered.shape[0] + 1)
    enough = agrees[order].cumsum(0).double() >= target * numbers.double()
    # Equal scores exit together: a cut is possible after the last of them.
    enough[:-1] &= ordered[:-1] > ordered[1:]
    cuts = enough.nonzero()
    return float(ordered[int(cuts[-1])]) if cuts.numel() else None


def _agreed(scores: Tensor, agrees: Tensor, thresholds: list[float | None]) -> Agreed:
    staying = torch.ones(scores.shape[1], dtype=torch.bool)
    exits, shares = [], list[float | None]()
    for own, agree, threshold in zip(scores, agrees, thresholds, strict=True):
        leaves = staying & (own >= threshold) if threshold is not None else staying & False
        exits.append(int(leaves.sum()))
        shares.append(int(agree[leaves].sum()) / exits[-1] if exits[-1] else None)
        staying &= ~leaves
    return Agreed((*exits, int(staying.sum())), tuple(shares))
