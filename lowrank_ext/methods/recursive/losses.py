"""Losses of uptraining, from the logits of each loop: cross entropy, distillation, early exits.

Tokens are taken in chunks, each converted to float32 by itself in forward and again in backward: no
[tokens, vocabulary] copy in float32 is ever alive.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lowrank_ext.checks import check_choice, check_count, check_number

LOSSES = ("ce", "kl", "reverse-kl", "tvd", "jsd")
EARLIER_LOOPS = 0.1  # the paper's "aggressive" coefficient
IGNORED = -100
_CHUNK_LOGITS = 2**21  # converted to float32 at a time: 8 MiB for each copy


class LoopLoss(NamedTuple):
    """What ``loop_loss`` returns.

    Attributes:
        total: the loss for backward.
        by_loop: float32 [num_loops], detached: the mean loss of each loop before its coefficient; 0
            where the coefficient is 0.
    """

    total: Tensor
    by_loop: Tensor


def loop_coefficients(
    num_loops: int,
    earlier: float | Sequence[float] = EARLIER_LOOPS,
    *,
    step: int = 0,
    warm_up: int = 0,
) -> tuple[float, ...]:
    """Coefficients of the loops' losses at a step of the training.

        c_l = earlier_l · min(1, (step + 1) / warm_up) for l < num_loops - 1,     c_last = 1

    Args:
        num_loops: B.
        earlier: of each loop but the last: a number for all, or B - 1 numbers. 0.1 is the paper's
            choice; 0.3 gives better early and worse last loops.
        step: the step, from 0.
        warm_up: number of steps over which they rise; 0: none.

    Raises:
        TypeError, ValueError: an argument is no number, negative, or of another length.

    Source: Relaxed Recursive Transformers, Bae et al. 2024 (arXiv 2410.20672), section 3.7; the
    warm-up is ours.
    """
    owner = "loop_coefficients"
    check_count(num_loops, 1, owner, "num_loops")
    check_count(step, 0, owner, "step")
    check_count(warm_up, 0, owner, "warm_up")
    given = list(earlier) if isinstance(earlier, Sequence) else [earlier] * (num_loops - 1)
    if len(given) != num_loops - 1:
        raise ValueError(
            f"{owner}: earlier must have an entry for each of the {num_loops - 1} earlier loops, "
            f"got {len(given)}"
        )
    for value in given:
        check_number(value, owner, "earlier")
    risen = min(1.0, (step + 1) / warm_up) if warm_up else 1.0
    return (*(risen * value for value in given), 1.0)


def loop_loss(
    logits: Sequence[Tensor],
    labels: Tensor,
    *,
    loss: str = "ce",
    teacher_logits: Tensor | None = None,
    coefficients: Sequence[float] | None = None,
    exit_loss: str = "kl",
    num_items: Tensor | int | None = None,
    chunk_tokens: int | None = None,
) -> LoopLoss:
    """Loss of the last loop, and distillation of each earlier loop towards the last.

        total = 1 / N sum_t (c_last loss(p_last, q) + sum_{l < last} c_l exit_loss(p_l, [p_last]))

        ce           -log p(label)
        kl           sum q log(q / p)          q: the teacher, [p_last]: detached
        reverse-kl   sum p log(p / q)
        tvd          1/2 sum |p - q|
        jsd          1/2 sum q log(q / m) + 1/2 sum p log(p / m),     m = (p + q) / 2

    Tokens t are those whose next label is not -100: labels are shifted as transformers does.
    Everything is summed in float32 (float64 for float64). Beside the logits at most twelve copies
    of a chunk live at a time, 8 MiB each; and in backward the gradient of one loop's logits, in
    their own dtype.

    Args:
        logits: [B, T, V] after each loop, as ``loop_logits`` gives them; or the last loop's alone.
        labels: int64 [B, T], not shifted.
        loss: of the last loop: "ce", "kl", "reverse-kl", "tvd" or "jsd".
        teacher_logits: [B, T, V], for all but "ce"; no gradient goes there.
        coefficients: one for each loop; None: those of ``loop_coefficients``. Loops with 0 are
            left out.
        exit_loss: of the earlier loops, one of the same; "ce" takes the labels.
        num_items: N; None: the number of counted tokens. Of an accumulated step the tokens of all
            its batches.
        chunk_tokens: tokens that are taken at a time; None: so many that they have 2^21 logits.

    Returns:
        A ``LoopLoss``. NaN where no token counts and num_items is not given, as
        torch.nn.functional.cross_entropy.

    Raises:
        TypeError, ValueError: a name is unknown, shapes differ, teacher_logits are missing or not
            used, a label is outside the vocabulary, or a coefficient is negative.

    Source: Relaxed Recursive Transformers, Bae et al. 2024 (arXiv 2410.20672), sections 3.6, 3.7.
    """
    owner = "loop_loss"
    _check_logits(owner, logits, labels, teacher_logits, loss, exit_loss)
    used = loop_coefficients(len(logits)) if coefficients is None else tuple(coefficients)
    if len(used) != len(logits):
        raise ValueError(
            f"{owner}: coefficients must have an entry for each of the {len(logits)} loops, got "
            f"{len(used)}"
        )
    for value in used:
        check_number(value, owner, "coefficients")
    if chunk_tokens is not None:
        check_count(chunk_tokens, 1, owner, "chunk_tokens")
    vocabulary = logits[-1].shape[-1]
    chunk = chunk_tokens or max(1, _CHUNK_LOGITS // vocabulary)
    tokens = _counted(labels, vocabulary, owner)
    count: Any = tokens.rows.numel() if num_items is None else num_items
    # The number on a GPU would have to be waited for.
    if not isinstance(count, Tensor) or count.device.type == "cpu":
        least = 1 if tokens.rows.numel() else 0
        if not count >= least:
            raise ValueError(f"{owner}: num_items must be at least {least}, got {int(count)}")
    if isinstance(count, Tensor):
        count = count.to(logits[-1].device)
    last = logits[-1].detach()
    means = []
    for index, (own, coefficient) in enumerate(zip(logits, used, strict=True)):
        is_last = index == len(logits) - 1
        kind, target = (loss, teacher_logits) if is_last else (exit_loss, last)
        if coefficient == 0:
            means.append(own.new_zeros((), dtype=_wide(own)))
            continue
        target = None if kind == "ce" or target is None else _rows_of(target.detach())
        summed: Tensor = _ChunkedSum.apply(_rows_of(own), target, tokens, kind, chunk)
        means.append(summed / count)
    total = sum(
        (value * mean for value, mean in zip(used, means, strict=True) if value),
        start=means[-1].new_zeros(()),
    )
    return LoopLoss(total, torch.stack([mean.detach() for mean in means]).float())


def token_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(label) of each row of ``logits`` [N, V], in float32, by chunks: [N]. No gradient."""
    chunk = max(1, _CHUNK_LOGITS // logits.shape[-1])
    parts = zip(logits.detach().split(chunk), labels.split(chunk), strict=True)
    found = [F.cross_entropy(own.to(_wide(own)), label, reduction="none") for own, label in parts]
    return torch.cat(found) if found else logits.new_zeros(0, dtype=_wide(logits))


class _Tokens(NamedTuple):
    """Which rows of [B · T, V] count, and their labels."""

    rows: Tensor
    labels: Tensor


def _counted(labels: Tensor, vocabulary: int, owner: str) -> _Tokens:
    shifted = F.pad(labels, (0, 1), value=IGNORED)[..., 1:].reshape(-1)
    rows = (shifted != IGNORED).nonzero().squeeze(1)
    own = shifted.index_select(0, rows)
    if own.numel() and not 0 <= int(own.min()) <= int(own.max()) < vocabulary:
        raise ValueError(
            f"{owner}: labels must be {IGNORED} or from 0 to {vocabulary - 1}, got from "
            f"{int(own.min())} to {int(own.max())}"
        )
    return _Tokens(rows, own)


def _rows_of(logits: Tensor) -> Tensor:
    return logits.reshape(-1, logits.shape[-1])


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


class _ChunkedSum(torch.autograd.Function):
    """Sum of the loss over the counted rows, which keeps the logits and nothing else."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target: Tensor | None, tokens: _Tokens, kind: str, chunk: int
    ) -> Tensor:
        ctx.save_for_backward(logits, target, *tokens)
        ctx.kind, ctx.chunk = kind, chunk
        total = logits.new_zeros((), dtype=_wide(logits))
        for rows, labels in _chunks(tokens, chunk):
            total += _sum_of(_taken(logits, rows), _taken(target, rows), labels, kind)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits, target, *rest = ctx.saved_tensors
        grad_logits = torch.zeros_like(logits)
        for rows, labels in _chunks(_Tokens(*rest), ctx.chunk):
            own = _taken(logits, rows)
            assert own is not None
            with torch.enable_grad():
                own.requires_grad_()
                value = _sum_of(own, _taken(target, rows), labels, ctx.kind)
            (part,) = torch.autograd.grad(value, own, gradient)
            grad_logits.index_copy_(0, rows, part.to(logits.dtype))
        return grad_logits, None, None, None, None


def _chunks(tokens: _Tokens, chunk: int) -> Any:
    return zip(tokens.rows.split(chunk), tokens.labels.split(chunk), strict=True)


def _taken(logits: Tensor | None, rows: Tensor) -> Any:
    """The rows as a new tensor in float32, or None."""
    return None if logits is None else logits.index_select(0, rows).to(_wide(logits))


def _sum_of(logits: Tensor, target: Tensor | None, labels: Tensor, kind: str) -> Tensor:
    """The loss summed over rows [n, V]."""
    if kind == "ce":
        return F.cross_entropy(logits, labels, reduction="sum")
    assert target is not None
    log_p, log_q = logits.log_softmax(-1), target.to(logits.dtype).log_softmax(-1)
    if kind == "kl":
        return F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    if kind == "reverse-kl":
        return F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    if kind == "tvd":
        return (log_p.exp() - log_q.exp()).abs().sum() / 2
    log_m = torch.logaddexp(log_p, log_q) - torch.log(log_p.new_tensor(2.0))
    from_q = F.kl_div(log_m, log_q, reduction="sum", log_target=True)
    return (from_q + F.kl_div(log_m, log_p, reduction="sum", log_target=True)) / 2


def _check_logits(
    owner: str,
    logits: Sequence[Tensor],
    labels: Tensor,
    teacher_logits: Tensor | None,
    loss: str,
    exit_loss: str,
) -> None:
    check_choice(loss, LOSSES, owner, "loss")
    check_choice(exit_loss, LOSSES, owner, "exit_loss")
    if not logits:
        raise ValueError(f"{owner}: logits must have an entry for each loop, got none")
    shape = logits[-1].shape
    for each in logits:
        if each.shape != shape or not each.is_floating_point():
            raise ValueError(
                f"{owner}: logits must be floating-point tensors of one shape, got {each.dtype} "
                f"{list(each.shape)} beside {list(shape)}"
            )
    if labels.shape != shape[:-1] or labels.dtype is not torch.int64:
        raise ValueError(
            f"{owner}: labels must be int64 {list(shape[:-1])}, got {labels.dtype} "
            f"{list(labels.shape)}"
        )
    if (teacher_logits is None) != (loss == "ce"):
        raise ValueError(
            f"{owner}: teacher_logits must be given for all losses but 'ce', got loss={loss!r} "
            f"{'without' if teacher_logits is None else 'with'} them"
        )
    if teacher_logits is not None and teacher_logits.shape != shape:
        raise ValueError(
            f"{owner}: teacher_logits must be {list(shape)}, as the logits, got "
            f"{list(teacher_logits.shape)}"
        )
