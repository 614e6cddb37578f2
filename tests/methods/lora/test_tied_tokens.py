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
from peft_models import VOCABULARY, randomize, token_ids
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


def config(name: str, indices: Any) -> LoRAConfig:
    return LoRAConfig(r=2, target_modules=[MODELS[name][1]], trainable_token_indices=indices)


def logits(model: nn.Module) -> Tensor:
    ids = token_ids()
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
