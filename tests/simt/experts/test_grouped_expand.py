"""y = base + scaling Σ_j gated[m k + j] lora_b[e_j]ᵀ and dx = dlogits router_weight +
Σ_j drop'(dh[m k + j] lora_a[e_j]): experts/grouped_expand.cuh on the SIMT executor."""

from typing import NamedTuple

import pytest
import torch
from kernel_calls import (
    COMPUTE_TYPES,
    DTYPES,
    _simt,
    assert_lean,
    assert_within_rule,
    integers,
    matrix,
    normal,
    plain,
    reports_of,
    spread,
    threshold_and_seed,
    traffic_of,
    true,
)
from lowrank_cases import seed_tensor
from segment_cases import same, spread_stack, stack
from torch import Tensor

from lowrank_ext import reference

SEED = -0x1234_5678_9ABC_DEF0

# (M, k, E, C, r): ragged in every letter, one block and several, few tokens (blocks of 16) and
# many, one unit of ranks and several, more experts than a word has bits, every expert chosen.
SHAPES = [
    (1, 1, 1, 1, 1),
    (17, 2, 3, 65, 3),
    (64, 3, 5, 66, 16),
    (65, 2, 8, 131, 17),
    (130, 4, 4, 63, 2),
    (131, 2, 40, 35, 33),
    (70, 5, 70, 33, 4),
]
every_mask = pytest.mark.parametrize("dropout", ["none", "own", "shared"])


class Choices(NamedTuple):
    ids: Tensor  # [M, k]
    tokens: Tensor

    @staticmethod
    def random(tokens: int, top_k: int, num_experts: int) -> "Choices":
        ids = torch.rand(tokens, num_experts).argsort(1)[:, :top_k].contiguous()
        return Choices(ids, order_tokens(ids, num_experts))

    def argument(self) -> tuple[int, ...]:
        return (self.tokens.data_ptr(), self.ids.data_ptr(), *self.ids.shape)


def order_tokens(ids: Tensor, num_experts: int, num_sms: int = 4) -> Tensor:
    tokens = torch.full((ids.shape[0],), -7)
    sizes = (*ids.shape, num_experts)
    _simt.order_tokens(ids.data_ptr(), *sizes, tokens.data_ptr(), num_sms=num_sms)
    return tokens


def grouped_up(
    compute_type, choices, base, gated, lora_b, scaling=1.0, *, y=None, num_sms=4
) -> Tensor:
    if y is None:
        y = torch.full((choices.ids.shape[0], lora_b.shape[1]), torch.nan, dtype=gated.dtype)
    arguments = matrix(base), matrix(gated), stack(lora_b), scaling, matrix(y)
    _simt.grouped_up(compute_type, choices.argument(), *arguments, num_sms=num_sms)
    return y


def grouped_down_backward_x(
    compute_type, choices, dlogits, router_weight, dh, lora_a, dropout="none", *, dx=None, num_sms=4
) -> Tensor:
    seed = seed_tensor(SEED)
    if dx is None:
        dx = torch.full((choices.ids.shape[0], lora_a.shape[2]), torch.nan, dtype=dh.dtype)
    _simt.grouped_down_backward_x(
        compute_type,
        choices.argument(),
        matrix(dlogits),
        matrix(router_weight),
        matrix(dh),
        stack(lora_a),
        shared_dropout=dropout == "shared",
        **threshold_and_seed(0.0 if dropout == "none" else 0.5, seed),
        dx=matrix(dx),
        num_sms=num_sms,
    )
    return dx


def up_formula(choices: Choices, scaling: float):
    def formula(base, gated, lora_b, rounding):
        product = torch.einsum(
            "sr,scr->sc", rounding(gated), rounding(lora_b)[choices.ids.flatten()]
        )
        return base + scaling * product.unflatten(0, choices.ids.shape).sum(1)

    return formula


def dx_formula(choices: Choices, dropout: str):
    def formula(dlogits, router_weight, dh, lora_a, rounding):
        slots = choices.ids.flatten()
        product = torch.einsum("sr,src->sc", rounding(dh), rounding(lora_a)[slots])
        parts = product.unflatten(0, choices.ids.shape)
        if dropout != "none":
            kept = kept_by_slot(choices, product.shape[1], dropout)
            parts = torch.where(kept, reference.dropout_scale(0.5) * parts, 0)
        return rounding(dlogits) @ rounding(router_weight) + parts.sum(1)

    return formula


def kept_by_slot(choices: Choices, cols: int, dropout: str) -> Tensor:
    """[M, k, C]"""
    rows, top_k = choices.ids.shape
    kept = torch.empty(rows, top_k, cols, dtype=torch.bool)
    for expert in choices.ids.unique().tolist():
        mask = reference.dropout_mask(
            SEED, rows, cols, 0.5, expert=expert if dropout == "own" else 0
        )
        chosen = choices.ids == expert
        kept[chosen] = mask.unsqueeze(1).expand_as(kept)[chosen]
    return kept


