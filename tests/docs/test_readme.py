"""The lines in the README's table of methods, as a reader would type them."""

import re
from pathlib import Path

import diffusers
import peft
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import lowrank_ext as lr

README = Path(__file__).parents[1] / "README.md"
STARTS_OFF_BASE = "GOAT"  # its SVD start has the base's output on average only


def table_rows() -> list[list[str]]:
    """The lines of code in the last cell of each row whose first cell links to a page."""
    rows = [line for line in README.read_text().splitlines() if line.startswith("| [")]
    return [re.findall(r"`(lr\.[^`]+)`", row.strip("| ").split(" | ")[-1]) for row in rows]


def llama() -> nn.Module:
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        norm_num_groups=8,
        attention_head_dim=8,
    )


@pytest.mark.parametrize("lines", table_rows(), ids=lambda lines: lines[0])
def test_lines_of_the_table(lines: list[str]) -> None:
    model = llama()
    names = {"lr": lr, "model": model}
    if "unet" in lines[0]:
        names["unet"] = unet()
    if "peft_model" in lines[0]:
        names["peft_model"] = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    ids = torch.randint(1, 97, (2, 9))
    with torch.no_grad():
        base = model(ids).logits
        for line in lines:
            assert eval(line, names) is not None
        if STARTS_OFF_BASE not in lines[0]:
            torch.testing.assert_close(model(ids).logits, base)


def test_every_page_is_linked() -> None:
    linked = set(re.findall(r"docs/methods/(\w+\.md)", README.read_text()))
    assert linked == {page.name for page in README.parent.glob("docs/methods/*.md")}
    assert len(table_rows()) == len(linked) + 1  # and lr.accelerate, which is no method
