"""moe_route: weights, ids, counts, balance loss and the order of the slots by expert."""

from types import ModuleType

import pytest
import torch
from devices import SIMT, DtypePair
from hypothesis import given, settings
from hypothesis import strategies as st
from lowrank_cases import (
    LAYOUTS,
    Layout,
    assert_raises_alike,
    assert_same_bits,
    opcheck,
    transposed,
)
from moe_cases import statistics_dtype
from torch import Tensor

from lowrank_ext import ops, reference
from lowrank_ext.ops.moe_route import Routing

OP = "moe_route"
INTEGERS = ("topk_ids", "expert_counts", "sorted_slots", "expert_offsets", "slot_positions")


def assert_close(actual: Tensor, expected: Tensor, what: str, scale: float = 8.0) -> None:
    """To a few roundings of the statistics' dtype: softmax in two libraries."""
    eps = torch.finfo(actual.dtype).eps
    assert actual.dtype == expected.dtype and actual.shape == expected.shape, what
    magnitude = float(expected.abs().max()) if expected.numel() else 1.0
    torch.testing.assert_close(
        actual,
        expected,
        rtol=scale * eps,
        atol=scale * eps * magnitude,
        equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )


def assert_routed(routing: Routing, top_k: int, num_experts: int) -> None:
    """What holds for any logits."""
    weights, ids, counts, loss, sorted_slots, offsets, positions = routing
    num_tokens = ids.numel() // top_k
    assert weights.shape == ids.shape and ids.dtype == torch.int64
    assert counts.shape == (num_experts,) and loss.shape == ()
    assert ((ids >= 0) & (ids < num_experts)).all()
    in_order = ids.reshape(-1, top_k).sort(-1).values
    assert (in_order.diff(dim=-1) > 0).all(), "ids of a row are distinct"
    slots = torch.arange(num_tokens * top_k, device=ids.device)
    assert_same_bits(sorted_slots.sort().values, slots, "sorted_slots is a permutation")
    assert_same_bits(positions[sorted_slots], slots, "slot_positions is its inverse")
    assert offsets[0] == 0 and offsets[-1] == num_tokens * top_k
    by_expert = ids.reshape(-1)[sorted_slots]
    for expert in range(num_experts):
        group = slice(int(offsets[expert]), int(offsets[expert + 1]))
        assert (by_expert[group] == expert).all()
        assert (sorted_slots[group].diff() > 0).all(), "the order within an expert is stable"


def assert_like_reference(logits: Tensor, top_k: int, token_mask: Tensor | None) -> Routing:
    got = ops.moe_route(logits, top_k=top_k, token_mask=token_mask)
    expected = Routing(*reference.moe_route(logits, top_k=top_k, token_mask=token_mask))
    assert_routed(got, top_k, logits.shape[-1])
    for name in INTEGERS:
        assert_same_bits(getattr(got, name), getattr(expected, name), name)
    assert_close(got.topk_weights, expected.topk_weights, "topk_weights")
    assert_close(got.balance_loss, expected.balance_loss, "balance_loss", scale=64)
    return got


@pytest.mark.simt(every=3)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("num_experts", "top_k"),
    [(1, 1), (2, 1), (2, 2), (3, 2), (8, 2), (8, 8), (13, 4), (64, 6), (256, 8), (300, 300)],
)
def test_values(
    device: str, dtype: torch.dtype, num_experts: int, top_k: int, masked: bool
) -> None:
    logits = torch.randn(3, 31, num_experts, device=device).to(dtype)
    token_mask = torch.rand(3, 31, device=device) < 0.7 if masked else None
    got = assert_like_reference(logits, top_k, token_mask)
    assert got.topk_weights.dtype == statistics_dtype(dtype)


@pytest.mark.simt(every=7)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (3, 2), (8, 2), (5, 5), (64, 6)])
@pytest.mark.parametrize("outputs", ["weights", "loss", "both"])
def test_gradients(
    device: str, dtype: torch.dtype, num_experts: int, top_k: int, masked: bool, outputs: str
) -> None:
    logits = torch.randn(5, 7, num_experts, device=device).to(dtype)
    token_mask = torch.rand(5, 7, device=device) < 0.6 if masked else None
    dweights = torch.randn(5, 7, top_k, device=device, dtype=statistics_dtype(dtype))

    def gradient(namespace: object, leaf: Tensor) -> Tensor:
        routing = Routing(*namespace.moe_route(leaf, top_k=top_k, token_mask=token_mask))
        used = {
            "weights": ([routing.topk_weights], [dweights.to(routing.topk_weights)]),
            "loss": ([routing.balance_loss], [torch.full_like(routing.balance_loss, 5)]),
        }
        used["both"] = tuple(a + b for a, b in zip(used["weights"], used["loss"], strict=True))
        (grad,) = torch.autograd.grad(used[outputs][0], leaf, used[outputs][1])
        return grad

    got = gradient(ops, logits.clone().requires_grad_())
    truth = gradient(reference, logits.double().requires_grad_())
    assert got.dtype == dtype and got.shape == logits.shape
    eps = torch.finfo(dtype).eps
    tolerance = max(eps, 32 * torch.finfo(statistics_dtype(dtype)).eps) * max(
        1.0, float(truth.abs().max())
    )
    torch.testing.assert_close(got.double(), truth, rtol=eps, atol=tolerance)


