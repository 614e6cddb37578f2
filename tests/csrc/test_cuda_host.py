"""The host side of the CUDA backend: order, scratch memory and launches of a call.

Run on the SIMT executor; what a GPU alone can show is in test_cuda.py.
"""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from devices import DtypePair, simt_module, simt_ops
from lowrank_cases import (
    BF16,
    FP32,
    GRADIENTS,
    MIXED,
    OPS,
    OPTIONAL,
    Tensors,
    assert_exact,
    assert_same_bits,
    expanded_columns,
    make_dout,
    make_tensors,
    raw_args,
    raw_backward_args,
    seed_tensor,
    sliced_rows,
    transposed,
)
from torch import Tensor
from torch._subclasses import FakeTensorMode

from lowrank_ext.ops import _branch

ALWAYS, NEVER = 0, 2**62  # sizes from which an output is seeded


@pytest.fixture
def host(simt: ModuleType) -> ModuleType:
    """Settings of the host side in the executor's build."""
    return simt.host


def test_settings_end_with_their_test(host: ModuleType) -> None:
    """conftest.simt_settings calls reset behind every test."""
    before = host.num_sms(), host.min_seeded_bytes()
    host.set_num_sms(before[0] + 1)
    host.set_min_seeded_bytes(before[1] + 1)
    host.reset()
    assert (host.num_sms(), host.min_seeded_bytes()) == before


def launches(run) -> list[dict]:
    """The reports of the kernels that run() launches."""
    simt_module().clear_reports()
    run()
    return simt_module().reports()


def run_forward(op: str, tensors: Tensors, **options: object) -> tuple[Tensor, Tensor]:
    return getattr(simt_ops(), op)(*raw_args(op, tensors, **options))


def run_backward(
    op: str, tensors: Tensors, needs: tuple[str, ...] = GRADIENTS, **options: object
) -> tuple[Tensor, ...]:
    _, h = run_forward(op, tensors, **options)
    dout = make_dout(tensors, integers=True)
    arguments = raw_backward_args(op, tensors, dout, h, needs, **options)
    simt_module().clear_reports()
    return getattr(simt_ops(), f"{op}_backward")(*arguments)


def base_bytes_read(reports: list[dict], kernel: str) -> int:
    """Of the base, whose reads count as the output's where it is the output itself."""
    (report,) = (report for report in reports if report["kernel"] == kernel)
    traffic = (t for t in report["tensors"] if t["name"] in ("base", "out"))
    return sum(t["unique_bytes_read"] for t in traffic)


# Who writes an output first


def test_outputs_are_seeded_from_a_size_on(host: ModuleType) -> None:
    host.set_min_seeded_bytes(1000)
    assert host.seed_base_output(10, 50, 2)
    assert not host.seed_base_output(10, 49, 2)
    assert not host.seed_base_output(0, 4096, 2)
    assert host.seed_base_output(2**20, 2**16, 8), "a size that passes 2^32"


@pytest.mark.simt(only=True)
@pytest.mark.parametrize("min_seeded_bytes", [ALWAYS, NEVER])
@pytest.mark.parametrize("bias", ["none", "dense", "strided"])
@pytest.mark.parametrize("dtypes", [FP32, BF16, MIXED], ids=["float32", "bfloat16", "mixed"])
def test_both_orders_are_exact(
    host: ModuleType, device: str, dtypes: DtypePair, bias: str, min_seeded_bytes: int
) -> None:
    host.set_min_seeded_bytes(min_seeded_bytes)
    tensors = make_tensors(
        "lowrank_linear",
        (21,),
        24,
        18,
        4,
        dtypes,
        device,
        bias=bias != "none",
        optional=OPTIONAL,
        integers=True,
    )
    if bias == "strided":
        tensors["bias"] = expanded_columns(tensors["bias"])
    options = {"scaling": 0.5, "dropout_p": 0.5, "seed": seed_tensor(4)}
    assert_exact("lowrank_linear", tensors, make_dout(tensors, integers=True), **options)


