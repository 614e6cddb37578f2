"""Losses of uptraining against torch's own, in float64, and what they keep and allocate."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from saved_bytes import kept_beside
from torch import Tensor

import lowrank_ext as lr
from lowrank_ext.methods.recursive.losses import LOSSES, token_cross_entropy

B, T, V = 2, 5, 7
loop_loss, loop_coefficients = lr.recursive.loop_loss, lr.recursive.loop_coefficients


def tensors(loops: int = 3, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], Tensor, Any]:
    """Logits of each loop, labels of which some do not count, logits of a teacher."""
    logits = [torch.randn(B, T, V, dtype=dtype).mul(2).requires_grad_() for _ in range(loops)]
    labels = torch.randint(V, (B, T))
    labels[0, 2] = labels[1, 4] = -100
    return logits, labels, torch.randn(B, T, V, dtype=dtype)


def by_definition(kind: str, logits: Tensor, labels: Tensor, target: Tensor | None) -> Tensor:
    """Mean over the tokens whose next label counts, from torch's own functions."""
    rows = labels[:, 1:] != -100
    own, next_labels = logits[:, :-1][rows], labels[:, 1:][rows]
    if kind == "ce":
        return F.cross_entropy(own, next_labels)
    assert target is not None
    log_p, log_q = own.log_softmax(-1), target[:, :-1][rows].log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    log_m = ((p + q) / 2).log()

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return F.kl_div(log_b, log_a, reduction="batchmean", log_target=True)

    return {
        "kl": lambda: kl(log_q, log_p),
        "reverse-kl": lambda: kl(log_p, log_q),
        "tvd": lambda: (p - q).abs().sum(-1).mean() / 2,
        "jsd": lambda: (kl(log_q, log_m) + kl(log_p, log_m)) / 2,
    }[kind]()


@pytest.mark.parametrize("chunk", [1, 3, None])
@pytest.mark.parametrize("kind", LOSSES)
def test_values_and_gradients_are_those_of_the_definition(kind: str, chunk: int | None) -> None:
    logits, labels, teacher = tensors()
    coefficients = (0.3, 0.2, 1.0)
    last = logits[-1].detach()
    parts = [
        *(by_definition(kind, own, labels, last) for own in logits[:-1]),
        by_definition(kind, logits[-1], labels, teacher),
    ]
    expected = sum(c * part for c, part in zip(coefficients, parts, strict=True))
    wanted = torch.autograd.grad(expected, logits)
    found = loop_loss(
        logits,
        labels,
        loss=kind,
        teacher_logits=None if kind == "ce" else teacher,
        coefficients=coefficients,
        exit_loss=kind,
        chunk_tokens=chunk,
    )
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(found.by_loop, torch.stack(parts).float())
    torch.testing.assert_close(torch.autograd.grad(found.total, logits), wanted)


@pytest.mark.parametrize("kind", LOSSES)
def test_gradcheck(kind: str) -> None:
    logits, labels, teacher = tensors(loops=1)

    def total(last: Tensor) -> Tensor:
        given = None if kind == "ce" else teacher
        return loop_loss([last], labels, loss=kind, teacher_logits=given, chunk_tokens=3).total

    assert torch.autograd.gradcheck(total, logits)


def test_earlier_loops_move_towards_a_last_loop_that_they_do_not_move() -> None:
    logits, labels, _ = tensors(loops=2)
    alone = loop_loss([logits[-1]], labels).total
    both = loop_loss(logits, labels).total
    (wanted,) = torch.autograd.grad(alone, logits[-1])
    towards, last = torch.autograd.grad(both, logits)
    assert torch.equal(last, wanted)
    expected = 0.1 * by_definition("kl", logits[0], labels, logits[1].detach())
    torch.testing.assert_close(both, alone + expected)
    torch.testing.assert_close(towards, torch.autograd.grad(expected, logits[0])[0])


def test_cross_entropy_is_that_of_transformers() -> None:
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")
    logits, labels, _ = tensors(loops=1, dtype=torch.float32)
    for num_items in (None, 20, torch.tensor(20)):
        wanted = loss_utils.ForCausalLMLoss(logits[0], labels, V, num_items_in_batch=num_items)
        torch.testing.assert_close(loop_loss(logits, labels, num_items=num_items).total, wanted)


def test_tokens_that_do_not_count_are_not_read() -> None:
    logits, labels, teacher = tensors(loops=2)
    options = {"loss": "kl", "teacher_logits": teacher}
    wanted = loop_loss(logits, labels, **options).total
    unread = (0, 1), (1, 3), (0, 4), (1, 4)  # before a label of -100, and at the end
    for tensor in (*logits, teacher):
        with torch.no_grad():
            for place in unread:
                tensor[place] = torch.nan
    found = loop_loss(logits, labels, **options).total
    assert torch.equal(found, wanted)
    for gradient in torch.autograd.grad(found, logits):
        assert all(not gradient[place].any() for place in unread)
        assert gradient.isfinite().all()


def test_no_counted_token() -> None:
    logits, labels, _ = tensors()
    nothing = torch.full_like(labels, -100)
    assert loop_loss(logits, nothing).total.isnan()
    found = loop_loss(logits, nothing, num_items=8).total
    assert found == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(found, logits))


