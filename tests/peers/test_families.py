"""Every method on a small model of every family: trains, saves, loads; LoRA is PEFT's."""

import copy
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import FAMILIES, base, logits, trained
from lora_sides import Case, check_start, check_values
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import lowrank_ext as lr
from lowrank_ext.registry import METHODS

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*trains without:UserWarning",
    "ignore:.*are not adapted:UserWarning",
    "ignore:.*does not act where:UserWarning",
    "ignore::FutureWarning",
)
RANK = 8
by_family = pytest.mark.parametrize("family", FAMILIES)


def adapted(family: str, method: str, by_peft: bool) -> Any:
    config = METHODS[method].config_class(r=RANK, target_modules=FAMILIES[family].targets)
    if not by_peft:
        return lr.adapt(base(family), config)
    of_peft = lr.peft_config(config, task_type=FAMILIES[family].task_type)
    return peft.get_peft_model(base(family), of_peft)


def frozen(model: nn.Module) -> dict[str, Tensor]:
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    state = model.state_dict(keep_vars=True)
    return {name: copy.deepcopy(t.detach()) for name, t in state.items() if name not in trains}


@pytest.mark.parametrize("by_peft", [False, True], ids=["adapt", "peft"])
@pytest.mark.parametrize("method", METHODS)
@by_family
def test_trains_saves_and_loads(family: str, method: str, by_peft: bool, tmp_path: Path) -> None:
    model = adapted(family, method, by_peft)
    at_rest = frozen(model)
    start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    history = trained(model, family)
    assert all(map(math.isfinite, history)) and history[-1] < history[0]
    moved = {
        name for name, p in model.named_parameters() if name in start and (p != start[name]).any()
    }
    assert any("lora" in name or "core" in name or "scale" in name for name in moved)
    after = frozen(model)
    assert at_rest.keys() == after.keys()
    assert [name for name in at_rest if not torch.equal(at_rest[name], after[name])] == []

    expected = logits(model, family)
    if by_peft:
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(base(family), tmp_path)
    else:
        lr.save_adapter(model, tmp_path)
        again = lr.load_adapter(base(family), tmp_path)
    assert torch.equal(logits(again, family), expected)
    assert not torch.allclose(expected, logits(base(family), family), atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_pefts_auto_class_finds_the_base(method: str, tmp_path: Path) -> None:
    base("llama").save_pretrained(tmp_path / "base")
    config = lr.peft_config(METHODS[method].config_class(r=RANK), task_type="CAUSAL_LM")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(loaded.requires_grad_(False), config)
    trained(model, "llama")
    model.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    again.requires_grad_(False)
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))


@by_family
def test_lora_starts_as_in_peft(family: str, tmp_path: Path) -> None:
    check_start(lora(family), tmp_path)


@by_family
def test_lora_computes_as_in_peft(family: str, tmp_path: Path) -> None:
    check_values(lora(family), tmp_path)


def lora(family: str) -> Case:
    own = {"target_modules": FAMILIES[family].targets, "modules_to_save": FAMILIES[family].heads}
    options = {"r": RANK, "alpha": 12, **own}
    return Case(options, family=family, dtype=FAMILIES[family].exact)


def test_modules_to_save_are_whole_names(tmp_path: Path) -> None:
    """PEFT takes any end of a path; its files load as they are."""
    config = peft.LoraConfig(r=RANK, target_modules=["q_proj"], modules_to_save=["norm"])
    theirs = peft.get_peft_model(base("llama"), config)
    trained(theirs, "llama")
    theirs.save_pretrained(tmp_path)
    ours = lr.adapt(
        base("llama"),
        lr.LoRAConfig(r=RANK, target_modules=["q_proj"], modules_to_save=["norm"]),
    )

    def norms(model: nn.Module) -> set[str]:
        trains = {key for key, p in model.named_parameters() if p.requires_grad and "norm" in key}
        return {
            key.removeprefix("base_model.model.").split(".modules_to_save")[0] for key in trains
        }

    assert norms(ours) == {"model.norm.weight"}
    assert {"model.norm", "model.layers.0.input_layernorm"} < norms(theirs)
    again = lr.load_adapter(base("llama"), tmp_path)
    torch.testing.assert_close(logits(again, "llama"), logits(theirs, "llama"))


def test_experts_and_routers_of_pefts_all_linear(tmp_path: Path) -> None:
    """PEFT adapts them in Mixtral; here experts are named in a warning, and routers refused."""
    config = peft.LoraConfig(r=RANK, target_modules="all-linear")
    model = peft.get_peft_model(base("mixtral"), config)
    named = set(model.peft_config["default"].target_parameters)
    assert named == {"gate.weight", "gate_up_proj", "down_proj"}
    with pytest.warns(
        UserWarning, match=r"target_parameters=\['experts\.down_proj', 'experts\.gate"
    ):
        lr.adapt(base("mixtral"), lr.LoRAConfig(r=RANK))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"target_parameters must name stacked .*gate\.weight"):
        lr.load_adapter(base("mixtral"), tmp_path)
