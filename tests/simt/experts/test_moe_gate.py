"""experts/moe_gate.cuh: routing, gating and their gradients, between the two projections."""

from typing import NamedTuple

import pytest
import torch
from kernel_calls import (
    COMPUTE_TYPES,
    DTYPES,
    _simt,
    acc_dtype,
    assert_within_rule,
    matrix,
    normal,
    reports_of,
)
from torch import Tensor

NAN = float("nan")

# Tokens, experts, rank, top_k: rows for several groups of lanes, experts for several a lane, more
# than registers hold, every expert chosen.
SIZES = [
    (1, 1, 1, 1),
    (37, 3, 2, 2),
    (70, 8, 4, 2),
    (33, 17, 5, 3),
    (9, 40, 3, 4),
    (5, 5, 33, 5),
    (3, 300, 1, 3),
]
some_kinds = pytest.mark.parametrize("compute_type", ["bf16", "fp32", "fp64"])


class Gate(NamedTuple):
    """What the forward kernels write, and their mask."""

    h: Tensor
    gated: Tensor
    probs: Tensor
    ids: Tensor
    weights: Tensor
    counts: Tensor
    loss: Tensor
    token_mask: Tensor | None

    def routing(self) -> tuple[object, ...]:
        mask = None if self.token_mask is None else self.token_mask.data_ptr()
        pointers = self.ids.data_ptr(), self.counts.data_ptr(), mask
        return matrix(self.probs), matrix(self.weights), *pointers


def columns_of(num_experts: int, rank: int, padded: bool = False) -> tuple[int, ...]:
    return _simt.dense_columns(num_experts, rank, padded=padded)


def make_z(
    compute_type: str, tokens: int, columns, num_splits: int = 3, padding: int = 0
) -> Tensor:
    """Partial sums [splits, M, R (+ padding)]; what lies between groups is NaN."""
    num_experts, rank, first, stride, num_cols = columns
    z = torch.full((num_splits, tokens, num_cols + padding), NAN, dtype=acc_dtype(compute_type))
    z[..., :num_experts] = normal(num_splits, tokens, num_experts, compute_type="fp64")
    for expert in range(num_experts):
        col = first + expert * stride
        z[..., col : col + rank] = normal(num_splits, tokens, rank, compute_type="fp64")
    return z


def run(
    compute_type: str, columns, z: Tensor, top_k: int, token_mask: Tensor | None = None
) -> Gate:
    num_experts, rank, *_, num_cols = columns
    num_splits, tokens, _ = z.shape
    statistics = acc_dtype(compute_type)
    gate = Gate(
        torch.full((tokens, num_experts * rank), NAN, dtype=DTYPES[compute_type]),
        torch.full((tokens, num_experts * rank), NAN, dtype=DTYPES[compute_type]),
        torch.full((tokens, num_experts), NAN, dtype=statistics),
        torch.full((tokens, top_k), -7),
        torch.full((tokens, top_k), NAN, dtype=statistics),
        torch.full((num_experts,), -7),
        torch.full((1,), NAN, dtype=statistics),
        token_mask,
    )
    outputs = matrix(gate.loss), matrix(gate.h), matrix(gate.gated)
    sums = matrix(z.flatten(0, 1)[:, :num_cols])
    _simt.moe_gate(compute_type, columns, sums, num_splits, gate.routing(), *outputs)
    return gate


def split_z(columns, z: Tensor) -> tuple[Tensor, Tensor]:
    """logits [M, E] and h [M, E, r], summed over splits in their order."""
    num_experts, rank, first, stride, _ = columns
    total = torch.zeros_like(z[0])
    for part in z:
        total = total + part
    starts = [first + expert * stride for expert in range(num_experts)]
    h = torch.stack([total[:, start : start + rank] for start in starts], 1)
    return total[:, :num_experts], h


def chosen_of(ids: Tensor, num_experts: int) -> Tensor:
    return torch.zeros(ids.shape[0], num_experts, dtype=torch.bool).scatter(1, ids, True)


