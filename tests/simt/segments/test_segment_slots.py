"""segments/segment_*.cuh where a row has several slots, one for each of its experts: large
matrices are gathered by slot / k, thin ones have a row for each slot, masks may be the experts'."""

import pytest
import torch
from kernel_calls import COMPUTE_TYPES, _simt, integers, normal, reports_of, traffic_of
from lowrank_cases import seed_tensor
from segment_cases import (
    SEED,
    Groups,
    same,
    scalings,
    segment_down,
    segment_down_backward_lora_a,
    segment_up_backward,
    segment_up_backward_lora_b,
)

# (M, k, n, C, r): few slots and many, one tile and several, idle groups.
SHAPES = [(1, 1, 1, 1, 1), (9, 3, 4, 70, 5), (70, 2, 9, 65, 17), (200, 4, 5, 131, 16)]
masks = pytest.mark.parametrize("shared_dropout", [True, False], ids=["shared mask", "own masks"])


def choices(rows: int, top_k: int, num_groups: int) -> torch.Tensor:
    return torch.rand(rows, num_groups).argsort(1)[:, :top_k].contiguous()


def few_ones(*shape, compute_type):
    """Integers few of which are not zero: sums stay exact in bf16."""
    return integers(*shape, compute_type=compute_type) * (torch.rand(*shape) < 0.2)


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@masks
def test_down(compute_type, shape, shared_dropout):
    rows, top_k, n, cols, rank = shape
    groups = Groups.of_slots(choices(rows, top_k, n), n, shared_dropout)
    x, lora_a = (
        few_ones(rows, cols, compute_type=compute_type),
        few_ones(n * rank, cols, compute_type=compute_type),
    )
    lora_a = lora_a.reshape(n, rank, cols)
    seed = seed_tensor(SEED)
    h = segment_down(compute_type, groups, x, lora_a, dropout_p=0.5, seed=seed)
    dropped = groups.dropped(x.double(), 0.5, SEED)
    expected = torch.einsum("sc,src->sr", dropped, lora_a.double()[groups.ids])
    same(h, expected)


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_up_backward(compute_type, shape):
    rows, top_k, n, cols, rank = shape
    groups = Groups.of_slots(choices(rows, top_k, n), n, True)
    dout, lora_b = (
        few_ones(rows, cols, compute_type=compute_type),
        few_ones(n * cols, rank, compute_type=compute_type),
    )
    lora_b = lora_b.reshape(n, cols, rank)
    dh = segment_up_backward(compute_type, groups, dout, lora_b, scalings(n))
    gathered = dout.double().repeat_interleave(top_k, 0)
    expected = torch.einsum("sc,scr->sr", gathered, lora_b.double()[groups.ids])
    same(dh, scalings(n).double()[groups.ids].unsqueeze(1) * expected)


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
@masks
def test_outer(compute_type, shape, shared_dropout):
    rows, top_k, n, cols, rank = shape
    groups = Groups.of_slots(choices(rows, top_k, n), n, shared_dropout)
    large, thin = (
        few_ones(rows, cols, compute_type=compute_type),
        few_ones(rows * top_k, rank, compute_type=compute_type),
    )

    def outer(gathered):
        return torch.stack(
            [gathered[groups.ids == i].mT @ thin[groups.ids == i].double() for i in range(n)]
        )

    got = segment_up_backward_lora_b(compute_type, groups, large, thin, scalings(n))
    gathered = large.double().repeat_interleave(top_k, 0)
    same(got, scalings(n).double()[:, None, None] * outer(gathered))
    options = {"dropout_p": 0.5, "seed": seed_tensor(SEED)}
    got = segment_down_backward_lora_a(compute_type, groups, thin, large, **options)
    same(got, outer(groups.dropped(large.double(), 0.5, SEED)).mT)


@pytest.mark.parametrize("compute_type", ["bf16", "fp64"])
def test_bad_rows_and_groups_stay_by_themselves(compute_type):
    """NaN in the operands of a group reaches its own rows only, and in a row its own slots only."""
    groups = Groups.of_slots(choices(40, 2, 6) % 5, 6, True)  # no row chose group 5
    x, lora_a = (
        few_ones(40, 70, compute_type=compute_type),
        few_ones(6 * 4, 70, compute_type=compute_type).reshape(6, 4, 70),
    )
    options = {"dropout_p": 0.5, "seed": seed_tensor(SEED)}
    good = segment_down(compute_type, groups, x, lora_a, **options)
    lora_a[5] = lora_a[2] = torch.nan
    x[7] = torch.inf
    h = segment_down(compute_type, groups, x, lora_a, **options)
    slots = torch.arange(80)
    others = (groups.ids != 2) & (slots // 2 != 7)
    assert torch.equal(h[others], good[others]) and not h[~others].isfinite().all(1).any()
    thin = few_ones(80, 4, compute_type=compute_type)
    dlora_a = segment_down_backward_lora_a(compute_type, groups, thin, x, **options)
    seen = groups.ids[14:16].tolist()
    for group in range(6):
        assert bool(dlora_a[group].isfinite().all()) == (group not in seen) or group in seen
    assert not dlora_a[5].any()


@masks
def test_the_order_of_threads_changes_no_bit(shared_dropout):
    groups = Groups.of_slots(choices(150, 3, 5), 5, shared_dropout)
    x, lora_a = (
        normal(150, 70, compute_type="bf16"),
        normal(5 * 8, 70, compute_type="bf16").reshape(5, 8, 70),
    )
    thin = normal(450, 8, compute_type="bf16")
    options = {"dropout_p": 0.3, "seed": seed_tensor(SEED)}
    results = []
    for schedule in (0, 1):
        _simt.set_options(schedule_seed=schedule)
        results.append(
            (
                segment_down("bf16", groups, x, lora_a, **options),
                segment_down_backward_lora_a("bf16", groups, thin, x, **options),
            )
        )
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_traffic():
    """x is read once for each slot, and nothing of a group without slots."""
    rows, top_k, n, cols, rank = 256, 2, 8, 512, 16
    ids = choices(rows, top_k, n - 1)
    groups = Groups.of_slots(ids, n, True)
    x = normal(rows, cols, compute_type="bf16")
    lora_a = normal(n * rank, cols, compute_type="bf16").reshape(n, rank, cols)
    options = {"dropout_p": 0.3, "seed": seed_tensor(SEED)}
    [down] = reports_of(lambda: segment_down("bf16", groups, x, lora_a, num_sms=1, **options))
    assert traffic_of(down, "x")["bytes_read"] == top_k * x.nbytes
    assert traffic_of(down, "lora_a")["unique_bytes_read"] == lora_a[: n - 1].nbytes
    thin = normal(rows * top_k, rank, compute_type="bf16")
    call = lambda: segment_down_backward_lora_a("bf16", groups, thin, x, **options)  # noqa: E731
    [outer] = reports_of(call)
    assert traffic_of(outer, "source")["bytes_read"] == top_k * x.nbytes
    assert down["shared_conflicts"] <= 0.02 * down["shared_requests"]
