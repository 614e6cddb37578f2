"""lowrank/lowrank_mid_backward.cuh: du = Σ g, dh = (du core) ⊙ rank_scale, dcore, drank_scale."""

import pytest
import torch
from kernel_calls import (
    COMPUTE_TYPES,
    DTYPES,
    _simt,
    acc_dtype,
    assert_free_banks,
    assert_within_rule,
    free_banks,
    integers,
    lowrank_mid_backward,
    normal,
    plain,
    reports_of,
    spread,
    true,
)
from torch import Tensor

SHAPES = [(1, 1), (15, 3), (17, 16), (64, 17), (65, 8), (130, 32), (63, 33), (129, 64), (66, 65)]


def formulas(g, h, rank_scale, core, rounding) -> dict[str, Tensor]:
    # du is rounded to x's type where it is an operand, as in plain torch.
    du = g.sum(0) if g.dtype == h.dtype else g.sum(0).to(h.dtype)
    dv = du if core is None else rounding(du) @ rounding(core)
    scaled = h if rank_scale is None else h * rank_scale
    return {
        "dh": dv if rank_scale is None else dv * rank_scale,
        "dcore": rounding(du).mT @ rounding(scaled),
        "drank_scale": (dv * h).sum(0),
    }


def operands(make, compute_type, shape, mid: str, num_splits: int = 3):
    rows, rank = shape
    g = torch.stack([make(rows, rank, compute_type=compute_type) for _ in range(num_splits)])
    h = make(rows, rank, compute_type=compute_type)
    rank_scale = make(rank, compute_type=compute_type) if "rank_scale" in mid else None
    core = make(rank, rank, compute_type=compute_type) if "core" in mid else None
    return g.to(acc_dtype(compute_type)), h, rank_scale, core


def needed(mid: str) -> tuple[str, ...]:
    return ("dh", *(f"d{name}" for name in ("core", "rank_scale") if name in mid))


def run(compute_type: str, g, h, rank_scale, core, need, **options) -> dict[str, Tensor]:
    return lowrank_mid_backward(
        compute_type, g, h, rank_scale=rank_scale, core=core, need=need, **options
    )


def assert_exact(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in got.items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(compute_type, shape):
    mid = "core" if shape[1] == 17 else "core rank_scale"
    tensors = operands(integers, compute_type, shape, mid)
    assert_exact(run(compute_type, *tensors, needed(mid)), true_of(tensors))


def true_of(tensors) -> dict[str, Tensor]:
    return true(formulas, *tensors)


@pytest.mark.parametrize("compute_type", ["bf16", "fp64"])
def test_rank_of_many_tiles(compute_type):
    tensors = operands(integers, compute_type, (65, 130), "core rank_scale")
    assert_exact(run(compute_type, *tensors, needed("core rank_scale")), true_of(tensors))


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("mid", ["", "rank_scale"])
def test_without_core(compute_type, mid):
    tensors = operands(integers, compute_type, (130, 20), mid)
    assert_exact(run(compute_type, *tensors, needed(mid)), true_of(tensors))


@pytest.mark.parametrize(
    "need", [("dh",), ("dcore",), ("drank_scale",), ("dcore", "drank_scale"), ("dh", "dcore")]
)
def test_only_what_is_needed(need):
    tensors = operands(integers, "bf16", (70, 70), "core rank_scale")
    g, h, rank_scale, core = tensors
    got = run("bf16", g, None if need == ("dh",) else h, rank_scale, core, need)
    assert_exact(got, true_of(tensors))


@pytest.mark.parametrize("compute_type", ["bf16", "fp16"])
def test_gradients_of_fp32_adapters(compute_type):
    tensors = operands(integers, compute_type, (200, 16), "core rank_scale")
    got = run(compute_type, *tensors, needed("core rank_scale"), gradient_dtype=torch.float32)
    assert got["dcore"].dtype == torch.float32
    assert_exact(got, true_of(tensors))


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
def test_strides_and_alignment(compute_type):
    g, h, rank_scale, core = operands(integers, compute_type, (66, 21), "core rank_scale")
    tensors = g, spread(h, 1, 3), rank_scale, spread(core, 1, 2)
    with free_banks():
        got = run(compute_type, *tensors, needed("core rank_scale"))
    assert_exact(got, true_of(tensors))


@pytest.mark.parametrize("num_sms", [1, 2, 9])
def test_row_groups(num_sms):
    tensors = operands(integers, "bf16", (300, 8), "core rank_scale", num_splits=5)
    got = run("bf16", *tensors, needed("core rank_scale"), num_sms=num_sms)
    assert_exact(got, true_of(tensors))


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
def test_rounding(compute_type):
    mid = "core rank_scale"
    tensors = operands(normal, compute_type, (150, 24), mid)
    got = run(compute_type, *tensors, needed(mid))
    plain_values, true_values = plain(compute_type, formulas, *tensors), true_of(tensors)
    for name, tensor in got.items():
        assert_within_rule(compute_type, tensor, plain_values[name], true_values[name])
    _simt.set_options(schedule_seed=1)
    again = run(compute_type, *tensors, needed(mid))
    assert all(torch.equal(tensor, again[name]) for name, tensor in got.items())


@pytest.mark.parametrize(("compute_type", "rank"), [("bf16", 64), ("fp32", 32), ("fp64", 32)])
def test_launches_and_traffic(compute_type, rank):
    """Nothing in the middle: one sum. With core and rank_scale: all from one reading of g."""
    plain_sum = operands(normal, compute_type, (256, 16), "")
    [report] = reports_of(lambda: run(compute_type, *plain_sum, ("dh",)))
    assert report["kernel"] == "partial_sums"
    tensors = operands(normal, compute_type, (256, rank), "core rank_scale")
    report, *sums = reports_of(lambda: run(compute_type, *tensors, needed("core rank_scale")))
    assert [one["kernel"] for one in sums] == ["partial_sums"] * 2
    traffic = {tensor["name"]: tensor for tensor in report["tensors"]}
    assert traffic["g"]["bytes_read"] == 3 * 256 * rank * acc_dtype(compute_type).itemsize
    assert traffic["dh"]["bytes_written"] == 256 * rank * DTYPES[compute_type].itemsize
    assert report["sectors_read"] <= 1.05 * report["bytes_read"] / 32
    assert_free_banks(report)


@pytest.mark.parametrize("compute_type", ["bf16", "fp64"])
def test_plan(compute_type):
    for rows in (1, 63, 64, 65, 1000, 8192):
        for num_sms in (1, 4, 132):
            plan = _simt.plan_mid_backward(compute_type, rows, need_sums=True, num_sms=num_sms)
            tiles = plan["num_row_groups"] * plan["row_tiles_per_group"]
            assert tiles * 64 >= rows
            assert (tiles - plan["row_tiles_per_group"]) * 64 < rows
            assert plan["num_row_groups"] <= max(num_sms // 2, 1)
        plan = _simt.plan_mid_backward(compute_type, rows, need_sums=False, num_sms=132)
        assert plan == {"num_row_groups": (rows + 63) // 64, "row_tiles_per_group": 1}