@pytest.mark.parametrize("bias", [False, True])
def test_seeded_output_reads_no_base(host: ModuleType, bias: bool) -> None:
    """The plan is followed: the branch reads y (dx) only where the base's product came first."""
    rows, num_in, num_out = 21, 24, 18
    tensors = make_tensors("lowrank_linear", (rows,), num_in, num_out, 4, FP32, bias=bias)
    expected = {
        ALWAYS: (num_out * 4 * bias, 0),
        NEVER: (rows * num_out * 4, rows * num_in * 4),
    }
    for min_seeded_bytes, (base_of_y, base_of_dx) in expected.items():
        host.set_min_seeded_bytes(min_seeded_bytes)
        forward = launches(lambda: run_forward("lowrank_linear", tensors))
        assert base_bytes_read(forward, "lowrank_up") == base_of_y
        backward = launches(lambda: run_backward("lowrank_linear", tensors, ("dx",)))
        assert base_bytes_read(backward, "lowrank_down_backward_x") == base_of_dx


@pytest.mark.simt(only=True)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("num_sms", [1, 3, 132])
def test_any_number_of_processors(host: ModuleType, device: str, op: str, num_sms: int) -> None:
    """Plans split the work by the number of multiprocessors; the values stay."""
    host.set_num_sms(num_sms)
    tensors = make_tensors(op, (40,), 72, 56, 8, FP32, device, optional=OPTIONAL, integers=True)
    options = {"dropout_p": 0.5, "seed": seed_tensor(4)}
    assert_exact(op, tensors, make_dout(tensors, integers=True), **options)


# Adapter tensors in another dtype or layout


@pytest.mark.parametrize("op", OPS)
def test_adapters_are_rounded_in_one_launch(host: ModuleType, op: str) -> None:
    tensors = make_tensors(op, (5,), 24, 18, 4, MIXED, optional=OPTIONAL)
    sizes = {name: tensors[name].numel() for name in ("lora_a", "lora_b", *OPTIONAL)}
    forward = launches(lambda: run_forward(op, tensors))
    assert_one_rounding(forward, sum(sizes.values()), bytes_each=4)
    backward = launches(lambda: run_backward(op, tensors))
    assert_one_rounding(backward, sum(sizes.values()), bytes_each=4)
    without_dx = launches(lambda: run_backward(op, tensors, GRADIENTS[1:]))
    assert_one_rounding(without_dx, sum(sizes.values()) - sizes["lora_a"], bytes_each=4)


def assert_one_rounding(reports: list[dict], num_elements: int, bytes_each: int) -> None:
    (report,) = (report for report in reports if report["kernel"] == "round_adapters")
    traffic = report["tensors"]
    assert sum(t["bytes_read"] for t in traffic) == bytes_each * num_elements
    assert sum(t["bytes_written"] for t in traffic) == 2 * num_elements


@pytest.mark.parametrize("op", OPS)
def test_only_what_needs_it_is_copied(host: ModuleType, op: str) -> None:
    tensors = make_tensors(op, (5,), 24, 18, 4, BF16, optional=OPTIONAL)
    rows_apart = {"lora_a": sliced_rows(tensors["lora_a"]), "core": sliced_rows(tensors["core"])}
    reports = launches(lambda: run_forward(op, tensors | rows_apart))
    assert "round_adapters" not in {report["kernel"] for report in reports}
    columns_apart = {
        "lora_b": transposed(tensors["lora_b"]),
        "out_scale": expanded_columns(tensors["out_scale"]),
    }
    reports = launches(lambda: run_forward(op, tensors | columns_apart))
    assert_one_rounding(reports, 18 * 4 + 18, bytes_each=2)


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
def test_rounding_is_torchs(host: ModuleType, base: torch.dtype) -> None:
    """To nearest even, infinity and NaN kept: h of an identity x is lora_a itself."""
    special = torch.tensor([1.00390625, 1.01171875, -0.0, 1e-45, 1e-7, 3e38, 65519.0, 65520.0])
    lora_a = torch.cat((special, torch.randn(8), torch.tensor([torch.inf, torch.nan]))).view(1, -1)
    for column in range(lora_a.shape[1]):
        x = torch.ones(1, 1, dtype=base)
        tensors = {"x": x, "lora_a": lora_a[:, column : column + 1], "lora_b": torch.ones(1, 1)}
        tensors |= {"base_out": x} | dict.fromkeys(OPTIONAL)
        _, h = run_forward("lowrank_add", tensors)
        assert_same_bits(h, tensors["lora_a"].to(base), f"column {column}")


