"""A method is one folder: one defined here works everywhere, without an edit anywhere else."""

import dataclasses
import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from byte_llama import save_byte_llama
from module_cases import IDS, TinyLM
from torch import nn
from typer.testing import CliRunner

import lowrank_ext as lr
from lowrank_ext.adapter_format import AdapterFormat
from lowrank_ext.cli import main
from lowrank_ext.config import AdapterConfig, config_names
from lowrank_ext.nn import LowRankLinear
from lowrank_ext.nn.init import draw_lora_a
from lowrank_ext.recipe import Option, Recipe, at_least
from lowrank_ext.registry import METHODS, Method, register, unregister

PACKAGE = Path(lr.__file__).parent


@dataclass(kw_only=True, frozen=True)
class ToyConfig(AdapterConfig):
    """LoRA with a trained factor for each rank."""

    peft_type: ClassVar[str] = "TOY"
    inits: ClassVar[tuple[str, ...]] = ("kaiming",)
    own_fields: ClassVar[tuple[str, ...]] = ("init", "start")

    init: str = "kaiming"
    start: int = 1

    def adapter_shapes(self, r: int, in_features: int, out_features: int) -> dict[str, list[int]]:
        return {**super().adapter_shapes(r, in_features, out_features), "toy_scale": [r]}

    def must_agree(self) -> dict[str, Any]:
        return {"start": self.start}


class ToyLinear(LowRankLinear):
    """y = x Wᵀ + bias + scaling · lora_b (toy_scale ⊙ lora_a x)."""

    config_class = ToyConfig

    config: ToyConfig
    toy_scale: nn.Parameter

    def _make_adapter(self, dtype: torch.dtype, device: torch.device) -> None:
        super()._make_adapter(dtype, device)
        self.toy_scale = nn.Parameter(torch.zeros(self.r, dtype=dtype, device=device))

    def _init_adapter(self) -> None:
        self.lora_a.copy_(draw_lora_a(self))
        self.lora_b.zero_()
        self.toy_scale.fill_(self.config.start)

    def branch_factors(self, training: bool) -> tuple[torch.Tensor, torch.Tensor]:
        return self.toy_scale.unsqueeze(1) * self.lora_a, self.lora_b


TOY = Method(
    config_class=ToyConfig,
    module_class=ToyLinear,
    file_format=AdapterFormat({"toy_scale": "lora_toy_scale.weight"}),
    recipes=(
        Recipe(
            name="toy",
            learning_rate=0.01,
            config=lambda shared, run: ToyConfig(**shared, start=run.options["toy_start"]),
            options=(
                Option(
                    name="toy_start",
                    type=int,
                    default=1,
                    help="toy: start of the factors.",
                    check=at_least(1),
                ),
            ),
            describe=lambda run: f"toy factors start at {run.options['toy_start']}",
        ),
    ),
)


@pytest.fixture(autouse=True)
def toy() -> Iterator[None]:
    register(TOY)
    yield
    unregister(TOY)


