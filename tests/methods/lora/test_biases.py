"""LoRA's lora_bias, and biases of the base that train: values, gradients and files are PEFT's."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft_models import VOCABULARY, randomize, token_ids
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

pytest.importorskip("peft")

import peft

import lowrank_ext as lr
from lowrank_ext.nn import LoRALinear

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5}


class Net(nn.Module):
    """Linears with a bias and one without, a norm with a bias, a head."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.up = nn.Linear(8, 12, dtype=dtype)
        self.norm = nn.LayerNorm(12, dtype=dtype)
        self.plain = nn.Linear(12, 12, bias=False, dtype=dtype)
        self.down = nn.Linear(12, 8, dtype=dtype)
        self.head = nn.Linear(8, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.norm(torch.tanh(self.up(x)))
        return self.head(self.down(torch.tanh(self.plain(hidden))))


def batch(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


@torch.no_grad()
def train(model: nn.Module) -> nn.Module:
    """Values as after training, the same for every model with these parameters."""
    trained = {own_name(n): p for n, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(2)
    for name in sorted(trained):
        noise = torch.randn(trained[name].shape, generator=generator)
        trained[name].add_(0.3 * noise.to(trained[name].dtype))
    return model.eval()


def own_name(name: str) -> str:
    """Our name of a parameter of PEFT's."""
    name = name.removeprefix("base_model.model.").replace(".base_layer", "")
    for theirs, ours in (
        (".lora_B.default.bias", ".lora_bias"),
        (".lora_A.default.weight", ".lora_a"),
        (".lora_B.default.weight", ".lora_b"),
        (".modules_to_save.default", ""),
    ):
        name = name.replace(theirs, ours)
    return name


def pair(
    dtype: torch.dtype = torch.float32, autocast: bool = True, **options: Any
) -> tuple[nn.Module, nn.Module]:
    options = {"r": 3, "target_modules": ["up", "plain", "down"], **options}
    torch.manual_seed(3)
    ours = lr.adapt(Net(dtype), lr.LoRAConfig(alpha=6, **options))
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of lora_bias over a base without a bias
        config = peft.LoraConfig(lora_alpha=6, **options)
        theirs = peft.get_peft_model(Net(dtype), config, autocast_adapter_dtype=autocast)
    return ours, theirs


OPTIONS: dict[str, dict[str, Any]] = {
    "lora_bias": {"lora_bias": True},
    "lora_only": {"bias": "lora_only"},
    "all": {"bias": "all"},
    "all_with_head": {"bias": "all", "lora_bias": True, "modules_to_save": ["head"]},
}


def gradients(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    x = batch(dtype).requires_grad_()
    y = model.train()(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)).sum().backward()
    found = {own_name(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"x": x.grad, "y": y.detach(), **found}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", OPTIONS)
def test_values_and_gradients_are_pefts(case: str, dtype: torch.dtype) -> None:
    ours, theirs = pair(dtype, **OPTIONS[case])
    start = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    expected = {own_name(n): p for n, p in theirs.named_parameters() if p.requires_grad}
    expected = {n: p for n, p in expected.items() if "original_module" not in n}
    assert start.keys() == expected.keys()
    for name, parameter in start.items():
        assert torch.equal(parameter, expected[name].to(dtype)), name
    got, wanted = gradients(train(ours), dtype), gradients(train(theirs), dtype)
    assert got.keys() == wanted.keys() and len(got) > 7
    for name, value in wanted.items():
        torch.testing.assert_close(
            got[name], value, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype], msg=name
        )


@pytest.mark.parametrize("adapter_dtype", ["float32", "base"])
def test_bfloat16_is_no_worse_than_peft(adapter_dtype: str) -> None:
    options: dict[str, Any] = {"lora_bias": True, "bias": "lora_only"}
    _, exact = pair(torch.float64, **options)
    truth = gradients(train(exact), torch.float64)
    targets = ["up", "plain", "down"]
    config = lr.LoRAConfig(
        r=3, alpha=6, target_modules=targets, adapter_dtype=adapter_dtype, **options
    )
    ours = lr.adapt(Net(torch.bfloat16), config)
    _, theirs = pair(torch.bfloat16, autocast=False, **options)
    for model in (ours, theirs):  # the values of ``exact``, rounded
        values = {own_name(n): p for n, p in exact.named_parameters()}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(values[own_name(name)])
    got, plain = (gradients(model, torch.bfloat16) for model in (ours, theirs))
    for name, value in truth.items():
        error, plain_error = ((v[name].double() - value).norm() for v in (got, plain))
        assert error <= 2 * plain_error + 0.02 * value.norm(), name


@pytest.mark.parametrize("case", OPTIONS)
def test_files_both_ways(case: str, tmp_path: Path) -> None:
    ours, theirs = map(train, pair(**OPTIONS[case]))
    lr.save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    x = batch()
    expected = theirs(x)
    torch.testing.assert_close(ours(x), expected, rtol=2e-5, atol=2e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = peft.PeftModel.from_pretrained(Net(), tmp_path / "ours")
    torch.testing.assert_close(read(x), expected, rtol=2e-5, atol=2e-5)
    for which in ("ours", "theirs"):
        model = lr.load_adapter(Net(), tmp_path / which)
        assert torch.equal(model.eval()(x), ours(x))
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            n for n, p in ours.named_parameters() if p.requires_grad
        }
        model = lr.adapt(Net(), model.lowrank_config)
        assert torch.equal(lr.load_adapter(model, tmp_path / which).eval()(x), ours(x))


def test_names_and_fields_in_the_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    ours, theirs = map(train, pair(bias="all", lora_bias=True))
    lr.save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    got, expected = (load_file(tmp_path / which / WEIGHTS) for which in ("ours", "theirs"))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in got)
    fields = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert (fields["bias"], fields["lora_bias"]) == ("all", True)


def test_a_merge_adds_lora_bias_and_gives_the_bits_back() -> None:
    ours, theirs = map(train, pair(lora_bias=True, target_modules=["up", "down"]))
    before = {name: t.clone() for name, t in ours.state_dict().items()}
    x = batch()
    expected = ours(x)
    lr.merge(ours)
    theirs.merge_adapter()
    torch.testing.assert_close(ours(x), expected, rtol=2e-5, atol=2e-5)
    bias = theirs.base_model.model.up.base_layer.bias
    torch.testing.assert_close(ours.up.bias, bias, rtol=2e-6, atol=2e-6)
    again = copy.deepcopy(ours)
    lr.unmerge(ours)
    after = ours.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    plain = lr.unload(again)
    assert type(plain.up) is nn.Linear
    torch.testing.assert_close(plain(x), expected, rtol=2e-5, atol=2e-5)


def test_a_merge_without_a_bias_to_add_to_is_refused() -> None:
    ours, theirs = map(train, pair(lora_bias=True))
    before = {name: t.clone() for name, t in ours.state_dict().items()}
    with pytest.raises(ValueError, match=r"merge: plain: .*the base must have a bias"):
        lr.merge(ours)
    assert all(torch.equal(t, before[name]) for name, t in ours.state_dict().items())
    with pytest.raises(RuntimeError, match="Impossible to merge LoRA with `lora_bias=True`"):
        theirs.merge_adapter()


def test_a_tied_bias_is_not_merged() -> None:
    model = Net()
    model.other = nn.Linear(8, 8)
    model.other.bias = model.down.bias
    lr.adapt(model, lr.LoRAConfig(r=2, target_modules=["down"], lora_bias=True))
    with pytest.raises(ValueError, match=r"the bias of down must be its own, got one tied to oth"):
        lr.merge(model)


def test_switching_off_gives_the_base_or_is_refused() -> None:
    base = Net()(batch())
    ours = train(pair(lora_bias=True)[0])
    with lr.disable_adapter(ours):
        assert torch.equal(ours(batch()), base)
    for bias in ("lora_only", "all"):
        model = train(pair(bias=bias)[0])
        expected = model(batch())
        off = lr.disable_adapter(model)
        with pytest.raises(ValueError, match=f"bias must be 'none', .* got '{bias}'"), off:
            raise AssertionError
        assert torch.equal(model(batch()), expected)
    # No module has a bias that could have changed.
    with pytest.warns(UserWarning, match="no bias trains, as bias asks for"):
        model = lr.adapt(
            Net(), lr.LoRAConfig(r=2, target_modules=["plain"], bias="lora_only", alpha=4)
        )
    train(model)
    with lr.disable_adapter(model):
        assert torch.equal(model(batch()), base)


def test_merged_biases_stay_and_unload_keeps_them() -> None:
    model = train(pair(bias="all")[0])
    expected = model(batch())
    norm = model.norm.bias.clone()
    lr.merge(model)
    torch.testing.assert_close(model(batch()), expected, rtol=2e-5, atol=2e-5)
    lr.unload(model, merge=False)
    assert torch.equal(model.norm.bias, norm) and not torch.equal(Net().norm.bias, norm)


def test_what_the_files_lack(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    ours = train(pair(bias="lora_only")[0])
    lr.save_adapter(ours, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = "base_model.model.down.base_layer.bias"
    save_file({k: t for k, t in tensors.items() if k != key}, tmp_path / WEIGHTS)
    model = Net()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"down\.base_layer\.bias is missing, .*set bias to 'none'"
    ):
        lr.load_adapter(model, tmp_path)
    save_file({**tensors, key: torch.zeros(5)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match=r"down.base_layer.bias must be floating-point \[8\]"):
        lr.load_adapter(model, tmp_path)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    save_file(tensors, tmp_path / WEIGHTS)
    other = lr.adapt(Net(), lr.LoRAConfig(r=3, alpha=6, target_modules=["up", "plain", "down"]))
    with pytest.raises(ValueError, match="bias must be 'none' as in the model, got 'lora_only'"):
        lr.load_adapter(other, tmp_path)
    with pytest.raises(ValueError, match="a LoRA at inference, got one with trained biases"):
        lr.AdapterBank(Net()).load("a", tmp_path)
    with pytest.raises(ValueError, match=r"export_lora: .* got one with trained biases"):
        lr.export_lora(ours, tmp_path / "exported")


def test_other_methods_do_not_read_biases(tmp_path: Path) -> None:
    lr.save_adapter(lr.adapt(Net(), lr.LaMDAConfig(r=3, target_modules=["up"])), tmp_path)
    fields = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**fields, "bias": "all"}))
    with pytest.raises(ValueError, match="bias='all'"):
        lr.load_adapter(Net(), tmp_path)


@pytest.mark.parametrize("kind", ["hooked", "conv1d", "no_bias", "plain"])
def test_kinds_of_bases(kind: str) -> None:
    from transformers.pytorch_utils import Conv1D

    base = Conv1D(6, 8) if kind == "conv1d" else nn.Linear(8, 6, bias=kind != "no_bias")
    if kind == "hooked":
        base.register_forward_hook(lambda module, args, y: y)
    weight = base.weight.t() if kind == "conv1d" else base.weight
    layer = LoRALinear.from_linear(base, r=2, alpha=6, lora_bias=True)
    nn.init.normal_(layer.lora_b)
    nn.init.normal_(layer.lora_bias)
    x = batch()
    product = x @ layer.lora_a.mT @ layer.lora_b.mT + layer.lora_bias
    expected = x @ weight.mT + 3 * product + (0 if base.bias is None else base.bias)
    torch.testing.assert_close(layer(x), expected, rtol=2e-5, atol=2e-5)
    state = layer.state_dict()
    assert "lora_bias" in state and torch.equal(state["lora_bias"], layer.lora_bias)
    copied = copy.deepcopy(layer)
    copied.load_state_dict(state)
    assert torch.equal(copied(x), layer(x))


def test_compiles_without_graph_breaks() -> None:
    ours, theirs = (train(pair(**OPTIONS["all_with_head"])[0]) for _ in range(2))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    got, expected = gradients(compiled, torch.float32), gradients(theirs, torch.float32)
    for name, value in expected.items():
        key = name if name in got else f"_orig_mod.{name}"
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", OPTIONS)
def test_peft_config_and_accelerate(case: str, tmp_path: Path) -> None:
    options = {"r": 3, "target_modules": ["up", "plain", "down"], **OPTIONS[case]}
    theirs = train(pair(**OPTIONS[case])[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(Net(), lr.peft_config(lr.LoRAConfig(alpha=6, **options)))
    report = lr.accelerate(made)
    assert len(report.accelerated) == 3 and not report.left_alone and not report.partly
    theirs.save_pretrained(tmp_path)
    peft.set_peft_model_state_dict(made, peft.get_peft_model_state_dict(theirs))
    for name, value in gradients(theirs, torch.float32).items():
        got = gradients(copy.deepcopy(made), torch.float32)
        torch.testing.assert_close(got[name], value, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"lora_bias": 1}, TypeError, "lora_bias must be a bool, got 1"),
        ({"bias": "some"}, ValueError, "bias must be one of .*'lora_only'.* got 'some'"),
        (
            {"lora_bias": True, "init": "gaussian"},
            ValueError,
            "lora_bias must be False with init='gaussian'",
        ),
        ({"lora_bias": True, "init": "pissa"}, ValueError, "lora_bias must be False with init="),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=f"LoRAConfig: {message}"):
        lr.LoRAConfig(r=2, **options)


@pytest.mark.parametrize("kernel", [1, 3])
def test_over_convolutions(kernel: int, tmp_path: Path) -> None:
    def net() -> nn.Sequential:
        torch.manual_seed(5)
        conv = nn.Conv2d(4, 6, kernel, padding=kernel // 2)
        return nn.Sequential(conv, nn.Flatten(2), nn.Linear(25, 3))

    options: dict[str, Any] = {"r": 2, "target_modules": ["0"], "lora_bias": True}
    theirs = peft.get_peft_model(net(), peft.LoraConfig(lora_alpha=4, **options))
    train(theirs)
    theirs.save_pretrained(tmp_path)
    ours = lr.load_adapter(net(), tmp_path)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(ours(x), theirs(x), rtol=2e-5, atol=2e-5)
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    expected = theirs.base_model.model[0].lora_B.default.bias.grad
    torch.testing.assert_close(ours[0].lora_bias.grad, expected, rtol=2e-5, atol=2e-5)
    y = ours(x)
    lr.merge(ours)
    torch.testing.assert_close(ours.eval()(x), y, rtol=2e-5, atol=2e-5)
    torch.manual_seed(3)
    fresh = lr.adapt(net(), lr.LoRAConfig(alpha=4, **options))
    torch.manual_seed(3)
    start = peft.get_peft_model(net(), peft.LoraConfig(lora_alpha=4, **options))
    assert torch.equal(fresh[0].lora_a, start.base_model.model[0].lora_A.default.weight.flatten(1))


def test_embeddings_have_none() -> None:
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 2))
    with pytest.raises(ValueError, match="lora_bias must be False over an embedding"):
        lr.adapt(model, lr.LoRAConfig(r=2, target_modules=["0"], lora_bias=True))


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_a_merged_model_is_saved_as_the_unmerged_one(bias: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"target_modules": ["up", "down"], "lora_bias": True, "bias": bias}
    model = lr.adapt(Net(), lr.LoRAConfig(r=2, **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    lr.save_adapter(model, tmp_path / "unmerged")
    lr.save_adapter(lr.merge(model), tmp_path / "merged")
    expected = (tmp_path / "unmerged" / WEIGHTS).read_bytes()
    assert (tmp_path / "merged" / WEIGHTS).read_bytes() == expected


def test_a_merged_bias_does_not_train() -> None:
    """A step on the sum of the base's bias and the branch's would be lost by unmerge."""
    options: dict[str, Any] = {"target_modules": ["up"], "lora_bias": True, "bias": "lora_only"}
    model = lr.adapt(Net(), lr.LoRAConfig(r=2, **options)).eval()
    lr.merge(model)
    assert not model.up.base_bias.requires_grad
    lr.unmerge(model)
    assert model.up.base_bias.requires_grad


def bert() -> nn.Module:
    """Its head, tied to the embeddings, has a bias, under two names."""
    torch.manual_seed(7)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    return BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, num_hidden_layers=1, **sizes)).eval()


