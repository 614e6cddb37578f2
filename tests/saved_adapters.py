"""Adapters of every kind on the command line's tiny model, away from their start, in files."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowrank_ext as lr

LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
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


def save_different_adapters(base: Path, path: Path) -> None:
    """a and b, which are LoRAs, dora and goat, so far from the base that each says another text."""
    goat = lr.GOATConfig(r=4, num_experts=2)
    save_adapter(base, path / "a", lr.LoRAConfig(**LORA), seed=1, move=0.5)
    save_adapter(base, path / "b", lr.LoRAConfig(r=2), seed=2, move=0.5)
    save_adapter(base, path / "dora", lr.LoRAConfig(**LORA, dora=True), seed=3, move=0.5)
    save_adapter(base, path / "goat", goat, seed=4, move=1.0)


def save_chat_model(base: Path, path: Path) -> None:
    """The model with a tokenizer that has TEMPLATE."""
    load_plain(base).save_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)


def new_tokens(base: Path, adapter: Path | None, prompt: str, count: int) -> list[int]:
    """What transformers' own greedy search says after a text."""
    model = load_plain(base)
    if adapter is not None:
        model = lr.load_adapter(model, adapter, trainable=False)
    ids = AutoTokenizer.from_pretrained(base)(prompt, return_tensors="pt")
    found = model.generate(**ids, max_new_tokens=count, do_sample=False, eos_token_id=256)
    return found[0, ids.input_ids.shape[1] :].tolist()
