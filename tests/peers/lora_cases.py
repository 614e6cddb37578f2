"""Every option of LoRA, a row for each: test_lora_options.py compares all ways to make it."""

from typing import Any

import torch
from lora_sides import Case

_RANKS = {"layers.0.self_attn.q_proj": 2, "v_proj": 3}
_ALPHAS = {r".*\.1\..*proj": 5, "o_proj": 7}
_GPT2: dict[str, Any] = {"target_modules": ["c_attn", "c_proj"]}
_ONE_LAYER = r"model\.layers\.1\.self_attn\.[qvo]_proj"
# PEFT starts by an SVD in float32 and below; lr.peft_config refuses such a start.
_BY_SVD: Any = {"by_svd": True, "dtype": torch.float32, "ways": ("accelerated", "adapt")}


CASES = {
    "plain": Case({}),
    "rank 1": Case({"r": 1}),
    "rank above the features": Case({"r": 40}),
    "alpha none": Case({"alpha": None}, {"lora_alpha": 4}),
    "alpha fractional": Case({"alpha": 2.5}),
    "rslora": Case({"rslora": True}),
    "rank_pattern": Case({"rank_pattern": _RANKS}),
    "alpha_pattern": Case({"alpha_pattern": _ALPHAS}),
    "patterns and rslora": Case({"rank_pattern": _RANKS, "alpha_pattern": _ALPHAS, "rslora": True}),
    "targets: all-linear": Case({"target_modules": "all-linear"}),
    "targets: a regular expression": Case({"target_modules": _ONE_LAYER}),
    "targets: paths": Case(
        {"target_modules": ["layers.1.self_attn.q_proj", "layers.0.mlp.up_proj"]}
    ),
    "layers_to_transform": Case({"layers_to_transform": [1]}),
    "layers_pattern": Case({"layers_to_transform": 0, "layers_pattern": "layers"}),
    "exclude: names": Case({"exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "exclude: a regular expression": Case({"exclude_modules": r".*\.0\..*"}),
    "dropout, off in evaluation": Case({"dropout": 0.3}, evaluates=True),
    "modules_to_save": Case({"modules_to_save": ["lm_head", "embed_tokens"]}),
    "gaussian": Case({"init": "gaussian"}),
    "pissa": Case({"init": "pissa"}, **_BY_SVD),
    "pissa, patterns and rslora": Case(
        {
            "init": "pissa",
            "rslora": True,
            "rank_pattern": {"v_proj": 3},
            "alpha_pattern": {"o_proj": 5},
        },
        **_BY_SVD,
    ),
    "pissa and Conv1D": Case({"init": "pissa", **_GPT2}, family="gpt2", **_BY_SVD),
    "Conv1D": Case(_GPT2, family="gpt2"),
    "Conv1D, all-linear": Case({"target_modules": "all-linear"}, family="gpt2"),
    "lora_bias": Case({"lora_bias": True}),
    "lora_bias and Conv1D": Case({"lora_bias": True, **_GPT2}, family="gpt2"),
    "bias: lora_only": Case({"bias": "lora_only", **_GPT2}, family="gpt2"),
    "bias: all": Case({"bias": "all", **_GPT2}, family="gpt2"),
    "dora": Case({"dora": True}),
    "dora, rslora and Conv1D": Case({"dora": True, "rslora": True, **_GPT2}, family="gpt2"),
    "embedding": Case({"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding, gaussian": Case({"target_modules": ["embed_tokens"], "init": "gaussian"}),
    "trainable_token_indices, scaled and tied": Case(
        {"trainable_token_indices": [7, 1]}, family="gemma3"
    ),
    "embedding, scaled and tied": Case(
        {"target_modules": ["embed_tokens", "q_proj"]}, family="gemma3"
    ),
    "Conv2d": Case(
        {"target_modules": ["projection", "q_proj"], "modules_to_save": ["classifier"]},
        family="vit",
    ),
    "trainable_token_indices": Case({"trainable_token_indices": [0, 5, 31]}),
    "trainable_token_indices, tied": Case(
        {"trainable_token_indices": [0, 5, 31], **_GPT2}, family="gpt2"
    ),
    "trainable_token_indices, by name": Case(
        {"trainable_token_indices": {"lm_head": [3, 4], "embed_tokens": [1]}}
    ),
    "target_parameters": Case(
        {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        family="mixtral",
        dtype=torch.float32,  # torch's grouped product has no float64
    ),
    "float32": Case({}, dtype=torch.float32),
    "bfloat16": Case({}, dtype=torch.bfloat16),
    "float16": Case({}, dtype=torch.float16),
    "adapters in bfloat16": Case(
        {"adapter_dtype": "base"},
        dtype=torch.bfloat16,
        get={"autocast_adapter_dtype": False},
        ways=("accelerated", "adapt"),
    ),
    # several together
    "dora, patterns, one layer": Case(
        {
            "dora": True,
            "rank_pattern": _RANKS,
            "alpha_pattern": {"o_proj": 7},
            "layers_to_transform": 0,
        }
    ),
    "dora, biases, a new head": Case(
        {"dora": True, "target_modules": "all-linear", "bias": "lora_only"}, family="bert"
    ),
    "dora and pissa": Case({"dora": True, "init": "pissa"}, **_BY_SVD),
    "lora_bias, bias, rslora": Case(
        {"lora_bias": True, "bias": "all", "rslora": True, **_GPT2}, family="gpt2"
    ),
    "embedding, rslora, patterns": Case(
        {
            "target_modules": ["embed_tokens", "q_proj"],
            "rslora": True,
            "rank_pattern": {"embed_tokens": 2},
            "alpha_pattern": {"embed_tokens": 5},
        }
    ),
    "embedding tied to the head": Case({"target_modules": ["wte", "c_attn"]}, family="gpt2"),
    "the head": Case({"target_modules": ["lm_head", "q_proj"]}),
    "tokens, a saved head": Case(
        {"trainable_token_indices": [1, 2], "modules_to_save": ["lm_head"]}
    ),
    "tokens of encoder and decoder": Case(
        {"trainable_token_indices": [1, 2], "target_modules": ["q", "v"]}, family="t5"
    ),
    "experts, rslora, patterns": Case(
        {
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
            "rslora": True,
            "rank_pattern": {"experts.down_proj": 2},
            "alpha_pattern": {"experts.gate_up_proj": 3},
        },
        family="mixtral",
        dtype=torch.float32,
    ),
}
