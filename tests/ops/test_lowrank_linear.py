"""lowrank_linear: its weight and bias, and how it takes the place of F.linear."""

import pytest
import torch
from devices import DtypePair
from lowrank_cases import (
    FP32,
    FP64,
    OPTIONAL,
    assert_raises_alike,
    assert_same_bits,
    call,
    make_tensors,
    on_device,
    present,
    seed_tensor,
)

from lowrank_ext import ops

OP = "lowrank_linear"


@pytest.mark.simt
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_zero_branch_is_exactly_the_linear(device: str, dtypes: DtypePair, p: float) -> None:
    tensors = make_tensors(OP, (9,), 33, 17, 4, dtypes, device, bias=False)
    if p < 1:
        tensors["lora_b"].zero_()
    y = call(ops, OP, tensors, dropout_p=p, seed=seed_tensor(0, device))
    linear = torch.nn.functional.linear(tensors["x"], tensors["weight"])
    assert_same_bits(y, linear, "y of a zero branch")


# Autocast: RF-14


@pytest.mark.simt
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(device: str, low: torch.dtype) -> None:
    x = torch.tensor([[1.00390625]], device=device, requires_grad=True)
    weight, lora_a, lora_b = (torch.ones(1, 1, device=device, requires_grad=True) for _ in range(3))
    with torch.autocast(device, low):
        y = ops.lowrank_linear(x, weight, None, lora_a, lora_b)
    assert y.dtype == low
    expected = {torch.bfloat16: 2.0, torch.float16: 2.0078125}[low]
    assert y.item() == expected
    y.sum().backward()
    for tensor in (x, weight, lora_a, lora_b):
        assert tensor.grad.dtype == torch.float32
    assert lora_a.grad.item() == lora_b.grad.item() == expected / 2
    outside = ops.lowrank_linear(x, weight, None, lora_a, lora_b)
    assert outside.dtype == torch.float32 and outside.item() == 2.0078125


@pytest.mark.simt
def test_autocast_follows_linear(device: str) -> None:
    """Everything that F.linear accepts under autocast: mixed inputs, fp64, a disabled region."""
    tensors = make_tensors(OP, (5,), 8, 6, 2, FP32, device, optional=OPTIONAL)
    half = {name: None if t is None else t.bfloat16() for name, t in tensors.items()}
    with torch.autocast(device, torch.bfloat16):
        for name in present(tensors):
            assert call(ops, OP, tensors | {name: half[name]}).dtype == torch.bfloat16
        with torch.autocast(device, enabled=False):
            assert call(ops, OP, tensors).dtype == torch.float32
    wide = make_tensors(OP, (5,), 8, 6, 2, FP64, device)
    with torch.autocast(device, torch.bfloat16):
        assert call(ops, OP, wide).dtype == torch.float64


@pytest.mark.simt
def test_half_base_with_fp32_adapters_needs_no_autocast(device: str) -> None:
    one = torch.ones(1, 1, device=device)
    x = torch.tensor([[1.00390625]], device=device)
    lora_a, lora_b = one.clone().requires_grad_(), one.clone().requires_grad_()
    y = ops.lowrank_linear(x.bfloat16(), one.bfloat16(), None, lora_a, lora_b)
    assert y.dtype == torch.bfloat16 and y.item() == 2.0
    y.sum().backward()
    assert lora_a.grad.dtype == lora_b.grad.dtype == torch.float32
    assert lora_a.grad.item() == lora_b.grad.item() == 1.0


# name of the case: (changed arguments, what the message must say)
WRONG: dict[str, tuple[dict[str, object], str]] = {
    "x too narrow": ({"x": torch.ones(3, 7)}, r"x must .*8.*got \[3, 7\]"),
    "weight 1-D": ({"weight": torch.ones(6)}, r"weight must .*got \[6\]"),
    "weight too narrow": ({"weight": torch.ones(6, 7)}, r"x must .*7.*got \[3, 8\]"),
    "weight dtype": ({"weight": torch.ones(6, 8).bfloat16()}, "weight must .*"),
    "bias too long": ({"bias": torch.ones(7)}, r"bias must .*6.*got \[7\]"),
    "bias 2-D": ({"bias": torch.ones(1, 6)}, r"bias must .*6.*got \[1, 6\]"),
    "bias dtype": ({"bias": torch.ones(6).double()}, "bias must .*"),
}


@pytest.mark.simt
@pytest.mark.parametrize("case", WRONG)
def test_wrong_argument(device: str, case: str) -> None:
    changes, message = WRONG[case]
    assert_raises_alike(
        OP, make_tensors(OP, (3,), 8, 6, 2, FP32, device), on_device(changes, device), message
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_weight_on_another_device() -> None:
    """RF-11 on one GPU: the message names both devices."""
    tensors = make_tensors(OP, (3,), 8, 6, 2, FP32, "cuda")
    tensors["weight"] = tensors["weight"].cpu()
    with pytest.raises(RuntimeError, match=r"(?s)(cpu.*cuda|cuda.*cpu)"):
        call(ops, OP, tensors)