HEADS: dict[str, Any] = {"tied": [5, 2], "named": {"cls.predictions.decoder": [5, 2]}}


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("tokens", HEADS.values(), ids=HEADS)
def test_beside_trained_rows_of_a_head(bias: str, tokens: Any, tmp_path: Path) -> None:
    options = {"r": 2, "target_modules": ["query"], "bias": bias, "trainable_token_indices": tokens}
    own = lr.LoRAConfig(**options, alpha=8)  # PEFT's
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = peft.get_peft_model(bert(), peft.LoraConfig(**options)).eval()
        randomize(reference)
        reference.save_pretrained(tmp_path)
    said = "PEFT leaves out the bias of a head, here cls.predictions.decoder"
    with pytest.warns(UserWarning, match=said):
        model = lr.load_adapter(bert(), tmp_path)
    decoder = model.cls.predictions.decoder
    assert decoder.bias.requires_grad == (bias == "all")
    assert bias != "all" or decoder.bias.abs().sum() > 0
    assert torch.equal(decoder.bias, reference.base_model.model.cls.predictions.bias)
    ids = token_ids()
    x = model.bert(ids).last_hidden_state
    x = model.cls.predictions.transform(x)
    expected = F.linear(x, decoder.weight, decoder.bias)
    expected[..., [5, 2]] = F.linear(x, decoder.rows, decoder.bias[[5, 2]])
    torch.testing.assert_close(model(ids).logits, expected)
    with pytest.warns(UserWarning, match=said):
        lr.save_adapter(model, tmp_path / "again")
    first, second = (load_file(path / WEIGHTS) for path in (tmp_path, tmp_path / "again"))
    if bias == "lora_only":  # PEFT writes the frozen bias, too
        del first["base_model.model.cls.predictions.decoder.token_adapter.base_layer.bias"]
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    back = peft.PeftModel.from_pretrained(bert(), tmp_path / "again").eval()
    torch.testing.assert_close(back(ids).logits, reference(ids).logits)
    into = lr.adapt(bert(), own)
    with pytest.warns(UserWarning, match=said):
        lr.load_adapter(into, tmp_path / "again")
    assert torch.equal(into(ids).logits, model(ids).logits)
    trained = {n for n, p in into.named_parameters() if p.requires_grad and "bias" in n}
    assert ("cls.predictions.bias" in trained) == (bias == "all")


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_beside_trained_rows_of_a_head_that_the_model_does_not_tell(
    bias: str, tmp_path: Path
) -> None:
    options = {"target_modules": ["up"], "bias": bias, "trainable_token_indices": {"head": [2]}}
    reference = train(peft.get_peft_model(Net(), peft.LoraConfig(r=2, **options)))
    reference.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="PEFT leaves out the bias of a head, here head"):
        model = lr.load_adapter(Net(), tmp_path)
    theirs = reference.base_model.model.head.token_adapter.base_layer.bias
    assert torch.equal(model.head.bias, theirs)
    assert torch.equal(theirs, Net().head.bias) == (bias == "lora_only")
    assert model.head.bias.requires_grad == theirs.requires_grad == (bias == "all")
    with pytest.warns(UserWarning, match="PEFT leaves out the bias of a head, here head"):
        lr.save_adapter(model, tmp_path / "again")
    with pytest.warns(UserWarning, match="PEFT leaves out the bias of a head, here head"):
        again = lr.load_adapter(Net(), tmp_path / "again")
    assert torch.equal(again(batch()), model(batch()))
    back = peft.PeftModel.from_pretrained(Net(), tmp_path / "again")
    torch.testing.assert_close(back(batch()), reference(batch()))


def test_a_frozen_bias_of_another_base_comes_with_the_adapter(tmp_path: Path) -> None:
    options = {"bias": "lora_only", "trainable_token_indices": {"head": [2]}}
    base = Net()
    with torch.no_grad():
        base.head.bias.add_(1)
    reference = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["up"], **options))
    reference.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"head\.token_adapter\.base_layer\.bias"):
        model = lr.load_adapter(Net(), tmp_path)
    theirs = reference.base_model.model.head.token_adapter.base_layer.bias
    assert torch.equal(model.head.bias, theirs) and not torch.equal(theirs, Net().head.bias)
    with pytest.warns(UserWarning, match="PEFT leaves out the bias"):
        lr.save_adapter(model, tmp_path / "again")
    with pytest.warns(UserWarning, match=r"head\.token_adapter\.base_layer\.bias"):
        again = lr.load_adapter(Net(), tmp_path / "again")
    assert torch.equal(again(batch()), model(batch()))