def assert_gate(compute_type: str, columns, z: Tensor, gate: Gate) -> None:
    """ids, counts and h exactly; statistics up to their rounding."""
    num_experts = columns[0]
    logits, h = split_z(columns, z)
    top_k = gate.ids.shape[1]
    _, order = logits.sort(dim=1, descending=True, stable=True)
    assert torch.equal(gate.ids, order[:, :top_k])
    close = {"rtol": 1e-13 if compute_type == "fp64" else 2e-6, "atol": 0.0}
    probs = logits.double().softmax(1)
    torch.testing.assert_close(gate.probs.double(), probs, **close)
    weights = logits.double().gather(1, gate.ids).softmax(1)
    torch.testing.assert_close(gate.weights.double(), weights, **close)

    chosen = chosen_of(gate.ids, num_experts)
    expected_h = torch.where(chosen.unsqueeze(2), h, 0).to(DTYPES[compute_type])
    assert torch.equal(gate.h, expected_h.flatten(1))
    by_expert = torch.zeros_like(gate.probs).scatter(1, gate.ids, gate.weights)
    gated = (by_expert.unsqueeze(2) * expected_h.to(gate.weights.dtype)).to(DTYPES[compute_type])
    assert torch.equal(gate.gated, gated.flatten(1))

    counted = torch.ones(len(h)).bool() if gate.token_mask is None else gate.token_mask
    assert torch.equal(gate.counts, chosen[counted].sum(0))
    tokens = max(1, int(counted.sum()))
    loss = num_experts * (gate.counts.double() / tokens * probs[counted].sum(0) / tokens).sum()
    torch.testing.assert_close(gate.loss[0].double(), loss.double(), rtol=close["rtol"], atol=0.0)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
def test_forward(compute_type, sizes):
    tokens, num_experts, rank, top_k = sizes
    columns = columns_of(num_experts, rank, padded=num_experts == 8)
    z = make_z(compute_type, tokens, columns, padding=5)
    mask = torch.rand(tokens) < 0.6 if num_experts % 2 else None
    gate = run(compute_type, columns, z, top_k, mask)
    assert_gate(compute_type, columns, z[..., : columns[4]], gate)
    again = torch.full_like(gate.gated, NAN)
    _simt.dense_apply_gates(compute_type, columns, gate.routing(), matrix(gate.h), matrix(again))
    assert torch.equal(again, gate.gated)


def test_no_tokens():
    columns = columns_of(4, 2)
    gate = run("bf16", columns, make_z("bf16", 0, columns), 2)
    assert gate.counts.tolist() == [0] * 4 and gate.loss.tolist() == [0]


def test_no_token_counts():
    columns = columns_of(4, 2)
    gate = run("bf16", columns, make_z("bf16", 9, columns), 2, torch.zeros(9).bool())
    assert gate.counts.tolist() == [0] * 4 and gate.loss.tolist() == [0]


@pytest.mark.parametrize("num_experts", [4, 280])
def test_ties_infinities_and_nan(num_experts):
    """RF-12: distinct ids, and NaN in no other row."""
    columns = columns_of(num_experts, 2)
    z = make_z("fp32", 6, columns, num_splits=1)
    z[0, 0, :num_experts] = 0
    z[0, 1, :num_experts] = -torch.inf
    z[0, 2, :num_experts] = NAN
    z[0, 3, num_experts - 1] = NAN
    z[0, 4, [1, 3]] = torch.inf
    gate = run("fp32", columns, z, 3)
    assert gate.ids[0].tolist() == gate.ids[1].tolist() == gate.ids[2].tolist() == [0, 1, 2]
    assert gate.ids[3, 0] == num_experts - 1 and gate.ids[4, :2].tolist() == [1, 3]
    assert all(len(set(row)) == 3 for row in gate.ids.tolist())
    assert gate.weights.isnan().any(1).tolist() == [False, True, True, True, True, False]
    assert not gate.h[[0, 5]].isnan().any() and not gate.gated[[0, 5]].isnan().any()
    others = ~chosen_of(gate.ids, num_experts).repeat_interleave(2, 1)
    assert not gate.gated[others].any()


# Backward


