"""Accelerated PEFT layers under torch's transforms, and unusual weights and inputs: as in PEFT."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from transform_cases import TRANSFORMS, assert_same

import lowrank_ext as lr

peft = pytest.importorskip("peft")
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
IN, OUT, RANK = 6, 5, 2

BASES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(IN, OUT),
    "conv1d": lambda: Conv1D(OUT, IN),
}
every_base = pytest.mark.parametrize("base", BASES)


def peft_model(base: str, adapters: int = 1, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=3, target_modules=["0"], fan_in_fan_out=base == "conv1d"
    )
    model = peft.get_peft_model(nn.Sequential(BASES[base]()), config, "first")
    for name in ("second", "third")[: adapters - 1]:
        model.add_adapter(name, config)
    model.base_model.set_adapter(["first", "second", "third"][:adapters])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    return model.to(dtype).eval()


def layer_of(model: nn.Module) -> nn.Module:
    return model.base_model.model[0]


def pair(*args: Any, **kwargs: Any) -> tuple[nn.Module, nn.Module]:
    """A layer of PEFT, and the same accelerated."""
    model = peft_model(*args, **kwargs)
    plain = copy.deepcopy(model)
    lr.accelerate(model)
    return layer_of(plain), layer_of(model)


def as_function(layer: nn.Module, names: list[str], **options: Any) -> Callable[..., Tensor]:
    def run(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, values, strict=True)), (x,), options)

    return run


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("adapters", [1, 2])
@every_base
def test_layer_as_pefts(base: str, adapters: int, transform: str) -> None:
    plain, layer = pair(base, adapters)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    x = torch.randn(4, IN, dtype=torch.float64)
    tensors = [x, *(layer.get_parameter(name).detach() for name in names)]
    run = TRANSFORMS[transform]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "accelerate: ")  # nothing runs through PEFT's forward
        got = run(as_function(layer, names), tensors)
    assert_same(got, run(as_function(plain, names), tensors))


@pytest.mark.parametrize("transform", ["jvp", "grad", "vjp", "double_backward"])
def test_adapter_names_as_pefts(transform: str) -> None:
    plain, layer = pair("linear", 2)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    rows = {"adapter_names": ["first", "second", "__base__", "second"]}
    x = torch.randn(4, 3, IN, dtype=torch.float64)
    tensors = [x, *(layer.get_parameter(name).detach() for name in names)]
    run = TRANSFORMS[transform]
    got = run(as_function(layer, names, **rows), tensors)
    assert_same(got, run(as_function(plain, names, **rows), tensors))


@every_base
def test_weights_that_are_plain_tensors(base: str) -> None:
    """RF-41: functional_call puts Tensors where Parameters were; FSDP1 removes the Parameters."""
    plain, layer = pair(base)
    x = torch.randn(4, IN, dtype=torch.float64)
    expected = plain(x)
    held = {name: p.detach().clone() for name, p in layer.named_parameters()}
    torch.testing.assert_close(functional_call(layer, held, (x,)), expected)
    for name, tensor in held.items():
        owner = layer.get_submodule(name.rpartition(".")[0])
        delattr(owner, "weight" if name.endswith("weight") else "bias")
        setattr(owner, "weight" if name.endswith("weight") else "bias", tensor)
    torch.testing.assert_close(layer(x), expected)


@every_base
def test_under_fsdp1(base: str, tmp_path: Any) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    if torch.distributed.is_initialized():
        pytest.skip("needs torch.distributed with no group of its own yet")
    plain, layer = pair(base, dtype=torch.float32)
    x = torch.randn(4, IN)
    expected = plain(x)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = FullyShardedDataParallel(
                layer, device_id=torch.device("cpu"), use_orig_params=True
            )
            y = wrapped(x)
            y.sum().backward()
        torch.testing.assert_close(y, expected)
        assert any(p.grad is not None for p in wrapped.parameters())
    finally:
        torch.distributed.destroy_process_group()


# Inputs that the ops do not have: as PEFT, or PEFT's error (RF-42)


def jagged() -> Tensor:
    parts = [torch.randn(n, IN) for n in (2, 3)]
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


INPUTS: dict[str, Callable[[], Tensor]] = {
    "meta": lambda: torch.randn(4, IN, device="meta"),
    "jagged": jagged,
    "nested": lambda: torch.nested.nested_tensor([torch.randn(n, IN) for n in (2, 3)]),
    "coo": lambda: torch.randn(4, IN).relu().to_sparse(),
    "csr": lambda: torch.randn(4, IN).relu().to_sparse_csr(),
}


def result(layer: nn.Module, x: Tensor, autocast: bool = False) -> Any:
    """The output's class, layout, shape and values, or the class of the error."""
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return type(error)
    if y.is_nested:
        return [t.detach() for t in y.unbind()], y.layout
    return (y.shape, y.device) if y.is_meta else (y.detach().to_dense(), y.layout)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_unusual_inputs_as_in_peft(kind: str, autocast: bool) -> None:
    plain, layer = pair("linear", dtype=torch.float32)
    if kind == "meta":
        plain, layer = plain.to("meta"), layer.to("meta")
    x = INPUTS[kind]()
    got, expected = result(layer, x, autocast), result(plain, x, autocast)
    if isinstance(expected, type) or kind == "meta":
        assert got == expected
    else:
        torch.testing.assert_close(got[0], expected[0])
        assert got[1] == expected[1]
    if kind in ("meta", "jagged", "coo"):
        assert not isinstance(result(layer, x), type)


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.filterwarnings("ignore")
def test_unusual_inputs_of_our_modules(kind: str) -> None:
    """The right value, or an error."""
    layer = lr.nn.LoRALinear.from_linear(nn.Linear(IN, OUT), r=RANK)
    nn.init.normal_(layer.lora_b)
    if kind == "meta":
        assert layer.to("meta")(INPUTS[kind]()).shape == (4, OUT)
        return
    x = INPUTS[kind]()
    with pytest.raises((RuntimeError, NotImplementedError), match=r"lowrank_linear|must be|nested"):
        layer(x)


# What is shown (RF-43)


@every_base
def test_repr_and_status_are_pefts(base: str) -> None:
    plain = peft_model(base)
    model = copy.deepcopy(plain)
    lr.accelerate(model)
    assert repr(model) == repr(plain)
    assert str(layer_of(model)).startswith("lora.Linear(")
    for status in (peft.get_layer_status, peft.get_model_status):
        assert status(model) == status(plain)


def test_counted_flops() -> None:
    plain, layer = pair("linear")
    x = torch.randn(4, IN, dtype=torch.float64, requires_grad=True)
    counts = []
    for module in (plain, layer):
        with FlopCounterMode(display=False) as counter:
            module(x).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_a_changed_scaling_does_not_compile_again() -> None:
    """RF-34."""
    _, layer = pair("linear", dtype=torch.float32)
    x = torch.randn(4, IN)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for scaling in (2.0, 0.5, 1 / 3, 8.0, 1.0, 0.1, 3.0, 1e-3):
        layer.scaling["first"] = scaling
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
