"""Precision and recall over all thresholds, and the area under their curve."""

from typing import NamedTuple

import torch
from torch import Tensor


class PrecisionRecall(NamedTuple):
    """The curve, from the highest threshold to the lowest: float64 [k] each, k distinct scores.

    precision[i] and recall[i] hold if every score of at least thresholds[i] is called unsafe.
    """

    precision: Tensor
    recall: Tensor
    thresholds: Tensor


def precision_recall(labels: Tensor, scores: Tensor) -> PrecisionRecall:
    """The precision-recall curve of ``scores`` [N] for ``labels`` [N], true or 1 for unsafe.

    Equal scores are one threshold: the order of the rows does not matter.

    Raises:
        ValueError: the shapes differ, a score is NaN, or no label is positive.
    """
    labels, scores = labels.detach().bool(), scores.detach().double()
    if labels.dim() != 1 or labels.shape != scores.shape:
        raise ValueError(
            f"precision_recall: labels and scores must be [N] both, got {list(labels.shape)} and "
            f"{list(scores.shape)}"
        )
    if scores.isnan().any():
        raise ValueError("precision_recall: scores must be numbers, got NaN")
    if not labels.any():
        raise ValueError("precision_recall: labels must hold a positive, got none")
    thresholds, group = torch.unique(-scores, return_inverse=True)
    size = torch.zeros_like(thresholds)
    found = size.index_add(0, group, labels.double()).cumsum(0)
    called = size.index_add(0, group, torch.ones_like(scores)).cumsum(0)
    return PrecisionRecall(found / called, found / found[-1], -thresholds)


def average_precision(labels: Tensor, scores: Tensor) -> float:
    """AUPRC as the average precision: Σ (recallᵢ - recallᵢ₋₁) · precisionᵢ, without interpolation.

    A constant score gives the share of positives, the baseline.

    Raises:
        ValueError: as ``precision_recall``.

    Examples:
        >>> average_precision(torch.tensor([0, 0, 1, 1]), torch.tensor([0.1, 0.4, 0.35, 0.8]))
        0.8333333333333333
    """
    curve = precision_recall(labels, scores)
    steps = curve.recall.diff(prepend=curve.recall.new_zeros(1))
    return float((steps * curve.precision).sum())
