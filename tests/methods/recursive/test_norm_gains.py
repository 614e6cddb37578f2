"""Gains of norms that differ in tied layers: adapters of linears that read them make up for it."""

import pytest
import torch
from decoders import FAMILIES, decoder, tokens
from torch import nn

import lowrank_ext as lr
from lowrank_ext.methods.recursive.norm_gains import gain_of, is_norm, norms_before_linears
from lowrank_ext.methods.recursive.structure import find_decoder

FULL = 10**6
LLAMA = {f"self_attn.{name}_proj": "input_layernorm" for name in "qkv"}
LLAMA |= {f"mlp.{name}_proj": "post_attention_layernorm" for name in ("gate", "up")}
IN_ATTENTION = {path: norm for path, norm in LLAMA.items() if "attn" in path}
BEFORE_MLP = {f"mlp.{name}_proj": "pre_feedforward_layernorm" for name in ("gate", "up")}
# What each family's linears read; norms of OLMo have no gain, GPT-2 has no nn.Linear.
READ = {
    **dict.fromkeys(("Llama", "Qwen2", "Qwen3", "Mistral"), LLAMA),
    **dict.fromkeys(("Gemma2", "Gemma3"), IN_ATTENTION | BEFORE_MLP),
    "Mixtral": IN_ATTENTION,
    "GPTNeoX": {
        "attention.query_key_value": "input_layernorm",
        "mlp.dense_h_to_4h": "post_attention_layernorm",
    },
    "Phi": {**dict.fromkeys(IN_ATTENTION, "input_layernorm"), "mlp.fc1": "input_layernorm"},
    "OPT": {**dict.fromkeys(IN_ATTENTION, "self_attn_layer_norm"), "fc1": "final_layer_norm"},
    "OLMo": {},
    "GPT2": {},
}


def with_own_gains(family: str) -> nn.Module:
    """Gains of norms that linears read differ by layer, by up to a hundredfold, and in sign. An
    adapter over a gain changes a bias too, so these norms have none."""
    model = decoder(family)
    read = set(READ[family].values())
    for layer in find_decoder(model, "test").layers:
        for path in read:
            norm = layer.get_submodule(path)
            weight = norm.weight
            if getattr(norm, "bias", None) is not None:
                nn.init.zeros_(norm.bias)
            weight.data.copy_(torch.randn_like(weight) * 10 ** torch.rand_like(weight))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_which_norm_a_linear_reads(family: str) -> None:
    model = decoder(family).train()
    layers = find_decoder(model, "test").layers
    calls: list[nn.Module] = []
    layers[0].register_forward_hook(lambda *_: calls.append(layers[0]))
    before = torch.get_rng_state()
    assert norms_before_linears(find_decoder(model, "test")) == READ[family]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(module.training for module in model.modules())
    left = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert left == [layers[0]] and not calls


@pytest.mark.parametrize("init", ["average", "stepwise"])
@pytest.mark.parametrize("family", [name for name, read in READ.items() if read])
def test_full_rank_is_the_source(family: str, init: str) -> None:
    if family == "Mixtral":
        pytest.skip("the router and the experts read the norm too, and have no adapters")
    source, ids = with_own_gains(family).double(), tokens()
    expected = source(ids).logits
    config = lr.recursive.RecursiveConfig(num_loops=2, init=init, rank=FULL)
    model = lr.recursive.convert(source, config)
    # Not 1e-12: rotary angles are in fp32, and factors over small gains are large.
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-6)


def test_a_lower_rank_is_the_best_for_the_output() -> None:
    """Of W diag(g), not of W: for an input whose entries are alike, as behind a norm."""
    rank, source = 4, with_own_gains("Llama")
    layers = [layer for layer in decoder("Llama").model.layers]
    for layer, own in zip(layers, source.model.layers, strict=True):
        layer.load_state_dict(own.state_dict())
    config = lr.recursive.RecursiveConfig(num_loops=2, rank=rank)
    model = lr.recursive.convert(source, config)
    for layer, folded in zip(layers, model.model.layers, strict=True):
        for path, norm in LLAMA.items():
            module = folded.get_submodule(path)
            gain, shared = (each.get_submodule(norm).weight.double() for each in (layer, folded))
            residual = layer.get_submodule(path).weight * gain - module.weight * shared
            lost = residual - module.lora_b.double() @ (module.lora_a.double() * shared)
            expected = torch.linalg.svdvals(residual)[rank:].norm()
            torch.testing.assert_close(lost.norm(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gains_that_are_zero_make_nothing_infinite(dtype: torch.dtype) -> None:
    source = decoder("Llama").to(dtype)
    for layer in source.model.layers:
        layer.input_layernorm.weight.data[::2] = 0
        layer.post_attention_layernorm.weight.data[1] = 1e-7
    model = lr.recursive.convert(source, lr.recursive.RecursiveConfig(num_loops=2, rank=4))
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert model(tokens()).logits.isfinite().all()


@pytest.mark.parametrize("size", [6, 7])
def test_gain_of_any_kind_of_norm(size: int) -> None:
    """Ratios of gains are those of the weights, or of 1 + weight."""
    weights = [torch.randn(size), torch.randn(size)]

    class OnePlus(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(size))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.rms_norm(x, (size,)) * (1 + self.weight)

    for norm, added in ((nn.LayerNorm(size), 0), (nn.RMSNorm(size), 0), (OnePlus(), 1)):
        assert is_norm(norm)
        given = [{"weight": weight} for weight in weights]
        if isinstance(norm, nn.LayerNorm):
            given = [{**each, "bias": torch.randn(size)} for each in given]
        ratio = gain_of(norm, given[0]) / gain_of(norm, given[1])
        torch.testing.assert_close(ratio, (weights[0] + added) / (weights[1] + added))
    for other in (nn.Linear(size, size), nn.Embedding(size, 2), nn.Sequential(nn.RMSNorm(size))):
        assert not is_norm(other)
