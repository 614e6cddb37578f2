"""lowrank_add: its base_out, the output of any base module."""

import pytest
import torch
from devices import DtypePair
from lowrank_cases import (
    FP32,
    OPTIONAL,
    assert_raises_alike,
    assert_same_bits,
    assert_same_values,
    call,
    evaluate,
    make_dout,
    make_tensors,
    on_device,
    seed_tensor,
)

from lowrank_ext import ops

OP = "lowrank_add"


@pytest.mark.simt
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_equals_lowrank_linear(device: str, dtypes: DtypePair, dropout_p: float) -> None:
    """With base_out = x weightᵀ + bias, on integers, both ops are the same function."""
    shape = ((9,), 24, 18, 4, dtypes, device)
    linear = make_tensors("lowrank_linear", *shape, optional=OPTIONAL, integers=True)
    dout = make_dout(linear, integers=True)
    options = {"scaling": 0.5, "dropout_p": dropout_p, "seed": seed_tensor(4, device)}
    expected = evaluate(ops, "lowrank_linear", linear, dout, **options)
    base_out = torch.nn.functional.linear(linear["x"], linear["weight"], linear["bias"])
    needs = ["base_out", "x", "lora_a", "lora_b", *OPTIONAL]
    got = evaluate(ops, OP, linear | {"base_out": base_out}, dout, needs, **options)
    got["dx"] = got["dx"] + dout @ linear["weight"]
    del got["dbase_out"], expected["dweight"], expected["dbias"]
    assert_same_values(got, {name: expected[name] for name in got})


@pytest.mark.simt
@pytest.mark.parametrize("dropout_p", [0.0, 1.0])
@pytest.mark.parametrize("lead", [(0,), (4,)])
def test_zero_branch_is_a_copy_of_base_out(
    device: str, dtypes: DtypePair, lead: tuple[int, ...], dropout_p: float
) -> None:
    """Bit for bit, and in memory of its own."""
    tensors = make_tensors(OP, lead, 33, 17, 4, dtypes, device)
    if dropout_p == 0:
        tensors["lora_b"].zero_()
    before = tensors["base_out"].clone()
    y = call(ops, OP, tensors, dropout_p=dropout_p, seed=seed_tensor(0, device))
    assert_same_bits(y, before, "y of a zero branch")
    y.fill_(torch.nan)
    assert_same_bits(tensors["base_out"], before, "base_out shares memory with y")


@pytest.mark.simt
def test_gradient_of_base_out_is_dout(device: str, dtypes: DtypePair) -> None:
    tensors = make_tensors(OP, (3, 11), 65, 43, 5, dtypes, device, optional=OPTIONAL)
    dout = make_dout(tensors)
    got = evaluate(ops, OP, tensors, dout, dropout_p=0.5, seed=seed_tensor(7, device))
    assert_same_bits(got["dbase_out"], dout, "the gradient of base_out")


@pytest.mark.simt
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(device: str, low: torch.dtype) -> None:
    """RF-14, for base_out still in fp32 and for one that the base module already made half."""
    x = torch.tensor([[1.00390625]], device=device, requires_grad=True)
    lora_a, lora_b = (torch.ones(1, 1, device=device, requires_grad=True) for _ in range(2))
    expected = {torch.bfloat16: 2.0, torch.float16: 2.0078125}[low]
    for base_out in (x.detach(), x.detach().to(low)):
        with torch.autocast(device, low):
            y = ops.lowrank_add(base_out, x, lora_a, lora_b)
        assert y.dtype == low and y.item() == expected
        grads = torch.autograd.grad(y.sum(), (x, lora_a, lora_b))
        assert {grad.dtype for grad in grads} == {torch.float32}
        assert grads[1].item() == grads[2].item() == expected / 2


# name of the case: (changed arguments, what the message must say)
WRONG: dict[str, tuple[dict[str, object], str]] = {
    "base_out too wide": ({"base_out": torch.ones(3, 7)}, r"lora_b must .*7.*got \[6, 2\]"),
    "base_out of other rows": ({"base_out": torch.ones(4, 6)}, r"base_out must .*got \[4, 6\]"),
    "base_out flattened": ({"base_out": torch.ones(18)}, r"base_out must .*got \[18\]"),
    "base_out dtype": ({"base_out": torch.ones(3, 6).bfloat16()}, "base_out must .*bfloat16"),
    "x too narrow": ({"x": torch.ones(3, 7)}, r"lora_a must .*7.*got \[2, 8\]"),
}


@pytest.mark.simt
@pytest.mark.parametrize("case", WRONG)
def test_wrong_argument(device: str, case: str) -> None:
    changes, message = WRONG[case]
    assert_raises_alike(
        OP, make_tensors(OP, (3,), 8, 6, 2, FP32, device), on_device(changes, device), message
    )