@pytest.mark.simt
def test_ties_go_to_the_lower_id(device: str, dtype: torch.dtype) -> None:
    rows = [[0.0] * 6, [1, 2, 2, 1, 2, 0], [-3, -3, 5, -3, 5, 5], [0.0, -0.0, 0.0, -0.0, 0.0, 0.0]]
    ids = ops.moe_route(torch.tensor(rows, device=device).to(dtype), top_k=4).topk_ids
    assert ids.tolist() == [[0, 1, 2, 3], [1, 2, 4, 0], [2, 4, 5, 0], [0, 1, 2, 3]]


@pytest.mark.simt(every=5)
@pytest.mark.parametrize("num_experts", [4, 9, 70])
def test_many_ties(device: str, dtype: torch.dtype, num_experts: int) -> None:
    logits = torch.randint(-1, 2, (50, num_experts), device=device).to(dtype)
    for top_k in (1, 2, num_experts // 2, num_experts):
        assert_like_reference(logits, top_k, None)


@pytest.mark.simt
def test_nan_and_equal_logits_give_valid_ids(device: str, dtype: torch.dtype) -> None:
    """RF-12."""
    nan, inf = float("nan"), float("inf")
    rows = [
        [nan] * 4,
        [0.1, 0.4, 0.2, 0.3],
        [0.0] * 4,
        [-inf] * 4,
        [nan, 1, 2, 0],
        [inf, 0, inf, 1],
    ]
    logits = torch.tensor(rows, device=device).to(dtype)
    got = ops.moe_route(logits, top_k=2)
    assert_routed(got, 2, 4)
    assert got.topk_ids.tolist() == [[0, 1], [1, 3], [0, 1], [0, 1], [0, 2], [0, 2]]
    assert got.topk_weights.isnan().all(-1).tolist() == [True, False, False, True, True, True]
    for row in (1, 2):  # as when run alone: a bad row never changes another
        alone = ops.moe_route(logits[row], top_k=2)
        assert_same_bits(got.topk_weights[row], alone.topk_weights, f"weights of row {row}")
        assert_same_bits(got.topk_ids[row], alone.topk_ids, f"ids of row {row}")
    again = ops.moe_route(logits, top_k=2)
    for name in Routing._fields:
        assert_same_bits(getattr(again, name), getattr(got, name), name)


@pytest.mark.simt
def test_gradient_of_a_bad_row_stays_in_it(device: str, dtype: torch.dtype) -> None:
    logits = torch.randn(4, 5, device=device).to(dtype)
    logits[1, 2] = torch.nan

    def gradient(rows: Tensor) -> Tensor:
        leaf = rows.clone().requires_grad_()
        weights = ops.moe_route(leaf, top_k=2).topk_weights
        (grad,) = torch.autograd.grad(weights.square().sum(), leaf)
        return grad

    together = gradient(logits)
    assert together[1].isnan().any()
    for row in (0, 2, 3):
        assert_same_bits(together[row], gradient(logits[row : row + 1])[0], f"row {row}")


@pytest.mark.simt
def test_minus_infinity_is_a_probability_of_zero(device: str) -> None:
    logits = torch.tensor([[-torch.inf, 2.0, -torch.inf, -torch.inf]], device=device)
    got = ops.moe_route(logits, top_k=2)
    assert got.topk_ids.tolist() == [[1, 0]] and got.topk_weights.tolist() == [[1.0, 0.0]]
    assert got.balance_loss.item() == 4.0


@pytest.mark.simt
def test_an_even_load_has_the_least_loss(device: str) -> None:
    """top_k, and E where one expert takes every first choice."""
    even = 50 * torch.eye(4, device=device).repeat(3, 1)
    assert ops.moe_route(even, top_k=1).balance_loss.item() == pytest.approx(1.0)
    skewed = 50 * torch.eye(4, device=device)[:1].repeat(12, 1)
    assert ops.moe_route(skewed, top_k=1).balance_loss.item() == pytest.approx(4.0)


@pytest.mark.simt
def test_masked_tokens_are_routed_and_not_counted(
    device: str, kernels: str, dtype: torch.dtype
) -> None:
    logits = torch.randn(9, 5, device=device).to(dtype)
    mask = torch.tensor([True, False, True] * 3, device=device)
    logits[~mask] *= 1000
    got = ops.moe_route(logits, top_k=2, token_mask=mask)
    kept = ops.moe_route(logits[mask], top_k=2)
    assert_same_bits(got.expert_counts, kept.expert_counts, "expert_counts")
    if kernels == "cpu":
        assert_same_bits(got.balance_loss, kept.balance_loss, "balance_loss")
    else:  # which tokens a GPU's lanes sum depends on where they are
        assert_close(got.balance_loss, kept.balance_loss, "balance_loss")
    assert got.expert_counts.sum() == 12 and got.expert_offsets[-1] == 18
    assert_same_bits(got.topk_ids[mask], kept.topk_ids, "topk_ids")


@pytest.mark.simt
@pytest.mark.parametrize("lead", [(0,), (4,), (2, 0)])
def test_no_token_counts(device: str, dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    logits = torch.randn(*lead, 3, device=device).to(dtype).requires_grad_()
    mask = torch.zeros(lead, dtype=torch.bool, device=device)
    got = ops.moe_route(logits, top_k=2, token_mask=mask)
    assert got.balance_loss.item() == 0 and not got.expert_counts.any()
    (grad,) = torch.autograd.grad(got.balance_loss + got.topk_weights.sum() * 0, logits)
    assert not grad.any()


@pytest.mark.simt
@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 0, 3)])
def test_leading_dimensions_are_kept(device: str, lead: tuple[int, ...]) -> None:
    mask = torch.rand(lead, device=device) < 0.5
    got = assert_like_reference(torch.randn(*lead, 6, device=device), 3, mask)
    assert got.topk_weights.shape == (*lead, 3)


