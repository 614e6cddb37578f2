"""RF-28: a base that is more than a plain linear keeps its keys in state dicts, and its hooks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowrank_ext as lr


class Doubled(nn.Linear):
    """A subclass with a forward of its own, so that the adapter keeps it as base_layer."""

    def __init__(self, *features: int) -> None:
        super().__init__(*features)
        self.register_buffer("offset", torch.zeros(features[1]))
        self.inner = nn.LayerNorm(2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.offset


def hooked(linear: nn.Linear) -> nn.Linear:
    linear.calls = []
    linear.register_forward_hook(lambda module, args, output: module.calls.append(1))
    return linear


BASES: dict[str, Callable[[], nn.Linear]] = {
    "plain": lambda: nn.Linear(4, 3),
    "hooked": lambda: hooked(nn.Linear(4, 3)),
    "subclass": lambda: Doubled(4, 3),
    "hooked_subclass": lambda: hooked(Doubled(4, 3)),
}


def model_with(base: str) -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, 4), BASES[base]())


def adapted(base: str, **options: object) -> nn.Sequential:
    model = lr.adapt(model_with(base), lr.LoRAConfig(r=2, target_modules=["1"], **options))
    with torch.no_grad():
        model[1].lora_b.normal_(generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize("base", BASES)
def test_keys_are_the_bases(base: str) -> None:
    keys = list(model_with(base).state_dict())
    model = adapted(base)
    assert {key for key in model.state_dict() if "lora_" not in key} == set(keys)
    assert {key for key in model[1].state_dict() if "lora_" not in key} == {
        key.removeprefix("1.") for key in keys if key.startswith("1.")
    }
    lr.merge(model)
    assert list(model.state_dict()) == keys
    merged = model.state_dict()
    plain = model_with(base)
    plain.load_state_dict(merged)
    x = torch.randn(6, 5)
    assert torch.equal(plain(x), model(x))
    if "hooked" in base:
        hooked_base = model[1].base_layer
        assert len(hooked_base.calls) >= 1
        assert lr.unload(model, merge=True)[1] is hooked_base
        hooked_base.calls.clear()
        assert torch.equal(model(x), plain(x)) and hooked_base.calls == [1]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("base", BASES)
def test_a_state_dict_comes_back(base: str, init: str, strict: bool) -> None:
    model = adapted(base, init=init)
    other = lr.adapt(model_with(base), lr.LoRAConfig(r=2, target_modules=["1"], init=init))
    for state in (
        model.state_dict(),
        {k.replace("1.weight", "1.base_layer.weight"): t for k, t in model.state_dict().items()},
    ):
        if base == "plain" and "1.base_layer.weight" in state:
            continue
        with torch.no_grad():
            for tensor in other.state_dict().values():
                tensor.zero_()
        other.load_state_dict(state, strict=strict)
        x = torch.randn(6, 5)
        assert torch.equal(other(x), model(x))
        assert other[1].residual_taken is (init == "pissa")

    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*1\.(base_layer\.)?other"):
        other.load_state_dict(model.state_dict() | {"1.other": torch.zeros(1)})


@pytest.mark.parametrize("base", BASES)
def test_a_bank_keeps_the_keys(base: str) -> None:
    model = model_with(base)
    keys = set(model.state_dict())
    bank = lr.AdapterBank(model)
    bank.add("one", {"1": lr.checkpoint.LoRATensors(torch.randn(2, 4), torch.randn(3, 2), 1.0)})
    more = {"1.lora_a", "1.lora_b", "1.scaling", "1.ranks"}
    assert model.state_dict().keys() - more == keys
    copy = model.state_dict()
    model.load_state_dict(copy)
    bank.close()
    assert set(model.state_dict()) == keys


def test_save_pretrained_of_a_merged_model_with_hooks(tmp_path: Path) -> None:
    """vllm#32599: the written model is the merged one, not one with missing weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    hooked(model.model.layers[0].self_attn.q_proj)
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: None)
    lr.adapt(model, lr.LoRAConfig(r=2, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    ids = torch.arange(12).view(2, 6)
    lr.merge(model)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        model.save_pretrained(tmp_path)
        again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(again(input_ids=ids).logits, expected)
    assert model.model.layers[0].self_attn.q_proj.base_layer.calls


class OwnAdapter(nn.Linear):
    """A base with a tensor that is named as one of the adapter, as a RelaxedLinear has."""

    def __init__(self) -> None:
        super().__init__(4, 3)
        self.lora_a = nn.Parameter(torch.randn(1, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x @ self.lora_a.mT


def test_tensors_of_one_name_both_have_a_key() -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(2)
        return lr.adapt(nn.Sequential(OwnAdapter()), lr.LoRAConfig(r=2, target_modules=["0"]))

    trained = model()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn_like(parameter))
    state = trained.state_dict()
    assert set(state) == {"0.lora_a", "0.lora_b", "0.base_layer.lora_a", "0.weight", "0.bias"}
    other, x = model(), torch.randn(6, 4)
    other.load_state_dict(state)
    assert torch.equal(other(x), trained(x))