@pytest.mark.parametrize("kind", LOSSES)
def test_bfloat16_is_summed_in_float32(kind: str) -> None:
    logits, labels, teacher = tensors(loops=1, dtype=torch.bfloat16)
    wide = logits[0].detach().float().requires_grad_()
    given = (teacher, teacher.float()) if kind != "ce" else (None, None)
    found = loop_loss(logits, labels, loss=kind, teacher_logits=given[0]).total
    wanted = loop_loss([wide], labels, loss=kind, teacher_logits=given[1]).total
    assert found.dtype is torch.float32
    assert torch.equal(found, wanted)
    (gradient,) = torch.autograd.grad(found, logits)
    assert torch.equal(gradient, torch.autograd.grad(wanted, wide)[0].bfloat16())


def test_only_the_logits_are_kept_and_only_a_chunk_is_float32() -> None:
    tokens, vocabulary, loops, chunk = 64, 512, 3, 4
    logits = [
        torch.randn(1, tokens, vocabulary, dtype=torch.bfloat16).requires_grad_()
        for _ in range(loops)
    ]
    teacher = torch.randn(1, tokens, vocabulary, dtype=torch.bfloat16)
    labels = torch.randint(vocabulary, (1, tokens))

    def total() -> Tensor:
        options = {"loss": "jsd", "teacher_logits": teacher, "exit_loss": "jsd"}
        return loop_loss(logits, labels, chunk_tokens=chunk, **options).total

    kept = kept_beside(total, [*logits, teacher])
    assert sum(size for size, _ in kept) <= 3 * loops * tokens * 8  # rows and labels

    def forward_and_backward() -> None:
        total().backward()

    chunk_bytes = chunk * vocabulary * 4
    one_gradient = tokens * vocabulary * 2  # each loop's is added to its logits' before the next
    one_copy = tokens * vocabulary * 4
    assert peak_bytes(total) < 9 * chunk_bytes < one_copy
    assert peak_bytes(forward_and_backward) < one_gradient + 12 * chunk_bytes < 2 * one_copy
    kept_rows = token_cross_entropy(logits[0][0], labels[0])
    torch.testing.assert_close(
        kept_rows, F.cross_entropy(logits[0][0].float(), labels[0], reduction="none")
    )


def peak_bytes(run: Any) -> int:
    """The most that is allocated on the CPU at one time beyond what was there before."""
    run()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    most = now = 0
    events = profile.profiler.kineto_results.experimental_event_tree()  # type: ignore[union-attr]
    changes: list[tuple[int, int]] = []
    waiting = list(events)
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.name == "[memory]":
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    assert changes
    for _, size in sorted(changes, key=lambda change: change[0]):
        now += size
        most = max(most, now)
    return most


# ------------------------------------------------------------------------------- coefficients


def test_coefficients() -> None:
    assert loop_coefficients(3) == (0.1, 0.1, 1.0)
    assert loop_coefficients(1, 0.3) == (1.0,)
    assert loop_coefficients(3, (0.3, 0.2)) == (0.3, 0.2, 1.0)
    rising = [loop_coefficients(2, 0.4, step=step, warm_up=4)[0] for step in range(6)]
    assert rising == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    assert all(math.isclose(loop_coefficients(2, 0.4, step=s, warm_up=4)[1], 1) for s in range(6))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"earlier": -0.1}, ValueError, "earlier must be at least 0"),
        ({"earlier": "0.1"}, ValueError, "earlier must have an entry for each of the 2 earlier"),
        ({"earlier": [0.1]}, ValueError, "earlier must have an entry for each of the 2 earlier"),
        ({"earlier": [0.1, None]}, TypeError, "earlier must be a number"),
        ({"step": -1}, ValueError, "step must be at least 0"),
        ({"warm_up": 0.5}, TypeError, "warm_up must be an int"),
    ],
)
def test_wrong_coefficients(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^loop_coefficients: {message}"):
        loop_coefficients(3, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "lk"}, "loss must be one of"),
        ({"exit_loss": "mse"}, "exit_loss must be one of"),
        ({"loss": "kl"}, "teacher_logits must be given for all losses but 'ce'"),
        ({"teacher_logits": torch.zeros(B, T, V)}, "teacher_logits must be given for all losses"),
        (
            {"loss": "kl", "teacher_logits": torch.zeros(B, T, V + 1)},
            r"teacher_logits must be \[2, 5, 7\]",
        ),
        ({"coefficients": (1.0,)}, "coefficients must have an entry for each of the 3 loops"),
        ({"coefficients": (0.1, -1.0, 1.0)}, "coefficients must be at least 0"),
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1"),
        ({"labels": torch.zeros(B, T)}, r"labels must be int64 \[2, 5\]"),
        ({"labels": torch.zeros(B, T - 1, dtype=torch.int64)}, r"labels must be int64 \[2, 5\]"),
        ({"labels": torch.full((B, T), V)}, "labels must be -100 or from 0 to 6, got from 7 to 7"),
        ({"labels": torch.full((B, T), -1)}, "labels must be -100 or from 0 to 6"),
        ({"logits": []}, "logits must have an entry for each loop"),
        (
            {"logits": [torch.zeros(B, T, V), torch.zeros(B, T, V + 1)]},
            "logits must be .* of one shape",
        ),
    ],
)
def test_wrong_arguments(options: Any, message: str) -> None:
    logits, labels, _ = tensors()
    arguments = {"logits": logits, "labels": labels, **options}
    with pytest.raises(ValueError, match=f"^loop_loss: {message}"):
        loop_loss(arguments.pop("logits"), arguments.pop("labels"), **arguments)
