"""LoRA of embeddings and convolutions: beside PEFT's layers, and what all our modules keep."""

import copy
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

pytest.importorskip("peft")

import peft

import lowrank_ext as lr
from lowrank_ext.methods.lora.config import LoRAConfig
from lowrank_ext.nn import LoRAConv, LoRAEmbedding, LoRALinear, LowRankLinear
from lowrank_ext.nn.token_rows import TokenRows

Dtype = torch.dtype
RANK, SCALING = 3, 2.0
K, N = 11, 6


class ScaledEmbedding(nn.Embedding):
    """As of Gemma 3: the forward scales the rows."""

    def __init__(self, scale: float | Tensor, **options: Any) -> None:
        super().__init__(K, N, **options)
        if isinstance(scale, Tensor):
            self.register_buffer("embed_scale", scale)
        else:
            self.embed_scale = scale

    def forward(self, input: Tensor) -> Tensor:
        scale = self.embed_scale
        rows = super().forward(input)
        return rows * (scale.to(rows.dtype) if isinstance(scale, Tensor) else scale)


def observed(module: nn.Module) -> nn.Module:
    """A module with a hook that only looks at its output."""
    module.register_forward_hook(lambda module, args, output: None)
    return module


def ids(dtype: Dtype) -> Tensor:
    return torch.tensor([[0, 3, 3, 10], [5, 2, 3, 0]])


def image(*shape: int) -> Callable[[Dtype], Tensor]:
    return lambda dtype: torch.randn(shape, dtype=torch.float64).to(dtype)


def channels_last(*shape: int) -> Callable[[Dtype], Tensor]:
    return lambda dtype: image(*shape)(dtype).contiguous(memory_format=torch.channels_last)


class Case(NamedTuple):
    base: Callable[[Dtype], nn.Module]
    input: Callable[[Dtype], Tensor]
    in_peft: bool = True  # whether PEFT's branch has the base's settings


CASES = {
    "embedding": Case(lambda dtype: nn.Embedding(K, N, dtype=dtype), ids),
    "one id": Case(lambda dtype: nn.Embedding(K, N, dtype=dtype), lambda dtype: torch.tensor(4)),
    "no ids": Case(lambda dtype: nn.Embedding(K, N, dtype=dtype), lambda dtype: ids(dtype)[:0]),
    "int32": Case(lambda dtype: nn.Embedding(K, N, dtype=dtype), lambda dtype: ids(dtype).int()),
    "padding_idx": Case(lambda dtype: nn.Embedding(K, N, padding_idx=3, dtype=dtype), ids),
    "by frequency": Case(
        lambda dtype: nn.Embedding(K, N, scale_grad_by_freq=True, dtype=dtype), ids
    ),
    "scaled": Case(lambda dtype: ScaledEmbedding(2.5, dtype=dtype), ids),
    "scaled by a buffer": Case(
        lambda dtype: ScaledEmbedding(torch.tensor(2.5, dtype=dtype), dtype=dtype), ids
    ),
    "observed embedding": Case(lambda dtype: observed(nn.Embedding(K, N, dtype=dtype)), ids),
    "Conv1d": Case(lambda dtype: nn.Conv1d(4, 5, 3, padding=1, dtype=dtype), image(2, 4, 9)),
    "no batch": Case(lambda dtype: nn.Conv1d(4, 5, 3, stride=2, dtype=dtype), image(4, 9)),
    "Conv1d of size 1": Case(lambda dtype: nn.Conv1d(4, 5, 1, dtype=dtype), image(2, 4, 9)),
    "Conv2d": Case(
        lambda dtype: nn.Conv2d(4, 5, (3, 2), stride=(2, 1), padding=(1, 0), dtype=dtype),
        image(2, 4, 6, 5),
    ),
    "same": Case(lambda dtype: nn.Conv2d(4, 5, 3, padding="same", dtype=dtype), image(2, 4, 6, 5)),
    "no bias": Case(lambda dtype: nn.Conv2d(4, 5, 3, bias=False, dtype=dtype), image(2, 4, 6, 5)),
    "channels last": Case(lambda dtype: nn.Conv2d(4, 5, 3, dtype=dtype), channels_last(2, 4, 6, 5)),
    "size 1": Case(lambda dtype: nn.Conv2d(4, 5, 1, dtype=dtype), image(2, 4, 6, 5)),
    "size 1, one image": Case(lambda dtype: nn.Conv2d(4, 5, 1, dtype=dtype), image(4, 6, 5)),
    "size 1, channels last": Case(
        lambda dtype: nn.Conv2d(4, 5, 1, padding="valid", dtype=dtype), channels_last(2, 4, 6, 5)
    ),
    "size 1, no images": Case(lambda dtype: nn.Conv2d(4, 5, 1, dtype=dtype), image(0, 4, 6, 5)),
    "size 1, strides": Case(lambda dtype: nn.Conv2d(4, 5, 1, 2, dtype=dtype), image(2, 4, 6, 5)),
    "size 1, padding": Case(
        lambda dtype: nn.Conv2d(4, 5, 1, padding=1, dtype=dtype), image(2, 4, 6, 5)
    ),
    "size 1, observed": Case(
        lambda dtype: observed(nn.Conv2d(4, 5, 1, dtype=dtype)), image(2, 4, 6, 5)
    ),
    "observed": Case(lambda dtype: observed(nn.Conv2d(4, 5, 3, dtype=dtype)), image(2, 4, 6, 5)),
    "Conv3d": Case(lambda dtype: nn.Conv3d(2, 5, 2, dtype=dtype), image(2, 2, 3, 4, 3)),
    "Conv3d of size 1": Case(lambda dtype: nn.Conv3d(2, 5, 1, dtype=dtype), image(2, 2, 3, 4, 3)),
    "dilation": Case(
        lambda dtype: nn.Conv2d(4, 5, 3, padding=2, dilation=2, dtype=dtype),
        image(2, 4, 6, 5),
        in_peft=False,
    ),
    "circular": Case(
        lambda dtype: nn.Conv2d(4, 5, 3, padding=1, padding_mode="circular", dtype=dtype),
        image(2, 4, 6, 5),
        in_peft=False,
    ),
    "reflected, observed": Case(
        lambda dtype: observed(nn.Conv1d(4, 5, 3, padding=2, padding_mode="reflect", dtype=dtype)),
        image(2, 4, 9),
        in_peft=False,
    ),
}
IN_PEFT = [name for name, case in CASES.items() if case.in_peft]