def operands(make, compute_type, shape):
    """choices; base, gated, lora_b; dlogits, router_weight, dh, lora_a."""
    tokens, top_k, experts, cols, rank = shape
    choices = Choices.random(tokens, top_k, experts)
    up = (
        make(tokens, cols, compute_type=compute_type),
        make(tokens * top_k, rank, compute_type=compute_type),
        make(experts * cols, rank, compute_type=compute_type).reshape(experts, cols, rank),
    )
    down = (
        make(tokens, experts, compute_type=compute_type),
        make(experts, cols, compute_type=compute_type),
        make(tokens * top_k, rank, compute_type=compute_type),
        make(experts * rank, cols, compute_type=compute_type).reshape(experts, rank, cols),
    )
    return choices, up, down


def few_ones(*shape, compute_type):
    return integers(*shape, compute_type=compute_type) * (torch.rand(*shape) < 0.3)


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_y(compute_type, shape):
    choices, up, _ = operands(few_ones, compute_type, shape)
    same(grouped_up(compute_type, choices, *up, 0.5), true(up_formula(choices, 0.5), *up))


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@every_mask
def test_dx(compute_type, shape, dropout):
    choices, _, down = operands(few_ones, compute_type, shape)
    dx = grouped_down_backward_x(compute_type, choices, *down, dropout)
    same(dx, true(dx_formula(choices, dropout), *down))


