"""Writes a model without adapters, its generation config and its tokenizer into a directory, as
transformers reads them."""

from pathlib import Path
from typing import Any

import torch

from lowrank_ext.cli.models import CausalLM
from lowrank_ext.merging import forget_quantization


def save_whole_model(
    model: CausalLM, tokenizer: Any, directory: Path, max_shard_size: str = "50GB"
) -> None:
    """Writes weights (safetensors), config, generation config, tokenizer and chat template.

    The config says of the files what holds for them: no GGUF, no quantization, and tied embeddings
    only where they are tied.
    """
    forget_quantization(model)
    _say_untied(model)
    _make_valid(model.generation_config)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(directory)


def _say_untied(model: CausalLM) -> None:
    """Has the config say that the head has a weight of its own, where it has."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or _same_memory(head.weight, embeddings.weight):
        return
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _make_valid(generation: Any) -> None:
    """Published configs may have a temperature without sampling, which transformers loads but does
    not write."""
    if generation is None:
        return
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True
