"""routing/moe_route.cuh: launches, bytes, schedules, and what tests of the op do not reach."""

from typing import Any

import pytest
import torch
from kernel_calls import DTYPES, _simt, reports_of, spread, traffic_of
from torch import Tensor

from lowrank_ext import reference
from lowrank_ext.ops.moe_route import Routing

SCALARS = ("bf16", "fp16", "fp32", "fp64")
INTEGERS = ("topk_ids", "expert_counts", "sorted_slots", "expert_offsets", "slot_positions")
OPS = torch.ops.lowrank_ext_simt
MANY_BLOCKS = ["route_tokens", "balance"]
ORDER = ["order_slots"]
ORDER_IN_THREE = ["count_slots", "scan_slot_counts", "scatter_slots"]


def route(logits: Tensor, top_k: int, mask: Tensor | None = None) -> tuple[Routing, list[Any]]:
    """The routing and its launches."""
    _simt.clear_reports()
    routing = Routing(*OPS.moe_route(logits, top_k, mask))
    return routing, _simt.reports()


def launches(reports: list[Any]) -> list[str]:
    return [report["kernel"] for report in reports]


def normal(num_tokens: int, num_experts: int, compute_type: str = "fp32") -> Tensor:
    return torch.randn(num_tokens, num_experts).to(DTYPES[compute_type])


def assert_right(got: Routing, logits: Tensor, top_k: int, mask: Tensor | None = None) -> None:
    true = Routing(*reference.moe_route(logits.double(), top_k=top_k, token_mask=mask))
    for name in INTEGERS:
        assert torch.equal(getattr(got, name), getattr(true, name)), name
    for name in ("topk_weights", "balance_loss"):
        value = getattr(got, name)
        eps = torch.finfo(value.dtype).eps
        torch.testing.assert_close(value.double(), getattr(true, name), rtol=16 * eps, atol=eps)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"),
    [(0, 3, 2), (1, 1, 1), (8192, 1, 1), (3, 256, 256), (2000, 5, 2), (40, 33, 4)],
)
def test_few_tokens_take_one_launch(num_tokens: int, num_experts: int, top_k: int) -> None:
    """At most 8192, and at most 256 experts."""
    logits = normal(num_tokens, num_experts)
    got, reports = route(logits, top_k)
    assert launches(reports) == ["moe_route"]
    assert_right(got, logits, top_k)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("compute_type", ["fp32", "fp64"])
def test_more_tokens(compute_type: str, masked: bool) -> None:
    logits = normal(8193, 3, compute_type)
    mask = torch.rand(8193) < 0.5 if masked else None
    got, reports = route(logits, 2, mask)
    assert launches(reports) == [*MANY_BLOCKS, *ORDER_IN_THREE]
    assert_right(got, logits, 2, mask)


@pytest.mark.parametrize("num_tokens", [0, 1, 70])
@pytest.mark.parametrize("compute_type", SCALARS)
def test_more_experts(compute_type: str, num_tokens: int) -> None:
    logits = normal(num_tokens, 257, compute_type)
    mask = torch.rand(num_tokens) < 0.5
    got, reports = route(logits, 3, mask)
    first = ["route_many_experts"] if num_tokens else []
    assert launches(reports) == [*first, "balance", *ORDER]
    assert_right(got, logits, 3, mask)


def test_many_choices_among_many_experts() -> None:
    logits = normal(3, 300)
    logits[1] = 0.0
    got, _ = route(logits, 290)
    assert_right(got, logits, 290)


@pytest.mark.parametrize("num_experts", [260, 8])
def test_bad_rows(num_experts: int) -> None:
    """NaN first, then ties by id; NaN weights in their own row only."""
    logits = normal(5, num_experts)
    logits[0] = torch.nan
    logits[1] = -torch.inf
    logits[2, 3] = torch.nan
    got, _ = route(logits, 4)
    assert got.topk_ids[:2].tolist() == [[0, 1, 2, 3]] * 2
    assert got.topk_ids[2, 0] == 3 and got.topk_ids[2].unique().numel() == 4
    assert got.topk_weights.isnan().all(1).tolist() == [True, True, True, False, False]
    alone, _ = route(logits[3:], 4)
    assert torch.equal(alone.topk_weights, got.topk_weights[3:])


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(300, 6), (50, 261)])
def test_any_schedule_gives_the_same_bits(num_tokens: int, num_experts: int) -> None:
    logits = normal(num_tokens, num_experts)
    dweights, dloss = torch.randn(num_tokens, 3), torch.tensor(0.5)
    results = []
    for seed in (0, 1):
        _simt.set_options(schedule_seed=seed)
        got, _ = route(logits, 3)
        dlogits = OPS.moe_route_backward(
            dweights, dloss, logits, got.topk_ids, got.expert_counts, None
        )
        results.append((*got, dlogits))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("num_sms", [1, 3, 40])
