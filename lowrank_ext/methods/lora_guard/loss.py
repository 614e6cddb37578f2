"""The loss of LoRA-Guard, with rare positives weighted up."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ext.checks import check_number


def positive_weights(labels: Tensor, limit: float = 100.0) -> Tensor:
    """negatives / positives of each column of ``labels`` [N, C], float32 [C], in 1/limit … limit.

    Without the limit a category without positives would have an infinite weight, and one without
    negatives weight 0.

    Raises:
        ValueError: labels is not [N, C] with at least one row, or limit is below 1.
    """
    check_number(limit, "positive_weights", "limit")
    if limit < 1:
        raise ValueError(f"positive_weights: limit must be at least 1, got {limit}")
    if labels.dim() != 2 or not labels.shape[0]:
        raise ValueError(
            f"positive_weights: labels must be [N, C] with N > 0, got {list(labels.shape)}"
        )
    positives = labels.bool().sum(0).double()
    return ((labels.shape[0] - positives) / positives).clamp(1 / limit, limit).float()


class GuardLoss(nn.Module):
    """share · BCE(unsafe) + (1 - share) · mean over categories of BCE(category).

    (Elesedy et al., arXiv 2407.02987.) Every binary cross entropy has a pos_weight, the negatives
    per positive of the training labels; a row is unsafe when any of its categories is positive.

    Args:
        labels: of the training set, [N, C], true or 1 where a text belongs to a category.
        unsafe_share: share, from 0 to 1. For a model with ``unsafe_head=False``, whose unsafe logit
            is the largest of its categories', 0 trains the categories alone.
        limit: bound of pos_weight and of its inverse.

    Attributes:
        unsafe_pos_weight: float32 buffer [1].
        category_pos_weight: float32 buffer [C].

    Raises:
        ValueError: an argument is out of range.

    Examples:
        >>> criterion = GuardLoss(train_labels)
        >>> loss = criterion(*model.guard(input_ids, attention_mask)[:2], labels)
    """

    unsafe_pos_weight: Tensor
    category_pos_weight: Tensor

    def __init__(self, labels: Tensor, unsafe_share: float = 0.5, limit: float = 100.0) -> None:
        super().__init__()
        check_number(unsafe_share, "GuardLoss", "unsafe_share")
        if unsafe_share > 1:
            raise ValueError(f"GuardLoss: unsafe_share must be at most 1, got {unsafe_share}")
        self.unsafe_share = unsafe_share
        self.register_buffer("category_pos_weight", positive_weights(labels, limit))
        unsafe = labels.bool().any(1, keepdim=True)
        self.register_buffer("unsafe_pos_weight", positive_weights(unsafe, limit))

    def forward(self, unsafe_logits: Tensor, category_logits: Tensor, labels: Tensor) -> Tensor:
        """A scalar, float32 (float64 for float64 logits), from logits [G, 1] and [G, C].

        Args:
            labels: [G, C]. With G = 0 the loss is 0, differentiable.

        Raises:
            ValueError: the shapes do not fit.
        """
        rows, num_categories = len(category_logits), len(self.category_pos_weight)
        expected = [rows, 1], [rows, num_categories], [rows, num_categories]
        got = tuple(list(t.shape) for t in (unsafe_logits, category_logits, labels))
        if got != expected:
            raise ValueError(
                "GuardLoss: unsafe_logits, category_logits and labels must be "
                f"{', '.join(map(str, expected))}, got {', '.join(map(str, got))}"
            )
        unsafe = _bce(unsafe_logits, labels.bool().any(1, keepdim=True), self.unsafe_pos_weight)
        categories = _bce(category_logits, labels, self.category_pos_weight)
        return self.unsafe_share * unsafe + (1 - self.unsafe_share) * categories


def _bce(logits: Tensor, labels: Tensor, pos_weight: Tensor) -> Tensor:
    """Mean over rows and columns; 0 without rows, where a mean would be NaN."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.binary_cross_entropy_with_logits(
        wide, labels.bool().to(wide.dtype), pos_weight=pos_weight.to(wide.dtype), reduction="sum"
    )
    return total / max(1, logits.numel())
