"""The kernels of csrc/cuda, called one by one with torch tensors, on the SIMT executor."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from devices import has_simt, simt_module
from torch import Tensor

from lowrank_ext import reference

if not has_simt():
    pytest.skip("the SIMT executor is not built, run `make simt`", allow_module_level=True)
_simt = simt_module()

COMPUTE_TYPES = ("bf16", "fp16", "tf32", "fp32", "fp64")
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
    "fp64": torch.float64,
}

# (M, K or N, r): ragged in every letter, every block size and rank tile, more than one of them.
RAGGED_SHAPES = [
    (1, 1, 1),
    (15, 63, 3),
    (16, 130, 16),
    (17, 65, 17),
    (63, 17, 8),
    (64, 64, 65),
    (65, 16, 32),
    (130, 15, 64),
    (65, 130, 1),
    (130, 65, 33),
    (65, 63, 130),
]


def acc_dtype(compute_type: str) -> torch.dtype:
    return torch.float64 if compute_type == "fp64" else torch.float32


# ---- arguments


def matrix(tensor: Tensor | None) -> dict[str, Any] | None:
    """What any_of of bind_kernels.cpp takes; a vector is one row."""
    if tensor is None:
        return None
    rows = tensor.unsqueeze(0) if tensor.dim() == 1 else tensor
    assert rows.dim() == 2 and (rows.stride(1) == 1 or rows.shape[1] <= 1)
    return {
        "data_ptr": tensor.data_ptr(),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "num_rows": rows.shape[0],
        "num_cols": rows.shape[1],
        "row_stride": rows.stride(0),
    }


def spread(tensor: Tensor, offset: int, padding: int) -> Tensor:
    """The same values in memory whose base is `offset` elements off 16 bytes and whose rows are
    `padding` elements apart."""
    rows, cols = tensor.shape
    buffer = tensor.new_full((offset + rows * (cols + padding) + 16,), float("nan"))
    view = buffer[offset:].as_strided((rows, cols), (cols + padding, 1))
    view.copy_(tensor)
    return view


def integers(*shape: int, compute_type: str, low: int = -1, high: int = 1) -> Tensor:
    """Small integers: every sum is exact in every order."""
    return torch.randint(low, high + 1, shape).to(DTYPES[compute_type])


def normal(*shape: int, compute_type: str) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(DTYPES[compute_type])


def threshold_and_seed(dropout_p: float, seed: Tensor | None) -> dict[str, int]:
    return {
        "threshold": reference.dropout_threshold(dropout_p),
        "seed": 0 if seed is None else seed.data_ptr(),
    }


def tf32(tensor: Tensor) -> Tensor:
    """fp32 rounded to TF32 (nearest, ties away from zero), as the tensor cores' operands are."""
    return ((tensor.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def plain(compute_type: str, product: Callable[..., Tensor], *operands: Tensor | None) -> Tensor:
    """Plain torch in this compute type: product(*operands, rounding of operands)."""
    return product(*operands, tf32 if compute_type == "tf32" else lambda tensor: tensor)


def true(product: Callable[..., Tensor], *operands: Tensor | None) -> Tensor:
    wide = (None if operand is None else operand.double() for operand in operands)
    return product(*wide, lambda tensor: tensor)


# As in lowrank_cases.py: where torch may sum in another order that is the floor, else one rounding.
FLOORS = {"fp64": 1e-13, "fp32": 2e-6, "tf32": 2e-6, "bf16": 2**-8, "fp16": 2**-11}


def assert_within_rule(compute_type: str, got: Tensor, plain: Tensor, true: Tensor) -> None:
    """The error is at most twice plain torch's, in the maximum and in the mean."""
    floor = FLOORS[compute_type] * true.abs().max()
    for statistic in (torch.max, torch.mean):
        error = statistic((got.double() - true).abs())
        allowed = 2 * statistic((plain.double() - true).abs()) + floor
        assert error <= allowed, f"{statistic.__name__} error {error:.3g}, allowed {allowed:.3g}"


def reports_of(call: Callable[[], Any]) -> list[dict[str, Any]]:
    _simt.clear_reports()
    call()
    return _simt.reports()


def assert_lean(report: dict[str, Any], needed_bytes: int) -> None:
    """Bytes that leave the L2 at most 5 % above what is needed, whole sectors, free banks."""
    moved = report["unique_bytes_read"] + report["bytes_written"]
    assert moved <= 1.05 * needed_bytes
    requested = report["bytes_read"] + report["bytes_written"]
    assert report["sectors_read"] + report["sectors_written"] <= 1.05 * requested / 32
    assert_free_banks(report)


def assert_free_banks(report: dict[str, Any]) -> None:
    """A bank of shared memory has to be waited for in at most 2 % of the requests."""
    assert report["shared_conflicts"] <= 0.02 * report["shared_requests"]


@contextmanager
def free_banks() -> Iterator[None]:
    """That holds for every launch inside."""
    _simt.clear_reports()
    yield
    reports = _simt.reports()
    assert reports
    for report in reports:
        assert_free_banks(report)


def traffic_of(report: dict[str, Any], name: str) -> dict[str, Any]:
    [tensor] = [tensor for tensor in report["tensors"] if tensor["name"] == name]
    return tensor


# ---- calls


def lowrank_down(
    compute_type: str,
    x: Tensor,
    lora_a: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    num_sms: int = 4,
) -> Tensor:
    h = torch.full((x.shape[0], lora_a.shape[0]), float("nan"), dtype=x.dtype)
    _simt.lowrank_down(
        compute_type,
        matrix(x),
        matrix(lora_a),
        matrix(h),
        **threshold_and_seed(dropout_p, seed),
        num_sms=num_sms,
    )
    return h


def lowrank_up_backward(
    compute_type: str,
    dout: Tensor,
    h: Tensor,
    lora_b: Tensor,
    *,
    rank_scale: Tensor | None = None,
    core: Tensor | None = None,
    out_scale: Tensor | None = None,
    scaling: float = 1.0,
    need: tuple[str, ...] = ("g", "dlora_b", "dout_scale"),
    gradient_dtype: torch.dtype | None = None,
    num_sms: int = 4,
) -> dict[str, Tensor]:
    """What is needed of g (summed over its splits), dlora_b and dout_scale."""
    num_rows, (out_features, rank) = dout.shape[0], lora_b.shape
    need_p = "dlora_b" in need or "dout_scale" in need
    shape = (num_rows, out_features, rank)
    splits = _simt.num_g_splits(compute_type, *shape, need_p=need_p, num_sms=num_sms)
    g = torch.full((splits, num_rows, rank), float("nan"), dtype=acc_dtype(compute_type))
    gradient_dtype = gradient_dtype or dout.dtype
    dlora_b = torch.full((out_features, rank), float("nan"), dtype=gradient_dtype)
    dout_scale = torch.full((out_features,), float("nan"), dtype=gradient_dtype)
    _simt.lowrank_up_backward(
        compute_type,
        matrix(dout),
        matrix(h),
        matrix(rank_scale),
        matrix(core),
        matrix(lora_b),
        matrix(out_scale),
        scaling,
        g.data_ptr() if "g" in need else 0,
        matrix(dlora_b) if "dlora_b" in need else None,
        matrix(dout_scale) if "dout_scale" in need else None,
        num_sms=num_sms,
    )
    results = {"g": g.sum(0), "dlora_b": dlora_b, "dout_scale": dout_scale}
    return {name: results[name] for name in need}


def lowrank_down_backward_lora_a(
    compute_type: str,
    dh: Tensor,
    x: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    gradient_dtype: torch.dtype | None = None,
    num_sms: int = 4,
) -> Tensor:
    shape = (dh.shape[1], x.shape[1])
    dlora_a = torch.full(shape, float("nan"), dtype=gradient_dtype or x.dtype)
    _simt.lowrank_down_backward_lora_a(
        compute_type,
        matrix(dh),
        matrix(x),
        **threshold_and_seed(dropout_p, seed),
        dlora_a=matrix(dlora_a),
        num_sms=num_sms,
    )
    return dlora_a


def lowrank_up(
    compute_type: str,
    base: Tensor | None,
    h: Tensor,
    lora_b: Tensor,
    *,
    rank_scale: Tensor | None = None,
    core: Tensor | None = None,
    out_scale: Tensor | None = None,
    scaling: float = 1.0,
    y: Tensor | None = None,
    num_sms: int = 4,
) -> Tensor:
    """base [M, N], or [N] for a bias."""
    if y is None:
        y = torch.full((h.shape[0], lora_b.shape[0]), float("nan"), dtype=h.dtype)
    base_matrix = matrix(base)
    if base is not None and base.dim() == 1:
        base_matrix["row_stride"] = 0
    _simt.lowrank_up(
        compute_type,
        base_matrix,
        matrix(h),
        matrix(rank_scale),
        matrix(core),
        matrix(lora_b),
        matrix(out_scale),
        scaling,
        matrix(y),
        num_sms=num_sms,
    )
    return y


def lowrank_down_backward_x(
    compute_type: str,
    base: Tensor | None,
    dh: Tensor,
    lora_a: Tensor,
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    dx: Tensor | None = None,
    num_sms: int = 4,
) -> Tensor:
    if dx is None:
        dx = torch.full((dh.shape[0], lora_a.shape[1]), float("nan"), dtype=dh.dtype)
    _simt.lowrank_down_backward_x(
        compute_type,
        matrix(base),
        matrix(dh),
        matrix(lora_a),
        **threshold_and_seed(dropout_p, seed),
        dx=matrix(dx),
        num_sms=num_sms,
    )
    return dx


def lowrank_mid_backward(
    compute_type: str,
    g: Tensor,
    h: Tensor | None,
    *,
    rank_scale: Tensor | None = None,
    core: Tensor | None = None,
    need: tuple[str, ...],
    gradient_dtype: torch.dtype | None = None,
    num_sms: int = 4,
) -> dict[str, Tensor]:
    """What is needed of dh, dcore and drank_scale, from g [splits, M, r]."""
    num_splits, num_rows, rank = g.shape
    gradient_dtype = gradient_dtype or DTYPES[compute_type]
    nan = float("nan")
    results = {
        "dh": torch.full((num_rows, rank), nan, dtype=DTYPES[compute_type]),
        "dcore": torch.full((rank, rank), nan, dtype=gradient_dtype),
        "drank_scale": torch.full((rank,), nan, dtype=gradient_dtype),
    }
    wanted = {name: results[name] if name in need else None for name in results}
    _simt.lowrank_mid_backward(
        compute_type,
        g.data_ptr(),
        num_splits,
        matrix(h),
        matrix(rank_scale),
        matrix(core),
        num_rows,
        rank,
        *(matrix(tensor) for tensor in wanted.values()),
        num_sms=num_sms,
    )
    return {name: results[name] for name in need}


def order_slots(
    ids: Tensor,
    num_groups: int,
    *,
    extra_groups: bool = False,
    need_positions: bool = True,
    num_sms: int = 4,
) -> dict[str, Tensor]:
    """sorted_slots, offsets and, if needed, positions."""
    num_keys = num_groups + 2 * extra_groups
    results = {
        "sorted_slots": torch.full_like(ids, -7),
        "offsets": torch.full((num_keys + 1,), -7),
        "positions": torch.full_like(ids, -7),
    }
    if not need_positions:
        del results["positions"]
    _simt.order_slots(
        ids.data_ptr(),
        ids.numel(),
        num_groups,
        extra_groups=extra_groups,
        **{
            name: results[name].data_ptr() if name in results else 0
            for name in ("sorted_slots", "offsets", "positions")
        },
        num_sms=num_sms,
    )
    return results
