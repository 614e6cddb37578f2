"""A language model that the tests of the command line and of the guard load from a directory."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def save_byte_llama(path: Path, context: int, **sizes: int) -> None:
    """A two-layer Llama with a tokenizer that has one token per byte; `sizes` replace the tiny
    ones of its config."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*letters, "<eos>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(path)
    tiny = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        max_position_embeddings=context,
        tie_word_embeddings=True,
        **{**tiny, **sizes},
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(path)
