"""Calls of adapted modules: x by any name, further arguments to the base, as from PEFT's layers."""

import contextlib
import copy
from pathlib import Path

import pytest
import torch
from module_cases import ALL_METHODS, IN, OUT, RANK, Conv1D, Method, branch, conv1d, randomize
from torch import Tensor, nn

import lowrank_ext as lr
from lowrank_ext.nn import LoRALinear, MultiLoRALinear

peft = pytest.importorskip("peft")


class ScaledLinear(nn.Linear):
    """A linear whose caller gives more than its input."""

    def forward(self, hidden: Tensor, scale: float = 1.0, *, shift: float = 0.0) -> Tensor:
        return scale * super().forward(hidden) + shift


class ScaledModel(nn.Module):
    """Two blocks, one chain, of which each call gives more than x."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"q_proj": ScaledLinear(8, 8)}) for _ in range(2))

    def forward(self, x: Tensor, by_name: bool = False) -> Tensor:
        for layer in self.layers:
            proj = layer["q_proj"]
            x = proj(hidden=x, scale=3.0, shift=2.0) if by_name else proj(x, 3.0, shift=2.0)
        return x


WITHOUT_SVD = [m for m in ALL_METHODS if m.init not in m.module.svd_inits]
by_method = pytest.mark.parametrize("method", WITHOUT_SVD, ids=str)
CALLS = {
    "positions": lambda f, x: f(x, 2.0),
    "position and keyword": lambda f, x: f(x, scale=2.0, shift=1.0),
    "keywords": lambda f, x: f(hidden=x, scale=2.0, shift=1.0),
    "own name": lambda f, x: f(hidden=x),
}
by_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def adapted(method: Method, base: nn.Module, **options):
    options = {"r": RANK, "init": method.init, **method.options(RANK), **options}
    module = method.module.from_linear(base, **options)
    randomize(module)
    return module


@by_call
@by_method
def test_the_base_gets_all_arguments(method: Method, call) -> None:
    base = ScaledLinear(IN, OUT)
    module = adapted(method, base)
    x = torch.randn(2, 5, IN)
    expected = (call(base, x).double() + branch(module, x)).float()
    torch.testing.assert_close(call(module, x), expected, rtol=1e-4, atol=1e-4)


@by_method
def test_the_base_gets_all_arguments_inside_chains_blocks_and_masks(method: Method) -> None:
    """Also where ResLoRA's states and Basis LoRA's masks come in."""
    model = ScaledModel()
    masks = {"coef_dropout": 0.5} if method.config is lr.BasisLoRAConfig else {}
    options = {"r": 2, "init": method.init, **method.options(2), **masks}
    lr.adapt(model, method.config(**options, target_modules=["q_proj"]))
    randomize(model)
    plain = copy.deepcopy(model)
    for layer in plain.layers:  # the same without arguments: they are put into the base
        layer["q_proj"].base_layer.forward = lambda x, own=layer["q_proj"].base_layer: (
            ScaledLinear.forward(own, x, 3.0, shift=2.0)
        )
    x = torch.randn(2, 4, 8)
    outputs = []
    for run in (model, lambda x: model(x, by_name=True), lambda x: stepwise(plain, x)):
        torch.manual_seed(5)
        outputs.append(run(x))
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[0], outputs[2])


def stepwise(model: ScaledModel, x: Tensor) -> Tensor:
    chained = isinstance(model.lowrank_config, lr.ResLoRAConfig)
    with lr.reslora_call(model) if chained else contextlib.nullcontext():
        for layer in model.layers:
            x = layer["q_proj"](x)
    return x


@by_method
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("make", [lambda: nn.Linear(IN, OUT), conv1d], ids=["linear", "conv1d"])
def test_a_plain_base_takes_x_by_name_and_nothing_else(method: Method, merged: bool, make) -> None:
    base = make()
    name = "x" if isinstance(base, Conv1D) else "input"
    module = adapted(method, base)
    if merged and not method.module.unmergeable_because:
        module.merge()
    x = torch.randn(3, IN)
    assert torch.equal(module(**{name: x}), module(x)) and torch.equal(module(x=x), module(x))
    owner = type(module).__name__
    with pytest.raises(TypeError, match=rf"{owner}\.forward: {name} must be given, got none"):
        module()
    for args, kwargs, got in (((x, 2.0), {}, "float"), ((x,), {"scale": 2.0}, "scale")):
        with pytest.raises(TypeError, match=rf"{owner}\.forward: {name} must be the only .*{got}"):
            module(*args, **kwargs)


def test_many_adapters_in_one_module() -> None:
    x, ids = torch.randn(2, 5, IN), torch.tensor([[0] * 5, [-1] * 5])
    lora_a, lora_b = torch.randn(2, IN), torch.randn(OUT, 2)
    for base in (nn.Linear(IN, OUT), ScaledLinear(IN, OUT)):
        layer = MultiLoRALinear.from_linear(base)
        layer.add("a", lora_a, lora_b, 1.0)
        name = layer.input_name
        assert name == ("hidden" if isinstance(base, ScaledLinear) else "input")
        expected = layer(x, ids)
        assert torch.equal(layer(**{name: x}, adapter_ids=ids), expected)
        assert torch.equal(layer(x, adapter_ids=ids), expected)
    expected = 2 * base(x) + 1
    expected[0] += x[0] @ lora_a.t() @ lora_b.t()
    torch.testing.assert_close(layer(x, ids, 2.0, shift=1.0), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match=r"MultiLoRALinear\.forward: input must be the only"):
        MultiLoRALinear.from_linear(nn.Linear(IN, OUT))(x, adapter_ids=ids, scale=2.0)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_bank_passes_arguments_on(by_name: bool, tmp_path: Path) -> None:
    base = ScaledModel()
    whole = lr.adapt(copy.deepcopy(base), lr.LoRAConfig(r=2, target_modules=["q_proj"]))
    randomize(whole)
    lr.save_adapter(whole, tmp_path)
    x = torch.randn(2, 4, 8)
    expected = torch.cat([whole(x)[:1], base(x)[1:]])
    bank = lr.AdapterBank(base)
    bank.load("a", tmp_path)
    with bank.rows(["a", None]):
        torch.testing.assert_close(base(x, by_name), expected)


@by_call
def test_accelerated_layers_do_as_pefts(call) -> None:
    model = peft.get_peft_model(
        nn.ModuleDict({"proj": ScaledLinear(IN, OUT)}),
        peft.LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False),
    )
    layer = model.base_model.model["proj"]
    x = torch.randn(2, 5, IN)
    results = []
    for _ in range(2):
        try:
            results.append(call(layer, x))
        except TypeError as error:
            results.append(str(error).partition(".")[2])
        lr.accelerate(model)
    if isinstance(results[0], str):  # PEFT's layers take x as the first argument only
        assert "positional argument: 'x'" in results[0] and results[0] == results[1]
    else:
        torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("make", [LoRALinear.from_linear, MultiLoRALinear.from_linear])
def test_the_input_can_have_dynamic_shapes(make) -> None:
    """torch.export maps them by the arguments of forward."""
    layer, rows = make(nn.Linear(6, 4)), torch.export.Dim("rows")
    program = torch.export.export(layer, (torch.randn(3, 6),), dynamic_shapes=({0: rows},))
    assert program.module()(torch.randn(5, 6)).shape == (5, 4)
