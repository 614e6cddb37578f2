"""A language model that the tests of the command line and of the guard load from a directory."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)


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


def save_as_gguf(source: Path, path: Path) -> None:
    """The model and tokenizer of `save_byte_llama` as a .gguf file in fp32."""
    import gguf

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    config, tokenizer = model.config, AutoTokenizer.from_pretrained(source)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(range(config.vocab_size)))
    writer.add_token_scores([0.0] * config.vocab_size)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        if name.endswith(
            ("q_proj.weight", "k_proj.weight")
        ):  # halves of a head's rows, interleaved
            rows, columns = tensor.shape
            halves = tensor.view(-1, 2, config.head_dim // 2, columns)
            tensor = halves.transpose(1, 2).reshape(rows, columns)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
