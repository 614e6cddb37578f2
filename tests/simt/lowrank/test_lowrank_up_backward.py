"""G = scaling · (dout ⊙ out_scale) lora_b, dlora_b and dout_scale on the executor, in one pass over
dout (lowrank/lowrank_up_backward.cuh) and in two (thin_product.cuh), and which is planned."""

import itertools

import pytest
import torch
from kernel_calls import (
    COMPUTE_TYPES,
    DTYPES,
    RAGGED_SHAPES,
    _simt,
    acc_dtype,
    assert_lean,
    assert_within_rule,
    free_banks,
    integers,
    lowrank_up_backward,
    normal,
    plain,
    reports_of,
    spread,
    traffic_of,
    true,
)
from torch import Tensor

SCALING = 2.0

SHAPES = [*RAGGED_SHAPES, (580, 70, 16)]
MIDS = ["", "rank_scale core out_scale", "core", "rank_scale", "out_scale"]
OUTPUTS = ("g", "dlora_b", "dout_scale")


def formula(dout, h, rank_scale, core, lora_b, out_scale, rounding) -> dict[str, Tensor]:
    u = h if rank_scale is None else h * rank_scale
    if core is not None:
        u = rounding(u) @ rounding(core).mT
    p = SCALING * rounding(dout).mT @ rounding(u)
    scaled_b = lora_b if out_scale is None else lora_b * out_scale.unsqueeze(1)
    return {
        "g": SCALING * rounding(dout) @ rounding(scaled_b),
        "dlora_b": p if out_scale is None else p * out_scale.unsqueeze(1),
        "dout_scale": (p * lora_b).sum(1),
    }


class Case:
    """Operands of one call; mid names those of rank_scale, core and out_scale that are there."""

    def __init__(self, make, compute_type: str, shape: tuple[int, int, int], mid: str):
        rows, cols, rank = shape
        self.compute_type = compute_type
        self.dout = make(rows, cols, compute_type=compute_type)
        self.h = make(rows, rank, compute_type=compute_type)
        self.lora_b = make(cols, rank, compute_type=compute_type)
        self.rank_scale = make(rank, compute_type=compute_type) if "rank_scale" in mid else None
        self.core = make(rank, rank, compute_type=compute_type) if "core" in mid else None
        self.out_scale = make(cols, compute_type=compute_type) if "out_scale" in mid else None

    def operands(self) -> tuple[Tensor | None, ...]:
        return (self.dout, self.h, self.rank_scale, self.core, self.lora_b, self.out_scale)

    def run(self, **options) -> dict[str, Tensor]:
        return lowrank_up_backward(
            self.compute_type,
            self.dout,
            self.h,
            self.lora_b,
            rank_scale=self.rank_scale,
            core=self.core,
            out_scale=self.out_scale,
            scaling=SCALING,
            **options,
        )

    def assert_exact(self, got: dict[str, Tensor]) -> None:
        expected = true(formula, *self.operands())
        for name, value in got.items():
            assert torch.equal(value, expected[name].to(value.dtype)), name


def is_one_pass(compute_type: str, shape: tuple[int, int, int], num_sms: int) -> bool:
    return _simt.plan_up_backward(compute_type, *shape, num_sms=num_sms)["one_pass"]


VARIANTS = list(itertools.islice(itertools.cycle(MIDS), len(SHAPES)))


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize(("shape", "mid"), list(zip(SHAPES, VARIANTS, strict=True)))
def test_shapes(compute_type, shape, mid):
    case = Case(integers, compute_type, shape, mid)
    case.assert_exact(case.run())


# One pass in regions of different heights and numbers of column splits, and two passes.
@pytest.mark.parametrize("compute_type", ["bf16", "tf32", "fp32"])
@pytest.mark.parametrize("num_sms", [1, 8, 132])
@pytest.mark.parametrize(
    ("shape", "one_pass"), [((200, 330, 16), True), ((130, 330, 20), True), ((66, 130, 70), False)]
)
def test_plans(compute_type, num_sms, shape, one_pass):
    assert is_one_pass(compute_type, shape, num_sms) == one_pass
    case = Case(integers, compute_type, shape, "rank_scale core out_scale")
    case.assert_exact(case.run(num_sms=num_sms))