@pytest.mark.parametrize("compute_type", ["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("layout", [(0, 8), (1, 3), (8, 1)], ids=str)
def test_layouts(compute_type, layout):
    choices, up, down = operands(few_ones, compute_type, (40, 2, 5, 67, 6))
    base, gated, lora_b = up
    expected = grouped_up(compute_type, choices, *up)
    y = spread(torch.zeros_like(base), *layout)
    moved = spread(base, *layout), spread(gated, *layout), spread_stack(lora_b, *layout)
    same(grouped_up(compute_type, choices, *moved, y=y), expected)
    expected = grouped_down_backward_x(compute_type, choices, *down, "own")
    dx = spread(torch.zeros_like(expected), *layout)
    moved = (*(spread(tensor, *layout) for tensor in down[:3]), spread_stack(down[3], *layout))
    same(grouped_down_backward_x(compute_type, choices, *moved, "own", dx=dx), expected)


@pytest.mark.parametrize("compute_type", ["bf16", "fp32", "fp64"])
def test_without_a_router(compute_type):
    choices, _, down = operands(few_ones, compute_type, (20, 2, 5, 40, 3))
    down = (torch.zeros_like(down[0]), *down[1:])
    expected = grouped_down_backward_x(compute_type, choices, *down, "own")
    same(grouped_down_backward_x(compute_type, choices, None, None, *down[2:], "own"), expected)


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
def test_nothing_comes_from_experts_that_a_token_did_not_choose(compute_type):
    """RF-13: NaN in an expert's weights reaches its own tokens only, also within a warp's rows, and
    an expert without tokens is not read."""
    choices, up, down = operands(few_ones, compute_type, (40, 2, 6, 70, 4))
    idle = 6 - 1
    swapped = choices.ids.clone()
    swapped[choices.ids == idle] = -1
    for row in (swapped == -1).nonzero()[:, 0].tolist():  # any other expert
        free = next(e for e in range(idle) if e not in swapped[row])
        swapped[row, swapped[row] == -1] = free
    choices = Choices(swapped, order_tokens(swapped, 6))
    good = (
        grouped_up(compute_type, choices, *up),
        grouped_down_backward_x(compute_type, choices, *down, "own"),
    )
    up[2][idle] = down[3][idle] = torch.nan
    up[2][2] = torch.inf
    down[3][2] = torch.nan
    bad = (
        grouped_up(compute_type, choices, *up),
        grouped_down_backward_x(compute_type, choices, *down, "own"),
    )
    others = ~(choices.ids == 2).any(1)
    assert 0 < others.sum() < 40
    for before, after in zip(good, bad, strict=True):
        assert torch.equal(after[others], before[others])
        assert not after[~others].isfinite().all(1).any()


def test_ids_that_are_no_expert_add_nothing():
    choices, up, down = operands(few_ones, "bf16", (20, 2, 4, 40, 3))
    choices.ids.fill_(-1)
    assert torch.equal(grouped_up("bf16", choices, *up), up[0])
    dx = grouped_down_backward_x("bf16", choices, None, None, *down[2:])
    assert not dx.any()


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@every_mask
def test_rounding_and_any_schedule(compute_type, dropout):
    choices, up, down = operands(normal, compute_type, (150, 2, 8, 70, 20))
    results = []
    for schedule in (0, 1):
        _simt.set_options(schedule_seed=schedule)
        y = grouped_up(compute_type, choices, *up, 0.5)
        results.append((y, grouped_down_backward_x(compute_type, choices, *down, dropout)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))
    y, dx = results[0]
    f = up_formula(choices, 0.5)
    assert_within_rule(compute_type, y, plain(compute_type, f, *up), true(f, *up))
    f = dx_formula(choices, dropout)
    assert_within_rule(compute_type, dx, plain(compute_type, f, *down), true(f, *down))


@pytest.mark.parametrize("compute_type", ["bf16", "fp32", "fp64"])
def test_the_order_of_tokens_changes_no_bit(compute_type):
    choices, up, down = operands(normal, compute_type, (200, 2, 6, 40, 5))
    mixed = choices._replace(tokens=torch.randperm(200))
    assert torch.equal(grouped_up(compute_type, choices, *up), grouped_up(compute_type, mixed, *up))
    dx = grouped_down_backward_x(compute_type, choices, *down, "own")
    assert torch.equal(grouped_down_backward_x(compute_type, mixed, *down, "own"), dx)


@pytest.mark.parametrize("compute_type", ["bf16", "tf32", "fp32", "fp64"])
def test_traffic(compute_type):
    """y and dx once, whatever the number of choices; nothing of an expert without tokens."""
    tokens, top_k, experts, cols, rank = 512, 2, 16, 512, 16
    size = DTYPES[compute_type].itemsize
    _, up, down = operands(normal, compute_type, (tokens, top_k, experts, cols, rank))
    ids = torch.stack([torch.arange(tokens) % 2, torch.full((tokens,), 2)], 1).contiguous()
    choices = Choices(ids, order_tokens(ids, experts))
    thin = 8 * tokens * (1 + top_k) + size * tokens * top_k * rank
    [report] = reports_of(lambda: grouped_up(compute_type, choices, *up))
    assert traffic_of(report, "base")["bytes_read"] == up[0].nbytes
    assert traffic_of(report, "out")["bytes_written"] == up[0].nbytes
    assert traffic_of(report, "right")["unique_bytes_read"] == up[2][:3].nbytes
    assert_lean(report, 2 * up[0].nbytes + up[2][:3].nbytes + thin)
    [report] = reports_of(lambda: grouped_down_backward_x(compute_type, choices, *down, "own"))
    assert traffic_of(report, "out")["bytes_written"] == up[0].nbytes
    assert traffic_of(report, "right")["unique_bytes_read"] == down[3][:3].nbytes
    routers = down[0].nbytes + down[1].nbytes
    assert_lean(report, up[0].nbytes + down[3][:3].nbytes + routers + thin)


def test_tokens_in_order_meet_few_experts():
    """Of 16 experts, two a token: products of about a quarter of the experts, not of all."""
    choices, up, _ = operands(normal, "bf16", (2048, 2, 16, 64, 16))
    [ordered] = reports_of(lambda: grouped_up("bf16", choices, *up))
    mixed = choices._replace(tokens=torch.arange(2048))
    [unordered] = reports_of(lambda: grouped_up("bf16", mixed, *up))
    least = 2048 // 16 * 2 * 8  # of whole warps whose tokens share both experts
    assert ordered["mma"] <= 2 * least < unordered["mma"] / 3


@pytest.mark.parametrize("num_sms", [1, 4])
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(300, 1, 9), (700, 2, 8), (17000, 3, 70)])
def test_order_of_tokens(tokens, top_k, experts, num_sms):
    """A permutation by the lowest id, and by the next one as far as there are keys."""
    ids = torch.rand(tokens, experts).argsort(1)[:, :top_k].contiguous()
    ordered = order_tokens(ids, experts, num_sms)
    assert torch.equal(ordered.sort().values, torch.arange(tokens))
    lowest = ids.sort(1).values
    keys = lowest[:, 0]
    if top_k > 1:
        per_expert = min(experts, 1024 // experts)
        keys = keys * per_expert + lowest[:, 1] * per_expert // experts
    assert torch.equal(ordered, keys.sort(stable=True).indices)


def test_order_of_tokens_with_ids_that_are_no_expert():
    ids = torch.tensor([[3, 1], [-1, 2**40], [2, -7], [0, 3]])
    assert order_tokens(ids, 4).tolist() == [3, 0, 2, 1]


# (compute type, M, C, E, k), with 132 multiprocessors: block rows, column tiles a block
PLANS = {
    ("bf16", 8192, 4096, 8, 2): (128, 16),
    ("bf16", 64, 4096, 8, 2): (16, 1),
    ("fp32", 8192, 4096, 8, 2): (128, 32),
    ("bf16", 8192, 4096, 256, 200): (16, 32),
}


@pytest.mark.parametrize("case", PLANS, ids=str)
def test_plan(case):
    plan = _simt.plan_grouped_expand(*case, num_sms=132)
    assert plan["num_row_blocks"] == -(-case[1] // plan["block_rows"])
    assert plan["shared_bytes"] <= 99 * 1024
    assert (plan["block_rows"], plan["col_tiles_per_block"]) == PLANS[case]
