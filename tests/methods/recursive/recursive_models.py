"""Small recursive models for tests."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lowrank_ext as lr

VOCABULARY = 61


def tiny_llama(**options) -> LlamaForCausalLM:
    """Six layers; weights large enough that next tokens differ from token to token."""
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=6, vocab_size=VOCABULARY)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    ends = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    torch.manual_seed(0)
    config = LlamaConfig(**{**sizes, **heads, **ends, "initializer_range": 0.2, **options})
    return LlamaForCausalLM(config).eval()


def tiny_recursive(num_loops: int = 3, rank: int = 4, **options) -> LlamaForCausalLM:
    config = lr.recursive.RecursiveConfig(num_loops=num_loops, rank=rank)
    model = lr.recursive.convert(tiny_llama(**options), config)
    for name, parameter in model.named_parameters():
        if "lora_b" in name:  # loops that differ
            with torch.no_grad():
                parameter.normal_(std=0.2)
    return model


def prompts(count: int = 7) -> list[list[int]]:
    """Token ids, of unlike lengths."""
    generator = torch.Generator().manual_seed(1)
    lengths = [3, 9, 1, 5, 17, 2, 8]
    return [
        torch.randint(VOCABULARY, (lengths[i % 7],), generator=generator).tolist()
        for i in range(count)
    ]
