"""trainable_token_indices where several modules have one weight."""

import itertools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft_models import VOCABULARY, llama, randomize, token_ids
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

pytest.importorskip("peft")

import peft

import lowrank_ext as lr
from lowrank_ext.adapt import token_rows_of
from lowrank_ext.methods.lora.config import LoRAConfig
from lowrank_ext.nn import TiedTokenRows, TokenRows

CONFIG = "adapter_config.json"


def t5() -> nn.Module:
    torch.manual_seed(7)
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 4, "d_ff": 24}
    return T5ForConditionalGeneration(T5Config(**sizes, num_layers=1, num_heads=4)).eval()


def bart() -> nn.Module:
    torch.manual_seed(7)
    layers = {f"{side}_layers": 1 for side in ("encoder", "decoder")}
    heads = {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    sizes = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32}
    config = BartConfig(vocab_size=VOCABULARY, d_model=16, **sizes, **layers, **heads)
    return BartForConditionalGeneration(config).eval()


# By name: how to make it, modules to adapt, and the path before shared, encoder and decoder.
MODELS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "T5": (t5, "q", ""),
    "BART": (bart, "q_proj", "model."),
}
TIED: dict[str, Callable[[], nn.Module]] = {"llama": lambda: llama(tied=True), "T5": t5}


def config(name: str, indices: Any) -> LoRAConfig:
    return LoRAConfig(r=2, target_modules=[MODELS[name][1]], trainable_token_indices=indices)


def logits(model: nn.Module) -> Tensor:
    ids = token_ids()
    if not model.config.is_encoder_decoder:
        return model(input_ids=ids).logits
    return model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits


DIFFERENT: dict[str, dict[str, list[int]]] = {
    "two embeddings": {"shared": [5], "decoder.embed_tokens": [9]},
    "the head": {"shared": [5], "lm_head": [9, 2]},
    "another order": {"shared": [5, 9], "encoder.embed_tokens": [9, 5]},
    "neither the inputs": {"encoder.embed_tokens": [5], "decoder.embed_tokens": [9]},
    "all": {"shared": [1], "embed_tokens": [2], "lm_head": [1]},
}


@pytest.mark.parametrize("case", DIFFERENT)
@pytest.mark.parametrize("name", MODELS)
def test_different_tokens_are_refused_in_every_order(name: str, case: str, tmp_path: Path) -> None:
    make = MODELS[name][0]
    lr.save_adapter(lr.adapt(make(), config(name, [5])), tmp_path)
    stored = json.loads((tmp_path / CONFIG).read_text())
    model = make()
    modules, before = list(model.modules()), logits(model)
    message = "trainable_token_indices must give the same tokens to modules of one weight"
    for order in itertools.permutations(DIFFERENT[case].items()):
        with pytest.raises(ValueError, match=f"^adapt: {message} .*shared.*lm_head.*, got "):
            lr.adapt(model, config(name, dict(order)))
        fields = {"trainable_token_indices": dict(order)}
        (tmp_path / CONFIG).write_text(json.dumps(stored | fields))
        with pytest.raises(ValueError, match=f"^load_adapter: .*{message}"):
            lr.load_adapter(model, tmp_path)
    assert list(model.modules()) == modules and torch.equal(logits(model), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


OTHERS = [["encoder.embed_tokens"], ["decoder.embed_tokens", "lm_head"], ["embed_tokens"]]


@pytest.mark.parametrize("named", OTHERS, ids=" ".join)
@pytest.mark.parametrize("name", MODELS)
def test_another_embedding_than_the_inputs_is_refused(
    name: str, named: list[str], tmp_path: Path
) -> None:
    """PEFT trains rows of the named modules alone."""
    make, target, prefix = MODELS[name]
    indices = {each: [5, 2] for each in named}
    model = make()
    modules = list(model.modules())
    message = f"must name the input embeddings {prefix}shared for the modules tied to these, got "
    with pytest.raises(ValueError, match=f"^adapt: .*{message}"):
        lr.adapt(model, config(name, indices))
    options = peft.LoraConfig(r=2, target_modules=[target], trainable_token_indices=indices)
    peft.get_peft_model(make(), options).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"^load_adapter: .*{message}"):
        lr.load_adapter(model, tmp_path)
    assert list(model.modules()) == modules


