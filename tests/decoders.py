"""Tiny decoder-only models of several families of transformers, with weights that matter."""

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

VOCABULARY = 32
_SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=4, vocab_size=VOCABULARY)
_HEADS = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=8)
_TEXT = dict(max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=0)
_OPT_SIZES = dict(ffn_dim=24, word_embed_proj_dim=16, num_attention_heads=2)
_GPT2_SIZES = dict(n_embd=16, n_layer=4, n_head=2, n_positions=64)
_SLIDING = dict(sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 2)
_NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
_LLAMA_LIKE: dict[str, Any] = {**_SIZES, **_HEADS, **_TEXT}

# Class of the config, class of the model, options.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaConfig", "LlamaForCausalLM", _LLAMA_LIKE),
    "Qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _LLAMA_LIKE),
    "Qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _LLAMA_LIKE),
    "Gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_LLAMA_LIKE, **_SLIDING}),
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**_LLAMA_LIKE, **_SLIDING}),
    "Mistral": ("MistralConfig", "MistralForCausalLM", {**_LLAMA_LIKE, "sliding_window": 4}),
    "GPTNeoX": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**_SIZES, **_TEXT, **_HEADS}),
    "Phi": ("PhiConfig", "PhiForCausalLM", _LLAMA_LIKE),
    "OLMo": ("OlmoConfig", "OlmoForCausalLM", _LLAMA_LIKE),
    "OPT": ("OPTConfig", "OPTForCausalLM", {**_SIZES, **_TEXT, **_OPT_SIZES}),
    "GPT2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {**_TEXT, **_GPT2_SIZES, **_NO_DROPOUT, "vocab_size": VOCABULARY},
    ),
    "Mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_LLAMA_LIKE, "num_local_experts": 3}),
}


def decoder(family: str = "Llama", **options: Any) -> PreTrainedModel:
    """Four layers in evaluation mode, the same numbers every time. Biases and gains are no zeros
    and ones, but equal in all layers, as no adapter could make up for their differences."""
    config_class, model_class, own = FAMILIES[family]
    config = getattr(transformers, config_class)(**{**own, **options})
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            seed = sum(map(ord, name if parameter.dim() > 1 else name.split(".")[-2]))
            draws = torch.Generator().manual_seed(seed)
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=draws))
    return model


def tokens(rows: int = 2, length: int = 7) -> torch.Tensor:
    """Token ids [rows, length], none of them special."""
    draws = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (rows, length), generator=draws)


def checkpoint_activations(model: PreTrainedModel, reentrant: bool) -> None:
    # transformers renamed it.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