@pytest.mark.parametrize("mid", MIDS)
@pytest.mark.parametrize("shape", [(70, 72, 24), (70, 72, 72)])
def test_mids(mid, shape):
    case = Case(integers, "bf16", shape, mid)
    case.assert_exact(case.run())


NEEDS = [need for count in (1, 2) for need in itertools.combinations(OUTPUTS, count)]


@pytest.mark.parametrize("need", NEEDS, ids="-".join)
@pytest.mark.parametrize("rank", [17, 72])
def test_needs(need, rank):
    case = Case(integers, "bf16", (70, 72, rank), "core out_scale")
    case.assert_exact(case.run(need=need))


def test_only_g_needs_no_h():
    case = Case(integers, "bf16", (70, 72, 16), "")
    expected = case.run(need=("g",))["g"]
    case.h = None
    assert torch.equal(case.run(need=("g",))["g"], expected)


def test_rank_512():
    case = Case(integers, "bf16", (65, 16, 512), "out_scale")
    case.assert_exact(case.run())


def test_no_rows():
    got = Case(integers, "bf16", (0, 65, 8), "").run()
    assert torch.equal(got["dlora_b"], torch.zeros(65, 8, dtype=torch.bfloat16))
    assert torch.equal(got["dout_scale"], torch.zeros(65, dtype=torch.bfloat16))


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("rank", [20, 70])
@pytest.mark.parametrize(("offset", "padding"), [(1, 3), (2, 6), (0, 3), (8, 8)])
def test_strides_and_alignment(compute_type, rank, offset, padding):
    case = Case(integers, compute_type, (66, 67, rank), "rank_scale core")
    for name in ("dout", "h", "core", "lora_b"):
        setattr(case, name, spread(getattr(case, name), offset, padding))
    with free_banks():
        got = case.run()
    case.assert_exact(got)


@pytest.mark.parametrize("compute_type", ["bf16", "fp16"])
@pytest.mark.parametrize("rank", [16, 72])
def test_gradients_of_wide_adapters(compute_type, rank):
    case = Case(integers, compute_type, (70, 72, rank), "out_scale")
    got = case.run(gradient_dtype=torch.float32)
    assert got["dlora_b"].dtype == got["dout_scale"].dtype == torch.float32
    case.assert_exact(got)


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("shape", [(200, 70, 20), (70, 130, 72)])
def test_rounding(compute_type, shape):
    case = Case(normal, compute_type, shape, "rank_scale core out_scale")
    got = case.run(num_sms=8)
    torchs, truth = plain(compute_type, formula, *case.operands()), true(formula, *case.operands())
    for name in OUTPUTS:
        assert_within_rule(compute_type, got[name], torchs[name], truth[name])
    _simt.set_options(schedule_seed=1)
    again = case.run(num_sms=8)
    assert all(torch.equal(again[name], got[name]) for name in OUTPUTS)


# ---- traffic


@pytest.mark.parametrize(
    ("compute_type", "rank", "num_sms"),
    [
        ("bf16", 16, 2),
        ("bf16", 16, 8),
        ("bf16", 32, 8),
        ("bf16", 64, 2),
        ("tf32", 16, 8),
        ("fp32", 16, 2),
    ],
)
def test_traffic_of_one_pass(compute_type, rank, num_sms):
    """dout is read once; partial sums are what the plan says."""
    rows, cols = 512, 512
    plan = _simt.plan_up_backward(compute_type, rows, cols, rank, num_sms=num_sms)
    assert plan["one_pass"]
    case = Case(normal, compute_type, (rows, cols, rank), "")
    need = ("g", "dlora_b")
    one_pass, gradients = reports_of(lambda: case.run(need=need, num_sms=num_sms))
    size = DTYPES[compute_type].itemsize
    g_bytes = 4 * plan["num_g_splits"] * rows * rank
    p_bytes = 4 * plan["num_p_parts"] * cols * rank
    assert_lean(one_pass, size * (rows * cols + (rows + cols) * rank) + g_bytes + p_bytes)
    assert_lean(gradients, p_bytes + size * cols * rank)
    assert traffic_of(one_pass, "dout")["bytes_read"] == size * rows * cols
    assert traffic_of(one_pass, "g")["bytes_written"] == g_bytes
    assert traffic_of(one_pass, "p")["bytes_written"] == p_bytes
    assert one_pass["shared_conflicts"] == 0


