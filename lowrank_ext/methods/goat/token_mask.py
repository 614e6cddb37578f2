"""token_mask: which tokens of a batch count for load balancing."""

from typing import Self

from torch import Tensor

# The mask of the innermost `with token_mask(...)`. A global instead of a ContextVar, because
# autograd may recompute a checkpointed forward on another thread.
_token_mask: Tensor | None = None


class token_mask:  # used like a function
    """``with lr.token_mask(mask):`` only tokens where ``mask`` is true count for load balancing.

    The mask [...] is bool or integer (a tokenizer's attention_mask), on x's device. It applies to
    every GOATLinear whose input x [..., K] has the mask's shape as leading dimensions; others count
    all tokens. It changes the balance loss and the counted load, never the output. With activation
    checkpointing backward must run inside the block too, as it reruns forward.

    Examples:
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
    """The active mask that applies to the rows of x [..., K], or None."""
    mask = _token_mask
    return mask if mask is not None and mask.shape == x.shape[:-1] else None