def backward(
    compute_type: str,
    columns,
    g: Tensor,
    gate: Gate,
    dloss: float | None = None,
    gates: bool = True,
) -> Tensor:
    num_splits, tokens, _ = g.shape
    dz = torch.full((tokens, columns[4] + 3), NAN, dtype=DTYPES[compute_type])[:, : columns[4]]
    upstream = None if dloss is None else torch.tensor([dloss], dtype=acc_dtype(compute_type))
    h = matrix(gate.h) if gates else None
    arguments = gate.routing(), matrix(upstream), h, gates, matrix(dz)
    _simt.dense_gate_backward(compute_type, columns, g.data_ptr(), num_splits, *arguments)
    return dz


def formula(columns, g: Tensor, gate: Gate, dloss: float | None, dtype=torch.float64) -> Tensor:
    """dz, by autograd from the statistics' definition."""
    num_experts, rank, first, stride, num_cols = columns
    tokens = gate.ids.shape[0]
    by_expert = g.sum(0).to(dtype).reshape(tokens, num_experts, rank)
    h = gate.h.to(dtype).reshape(tokens, num_experts, rank)
    logits = gate.probs.to(dtype).log().requires_grad_()
    weights = torch.zeros_like(logits).scatter(1, gate.ids, logits.gather(1, gate.ids).softmax(1))
    objective = (weights * (by_expert * h).sum(2)).sum()
    if dloss is not None:
        counted = torch.ones(tokens).bool() if gate.token_mask is None else gate.token_mask
        share = gate.counts.to(dtype) / max(1, int(counted.sum()))
        mean = logits.softmax(1)[counted].sum(0) / max(1, int(counted.sum()))
        objective = objective + dloss * num_experts * (share * mean).sum()
    (dlogits,) = torch.autograd.grad(objective, logits)
    dz = torch.zeros(tokens, num_cols, dtype=dtype)
    dz[:, :num_experts] = dlogits
    chosen = chosen_of(gate.ids, num_experts)
    dh = torch.where(chosen.unsqueeze(2), weights.detach().unsqueeze(2) * by_expert, 0)
    for expert in range(num_experts):
        col = first + expert * stride
        dz[:, col : col + rank] = dh[:, expert]
    return dz


def backward_case(
    compute_type: str, sizes, mask: bool = False
) -> tuple[tuple[int, ...], Tensor, Gate]:
    tokens, num_experts, rank, top_k = sizes
    columns = columns_of(num_experts, rank, padded=num_experts == 8)
    token_mask = torch.rand(tokens) < 0.6 if mask else None
    gate = run(compute_type, columns, make_z(compute_type, tokens, columns), top_k, token_mask)
    g = normal(2, tokens, num_experts * rank, compute_type="fp64").to(acc_dtype(compute_type))
    return columns, g, gate


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
def test_backward(compute_type, sizes):
    columns, g, gate = backward_case(compute_type, sizes, mask=sizes[1] % 2 == 1)
    dloss = None if sizes[1] == 40 else 3.0
    dz = backward(compute_type, columns, g, gate, dloss)
    true = formula(columns, g, gate, dloss)
    assert_within_rule(
        compute_type, dz, formula(columns, g, gate, dloss, acc_dtype(compute_type)), true
    )
    chosen = chosen_of(gate.ids, sizes[1])
    if dloss is None:
        assert not dz[:, : sizes[1]][~chosen].any()
    experts = backward(compute_type, columns, g, gate, dloss, gates=False)
    assert not experts[:, : columns[2]].any()
    assert torch.equal(experts[:, columns[2] :], dz[:, columns[2] :])


@some_kinds
def test_same_bits_in_every_order(compute_type):
    columns, g, gate = backward_case(compute_type, (70, 8, 4, 2))
    z = make_z(compute_type, 70, columns)
    results = []
    for seed in (0, 1):
        _simt.set_options(schedule_seed=seed)
        results.append(
            (*run(compute_type, columns, z, 2)[:-1], backward(compute_type, columns, g, gate, 2.0))
        )
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_one_expert_has_no_gradient_of_its_logit():
    """Its weight is one whatever the logit."""
    columns, g, gate = backward_case("bf16", (20, 1, 4, 1))
    assert not backward("bf16", columns, g, gate, 5.0)[:, 0].any()