@pytest.mark.parametrize(("compute_type", "rank"), [("bf16", 64), ("bf16", 128), ("fp64", 32)])
def test_traffic_of_g_alone(compute_type, rank):
    """LaMDA with both projections frozen: one pass, nothing else."""
    rows, cols, size = 256, 512, DTYPES[compute_type].itemsize
    case = Case(normal, compute_type, (rows, cols, rank), "")
    [report] = reports_of(lambda: case.run(need=("g",), num_sms=4))
    g_bytes = acc_dtype(compute_type).itemsize * rows * rank
    assert_lean(report, size * (rows * cols + cols * rank) + g_bytes)
    assert traffic_of(report, "dout")["bytes_read"] == size * rows * cols
    assert report["shared_conflicts"] == 0


# ---- plan


@pytest.mark.parametrize("compute_type", COMPUTE_TYPES)
@pytest.mark.parametrize("num_sms", [1, 4, 132])
def test_plan_covers_everything(compute_type, num_sms):
    cols_of_tile = 128 // DTYPES[compute_type].itemsize
    for rows, cols, rank in itertools.product(
        [0, 1, 64, 65, 1000, 8192, 10**7], [1, 65, 4096, 150_000], [1, 16, 17, 64, 65, 512]
    ):
        plan = _simt.plan_up_backward(compute_type, rows, cols, rank, num_sms=num_sms)
        if not plan["one_pass"]:
            assert plan["num_g_splits"] == plan["g"]["num_splits"]
            assert plan["num_p_parts"] == plan["p"]["num_splits"]
            continue
        assert acc_dtype(compute_type) == torch.float32 and plan["rank_tile"] >= rank
        region = 64 * plan["row_tiles_per_region"]
        assert (plan["num_regions"] - 1) * region < rows <= plan["num_regions"] * region
        run = cols_of_tile * plan["col_tiles_per_split"]
        assert (plan["num_col_splits"] - 1) * run < cols <= plan["num_col_splits"] * run
        assert plan["num_col_splits"] <= 65535


def partial_bytes(plan: dict, rows: int, cols: int, rank: int) -> int:
    return 8 * rank * (plan["num_g_splits"] * rows + plan["num_p_parts"] * cols)


@pytest.mark.parametrize(("rank", "limit"), [(8, 1.12), (16, 1.24), (32, 1.47)])
def test_plan_of_one_pass_on_a_large_device(rank, limit):
    """H100, M = 8192, N = 4096: dout and partial sums, written and read, over dout in bytes."""
    plan = _simt.plan_up_backward("bf16", 8192, 4096, rank, num_sms=132)
    assert plan["one_pass"]
    assert plan["num_regions"] * plan["num_col_splits"] >= 0.75 * 132
    dout_bytes = 2 * 8192 * 4096
    assert (dout_bytes + partial_bytes(plan, 8192, 4096, rank)) / dout_bytes <= limit


@pytest.mark.parametrize("rank", [65, 128, 512])
def test_plan_of_large_ranks_is_two_passes(rank):
    plan = _simt.plan_up_backward("bf16", 8192, 4096, rank, num_sms=132)
    assert not plan["one_pass"]
    assert plan["g"]["num_splits"] == 1