def class_over(base: nn.Module) -> type[LowRankLinear]:
    return LoRAEmbedding if isinstance(base, nn.Embedding) else LoRAConv


def adapter_over(base: nn.Module, **options: Any) -> LowRankLinear:
    """An adapter of order one, that no init gives."""
    options = {"r": RANK, "alpha": SCALING * RANK, **options}
    module = class_over(base).from_linear(base, **options)
    with torch.no_grad():
        module.lora_a.copy_(torch.randn(module.lora_a.shape) / math.sqrt(4))
        module.lora_b.copy_(torch.randn(module.lora_b.shape) / math.sqrt(RANK))
    return module


def with_branch(base: nn.Module, module: LowRankLinear) -> nn.Module:
    """The definition: a base in fp64 with W + scaling · lora_b lora_a; differentiable in both."""
    wide = copy.deepcopy(base).double()
    weight = wide.weight.detach()
    delta = module.scaling * module.lora_b.double() @ module.lora_a.double()
    delta = delta.t() if isinstance(base, nn.Embedding) else delta.view(weight.shape)
    del wide._parameters["weight"]
    wide.weight = weight + delta
    return wide


class Holder(nn.Module):
    """A model of one module."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x)


def in_peft(base: nn.Module, **options: Any) -> tuple[nn.Module, Tensor, Tensor]:
    """The model in PEFT, and the two projections."""
    options = {"r": RANK, "lora_alpha": SCALING * RANK, "target_modules": ["base"], **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Holder(base), peft.LoraConfig(**options))
    layer = model.base_model.model.base
    if isinstance(base, nn.Embedding):
        return model, layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    return model, layer.lora_A["default"].weight, layer.lora_B["default"].weight


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_the_definitions(name: str) -> None:
    base, x = CASES[name].base(torch.float64), CASES[name].input(torch.float64)
    copied = copy.deepcopy(base)
    module = adapter_over(base)
    x = x.requires_grad_() if x.is_floating_point() else x
    trained = [module.lora_a, module.lora_b, *([x] if x.requires_grad else [])]
    y, expected = module(x), with_branch(copied, module)(x)
    torch.testing.assert_close(y, expected)
    if name in (
        "padding_idx",
        "by frequency",
    ):  # those change gradients of lora_a alone, as in PEFT
        return
    dy = torch.randn_like(y)
    for ours, theirs in zip(
        torch.autograd.grad(y, trained, dy),
        torch.autograd.grad(expected, trained, dy),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    assert base.weight.grad is None and not base.weight.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", IN_PEFT)
def test_values_and_gradients_are_pefts(name: str, dtype: Dtype) -> None:
    base, x = CASES[name].base(dtype), CASES[name].input(dtype)
    reference, lora_a, lora_b = in_peft(copy.deepcopy(base))
    module = adapter_over(base)
    with torch.no_grad():
        lora_a.copy_(module.lora_a.view(lora_a.shape))
        lora_b.copy_(module.lora_b.view(lora_b.shape))
    y, expected = module(x), reference(x)
    # Three times the rounding of a sum of K products in the base's dtype.
    tolerance = {"rtol": 0.0, "atol": 12 * torch.finfo(dtype).eps}
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(y / scale, expected / scale, **tolerance)
    assert y.dtype == expected.dtype and y.shape == expected.shape
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, [module.lora_a, module.lora_b], dy)
    for own, theirs in zip(ours, torch.autograd.grad(expected, [lora_a, lora_b], dy), strict=True):
        assert own.dtype == theirs.dtype
        scale = max(1.0, theirs.abs().max().item())
        torch.testing.assert_close(own / scale, theirs.reshape(own.shape) / scale, **tolerance)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
@pytest.mark.parametrize("name", ["embedding", "Conv1d", "Conv2d", "size 1", "Conv3d"])
def test_the_seed_gives_pefts_start(name: str, init: str) -> None:
    base = CASES[name].base(torch.float32)
    torch.manual_seed(3)
    _, lora_a, lora_b = in_peft(
        copy.deepcopy(base), init_lora_weights=True if init == "kaiming" else init
    )
    after = torch.rand(1)
    torch.manual_seed(3)
    module = class_over(base).from_linear(base, r=RANK, init=init)
    assert torch.equal(module.lora_a, lora_a.flatten(1))
    assert torch.equal(module.lora_b, lora_b.flatten(1))
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize("name", CASES)
def test_starts_with_the_bases_bits(name: str) -> None:
    base, x = CASES[name].base(torch.float32), CASES[name].input(torch.float32)
    expected = base(x)
    y = class_over(base).from_linear(base, r=RANK)(x)
    # A convolution of size 1 is another product than torch's: the same numbers, not the same bits.
    if "size 1" in name:
        torch.testing.assert_close(y, expected)
    else:
        assert torch.equal(y, expected)
    assert y.stride() == expected.stride() or not y.numel()


@pytest.mark.parametrize("name", CASES)
def test_merges_rounds_once_and_unmerges_bit_for_bit(name: str) -> None:
    base, x = CASES[name].base(torch.float32), CASES[name].input(torch.float32)
    weight = base.weight.detach().clone()
    adapted = adapter_over(base)
    delta = with_branch(base, adapted).weight - weight.double()
    expected, y = weight + delta.float(), adapted(x)
    adapted.merge()
    assert torch.equal(base.weight, expected)
    torch.testing.assert_close(adapted.eval()(x), y, rtol=1e-4, atol=1e-4)
    adapted.unmerge()
    assert torch.equal(base.weight, weight)


@pytest.mark.parametrize("name", CASES)
def test_pissa_keeps_the_output_and_restores_the_base(name: str) -> None:
    base, x = CASES[name].base(torch.float64), CASES[name].input(torch.float64)
    expected, weight = base(x), base.weight.detach().clone()
    module = class_over(base).from_linear(base, r=2, init="pissa")
    assert not torch.allclose(base.weight, weight)
    torch.testing.assert_close(module(x), expected)
    module.blocks = 1  # as in a block of disable_adapter
    torch.testing.assert_close(module(x), expected)
    module.blocks = 0
    torch.testing.assert_close(module.to_linear(merge=False).weight.detach(), weight)


@pytest.mark.parametrize("name", CASES)
def test_the_plain_module_comes_back(name: str) -> None:
    base, x = CASES[name].base(torch.float32), CASES[name].input(torch.float32)
    expected, text = base(x), repr(base)
    plain = adapter_over(base).to_linear(merge=False)
    assert type(plain) is type(base) and repr(plain) == text
    assert plain.weight is base.weight
    assert torch.equal(plain(x), expected)


@pytest.mark.parametrize("name", CASES)
def test_copies_and_state_dicts(name: str) -> None:
    base, x = CASES[name].base(torch.float32), CASES[name].input(torch.float32)
    module = adapter_over(base)
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    state = module.state_dict()
    assert state.keys() == {*base.state_dict(), "lora_a", "lora_b"}
    other = class_over(base).from_linear(CASES[name].base(torch.float32), r=RANK, alpha=6)
    other.load_state_dict(state)
    assert torch.equal(other(x), module(x))
    module.merge()
    assert module.state_dict().keys() == base.state_dict().keys()
    plain = CASES[name].base(torch.float32)
    plain.load_state_dict(module.state_dict())


@pytest.mark.parametrize("name", ["embedding", "Conv1d", "Conv2d", "size 1", "channels last"])
def test_compiles_as_one_graph(name: str) -> None:
    base, x = CASES[name].base(torch.float32), CASES[name].input(torch.float32)
    module = adapter_over(base, dropout=0.25)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled.eval()(x), module.eval()(x))
    compiled.train()(x).square().sum().backward()
    assert module.lora_a.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["Conv1d", "Conv2d", "size 1", "size 1, observed", "Conv3d"])
def test_dropout_falls_on_the_branch_in_training_only(name: str) -> None:
    base, x = CASES[name].base(torch.float64), CASES[name].input(torch.float64)
    module = adapter_over(base, dropout=0.5).train()
    base_out, whole = module.base_output(x), module.eval()(x)
    torch.testing.assert_close(whole, with_branch(base, module)(x))
    module.train()
    torch.manual_seed(5)
    first = module(x)
    torch.manual_seed(5)
    assert torch.equal(module(x), first) and not torch.allclose(first, whole)
    mean = torch.stack([module(x) for _ in range(2000)]).mean(0)
    spread = (whole - base_out).abs().max()
    torch.testing.assert_close(mean, whole, rtol=0, atol=0.2 * spread.item())


def test_embeddings_have_no_dropout() -> None:
    """As in PEFT."""
    module = adapter_over(nn.Embedding(K, N), dropout=0.5)
    x = ids(torch.float32)
    assert torch.equal(module.train()(x), module.eval()(x))


def test_autocast_leaves_an_embedding_in_its_dtype() -> None:
    module, x = adapter_over(nn.Embedding(K, N)), ids(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert torch.equal(y, module(x)) and y.dtype == torch.float32


@pytest.mark.parametrize("name", ["Conv2d", "size 1"])
def test_autocast_of_a_convolution(name: str) -> None:
    base, x = CASES[name].base(torch.float32), CASES[name].input(torch.float32)
    module = adapter_over(base)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), module(x), rtol=0.05, atol=0.05)


def test_a_sparse_embedding_has_dense_gradients() -> None:
    """In PEFT the backward fails: it transposes a sparse gradient."""
    base, x = nn.Embedding(K, N, sparse=True), ids(torch.float32)
    dense = nn.Embedding(K, N, _weight=base.weight.detach().clone())
    module = adapter_over(base)
    other = LoRAEmbedding.from_linear(dense, r=RANK, alpha=6)
    with torch.no_grad():
        other.lora_a.copy_(module.lora_a), other.lora_b.copy_(module.lora_b)
    for each in (module, other):
        each(x).square().sum().backward()
    assert torch.equal(module.lora_a.grad, other.lora_a.grad)
    assert module.to_linear(merge=False).sparse


@pytest.mark.parametrize("saved_by", ["ours", "peft"])
@pytest.mark.parametrize("name", IN_PEFT)
def test_files_both_ways(name: str, saved_by: str, tmp_path: Path) -> None:
    case = CASES[name]
    base, x = case.base(torch.float64), case.input(torch.float64)
    config = LoRAConfig(r=RANK, alpha=6, target_modules=["base"])
    if saved_by == "peft":
        model, lora_a, lora_b = in_peft(copy.deepcopy(base))
        with torch.no_grad():
            lora_a.normal_(), lora_b.normal_()
        model.save_pretrained(tmp_path)
        other = lr.load_adapter(Holder(copy.deepcopy(base)), tmp_path)
    else:
        model = lr.adapt(Holder(copy.deepcopy(base)), config)
        with torch.no_grad():
            model.base.lora_a.normal_(), model.base.lora_b.normal_()
        lr.save_adapter(model, tmp_path)
        other = peft.PeftModel.from_pretrained(Holder(copy.deepcopy(base)), tmp_path)
    torch.testing.assert_close(other(x), model(x))
    again = lr.load_adapter(lr.adapt(Holder(copy.deepcopy(base)), config), tmp_path)
    torch.testing.assert_close(again(x), model(x))
    lr.save_adapter(again, tmp_path / "again")
    weights = "adapter_model.safetensors"
    first, second = load_file(tmp_path / weights), load_file(tmp_path / "again" / weights)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", [name for name in CASES if name not in IN_PEFT])
def test_files_that_peft_computes_otherwise_are_said(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base, x = case.base(torch.float64), case.input(torch.float64)
    model = lr.adapt(Holder(copy.deepcopy(base)), LoRAConfig(r=2, target_modules=["base"]))
    with torch.no_grad():
        model.base.lora_b.normal_()
    with pytest.warns(UserWarning, match="save_adapter: PEFT ignores dilation and padding"):
        lr.save_adapter(model, tmp_path)
    other = Holder(copy.deepcopy(base))
    with pytest.warns(UserWarning, match="load_adapter: PEFT ignores dilation .* here base"):
        lr.load_adapter(other, tmp_path)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("name", ["embedding", "scaled", "Conv1d", "Conv2d", "size 1"])
def test_a_pissa_file_and_an_exported_lora_are_plain(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    base, x = case.base(torch.float64), case.input(torch.float64)
    config = LoRAConfig(r=2, alpha=4, init="pissa", target_modules=["base"])
    model = lr.adapt(Holder(copy.deepcopy(base)), config)
    with torch.no_grad():
        model.base.lora_b.add_(torch.randn_like(model.base.lora_b))
    lr.save_adapter(model, tmp_path / "saved")
    lr.export_lora(model, tmp_path / "exported")
    for place in ("saved", "exported"):
        other = peft.PeftModel.from_pretrained(Holder(copy.deepcopy(base)), tmp_path / place)
        torch.testing.assert_close(other(x), model(x))
        ours = lr.load_adapter(Holder(copy.deepcopy(base)), tmp_path / place)
        torch.testing.assert_close(ours(x), model(x))
        assert ours.base.residual_taken == (place == "saved")


def test_exports_kernels_for_diffusers(tmp_path: Path) -> None:
    model = lr.adapt(Holder(nn.Conv2d(4, 5, 3)), LoRAConfig(r=2, target_modules=["base"]))
    lr.export_lora(model, tmp_path, format="diffusers", component="unet")
    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    shapes = {key: list(tensor.shape) for key, tensor in tensors.items()}
    assert shapes == {
        "unet.base.lora_A.weight": [2, 4, 3, 3],
        "unet.base.lora_B.weight": [5, 2, 1, 1],
    }


def test_pefts_own_pissa_over_an_embedding_is_refused(tmp_path: Path) -> None:
    """PEFT starts an embedding at zero and takes nothing out of its weight."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.linear = nn.Embedding(K, N), nn.Linear(N, N)

    targets = {"r": 2, "target_modules": ["embed", "linear"], "init_lora_weights": "pissa"}
    peft.get_peft_model(Both(), peft.LoraConfig(**targets)).save_pretrained(tmp_path)
    base = Both()
    with pytest.raises(ValueError, match=r"'pissa'.* is not supported over embed, an Embedding"):
        lr.load_adapter(base, tmp_path)
    assert not hasattr(base, "lowrank_config") and type(base.linear) is nn.Linear