def test_bad_values_of_experts_not_chosen_are_not_read():
    columns, g, gate = backward_case("fp32", (30, 8, 4, 2))
    expected = backward("fp32", columns, g, gate, 2.0)
    others = ~chosen_of(gate.ids, 8).repeat_interleave(4, 1)
    g[:, others] = NAN
    assert torch.equal(backward("fp32", columns, g, gate, 2.0), expected)


def test_traffic():
    """E = 8, r = 4, k = 2: z once, of G the chosen quarter; five small tensors written."""
    tokens, columns = 1024, columns_of(8, 4)
    z = make_z("bf16", tokens, columns, num_splits=2)
    forward, balance = reports_of(lambda: run("bf16", columns, z, 2))
    assert forward["kernel"] == "moe_gate" and balance["kernel"] == "balance"
    read = {one["name"]: one["unique_bytes_read"] for one in forward["tensors"]}
    assert read["z"] <= z.nbytes * (8 + 8) / 40
    written = tokens * (2 * 32 * 2 + 8 * 4 + 2 * 8 + 2 * 4) + 32 * 8 * 16
    assert forward["bytes_written"] == written
    _, g, gate = backward_case("bf16", (tokens, 8, 4, 2))
    dz = lambda: backward("bf16", columns, g, gate, 1.0)  # noqa: E731
    [report] = reports_of(dz)
    read = {one["name"]: one["unique_bytes_read"] for one in report["tensors"]}
    assert read["g"] == g.nbytes // 4
    assert report["bytes_written"] == tokens * 40 * 2
    assert_lean_enough(report)


def assert_lean_enough(report: dict) -> None:
    """Rows of few elements: at most two sectors for what one would hold."""
    requested = report["bytes_read"] + report["bytes_written"]
    assert report["sectors_read"] + report["sectors_written"] <= 2 * requested / 32


# Slots: the grouped form


def slot_sums(compute_type: str, gate: Gate, rank: int, num_splits: int = 3) -> Tensor:
    """Partial sums [splits, M k, r + padding]; the padding is NaN."""
    sums = torch.full((num_splits, gate.ids.numel(), rank + 3), NAN, dtype=acc_dtype(compute_type))
    sums[..., :rank] = normal(num_splits, gate.ids.numel(), rank, compute_type="fp64")
    return sums


def rows_of(sums: Tensor, num_cols: int) -> dict:
    return matrix(sums.flatten(0, 1)[:, :num_cols])


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
def test_routing_alone(compute_type, sizes):
    """Of a z that has the router's columns only: as with the experts' beside them."""
    tokens, num_experts, rank, top_k = sizes
    columns = columns_of(num_experts, rank)
    z = make_z(compute_type, tokens, columns, padding=3)
    expected = run(compute_type, columns, z, top_k)
    logits = columns_of(num_experts, 0)
    alone = run(
        compute_type, logits, z[..., : num_experts + 2].contiguous()[..., :num_experts], top_k
    )
    for name in ("probs", "ids", "weights", "counts", "loss"):
        assert torch.equal(getattr(alone, name), getattr(expected, name)), name


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
def test_slots(compute_type, sizes):
    """h is the slots' sums where chosen and zeros elsewhere, gated is weight times rounded h."""
    tokens, num_experts, rank, top_k = sizes
    columns = columns_of(num_experts, rank)
    gate = run(compute_type, columns, make_z(compute_type, tokens, columns), top_k)
    sums = slot_sums(compute_type, gate, rank)
    h = torch.full((tokens, num_experts * rank), NAN, dtype=DTYPES[compute_type])
    gated = torch.full((tokens * top_k, rank + 5), NAN, dtype=DTYPES[compute_type])[:, :rank]
    _simt.grouped_gate(
        compute_type, rows_of(sums, rank), 3, gate.routing(), matrix(h), matrix(gated)
    )

    total = sums[0] + sums[1] + sums[2]
    own = total[:, :rank].to(DTYPES[compute_type])
    expected = torch.zeros(tokens, num_experts, rank, dtype=DTYPES[compute_type])
    expected[torch.arange(tokens).repeat_interleave(top_k), gate.ids.flatten()] = own
    assert torch.equal(h, expected.flatten(1))
    weights = gate.weights.flatten().unsqueeze(1)
    assert torch.equal(gated, (weights * own.to(weights.dtype)).to(DTYPES[compute_type]))
    again = torch.full_like(gated, NAN)
    _simt.grouped_apply_gates(compute_type, gate.routing(), matrix(h), matrix(again))
    assert torch.equal(again, gated)