# TF32


def test_tf32_rounds_the_factors(host: ModuleType) -> None:
    x = torch.full((1, 1), 1 + 2.0**-12)
    one = torch.ones(1, 1)
    tensors = {"x": x, "lora_a": one, "lora_b": one, "base_out": one} | dict.fromkeys(OPTIONAL)
    _, h = run_forward("lowrank_add", tensors, allow_tf32=False)
    _, h_tf32 = run_forward("lowrank_add", tensors, allow_tf32=True)
    assert h.item() == x.item() and h_tf32.item() == 1.0
    double = {name: None if t is None else t.double() for name, t in tensors.items()}
    assert run_forward("lowrank_add", double, allow_tf32=True)[1].item() == x.item()


@pytest.mark.parametrize("op", OPS)
def test_tf32_is_exact_on_integers(host: ModuleType, op: str) -> None:
    tensors = make_tensors(op, (33,), 40, 24, 8, FP32, optional=OPTIONAL, integers=True)
    options = {"scaling": 2.0, "dropout_p": 0.5, "seed": seed_tensor(3)}
    assert_same_bits(
        run_forward(op, tensors, allow_tf32=True, **options)[0],
        run_forward(op, tensors, allow_tf32=False, **options)[0],
        "y",
    )
    torch.manual_seed(1)
    exact = run_backward(op, tensors, allow_tf32=False, **options)
    torch.manual_seed(1)
    tf32 = run_backward(op, tensors, allow_tf32=True, **options)
    for name, left, right in zip(GRADIENTS, tf32, exact, strict=True):
        assert_same_bits(left, right, name)


@pytest.fixture
def fp32_precision() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("fp32_precision")
def test_tf32_follows_torch() -> None:
    matmul = torch.backends.cuda.matmul
    with FakeTensorMode():
        fp32 = torch.empty(2, device="cuda")
        for precision in ("tf32", "ieee"):
            matmul.fp32_precision = precision
            assert _branch.tf32_allowed(fp32) == (precision == "tf32")
            assert not _branch.tf32_allowed(fp32.bfloat16())
            assert not _branch.tf32_allowed(torch.empty(2))


@pytest.mark.usefixtures("fp32_precision")
def test_change_of_tf32_recompiles() -> None:
    """The setting is read while tracing; dynamo's own guard on it brings a new trace."""
    compiled = torch.compile(
        lambda x: x + 1 if _branch._tf32_is_set() else x - 1, fullgraph=True, backend="eager"
    )
    for precision, expected in (("ieee", -1.0), ("tf32", 1.0), ("ieee", -1.0)):
        torch.backends.cuda.matmul.fp32_precision = precision
        assert compiled(torch.zeros(1)).item() == expected


# Launches


@pytest.mark.parametrize(
    ("shape", "what"),
    [
        ((2**31, 1, 1, 128), "grid.x must be at most 2147483647, got 2147483648"),
        ((1, 65536, 1, 128), "grid.y must be at most 65535, got 65536"),
        ((1, 1, 65536, 128), "grid.z must be at most 65535, got 65536"),
        ((1, 1, 1, 1025), "block size must be at most 1024, got 1025"),
    ],
)
def test_launch_past_a_limit_names_the_launcher(
    host: ModuleType, shape: tuple[int, ...], what: str
) -> None:
    with pytest.raises(RuntimeError, match=f"^launch_example: {what}$"):
        host.check_launch("launch_example", *shape)
    host.check_launch("launch_example", 2**31 - 1, 65535, 65535, 1024)
