"""RF-30: a vocabulary that is resized under an adapter of a tied head."""

import warnings
from pathlib import Path

import pytest
import torch
from peft_models import llama, randomize, token_ids
from transformers import LlamaForCausalLM

import lowrank_ext as lr


def resize(model: torch.nn.Module, size: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(size, mean_resizing=False)


def config(**options: object) -> lr.LoRAConfig:
    return lr.LoRAConfig(**{"r": 2, "target_modules": ["q_proj", "lm_head"], **options})


@pytest.mark.parametrize("size", [72, 60])
def test_resizing_under_an_adapter_is_refused(size: int, tmp_path: Path) -> None:
    model = lr.adapt(llama(tied=True), config())
    with pytest.raises(
        ValueError, match=r"LoRALinear: out_features must stay 67, .* before adapt or load_adapter"
    ):
        resize(model, size)
    with pytest.raises(ValueError, match=r"save_adapter: the weight of lm_head must be \[67, 32\]"):
        lr.save_adapter(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("saved", [(), ("embed_tokens",), ("model",)])
def test_new_rows_that_are_not_saved_are_said(saved: tuple[str, ...], tmp_path: Path) -> None:
    """PEFT saves the embeddings then: another resize of the base draws other rows."""
    llama().save_pretrained(tmp_path / "base")
    for size, expected in ((72, not saved), (67, False)):
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        resize(model, size)
        names = ["lm_head"] if saved == ("model",) else ["q_proj"]
        lr.adapt(model, config(target_modules=names, modules_to_save=saved))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            lr.save_adapter(model, tmp_path / "adapter")
        texts = [str(w.message) for w in said if "save_adapter: the vocabulary has" in str(w)]
        assert bool(texts) == expected
        assert not texts or "from 67 to 72" in texts[0]


def test_resizing_under_a_bank_is_refused(tmp_path: Path) -> None:
    lr.save_adapter(lr.adapt(llama(tied=True), config()), tmp_path)
    bank = lr.AdapterBank(model := llama(tied=True))
    bank.load("a", tmp_path)
    with pytest.raises(ValueError, match="MultiLoRALinear: out_features must stay 67"):
        resize(model, 72)


def test_the_ways_out_work(tmp_path: Path) -> None:
    model = llama(tied=True)
    resize(model, 72)
    lr.adapt(model, config())
    randomize(model)
    lr.save_adapter(model, tmp_path)
    model.resize_token_embeddings(72)  # the same size is none
    model.tie_weights()
    logits = model(input_ids=token_ids()).logits
    other = llama(tied=True)
    resize(other, 72)
    with torch.no_grad():
        other.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight)
    assert torch.equal(lr.load_adapter(other, tmp_path)(input_ids=token_ids()).logits, logits)
    lr.unload(model)
    resize(model, 80)
    assert model(input_ids=token_ids()).logits.shape[-1] == 80
    # an adapter that is not on the head minds nothing
    free = lr.adapt(llama(tied=True), config(target_modules=["q_proj"]))
    resize(free, 72)
    assert free(input_ids=token_ids()).logits.shape[-1] == 72
    lr.save_adapter(free, tmp_path / "free")
