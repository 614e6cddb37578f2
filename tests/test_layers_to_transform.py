"""layers_to_transform and layers_pattern: PEFT's selection, and names that match no layer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from module_cases import ALL_METHODS, Method
from peft_models import gpt2, llama, randomize, token_ids
from torch import nn

pytest.importorskip("peft")

import peft

import lowrank_ext as lr
from lowrank_ext.nn import LowRankLinear


class Block(nn.Module):
    def __init__(self, numbered_inside: bool) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.layer = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)]) if numbered_inside else None
        self.v = nn.Linear(8, 8)


class Stacks(nn.Module):
    """Numbers inside of layers, a number at the start of a path, and modules outside of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.block = nn.ModuleList([Block(True) for _ in range(3)])
        self.decoder = nn.Module()
        self.decoder.layers = nn.ModuleList([Block(False) for _ in range(4)])
        self.q = nn.Linear(8, 8)


CASES: dict[str, dict[str, Any]] = {
    "several": {"layers_to_transform": [0, 2]},
    "one": {"layers_to_transform": 1},
    "range": {"layers_to_transform": range(1, 3)},
    "pattern": {"layers_to_transform": [3, 0], "layers_pattern": "layers"},
    "patterns": {"layers_to_transform": [1], "layers_pattern": ["layers", "block"]},
    "regex": {"layers_to_transform": [2], "layers_pattern": "(block|layers)"},
    "whole_path": {
        "layers_to_transform": [1],
        "target_modules": ["decoder.layers.3.v", "v", "q"],
    },
    "excluded": {"layers_to_transform": [0, 1], "exclude_modules": ["encoder.block.1.q"]},
    "numbers": {"layers_to_transform": {2, 1}, "target_modules": ["q", "0", "1"]},
}


def adapted(model: nn.Module) -> set[str]:
    return {path for path, m in model.named_modules() if isinstance(m, LowRankLinear)}


def adapted_by_peft(model: nn.Module, **options: Any) -> set[str]:
    if not isinstance(options.get("layers_to_transform"), int):
        options["layers_to_transform"] = list(options["layers_to_transform"])
    model = peft.get_peft_model(model, peft.LoraConfig(**options))
    found = (p for p, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer))
    return {path.removeprefix("base_model.model.") for path in found}


@pytest.mark.parametrize("case", CASES)
def test_selects_what_peft_selects(case: str) -> None:
    options = {"target_modules": ["q", "v"], **CASES[case]}
    model = lr.adapt(Stacks(), lr.LoRAConfig(r=2, **options))
    assert adapted(model) == adapted_by_peft(Stacks(), r=2, **options)
    values = json.loads(json.dumps(model.lowrank_config.to_dict()))
    assert lr.LoRAConfig.from_dict(values) == model.lowrank_config


@pytest.mark.parametrize("make", [llama, gpt2])
def test_models_of_transformers(make: Any, tmp_path: Path) -> None:
    """Ours and PEFT's from one seed give the same logits, and read each other's files."""
    names = ["q_proj", "down_proj"] if make is llama else ["c_attn"]
    options = {"target_modules": names, "layers_to_transform": [1], "r": 2}
    torch.manual_seed(3)
    model = lr.adapt(make(), lr.LoRAConfig(**options))
    torch.manual_seed(3)
    theirs = peft.get_peft_model(
        make(), peft.LoraConfig(lora_alpha=2, fan_in_fan_out=make is gpt2, **options)
    )
    for each in (model, theirs):
        randomize(each)
    ids = token_ids()
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=2e-5, atol=2e-5)
    lr.save_adapter(model, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path / "ours")
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=2e-5, atol=2e-5)
    loaded = lr.load_adapter(make(), tmp_path / "theirs")
    assert adapted(loaded) == adapted(model)
    torch.testing.assert_close(loaded(ids).logits, theirs(ids).logits, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("method", ALL_METHODS, ids=str)
def test_every_method(method: Method) -> None:
    options = method.options(2)
    config = method.config(
        r=2,
        init=method.init,
        target_modules=["v", "layers.1.q"],
        layers_to_transform=[1],
        layers_pattern="layers",
        **options,
    )
    model = lr.adapt(Stacks(), config)
    assert adapted(model) == {"decoder.layers.1.q", "decoder.layers.1.v"}
    made = lr.peft_config(config) if method.init != "pissa" else None
    if made is not None:
        assert (made.layers_to_transform, made.layers_pattern) == ([1], "layers")
        tuned = peft.get_peft_model(Stacks(), made)
        trained = {n.partition(".lora")[0] for n, p in tuned.named_parameters() if p.requires_grad}
        assert all(".layers.1." in name for name in trained) and len(trained) >= 2


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layers_to_transform": [1, 4]}, "layers_to_transform must name layers .* got 4, which"),
        (
            {"layers_to_transform": [1], "layers_pattern": ["layers", "blocks"]},
            "layers_pattern must match an adapted module .*'blocks', which matches none",
        ),
        (
            {"layers_to_transform": [7]},
            "target_modules must leave a linear .* in layers_to_transform=.7,. with",
        ),
        (
            {"layers_to_transform": [1], "target_modules": ["decoder.layers.3.v"]},
            "layers_to_transform must name layers .*'decoder.layers.3.v'.* got 1",
        ),
        (
            {"layers_to_transform": [3], "layers_pattern": ["block"]},
            "target_modules must leave a linear .*layers_pattern=.'block',",
        ),
    ],
)
def test_layers_that_the_model_lacks(options: dict[str, Any], message: str) -> None:
    model = Stacks()
    state = {name: (t.clone(), t.requires_grad) for name, t in model.named_parameters()}
    with pytest.raises(ValueError, match=f"adapt: {message}"):
        lr.adapt(model, lr.LoRAConfig(r=2, **{"target_modules": ["v"], **options}))
    assert not adapted(model) and not hasattr(model, "lowrank_config")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state[name][0]) and parameter.requires_grad == state[name][1]


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"layers_to_transform": [0]}, ValueError, "layers_to_transform must be None where target"),
        (
            {"layers_to_transform": 0, "target_modules": ".*q"},
            ValueError,
            "must be None where target_modules is a string, got '.*q'; give target_modules as a li",
        ),
        (
            {"layers_pattern": "h", "target_modules": ["q"]},
            ValueError,
            "layers_pattern must be None without layers_to_transform, got 'h'",
        ),
        ({"layers_to_transform": []}, ValueError, "must name at least one layer, got none"),
        ({"layers_to_transform": "1"}, TypeError, "must be a layer's number, or several, got '1'"),
        ({"layers_to_transform": [1.0]}, TypeError, "layers_to_transform must be an int, got 1.0"),
        ({"layers_to_transform": True}, TypeError, "layers_to_transform must be an int, got True"),
        ({"layers_to_transform": [-1]}, ValueError, "layers_to_transform must be at least 0"),
        (
            {"layers_to_transform": [1], "layers_pattern": ["("], "target_modules": ["q"]},
            ValueError,
            "layers_pattern must be a valid regular expression, got '\\('",
        ),
        (
            {"layers_to_transform": [1], "layers_pattern": [2], "target_modules": ["q"]},
            TypeError,
            "layers_pattern must hold non-empty strings, got 2",
        ),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=f"LaMDAConfig: .*{message}"):
        lr.LaMDAConfig(r=2, **options)