def trained(model: nn.Module) -> nn.Module:
    """The model with adapters that no init gives."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape) / 8)
    return model


def test_adapts_and_is_summarized() -> None:
    model = TinyLM()
    expected = model(IDS)
    lr.adapt(model, ToyConfig(r=3, target_modules=["q_proj"]))
    assert torch.equal(model(IDS), expected)
    layer = model.layers[0].q_proj
    assert type(layer) is lr.nn.ToyLinear and "ToyLinear" in dir(lr.nn)
    assert layer.toy_scale.requires_grad
    assert lr.trainable_parameters(model).trainable == 2 * (3 * 8 + 3 * 8 + 3)
    assert "Toy" in [str(cell) for cell in lr.summary(model).columns[1].cells]
    assert "ToyConfig" in config_names()


def test_merges_and_unmerges_bit_for_bit() -> None:
    model = trained(lr.adapt(TinyLM(dtype=torch.float64), ToyConfig(r=3, adapter_dtype="base")))
    weight, expected = model.layers[0].q_proj.weight.clone(), model(IDS)
    torch.testing.assert_close(lr.merge(model)(IDS), expected)
    assert torch.equal(lr.unmerge(model).layers[0].q_proj.weight, weight)


def test_saves_and_loads(tmp_path: Path) -> None:
    base = TinyLM().state_dict()
    model = trained(lr.adapt(TinyLM(), ToyConfig(r=3, start=2)))
    for name, tensor in base.items():
        model.get_parameter(name).data.copy_(tensor)
    lr.save_adapter(model, tmp_path)
    other = TinyLM()
    other.load_state_dict(base)
    lr.load_adapter(other, tmp_path)
    assert torch.equal(other(IDS), model(IDS))
    assert other.lowrank_config.start == 2
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (fields["peft_type"], fields["start"]) == ("TOY", 2)
    with pytest.raises(ValueError, match="start must be 1 as in the model, got 2"):
        lr.load_adapter(lr.adapt(TinyLM(), ToyConfig(r=3)), tmp_path)


def test_config_goes_through_a_dictionary() -> None:
    config = ToyConfig(r=3, start=4)
    assert AdapterConfig.from_dict(config.to_dict()) == config


def test_one_module_names_itself_in_errors() -> None:
    with pytest.raises(ValueError, match=r"^ToyLinear: r must be at least 1, got 0"):
        ToyLinear.from_linear(nn.Linear(4, 3), r=0)


def test_is_on_the_command_line(tmp_path: Path) -> None:
    app = importlib.reload(main).app  # options are read when the command is made
    help_text = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["finetune", "--help"]).output
    assert "--toy-start" in help_text and "toy: start of the factors." in help_text
    save_byte_llama(tmp_path / "model", context=64)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n} times {n} is {n * n}; " for n in range(400)))
    options = f"--model {tmp_path / 'model'} --text {text} --rank 4 --steps 2 --batch 2"
    options += f" --seq-len 16 --eval-batches 1 --dtype fp32 --out {tmp_path / 'out'}"
    run = ["finetune", "--method", "toy", *options.split()]
    result = CliRunner().invoke(app, [*run, "--toy-start", "3"])
    assert result.exit_code == 0, result.output
    assert "toy factors start at 3" in result.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["settings"]["toy_start"] == 3
    (row,) = report["methods"]
    assert (row["method"], row["learning_rate"]) == ("toy", 0.01)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    failed = CliRunner().invoke(app, [*run, "--toy-start", "0"])
    assert failed.exit_code == 2 and "--toy-start must be at least 1, got 0" in failed.stderr


def test_what_is_not_registered_is_neither_saved_nor_adapted(tmp_path: Path) -> None:
    model = lr.adapt(TinyLM(), ToyConfig(r=3))
    lr.save_adapter(model, tmp_path / "saved")
    unregister(TOY)
    try:
        with pytest.raises(TypeError, match=r"config must be a LoRAConfig, .* got ToyConfig"):
            lr.adapt(TinyLM(), ToyConfig(r=3))
        with pytest.raises(ValueError, match="the method of ToyConfig must be registered, got LO"):
            lr.save_adapter(model, tmp_path / "other")
        with pytest.raises(ValueError, match=r"peft_type must be one of 'LORA', .* got 'TOY'"):
            lr.load_adapter(TinyLM(), tmp_path / "saved")
    finally:
        register(TOY)
    assert not (tmp_path / "other").exists()


def test_names_are_taken_once() -> None:
    with pytest.raises(ValueError, match="peft_type must be new, got 'TOY' again"):
        register(TOY)

    @dataclass(kw_only=True, frozen=True)
    class OtherConfig(ToyConfig):
        peft_type: ClassVar[str] = "OTHER"

    class OtherLinear(ToyLinear):
        config_class = OtherConfig

    def other(**changes: Any) -> Method:
        return Method(**{"config_class": OtherConfig, "module_class": OtherLinear, **changes})

    with pytest.raises(TypeError, match=r"ToyLinear\.config_class must be OtherConfig"):
        register(other(module_class=ToyLinear))
    with pytest.raises(ValueError, match="the module's name must be new, got 'LoRALinear' again"):
        register(other(module_class=type("LoRALinear", (OtherLinear,), {})))

    with pytest.raises(ValueError, match="names of recipes must be new, got 'toy' again"):
        register(other(recipes=TOY.recipes))
    with pytest.raises(ValueError, match=r"toy_scale must be called 'lora_toy_scale\.weight'"):
        register(other(file_format=AdapterFormat({"toy_scale": "lora_factor.weight"})))
    with pytest.raises(ValueError, match=r"'lora_toy_scale\.weight' must be toy_scale"):
        register(other(file_format=AdapterFormat({"factor": "lora_toy_scale.weight"})))
    (recipe,) = TOY.recipes
    option = dataclasses.replace(recipe.options[0], default=2)
    changed = dataclasses.replace(recipe, name="other", options=(option,))
    with pytest.raises(ValueError, match="option 'toy_start' must be int with the default 1 as el"):
        register(other(recipes=(changed,)))
    assert "OTHER" not in METHODS