@pytest.mark.parametrize("name", MODELS)
def test_the_same_tokens_in_every_order_are_pefts(name: str, tmp_path: Path) -> None:
    make, _, prefix = MODELS[name]
    named = [f"{prefix}shared", f"{prefix}encoder.embed_tokens", "lm_head"]
    for number, order in enumerate(itertools.permutations(named)):
        model = lr.adapt(make(), config(name, {each: [5, 2] for each in order}))
        assert list(token_rows_of(model)) == [f"{prefix}shared"]
        randomize(model)
        path = tmp_path / str(number)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lr.save_adapter(model, path)
        reference = peft.PeftModel.from_pretrained(make(), path).eval()
        expected = logits(model.eval())
        assert not torch.allclose(expected, logits(make()), atol=1e-3)
        torch.testing.assert_close(logits(reference), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(logits(lr.load_adapter(make(), path).eval()), expected)


class TwoTables(nn.Module):
    """A model whose second table, not its input embeddings, is tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.config = SimpleNamespace(tie_word_embeddings=True)
        self.words, self.labels = nn.Embedding(9, 4), nn.Embedding(9, 4)
        self.middle, self.head = nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.labels.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.middle(self.words(ids) + self.labels(ids)))


def test_a_tie_without_the_input_embeddings_is_said(tmp_path: Path) -> None:
    options = LoRAConfig(r=2, target_modules=["middle"], trainable_token_indices={"labels": [3]})
    model = lr.adapt(TwoTables(), options)
    randomize(model)
    with pytest.warns(UserWarning, match="PEFT leaves alone what is tied to other .* here head"):
        lr.save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match="PEFT leaves alone what is tied to other .* here head"):
        loaded = lr.load_adapter(TwoTables(), tmp_path)
    ids = torch.arange(9)
    assert torch.equal(loaded(ids), model(ids))


def with_rows(make: Callable[[], nn.Module]) -> nn.Module:
    names = ["q_proj"] if make is not t5 else ["q"]
    options = LoRAConfig(r=2, target_modules=names, trainable_token_indices=[5, 2])
    model = lr.adapt(make(), options)
    randomize(model)
    return model.eval()


def weights_of(model: nn.Module) -> list[nn.Parameter]:
    modules = (m for m in model.modules() if isinstance(m, TokenRows | TiedTokenRows))
    return [module.weight for module in modules]


@pytest.mark.parametrize("merges", [lr.merge, lambda m: lr.unload(m, merge=True)])
@pytest.mark.parametrize("name", TIED)
def test_a_tie_that_was_lost_is_not_merged(name: str, merges: Callable[..., nn.Module]) -> None:
    """A merge would write the rows into the weight of one module alone."""
    source, model = with_rows(TIED[name]), with_rows(TIED[name])
    state = {key: value.clone() for key, value in source.state_dict().items()}
    model.load_state_dict(state, assign=True)
    expected = logits(source)
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match=r"^merge: .*lm_head.*weight must be the weight of .*tie_"):
        merges(model)
    assert torch.equal(logits(model), expected)
    model.load_state_dict(state)
    model.tie_weights()
    assert len(set(weights_of(model))) == 1
    merges(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TIED)
def test_ties_and_sizes_that_stay(name: str) -> None:
    model = with_rows(TIED[name])
    expected, weights = logits(model), set(weights_of(model))
    names = [key for key, _ in model.named_parameters()]
    model.tie_weights()
    assert model.resize_token_embeddings(VOCABULARY) is model.get_input_embeddings()
    assert torch.equal(logits(model), expected) and set(weights_of(model)) == weights
    assert [key for key, _ in model.named_parameters()] == names
    assert not any(weight.requires_grad for weight in weights)
    plain = lr.unload(model, merge=True)
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [VOCABULARY + 5, VOCABULARY - 7])
@pytest.mark.parametrize("name", TIED)
def test_a_resize_is_refused(name: str, size: int) -> None:
    model = with_rows(TIED[name])
    expected, modules = logits(model), list(model.modules())
    with pytest.raises(TypeError, match="TokenRows'>, which is not an instance of"):
        model.resize_token_embeddings(size)
    assert list(model.modules()) == modules and torch.equal(logits(model), expected)
    assert model.config.vocab_size == VOCABULARY


def test_a_resize_under_rows_of_a_head_is_refused() -> None:
    options = LoRAConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"lm_head": [5]})
    model = lr.adapt(llama(tied=True), options)
    with pytest.raises(ValueError, match=r"TokenRows: out_features must stay 67, .* got 72; call"):
        model.resize_token_embeddings(72, mean_resizing=False)


@pytest.mark.parametrize("base", [nn.Embedding(9, 4), nn.Linear(4, 9)], ids=["rows", "head"])
def test_the_weight_is_the_bases(base: nn.Module) -> None:
    module = TokenRows(base, [5])
    module.weight = weight = nn.Parameter(torch.ones(9, 4), requires_grad=False)
    assert base.weight is module.weight is weight and "weight" not in module._parameters
    message = r"TokenRows: the shape of the weight must stay \[9, 4\], .* got \[8, 4\]; call res"
    with pytest.raises(ValueError, match=message):
        module.weight = nn.Parameter(torch.ones(8, 4))
    assert base.weight is weight


def test_sizes_of_an_adapted_embedding() -> None:
    model = lr.adapt(llama(), LoRAConfig(r=2, target_modules=["embed_tokens"]))
    randomize(model)
    embedding, expected = model.model.embed_tokens, logits(model)
    assert model.resize_token_embeddings(VOCABULARY) is embedding
    model.tie_weights()
    assert torch.equal(logits(model), expected)
    with pytest.raises(TypeError, match="LoRAEmbedding'>, which is not an instance of"):
        model.resize_token_embeddings(72)
    for each in (embedding, with_rows(t5).shared):
        with pytest.raises(ValueError, match=r": num_embeddings must stay 67, .* got 72; call res"):
            each.num_embeddings = 72
        assert each.num_embeddings == VOCABULARY and each.embedding_dim == each.weight.shape[1]
    assert torch.equal(logits(model), expected)