@pytest.mark.simt
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device: str, dtype: torch.dtype, layout: Layout) -> None:
    logits = layout(torch.randn(6, 10, device=device).to(dtype))
    mask = (torch.rand(6, 2, device=device) < 0.5)[:, 0]
    dweights = layout(torch.randn(6, 2, device=device, dtype=statistics_dtype(dtype)))
    results = []
    for rows, counted in ((logits, mask), (logits.contiguous(), mask.contiguous())):
        leaf = rows.detach().requires_grad_()
        got = ops.moe_route(leaf, top_k=2, token_mask=counted)
        upstream = dweights if rows is logits else dweights.contiguous()
        grad = torch.autograd.grad(got.topk_weights, leaf, upstream)
        results.append([t.detach() for t in (*got, *grad)])
    for strided, dense in zip(*results, strict=True):
        assert_same_bits(strided, dense, "strided")


@pytest.mark.simt
@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    num_tokens=st.integers(0, 40),
    num_experts=st.integers(1, 40),
    choice=st.integers(0, 10**6),
    integers=st.booleans(),
    mask=st.sampled_from(["none", "random", "no token"]),
)
def test_any_sizes(
    device: str, num_tokens: int, num_experts: int, choice: int, integers: bool, mask: str
) -> None:
    torch.manual_seed(choice)
    top_k = choice % num_experts + 1
    shape = (num_tokens, num_experts)
    logits = torch.randint(-2, 3, shape).float() if integers else torch.randn(shape)
    token_mask = None
    if mask != "none":
        token_mask = (torch.rand(num_tokens) < (mask == "random") * 0.5).to(device)
    assert_like_reference(logits.to(device), top_k, token_mask)


def test_gradcheck() -> None:
    logits = torch.randn(5, 4, dtype=torch.float64).requires_grad_()  # no ties
    mask = torch.tensor([True, True, False, True, True])

    def op(leaf: Tensor) -> tuple[Tensor, Tensor]:
        got = ops.moe_route(leaf, top_k=2, token_mask=mask)
        return got.topk_weights, got.balance_loss

    assert op(logits)[1].requires_grad
    # f has no gradient and does not change near these logits: the difference quotient agrees.
    assert torch.autograd.gradcheck(op, logits)


