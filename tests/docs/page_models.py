"""Small models and data that the pages' hidden blocks give the names used on the page."""

from pathlib import Path

import diffusers
import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

VOCABULARY = 97


def llama() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def mixtral() -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        pad_token_id=0,
    )
    return MixtralForCausalLM(config).eval()


def saved_llama(path: str) -> str:
    """The directory, with a checkpoint in it."""
    llama().save_pretrained(path)
    return str(Path(path).resolve())


def token_batch(rows: int = 2, length: int = 9) -> dict[str, Tensor]:
    """A batch as a collator makes it, its last row padded on the right."""
    ids = torch.randint(1, VOCABULARY, (rows, length))
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def token_rows(count: int = 4) -> list[dict[str, Tensor]]:
    """A data set for transformers' Trainer."""
    return [{name: t[0] for name, t in token_batch(1).items()} for _ in range(count)]


def unet(cross_attention_dim: int = 32) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        norm_num_groups=8,
        attention_head_dim=8,
    )


def clip_vision(hidden_size: int, image_size: int, patch_size: int) -> nn.Module:
    config = CLIPVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=patch_size,
    )
    return CLIPVisionModel(config).eval()
