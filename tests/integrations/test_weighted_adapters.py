"""add_weighted_adapter of this library's methods: exact sums, by PEFT's name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

import peft
from test_peft_tuner import CONFIGS, OWN, close, llama, logits, peft_model

import lowrank_ext as lr
from lowrank_ext.integrations.peft_tuner.layer import LowRankTunerLayer

WITHOUT_SUM = ("goat", "reslora", "reslora-block")
SUMMED = [name for name in OWN if name not in WITHOUT_SUM]
WEIGHTS = {"default": 0.7, "second": -0.4}

pytestmark = pytest.mark.filterwarnings("ignore:.*trains without:UserWarning")


def two_adapters(name: str) -> Any:
    """A model with the adapters "default" and "second", both moved away from their start."""
    model = peft_model(name)
    torch.manual_seed(12)
    model.add_adapter("second", lr.peft_config(CONFIGS[name], task_type="CAUSAL_LM"))
    for number, adapter in enumerate(WEIGHTS):
        torch.manual_seed(number)
        model.set_adapter(adapter)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def layers(model: nn.Module) -> dict[str, LowRankTunerLayer]:
    return {p: m for p, m in model.named_modules() if isinstance(m, LowRankTunerLayer)}


@torch.no_grad()
def changes(layer: LowRankTunerLayer, name: str) -> Tensor:
    """What the adapter does to the weight that the base had before the first adapter, in fp64."""
    lora_a, lora_b = layer.method.file_format.lora_factors(layer.adapter(name))
    return layer.adapter(name).scaling * (lora_b.double() @ lora_a.double())


@pytest.mark.parametrize("name", SUMMED)
def test_the_sum_is_exact(name: str) -> None:
    model = two_adapters(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "mix")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    for layer in layers(model).values():
        expected = sum(weight * changes(layer, key) for key, weight in WEIGHTS.items())
        torch.testing.assert_close(changes(layer, "mix"), expected, rtol=1e-5, atol=1e-6)
    model.set_adapter("mix")
    dense = llama()
    with torch.no_grad():
        for path, layer in layers(model).items():
            weight = dense.get_parameter(f"{path.removeprefix('base_model.model.')}.weight")
            weight += changes(layer, "mix")
    close(logits(model), logits(dense))


@pytest.mark.parametrize("name", SUMMED)
def test_the_sum_trains_saves_and_loads(name: str, tmp_path: Path) -> None:
    model = two_adapters(name)
    model.add_weighted_adapter(list(WEIGHTS), list(WEIGHTS.values()), "mix")
    assert model.active_adapter == "second"
    model.set_adapter("mix")
    assert any(parameter.requires_grad for parameter in model.parameters())
    expected = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["mix"])
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "mix")
    close(logits(again), expected)
    close(logits(lr.load_adapter(llama(), tmp_path / "mix")), expected)
    model.delete_adapter("mix")
    assert set(model.peft_config) == set(WEIGHTS)


def test_one_adapter_and_other_modules() -> None:
    model = peft_model("aflora")
    config = lr.AFLoRAConfig(r=3, target_modules=["q_proj"])
    model.add_adapter("second", lr.peft_config(config, task_type="CAUSAL_LM"))
    for layer in layers(model).values():
        for adapter in layer.named_adapters().values():
            nn.init.normal_(adapter.out_scale)
    model.add_weighted_adapter(["second"], [2.0], "twice")
    assert sum("twice" in layer.adapters for layer in layers(model).values()) == 2
    model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "both")
    ranks = {path.rpartition(".")[2]: m.adapter("both").r for path, m in layers(model).items()}
    assert ranks["q_proj"] == 7 and ranks["v_proj"] == 4
    for layer in layers(model).values():
        expected = sum(changes(layer, k) for k in ("default", "second") if k in layer.adapters)
        torch.testing.assert_close(changes(layer, "both"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", WITHOUT_SUM)
def test_methods_without_a_sum(name: str) -> None:
    model = peft_model(name)
    with pytest.raises(ValueError, match="have no sum"):
        model.add_weighted_adapter(["default"], [1.0], "mix")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["default", "thrid"], [1.0, 1.0], "mix"), "must be some of .* got 'thrid'"),
        ((["default"], [1.0, 1.0], "mix"), "different names with a weight each"),
        ((["default", "default"], [1.0, 1.0], "mix"), "different names with a weight each"),
        (([], [], "mix"), "different names with a weight each"),
        ((["default"], [float("nan")], "mix"), "weights must be finite"),
        ((["default"], [1.0], "default"), "adapter_name must be new"),
        ((["default"], [1.0], "mix", "svd"), "combination_type must be 'cat'"),
    ],
)
def test_refused(arguments: tuple[Any, ...], message: str) -> None:
    model = peft_model("lamda")
    before = model.state_dict().keys()
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert model.state_dict().keys() == before and list(model.peft_config) == ["default"]


@pytest.mark.parametrize("config", [lr.LaMDAConfig, lr.AFLoRAConfig])
def test_adapters_of_different_modules(config: Any, tmp_path: Path) -> None:
    def of(*targets: str) -> Any:
        return lr.peft_config(config(r=4, target_modules=targets), task_type="CAUSAL_LM")

    model = peft.get_peft_model(llama(), of("q_proj", "v_proj"))
    model.add_adapter("second", of("v_proj", "o_proj"))
    for layer in layers(model).values():
        for adapter in layer.named_adapters().values():
            nn.init.normal_(adapter.lora_b, std=0.1)
            if adapter.out_scale is not None:
                nn.init.normal_(adapter.out_scale)
    model.add_weighted_adapter(["second", "default"], [0.5, 2.0], "mix")
    for layer in layers(model).values():
        pairs = (("second", 0.5), ("default", 2.0))
        expected = sum(w * changes(layer, key) for key, w in pairs if key in layer.adapters)
        torch.testing.assert_close(changes(layer, "mix"), expected, rtol=1e-5, atol=1e-6)
    model.set_adapter("mix")
    expected_logits = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["mix"])
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "mix")
    close(logits(again), expected_logits)


def test_adapters_without_values_have_no_sum_and_are_not_saved(tmp_path: Path) -> None:
    model = peft_model("aflora")
    model.save_pretrained(tmp_path)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    before = (tmp_path / "adapter_model.safetensors").read_bytes()
    waiting = peft.get_peft_model(llama(), config)
    with pytest.raises(RuntimeError, match="has no values"):
        waiting.add_weighted_adapter(["default"], [1.0], "mix")
    assert list(waiting.peft_config) == ["default"]
    with pytest.raises(RuntimeError, match="has no values"):
        waiting.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == before


def test_the_sum_has_the_dtype_of_its_summands() -> None:
    torch.manual_seed(11)
    config = lr.peft_config(CONFIGS["aflora"], task_type="CAUSAL_LM")
    base = llama(torch.bfloat16)
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    model.add_weighted_adapter(["default"], [1.0], "mix")
    for layer in layers(model).values():
        assert layer.adapter("mix").lora_a.dtype == torch.bfloat16