def test_second_derivatives() -> None:
    logits = torch.randn(3, 4, dtype=torch.float64).requires_grad_()

    def penalty(space: ModuleType) -> tuple[Tensor, ...]:
        weights = space.moe_route(logits, top_k=2)[0]
        (dlogits,) = torch.autograd.grad(weights.square().sum(), logits, create_graph=True)
        return torch.autograd.grad(dlogits.square().sum(), logits)

    torch.testing.assert_close(penalty(ops), penalty(reference))


@pytest.mark.simt(every=3)
@pytest.mark.parametrize("layout", [torch.clone, transposed])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(
    device: str, kernels: str, dtype: torch.dtype, masked: bool, layout: Layout
) -> None:
    compiled = kernels != SIMT and layout is transposed
    logits = layout(torch.randn(2, 5, 6, device=device).to(dtype))
    mask = torch.rand(2, 5, device=device) < 0.5 if masked else None
    got = ops.moe_route(logits, top_k=2, token_mask=mask)
    upstream = (torch.randn_like(got.topk_weights), torch.randn_like(got.balance_loss))
    arguments = (*upstream, logits, got.topk_ids, got.expert_counts, mask)
    opcheck(torch.ops.lowrank_ext.moe_route_backward.default, arguments, compiled)
    arguments = (logits.requires_grad_(), 2, mask)
    opcheck(torch.ops.lowrank_ext.moe_route.default, arguments, compiled)


@pytest.mark.simt
def test_compiled_with_a_dynamic_number_of_tokens(device: str) -> None:
    def run(logits: Tensor) -> Tensor:
        got = ops.moe_route(logits, top_k=2)
        return (got.topk_weights.square().sum() + got.balance_loss) * got.expert_offsets[1]

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_tokens in (5, 8, 17):
        logits = torch.randn(num_tokens, 6, device=device).requires_grad_()
        got, expected = compiled(logits), run(logits)
        assert_same_bits(got, expected, "compiled")
        grads = [torch.autograd.grad(value, logits)[0] for value in (got, expected)]
        assert_same_bits(*grads, "gradient, compiled")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.simt
def test_under_autocast(device: str) -> None:
    """Statistics stay in float32."""
    logits = torch.randn(4, 5, device=device)
    with torch.autocast(device, torch.bfloat16):
        got = ops.moe_route(logits, top_k=2)
    assert got.topk_weights.dtype == torch.float32
    assert_same_bits(got.topk_weights, ops.moe_route(logits, top_k=2).topk_weights, "weights")


RIGHT = {"router_logits": torch.zeros(3, 4), "top_k": 2}
WRONG: dict[str, tuple[dict[str, object], str]] = {
    "no logits": ({"router_logits": torch.zeros(3, 0)}, r"router_logits must .*got \[3, 0\]"),
    "a scalar": ({"router_logits": torch.zeros(())}, r"router_logits must .*got \[\]"),
    "integers": ({"router_logits": torch.zeros(3, 4).long()}, "router_logits must .*int64"),
    "top_k zero": ({"top_k": 0}, "top_k must be between 1 and the number of experts 4, got 0"),
    "top_k large": ({"top_k": 5}, "top_k must be between 1 and the number of experts 4, got 5"),
    "mask too long": ({"token_mask": torch.ones(4).bool()}, r"token_mask must .*got \[4\]"),
    "mask 2-D": ({"token_mask": torch.ones(3, 4).bool()}, r"token_mask must .*got \[3, 4\]"),
    "mask of floats": ({"token_mask": torch.ones(3)}, "token_mask must be bool, got float32"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_argument(case: str) -> None:
    assert_raises_alike(OP, RIGHT, *WRONG[case])


@pytest.mark.parametrize("bad", [-1, 4])
def test_backward_refuses_ids_of_no_expert(bad: int) -> None:
    logits, ids = torch.randn(3, 4), torch.tensor([[0, 1], [2, bad], [1, 0]])
    with pytest.raises(RuntimeError, match=f"topk_ids must be between 0 and .*3, got {bad}"):
        torch.ops.lowrank_ext.moe_route_backward(
            torch.ones(3, 2), None, logits, ids, torch.zeros(4, dtype=torch.int64), None
        )


@pytest.mark.simt
def test_dtypes_of_the_issue(device: str, dtypes: DtypePair) -> None:
    """Statistics do not depend on the adapter's dtype, only on the logits'."""
    logits = torch.randn(4, 3, device=device).to(dtypes.base)
    exact = ops.moe_route(logits.to(statistics_dtype(dtypes.base)), top_k=2)
    for name in Routing._fields:
        got = getattr(ops.moe_route(logits, top_k=2), name)
        assert_same_bits(got, getattr(exact, name), name)
