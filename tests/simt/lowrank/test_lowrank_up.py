"""y = base + scaling · out_scale ⊙ mid(h) lora_bᵀ: lowrank/lowrank_up.cuh on the SIMT executor."""

import itertools

import pytest
import torch
from kernel_calls import (
    COMPUTE_TYPES,
    DTYPES,
    RAGGED_SHAPES,
    _simt,
    assert_lean,
    assert_within_rule,
    free_banks,
    integers,
    lowrank_up,
    normal,
    plain,
    reports_of,
    spread,
    traffic_of,
    true,
)
from torch import Tensor

SCALING = 2.0


def formula(base, h, rank_scale, core, lora_b, out_scale, rounding):
    if rank_scale is not None:
        h = h * rank_scale
    if core is not None:
        h = rounding(h) @ rounding(core).mT
    branch = rounding(h) @ rounding(lora_b).mT
    if out_scale is not None:
        branch = branch * out_scale
    return SCALING * branch if base is None else base + SCALING * branch


class Case:
    """Operands of one call; mid names those of rank_scale, core and out_scale that are there."""

    def __init__(self, make, compute_type: str, shape: tuple[int, int, int], mid: str, base: str):
        rows, cols, rank = shape
        self.h = make(rows, rank, compute_type=compute_type)
        self.lora_b = make(cols, rank, compute_type=compute_type)
        self.rank_scale = make(rank, compute_type=compute_type) if "rank_scale" in mid else None
        self.core = make(rank, rank, compute_type=compute_type) if "core" in mid else None
        self.out_scale = make(cols, compute_type=compute_type) if "out_scale" in mid else None
        self.base = {
            "matrix": lambda: make(rows, cols, compute_type=compute_type),
            "bias": lambda: make(cols, compute_type=compute_type),
            "none": lambda: None,
        }[base]()

    def operands(self) -> tuple[Tensor | None, ...]:
        return (self.base, self.h, self.rank_scale, self.core, self.lora_b, self.out_scale)

    def run(self, compute_type: str, **options) -> Tensor:
        return lowrank_up(
            compute_type,
            self.base,
            self.h,
            self.lora_b,
            rank_scale=self.rank_scale,
            core=self.core,
            out_scale=self.out_scale,
            scaling=SCALING,
            **options,
        )

    def assert_exact(self, compute_type: str, got: Tensor) -> None:
        assert torch.equal(got, true(formula, *self.operands()).to(DTYPES[compute_type]))


MIDS = ["", "rank_scale core out_scale", "core", "rank_scale", "out_scale"]
BASES = ["matrix", "bias", "none"]
VARIANTS = list(
    itertools.islice(zip(itertools.cycle(MIDS), itertools.cycle(BASES)), len(RAGGED_SHAPES))
)


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize(("shape", "variant"), list(zip(RAGGED_SHAPES, VARIANTS, strict=True)))
def test_shapes(compute_type, shape, variant):
    case = Case(integers, compute_type, shape, *variant)
    case.assert_exact(compute_type, case.run(compute_type))


@pytest.mark.parametrize("mid", MIDS)
@pytest.mark.parametrize("base", BASES)
def test_options(mid, base):
    case = Case(integers, "bf16", (70, 72, 24), mid, base)
    case.assert_exact("bf16", case.run("bf16"))


