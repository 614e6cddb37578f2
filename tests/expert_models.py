"""Tiny models of transformers with experts stacked in parameters, of four layouts."""

from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

_SIZES = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
_LLAMA = dict(vocab_size=32, num_key_value_heads=1, pad_token_id=0, **_SIZES)
_MOE = dict(**_LLAMA, num_experts_per_tok=2, moe_intermediate_size=8)
_LATENT = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)
# Weights [E, N, K]; GPT-OSS: [E, K, N] with biases, gate and up alternating; DeepSeek: beside
# shared experts, which are linear modules with names of stacked weights.
EXPERT_MODELS: dict[str, dict[str, Any]] = {
    "MixtralForCausalLM": _LLAMA | dict(num_local_experts=4),
    "Qwen3MoeForCausalLM": _MOE | dict(num_experts=4, head_dim=8, decoder_sparse_step=1),
    "GptOssForCausalLM": _LLAMA | dict(num_local_experts=4, head_dim=8),
    "DeepseekV3ForCausalLM": _MOE
    | _LATENT
    | dict(n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=0),
}
GATE_UP, DOWN = "experts.gate_up_proj", "experts.down_proj"


def expert_model(
    name: str, implementation: str = "grouped_mm", dtype: torch.dtype = torch.float32, **sizes: Any
) -> nn.Module:
    """In evaluation mode, the same numbers every time, biases no zeros."""
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**EXPERT_MODELS[name], **sizes})).eval()
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draws))
    model.set_experts_implementation(implementation)
    return model.to(dtype)


def expert_tokens(rows: int = 2, length: int = 9) -> torch.Tensor:
    return torch.randint(1, 32, (rows, length), generator=torch.Generator().manual_seed(2))
