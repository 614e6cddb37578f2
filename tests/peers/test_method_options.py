"""The options that all methods share: a method is the same by lr.adapt and by PEFT."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import FAMILIES, base, logits, trained
from lora_sides import saved
from torch import Tensor

import lowrank_ext as lr
from lowrank_ext.registry import METHODS

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*trains without:UserWarning",
    "ignore:.*does not act where:UserWarning",
    "ignore::FutureWarning",
)
RANK = 8
NAMES: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "o_proj"]}
OPTIONS: dict[str, dict[str, Any]] = {
    "alpha": {"alpha": 12},
    "rslora": {"alpha": 12, "rslora": True},
    "rank_pattern": {**NAMES, "rank_pattern": {"o_proj": 16, "layers.0.self_attn.q_proj": 16}},
    "alpha_pattern": {**NAMES, "alpha_pattern": {r".*\.1\..*proj": 5, "o_proj": 7}},
    "a regular expression": {"target_modules": r"model\.layers\.\d\.self_attn\.[qvo]_proj"},
    "exclude_modules": {"exclude_modules": ["o_proj", "layers.0.mlp.up_proj"]},
    "layers_to_transform": {**NAMES, "layers_to_transform": [1], "layers_pattern": "layers"},
    "modules_to_save": {**NAMES, "modules_to_save": ["lm_head"]},
}
OWN = [name for name in METHODS if name != "LORA"]  # test_lora_options.py is LoRA's
PAIRS = [(o, m) for m in OWN for o in OPTIONS if (o, m) != ("rslora", "GOAT")]  # whose scale is it


def both(method: str, options: dict[str, Any], family: str = "llama") -> tuple[Any, Any]:
    """By lr.adapt and by PEFT, from one seed."""
    config = METHODS[method].config_class(r=RANK, **options)
    torch.manual_seed(3)
    ours = lr.adapt(base(family), config)
    torch.manual_seed(3)
    of_peft = lr.peft_config(config, task_type=FAMILIES[family].task_type)
    return ours, peft.get_peft_model(base(family), of_peft)


def check_files(ours: Any, theirs: Any, folder: Path) -> dict[str, Tensor]:
    found, expected = saved(ours, folder / "ours"), saved(theirs, folder / "theirs")
    assert found.keys() == expected.keys()
    assert [key for key in found if not torch.equal(found[key], expected[key])] == []
    return found


@pytest.mark.parametrize("method", OWN)
@pytest.mark.parametrize("family", FAMILIES)
def test_starts_alike(family: str, method: str, tmp_path: Path) -> None:
    ours, theirs = both(method, {"target_modules": FAMILIES[family].targets}, family)
    check_files(ours, theirs, tmp_path)
    assert torch.equal(logits(ours, family), logits(theirs, family))


@pytest.mark.parametrize(("options", "method"), PAIRS)
def test_trains_alike(options: str, method: str, tmp_path: Path) -> None:
    ours, theirs = both(method, OPTIONS[options])
    start = check_files(ours, theirs, tmp_path / "start")
    histories = []
    for model in (ours, theirs):
        torch.manual_seed(4)  # of masks
        histories.append(trained(model, "llama"))
    assert histories[0] == histories[1]
    after = check_files(ours, theirs, tmp_path)
    assert any(not torch.equal(after[key], start[key]) for key in start)
    again = lr.load_adapter(base("llama"), tmp_path / "theirs")
    by_peft = peft.PeftModel.from_pretrained(base("llama"), tmp_path / "ours")
    for model in (theirs, again, by_peft):
        assert torch.equal(logits(model, "llama"), logits(ours, "llama"))
