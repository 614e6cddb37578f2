"""The mask of real tokens: which of a batch count for load balancing."""

from typing import Self

from torch import Tensor

# The mask of the innermost `with token_mask(...)`. Not a ContextVar: autograd may run the
# recomputation of a checkpointed forward on a thread of its own.
_token_mask: Tensor | None = None


class token_mask:  # used like a function
    """``with lr.token_mask(mask):`` only tokens where ``mask`` is true count for load balancing.

    Every GOATLinear whose input has the mask's leading dimensions uses it, with x [..., K] and mask
    [...], bool or integer (a tokenizer's attention_mask), on x's device; others count all tokens.
    It changes the balance loss and the counted load, never the output. With activation
    checkpointing backward belongs inside the block, as it runs forward once more.

    Example:
        >>> with lr.token_mask(batch["attention_mask"]):
        ...     loss = model(**batch).loss + lr.balance_loss(model)
        ...     loss.backward()
    """

    def __init__(self, mask: Tensor | None) -> None:
        if mask is not None and (mask.is_floating_point() or mask.is_complex() or mask.dim() == 0):
            raise ValueError(
                "token_mask: mask must be a bool or integer tensor of x's leading dimensions, got "
                f"{str(mask.dtype).removeprefix('torch.')} {list(mask.shape)}"
            )
        self.mask = None if mask is None else mask.bool()
        self._outer: list[Tensor | None] = []

    def __enter__(self) -> Self:
        global _token_mask
        self._outer.append(_token_mask)
        _token_mask = self.mask
        return self

    def __exit__(self, *exception: object) -> None:
        global _token_mask
        _token_mask = self._outer.pop()


def current_token_mask(x: Tensor) -> Tensor | None:
    """The mask that holds for the rows of x [..., K], if any."""
    mask = _token_mask
    return mask if mask is not None and mask.shape == x.shape[:-1] else None