def slots_backward(
    compute_type: str,
    gate: Gate,
    rank: int,
    g: Tensor,
    by_slot: bool,
    dloss: float | None,
    gates: bool,
) -> tuple[Tensor, Tensor]:
    """dlogits [M, E] and dh [M k, r] from g [splits, rows, columns]."""
    tokens, num_experts = gate.probs.shape
    dlogits = torch.full((tokens, num_experts + 3), NAN, dtype=DTYPES[compute_type])[
        :, :num_experts
    ]
    dh = torch.full((gate.ids.numel(), rank + 3), NAN, dtype=DTYPES[compute_type])[:, :rank]
    upstream = None if dloss is None else torch.tensor([dloss], dtype=acc_dtype(compute_type))
    num_cols = rank if by_slot else num_experts * rank
    _simt.grouped_gate_backward(
        compute_type,
        rows_of(g, num_cols),
        g.shape[0],
        by_slot,
        gate.routing(),
        matrix(upstream),
        matrix(gate.h) if gates else None,
        matrix(dlogits) if gates else None,
        matrix(dh),
    )
    return dlogits, dh


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
def test_slots_backward(compute_type, sizes):
    """Bit for bit what the dense form makes of the same G, from rows of either kind."""
    tokens, num_experts, rank, top_k = sizes
    _, g, gate = backward_case(compute_type, sizes, mask=sizes[1] % 2 == 1)
    packed = columns_of(num_experts, rank)
    dloss = None if num_experts == 40 else 3.0
    dz = backward(compute_type, packed, g, gate, dloss)
    places = torch.arange(tokens).repeat_interleave(top_k), gate.ids.flatten()
    expected = dz[:, num_experts:].reshape(tokens, num_experts, rank)[places]
    by_slot = g.reshape(2, tokens, num_experts, rank)[:, *places].contiguous()
    for rows, is_by_slot in ((by_slot, True), (g, False)):
        dlogits, dh = slots_backward(compute_type, gate, rank, rows, is_by_slot, dloss, gates=True)
        assert torch.equal(dlogits, dz[:, :num_experts]) and torch.equal(dh, expected)
        _, dh = slots_backward(compute_type, gate, rank, rows, is_by_slot, dloss, gates=False)
        assert torch.equal(dh, expected)


def test_slots_in_any_schedule():
    _, g, gate = backward_case("bf16", (70, 8, 4, 2))
    sums, results = slot_sums("bf16", gate, 4), []
    for seed in (0, 1):
        _simt.set_options(schedule_seed=seed)
        h, gated = torch.empty(70, 32).bfloat16(), torch.empty(140, 4).bfloat16()
        _simt.grouped_gate("bf16", rows_of(sums, 4), 3, gate.routing(), matrix(h), matrix(gated))
        results.append((h, gated, *slots_backward("bf16", gate, 4, g, False, 2.0, True)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_traffic_of_slots():
    """h is written once; the sums are read once."""
    tokens, rank = 1024, 8
    columns = columns_of(8, rank)
    gate = run("bf16", columns, make_z("bf16", tokens, columns), 2)
    sums = torch.randn(2, 2 * tokens, rank)
    h, gated = torch.empty(tokens, 64).bfloat16(), torch.empty(2 * tokens, rank).bfloat16()
    call = lambda: _simt.grouped_gate(  # noqa: E731
        "bf16", matrix(sums.flatten(0, 1)), 2, gate.routing(), matrix(h), matrix(gated)
    )
    [report] = reports_of(call)
    assert report["unique_bytes_read"] == sums.nbytes + tokens * 2 * (8 + 4)
    assert report["bytes_written"] == h.nbytes + gated.nbytes
    assert_lean_enough(report)