def test_a_file_for_a_convolution_with_groups_is_refused(tmp_path: Path) -> None:
    """PEFT's branch is no part of the weight there."""
    base = nn.Conv2d(4, 4, 3, groups=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(Holder(base), peft.LoraConfig(r=2, target_modules=["base"]))
    model.save_pretrained(tmp_path)
    other = Holder(nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ValueError, match="load_adapter: base: LoRAConv: groups must be 1, got 2"):
        lr.load_adapter(other, tmp_path)
    assert type(other.base) is nn.Conv2d


REFUSED_BASES: dict[str, tuple[nn.Module, str]] = {
    "max_norm": (nn.Embedding(K, N, max_norm=1.0), r"max_norm must be None, .* got 1\.0"),
    "embed_scale": (ScaledEmbedding(torch.ones(2)), r"embed_scale must be one number, got \[2\]"),
    "groups": (nn.Conv2d(4, 4, 3, groups=2), "groups must be 1, got 2; .* exclude_modules"),
}


@pytest.mark.parametrize("case", REFUSED_BASES)
def test_settings_that_no_branch_follows_are_refused(case: str) -> None:
    base, message = REFUSED_BASES[case]
    model = Holder(base)
    with pytest.raises(ValueError, match=rf"^adapt: base: LoRA\w+: {message}"):
        lr.adapt(model, LoRAConfig(r=2, target_modules=["base"]))
    assert model.base is base and base.weight.requires_grad
    with pytest.raises(ValueError, match=message):
        class_over(base).from_linear(base, r=2)


class Shifted(nn.Embedding):
    """As of positions with an offset."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward((input + 2) % K)


class OfMasks(nn.Embedding):
    """As OPT's positions, which are counted from a mask."""

    def forward(self, attention_mask: Tensor, past: int = 0) -> Tensor:
        return super().forward(attention_mask.cumsum(1) - 1 + past)


class Doubled(nn.Embedding):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def other_lookups() -> dict[str, nn.Module]:
    hooked, patched = nn.Embedding(K, N), nn.Embedding(K, N)
    hooked.register_forward_pre_hook(lambda module, args: ((args[0] + 1) % K,))
    patched.forward = lambda ids: F.embedding(K - 1 - ids, patched.weight)  # type: ignore[method-assign]
    bart = BartLearnedPositionalEmbedding(K, N)
    opt = OPTLearnedPositionalEmbedding(K, N)
    even = Shifted(K, N)
    nn.init.ones_(even.weight)  # whose rows are equal now
    return {
        "shifted": Shifted(K, N),
        "equal rows": even,
        "masks": OfMasks(K, N),
        "doubled": Doubled(K, N),
        "hook before": hooked,
        "own forward": patched,
        "bart": bart,
        "opt": opt,
    }


@pytest.mark.parametrize("place", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", other_lookups())
def test_embeddings_that_look_up_other_rows_are_refused(
    case: str, dtype: Dtype, place: str
) -> None:
    """In bfloat16 and with small weights, too, where rows differ by little."""
    base = other_lookups()[case].to(dtype)
    base.weight.data.mul_(0.02)
    model = nn.Sequential(base.to(place))
    message = "base must return the rows of its weight at the ids of the call"
    with pytest.raises(ValueError, match=f"adapt: 0: LoRAEmbedding: {message}"):
        lr.adapt(model, lr.LoRAConfig(r=2, target_modules=["0"]))
    assert model[0] is base and base.weight.requires_grad
    with pytest.raises(ValueError, match="base must be an embedding or a head that computes"):
        TokenRows(base, [1])


def lookups_of_ids() -> dict[str, nn.Module]:
    looked, doubling = nn.Embedding(K, N), nn.Embedding(K, N)
    looked.register_forward_pre_hook(lambda module, args: None)
    doubling.register_forward_hook(lambda module, args, output: 2 * output)
    return {
        "subclass": type("Renamed", (nn.Embedding,), {})(K, N),
        "hook before": looked,
        "hook after": doubling,
        "a number": ScaledEmbedding(7.5),
        "a tensor": ScaledEmbedding(torch.tensor(7.5)),
        "gemma": Gemma3TextScaledWordEmbedding(K, N, 0, 7.5),
        "parametrized": nn.utils.parametrizations.weight_norm(nn.Embedding(K, N)),
    }


@pytest.mark.parametrize("place", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", lookups_of_ids())
def test_embeddings_that_look_up_their_ids_are_taken(case: str, dtype: Dtype, place: str) -> None:
    base = lookups_of_ids()[case].to(dtype).to(place)
    before = [base(ids(dtype).to(place)), *base.parameters()]
    module = LoRAEmbedding.from_linear(base, r=2)
    after = [module(ids(dtype).to(place)), *base.parameters()]
    assert after[0].shape == (2, 4, N) and after[0].dtype == dtype
    if place == "cpu":
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_runs_on_the_meta_device(name: str) -> None:
    case = CASES[name]
    module = adapter_over(case.base(torch.float32))
    x = case.input(torch.float32)
    expected = module(x)
    got = module.to("meta")(x.to("meta"))
    assert got.is_meta and (got.shape, got.dtype) == (expected.shape, expected.dtype)
    if got.requires_grad:
        got.sum().backward()
        assert module.lora_b.grad.is_meta


def test_each_class_takes_its_own_family() -> None:
    with pytest.raises(TypeError, match=r"linear must be nn\.Embedding, .* got Linear"):
        LoRAEmbedding.from_linear(nn.Linear(4, 4))
    with pytest.raises(TypeError, match=r"linear must be nn\.Conv1d, .* got ConvTranspose1d"):
        LoRAConv.from_linear(nn.ConvTranspose1d(4, 4, 3))
    with pytest.raises(TypeError, match=r"linear must be nn\.Linear, .* got Conv2d"):
        LoRALinear.from_linear(nn.Conv2d(4, 4, 3))
    with pytest.raises(TypeError, match="LoRAConv: base must be a convolution, got none"):
        LoRAConv(4, 4, r=2)


def test_an_embedding_of_its_own() -> None:
    module = LoRAEmbedding(K, N, r=2, dtype=torch.float64)
    assert module.weight.shape == (K, N) and module.bias is None
    module = LoRAEmbedding(K, N, r=2, device="meta").to_empty(device="cpu")
    module.reset_parameters()
    assert torch.equal(module(ids(torch.float32)), module.weight[ids(torch.float32)])


class Mixed(nn.Module):
    """All three families, and modules of none."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(K, N)
        self.conv = nn.Conv1d(N, 5, 3, padding=1)
        self.grouped = nn.Conv1d(5, 5, 1, groups=5)
        self.norm = nn.LayerNorm(5)
        self.linear = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.grouped(self.conv(self.embed(x).mT)).mT
        return self.linear(self.norm(y))


def test_a_model_of_all_families() -> None:
    torch.manual_seed(0)
    model, x = Mixed(), ids(torch.float32)
    before = model(x)
    config = LoRAConfig(r=2, target_modules=["embed", "conv", "linear"], rank_pattern={"embed": 3})
    lr.adapt(model, config)
    assert [type(m) for m in (model.embed, model.conv, model.linear)] == [
        LoRAEmbedding,
        LoRAConv,
        LoRALinear,
    ]
    assert (model.embed.r, model.conv.r, model.conv.in_features) == (3, 2, 3 * N)
    assert torch.equal(model(x), before)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    after = model.eval()(x)
    with lr.disable_adapter(model):
        assert torch.equal(model(x), before)
    columns = [[str(cell) for cell in column.cells] for column in lr.summary(model).columns]
    assert columns[1] == ["LoRAEmbedding", "LoRAConv", "LoRA"]
    assert columns[3] == ["11 → 6", "18 → 5", "5 → 4"]
    lr.merge(model)
    torch.testing.assert_close(model(x), after, rtol=1e-4, atol=1e-4)
    lr.unload(model)
    assert [type(m) for m in model.children()] == [type(m) for m in Mixed().children()]
    torch.testing.assert_close(model(x), after, rtol=1e-4, atol=1e-4)


def test_models_read_the_settings_of_a_base() -> None:
    """Whisper's forward reads the strides of its convolutions."""
    embedding = LoRAEmbedding.from_linear(nn.Embedding(K, N, padding_idx=3), r=2)
    assert (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx) == (K, N, 3)
    convolution = LoRAConv.from_linear(nn.Conv2d(4, 5, 3, stride=2, padding=1), r=2)
    assert (convolution.in_channels, convolution.out_channels) == (4, 5)
    assert convolution.stride == (2, 2) and convolution.kernel_size == (3, 3)
    assert (convolution.padding, convolution.dilation, convolution.groups) == ((1, 1), (1, 1), 1)


def test_a_tied_head_keeps_the_bases_weight() -> None:
    """As in PEFT; a merge, which PEFT makes with a warning, would change the head's logits."""
    from peft_models import llama, token_ids

    options = {"r": 2, "target_modules": ["embed_tokens"]}
    torch.manual_seed(3)
    model = lr.adapt(llama(tied=True), LoRAConfig(**options))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = peft.get_peft_model(llama(tied=True), peft.LoraConfig(**options, lora_alpha=2))
    embedding = reference.base_model.model.model.embed_tokens
    with torch.no_grad():
        model.model.embed_tokens.lora_a.normal_()
        embedding.lora_embedding_A["default"].copy_(model.model.embed_tokens.lora_a)
    ids, weight = token_ids(), model.lm_head.weight.clone()
    torch.testing.assert_close(model(ids).logits, reference(ids).logits)
    for call in (lr.merge, lambda m: lr.unload(m, merge=True)):
        with pytest.raises(ValueError, match="embed_tokens must be its own, got one tied to"):
            call(model)
        assert torch.equal(model.lm_head.weight, weight)
    with pytest.raises(ValueError, match="would change the weight, which is tied to lm_head"):
        lr.adapt(llama(tied=True), LoRAConfig(**options, init="pissa"))


def test_a_guard_refuses_other_families() -> None:
    from peft_models import llama

    with pytest.raises(ValueError, match="GuardModel: target_modules must name linear modules"):
        lr.guard.GuardModel(llama(), targets=["embed_tokens"])


def test_all_linear_stays_linear() -> None:
    model = lr.adapt(Mixed(), LoRAConfig(r=2))
    assert type(model.embed) is nn.Embedding and type(model.conv) is nn.Conv1d


def test_a_regular_expression_selects_among_all_families() -> None:
    with pytest.raises(ValueError, match="adapt: grouped: LoRAConv: groups must be 1"):
        lr.adapt(Mixed(), LoRAConfig(r=2, target_modules=".*"))
    model = lr.adapt(Mixed(), LoRAConfig(r=2, target_modules=".*", exclude_modules="grouped"))
    assert type(model.embed) is LoRAEmbedding and type(model.norm) is nn.LayerNorm


def test_methods_without_such_modules_refuse_them_by_name() -> None:
    model = Mixed()
    for name, kind in (("embed", "an Embedding"), ("conv", "a Conv1d")):
        message = f"must name linear modules, got {name}, {kind}"
        with pytest.raises(ValueError, match=message):
            lr.adapt(model, lr.LaMDAConfig(r=2, init="lora", target_modules=[name]))
    with pytest.raises(
        ValueError, match="name linear, embedding or convolution modules, got norm, a LayerNorm"
    ):
        lr.adapt(model, LoRAConfig(r=2, target_modules=["norm"]))
    lr.adapt(model, lr.LaMDAConfig(r=2, init="lora", target_modules=".*"))
    assert type(model.embed) is nn.Embedding


def test_a_bank_refuses_other_families() -> None:
    factors = torch.zeros(2, K), torch.zeros(N, 2)
    tensors = lr.checkpoint.LoRATensors(*factors, 1.0)
    bank = lr.AdapterBank(Mixed())
    with pytest.raises(ValueError, match="must name linear modules, got embed, an Embedding"):
        bank.add("a", {"embed": tensors})


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "a turned kernel": (
        lambda t: {k: v.mT.contiguous() if "lora_A" in k else v for k, v in t.items()},
        r"lora_A\.weight.* must be \[2, 4, 3, 2\], got \[2, 4, 2, 3\]",
    ),
    "a flat kernel": (
        lambda t: {k: v.flatten(1) for k, v in t.items()},
        r"lora_A\.weight.* must be \[2, 4, 3, 2\], got \[2, 24\]",
    ),
    "an embedding's names": (
        lambda t: {
            k.replace("A.weight", "embedding_A").replace("B.weight", "embedding_B"): v
            for k, v in t.items()
        },
        r"lora_A\.weight.* is missing",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_kernels_are_refused(damage: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    def holder() -> nn.Module:
        return Holder(nn.Conv2d(4, 5, (3, 2)))

    change, message = DAMAGES[damage]
    lr.save_adapter(lr.adapt(holder(), LoRAConfig(r=2, target_modules=["base"])), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    model = holder()
    with pytest.raises(ValueError, match=message):
        lr.load_adapter(model, tmp_path)
    assert type(model.base) is nn.Conv2d