# 64 rows of bf16 and 16 of wider kinds are what shared memory holds.
@pytest.mark.parametrize("compute_type", ["bf16", "tf32", "fp32"])
def test_rank_512(compute_type):
    case = Case(integers, compute_type, (65, 16, 512), "rank_scale", "matrix")
    case.assert_exact(compute_type, case.run(compute_type))


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize(("offset", "padding"), [(1, 3), (0, 3), (8, 8)])
def test_strides_and_alignment(compute_type, offset, padding):
    case = Case(integers, compute_type, (66, 67, 20), "rank_scale core", "matrix")
    for name in ("base", "h", "core", "lora_b"):
        setattr(case, name, spread(getattr(case, name), offset, padding))
    y = spread(torch.zeros(66, 67, dtype=DTYPES[compute_type]), offset, padding)
    with free_banks():
        got = case.run(compute_type, y=y)
    case.assert_exact(compute_type, got)


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("shape", [(65, 130, 16), (5, 130, 16)])
def test_in_place(compute_type, shape):
    case = Case(integers, compute_type, shape, "", "matrix")
    expected = true(formula, *case.operands()).to(DTYPES[compute_type])
    assert torch.equal(case.run(compute_type, y=case.base), expected)


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("shape", [(70, 65, 20), (7, 65, 20)])
def test_rounding(compute_type, shape):
    case = Case(normal, compute_type, shape, "rank_scale core out_scale", "matrix")
    got = case.run(compute_type)
    assert_within_rule(
        compute_type,
        got,
        plain(compute_type, formula, *case.operands()),
        true(formula, *case.operands()),
    )
    _simt.set_options(schedule_seed=1)
    assert torch.equal(case.run(compute_type), got)


def test_zero_branch_leaves_base():
    case = Case(normal, "bf16", (65, 64, 8), "", "matrix")
    case.lora_b.zero_()
    assert torch.equal(case.run("bf16"), case.base)


# ---- traffic


@pytest.mark.parametrize(
    ("compute_type", "rank"),
    [("bf16", 16), ("bf16", 64), ("bf16", 128), ("fp32", 16), ("fp64", 16)],
)
def test_traffic(compute_type, rank):
    rows, cols = 256, 512
    case = Case(normal, compute_type, (rows, cols, rank), "", "matrix")
    [report] = reports_of(lambda: case.run(compute_type))
    size = DTYPES[compute_type].itemsize
    assert_lean(report, size * (2 * rows * cols + (rows + cols) * rank))
    assert traffic_of(report, "base")["bytes_read"] == size * rows * cols
    assert traffic_of(report, "out")["bytes_written"] == size * rows * cols
    plan = _simt.plan_expand(compute_type, rows, cols, rank, num_sms=4)
    right = traffic_of(report, "right")
    assert right["bytes_read"] == plan["num_row_blocks"] * size * cols * rank
    assert traffic_of(report, "left")["bytes_read"] == plan["num_col_blocks"] * size * rows * rank


# ---- plan


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("num_sms", [1, 4, 132])
def test_plan_covers_everything(compute_type, num_sms):
    cols_per_line = 128 // DTYPES[compute_type].itemsize
    for rows, cols, rank in itertools.product(
        [1, 64, 65, 1000, 8192, 10**6], [1, 65, 4096, 150_000], [1, 16, 17, 64, 65, 512]
    ):
        plan = _simt.plan_expand(compute_type, rows, cols, rank, num_sms=num_sms)
        block_cols = cols_per_line * (2 if plan["block_rows"] == 16 else 1)
        block_cols *= plan["col_tiles_per_block"]
        assert (plan["num_row_blocks"] - 1) * plan["block_rows"] < rows
        assert plan["num_row_blocks"] * plan["block_rows"] >= rows
        assert (plan["num_col_blocks"] - 1) * block_cols < cols
        assert plan["num_col_blocks"] * block_cols >= cols
        assert plan["num_col_blocks"] <= 65535
        assert plan["shared_bytes"] <= 99 * 1024


def test_plan_fills_the_device():
    """H100, M = 8192, N = 4096: one wave of two blocks per SM, hardly a slot left over."""
    for rank in (16, 32, 64):
        plan = _simt.plan_expand("bf16", 8192, 4096, rank, num_sms=132)
        assert plan["block_rows"] == 128
        assert 0.9 * 264 <= plan["num_row_blocks"] * plan["num_col_blocks"] <= 264


def test_plan_spreads_few_rows():
    plan = _simt.plan_expand("bf16", 1, 4096, 16, num_sms=132)
    assert plan["block_rows"] == 16
    assert plan["num_col_blocks"] == 4096 // 128


def test_no_rows_and_no_columns():
    assert reports_of(lambda: Case(normal, "bf16", (0, 64, 8), "", "matrix").run("bf16")) == []
    assert reports_of(lambda: Case(normal, "bf16", (8, 0, 8), "", "matrix").run("bf16")) == []
