"""Adapters of every kind on the command line's tiny model, away from their start, in files."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import lowrank_ext as lr

IDS = torch.arange(40).view(2, 20) * 6


def load_plain(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


@torch.no_grad()
def save_adapter(base: Path, path: Path, config: Any, seed: int = 0, move: float = 0.05) -> Tensor:
    """Writes an adapter whose every trained tensor has been moved; returns the logits of IDS."""
    torch.manual_seed(seed)
    model = lr.adapt(load_plain(base), config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(move * torch.randn_like(parameter))
    model.eval()
    lr.save_adapter(model, path)
    return model(IDS).logits