def test_any_number_of_blocks(num_sms: int) -> None:
    _simt.host.set_num_sms(num_sms)
    logits = normal(90, 258)
    got, _ = route(logits, 2)
    assert_right(got, logits, 2)


@pytest.mark.parametrize("compute_type", SCALARS)
def test_rows_apart(compute_type: str) -> None:
    logits = spread(normal(37, 13, compute_type), 1, 3)
    got, _ = route(logits, 5)
    assert_right(got, logits, 5)


# Traffic


@pytest.mark.parametrize("compute_type", SCALARS)
@pytest.mark.parametrize(("num_experts", "top_k"), [(8, 2), (64, 6), (256, 8)])
def test_traffic(compute_type: str, num_experts: int, top_k: int) -> None:
    """Logits once, in whole sectors; ids twice more, for the order; each output once."""
    num_tokens = 64
    logits = normal(num_tokens, num_experts, compute_type)
    got, [report] = route(logits, top_k)
    read = traffic_of(report, "logits")
    assert read["bytes_read"] == read["unique_bytes_read"] == logits.nbytes
    assert read["sectors_read"] == logits.nbytes / 32
    assert traffic_of(report, "topk_ids")["bytes_read"] == 2 * got.topk_ids.nbytes
    for name, output in got._asdict().items():
        assert traffic_of(report, name)["bytes_written"] == output.nbytes, name
    assert report["atomics"] == 0


@pytest.mark.parametrize("compute_type", SCALARS)
@pytest.mark.parametrize("num_experts", [8, 64])
def test_backward_traffic(compute_type: str, num_experts: int) -> None:
    logits = normal(64, num_experts, compute_type)
    got, _ = route(logits, 2)
    dweights = torch.randn_like(got.topk_weights)
    [report] = reports_of(
        lambda: OPS.moe_route_backward(
            dweights,
            torch.ones_like(got.balance_loss),
            logits,
            got.topk_ids,
            got.expert_counts,
            None,
        )
    )
    assert report["kernel"] == "moe_route_backward"
    for name, direction in (("logits", "read"), ("dlogits", "written")):
        traffic = traffic_of(report, name)
        assert traffic[f"bytes_{direction}"] == logits.nbytes
        assert traffic[f"sectors_{direction}"] == logits.nbytes / 32
    for name in ("topk_ids", "dweights"):
        assert traffic_of(report, name)["unique_bytes_read"] <= got.topk_ids.nbytes


# Backward


@pytest.mark.parametrize("compute_type", SCALARS)
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (13, 4), (256, 3), (270, 5), (600, 2)])
def test_backward(compute_type: str, num_experts: int, top_k: int) -> None:
    logits = normal(9, num_experts, compute_type)
    mask = torch.rand(9) < 0.6
    got, _ = route(logits, top_k, mask)
    dweights, dloss = torch.randn_like(got.topk_weights), torch.tensor(3.0).to(got.balance_loss)
    dlogits = OPS.moe_route_backward(dweights, dloss, logits, got.topk_ids, got.expert_counts, mask)
    leaf = logits.double().requires_grad_()
    true = Routing(*reference.moe_route(leaf, top_k=top_k, token_mask=mask))
    upstream = [dweights.double(), dloss.double()]
    [expected] = torch.autograd.grad([true.topk_weights, true.balance_loss], leaf, upstream)
    eps, statistics = torch.finfo(dlogits.dtype).eps, torch.finfo(got.topk_weights.dtype).eps
    atol = 32 * statistics * expected.abs().max().item()
    torch.testing.assert_close(dlogits.double(), expected, rtol=eps, atol=atol)


@pytest.mark.parametrize("num_experts", [5, 300])
def test_an_id_of_no_expert_has_no_gradient(num_experts: int) -> None:
    """The host does not look at ids on a GPU; nothing outside is touched."""
    logits = normal(2, num_experts)
    ids = torch.tensor([[1, num_experts], [-1, 2**40]])
    dlogits = OPS.moe_route_backward(
        torch.ones(2, 2), None, logits, ids, torch.zeros(num_experts).long(), None
    )
    assert not dlogits.any()
