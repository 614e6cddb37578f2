"""Options of the methods on the command line: what is adapted, how it starts and learns."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("typer")
pytest.importorskip("transformers")

from finetune_runs import check_error, invoke, report, resume, rows, small_run, stop_at

from lowrank_ext.cli import finetune
from lowrank_ext.cli.methods import entry
from lowrank_ext.cli.models import find_model, load_model
from lowrank_ext.cli.settings import Settings, method_options
from lowrank_ext.cli.targets import parse_layers

pytestmark = pytest.mark.usefixtures("quick_runs")

Built = Callable[..., tuple[nn.Module, Settings]]


@pytest.fixture
def built(settings_of: Callable[..., Settings], tiny_model: Path) -> Built:
    """The adapted model of a run's first step, and its settings."""

    def built(method: str, *arguments: str) -> tuple[nn.Module, Settings]:
        small = ("--model", str(tiny_model), "--method", method, "--seq-len", "64")
        rank = () if method == "full" else ("--rank", "4")
        experts = ("--experts", "2", "--top-k", "1") if method in ("goat", "moe-lora") else ()
        settings = settings_of(*small, *rank, *experts, *arguments)
        torch.manual_seed(0)
        model = load_model(find_model(str(tiny_model)), torch.float32).model
        return entry(method).build(model, settings), settings

    return built


@pytest.mark.parametrize(
    ("method", "arguments", "expected"),
    [
        ("lora", "--rslora --alpha 8", {"rslora": True, "alpha": 8.0}),
        ("lora", "--init pissa", {"init": "pissa"}),
        ("lora", "--init gaussian --dora", {"init": "gaussian", "dora": True}),
        ("lora", "--lora-bias", {"bias": "none", "lora_bias": True}),
        ("lora", "--no-dora", {"dora": False, "init": "kaiming"}),
        ("lora", "--exclude k_proj,up_proj", {"exclude_modules": ("k_proj", "up_proj")}),
        ("aflora", "--exclude .*mlp.*", {"exclude_modules": ".*mlp.*"}),
        ("lora", "--targets q_proj,v_proj --layers 1", {"layers_to_transform": (1,)}),
        ("lamda", "--modules-to-save norm", {"modules_to_save": ("norm",)}),
        ("lamda", "--init svd_zero_core", {"init": "svd_zero_core", "rank_budget": None}),
        ("lamda", "--no-train-lora-b", {"train_lora_b": False}),
        ("lamda++", "--rank-budget params", {"rank_budget": "params"}),
        ("lamda++", "--direction concentrated_gets_more", {"direction": "concentrated_gets_more"}),
        ("goat", "--scale theory --eta 0.5", {"scale": "theory", "eta": 0.5, "init": "goat"}),
        ("goat", "--rho 5 --residual-factor 0.2", {"rho": 5.0, "residual_factor": 0.2}),
        ("goat", "--init goat_mini --shared-dropout", {"init": "goat_mini"}),
        ("moe-lora", "--shared-dropout", {"shared_dropout": True, "init": "zero"}),
        ("aflora", "--rank-scale-init 0.5", {"rank_scale_init": 0.5, "live_modules": None}),
        ("aflora", "--live-modules q_proj,v_proj", {"live_modules": ("q_proj", "v_proj")}),
        ("reslora-bs", "--pre-num -1 --shared-dropout", {"pre_num": -1, "shared_dropout": True}),
        ("reslora-ms", "--pre-num 1", {"pre_num": 1, "shortcut": "middle"}),
        ("set-and-sequence", "--basis up --init gaussian", {"basis": "up", "init": "gaussian"}),
        ("set-and-sequence", "--coef-dropout 0.2 --mask-per sample", {"coef_dropout": 0.2}),
        ("set-and-sequence", "--no-mask-rescale --mask-identity", {"mask_rescale": False}),
        ("set-and-sequence", "--residual-coef-dropout 0", {"residual_coef_dropout": 0.0}),
    ],
)
def test_options_are_in_the_config(
    built: Built, method: str, arguments: str, expected: dict[str, Any]
) -> None:
    model, _ = built(method, *arguments.split())
    config = model.lowrank_config
    assert {name: getattr(config, name) for name in expected} == expected


def test_every_option_of_a_method_is_tested_here_or_in_its_own_tests() -> None:
    text = Path(__file__).read_text() + Path(__file__).with_name("test_cli.py").read_text()
    for option in method_options():
        flag = option.name.replace("_", "-")
        assert any(word in text for word in (f"--{flag}", f"--no-{flag}", f'"{option.name}"'))


@pytest.mark.parametrize("method", ["lora", "peft-lora", "peft-lora-accelerated"])
def test_peft_gets_the_same_options(built: Built, method: str) -> None:
    words = "--targets q_proj,v_proj --layers 1 --rslora --init gaussian --modules-to-save norm"
    model, _ = built(method, *words.split(), "--dora", "--alpha", "8")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".layers.")[1][0] for name in trained if "layers" in name} == {"1"}
    assert any(".norm." in name for name in trained)
    assert any("magnitude" in name for name in trained)
    if method != "lora":
        config = model.peft_config["default"]
        assert (config.use_rslora, config.init_lora_weights, config.bias) == (
            True,
            "gaussian",
            "none",
        )
        assert config.layers_to_transform == [1] and config.use_dora


@pytest.mark.parametrize("method", ["lora", "peft-lora"])
def test_lora_plus(built: Built, method: str) -> None:
    model, settings = built(method, "--lora-plus-ratio", "8")
    groups = entry(method).training.parameter_groups(model, settings)
    assert [factor for _, factor in groups] == [8.0]
    found = {id(parameter) for parameters, _ in groups for parameter in parameters}
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert found == {id(p) for name, p in trained if "lora_b" in name.lower()}
    assert len(found) == len(trained) // 2
    model, settings = built(method)
    assert entry(method).training.parameter_groups(model, settings) == []


def test_biases(settings_of: Callable[..., Settings]) -> None:
    """The model of these tests has none."""
    settings = settings_of("--bias", "lora_only")
    config = entry("lora").recipe.config(settings.config_fields("lora"), settings)
    assert config.base_biases == "adapted"


def test_core_rate(built: Built) -> None:
    model, settings = built("lamda", "--core-lr-ratio", "3")
    ((cores, factor),) = entry("lamda").training.parameter_groups(model, settings)
    assert factor == 3.0 and len(cores) == len({id(core) for core in cores}) > 0
    assert {tuple(core.shape) for core in cores} == {(4, 4)}


def test_betas_of_aflora(built: Built) -> None:
    model, settings = built("aflora", "--freeze-beta1", "0.5", "--freeze-beta2", "0")
    schedule = entry("aflora").training.schedule(model, settings)
    assert (schedule.beta1, schedule.beta2) == (0.5, 0.0)


@pytest.mark.parametrize(
    ("text", "numbers"), [(None, None), ("3", [3]), ("4-6, 0,5", [0, 4, 5, 6]), ("2-2", [2])]
)
def test_layers(text: str | None, numbers: list[int] | None) -> None:
    assert parse_layers(text) == numbers


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--layers 0-", "--layers must be numbers and ranges separated by commas"),
        ("--layers 5-3", "--layers must be numbers and ranges"),
        ("--layers ,", "--layers must be numbers and ranges"),
        (
            "--layers 0,1",
            "--layers needs names in --targets, as in --targets q_proj,v_proj, got --targets all-",
        ),
        ("--method peft-lora --layers 0 --targets .*q_proj", "got --targets .*q_proj"),
        ("--exclude q(", "--exclude 'q(' is not a regular expression"),
        ("--init pisa", "LoRAConfig: init must be one of"),
        ("--init pissa --lora-bias", "lora_bias must be False with init='pissa'"),
        ("--method peft-lora --init svd_residual", "cannot set up PEFT's LoRA"),
        ("--dora --lora-bias", "lora_bias must be False with dora=True"),
        ("--bias some", "bias must be one of"),
        ("--lora-plus-ratio 0", "--lora-plus-ratio must be a positive number, got 0.0"),
        ("--method goat --rslora", "GOATConfig: rslora must be False, scale says how"),
        ("--method goat --scale theory --alpha 4", "alpha must be None with scale='theory'"),
        ("--method goat --eta 0", "--eta must be a positive number"),
        ("--method goat --rho nan", "--rho must be a positive number"),
        ("--method goat --residual-factor -1", "--residual-factor must be at least 0"),
        ("--method lamda --init pissa", "LaMDAConfig: init must be one of"),
        ("--method lamda --init lora --no-train-lora-b", "train_lora_b must be True"),
        ("--method lamda --core-lr-ratio -1", "--core-lr-ratio must be a positive number"),
        ("--method lamda --rank-budget rank", "--rank-budget is of lamda++; the run has lamda"),
        ("--method lamda++ --rank-budget ranks", "rank_budget must be one of"),
        ("--method aflora --freeze-beta1 1", "--freeze-beta1 must be at least 0 and below 1"),
        ("--method aflora --rank-scale-init 0", "--rank-scale-init must be a positive number"),
        ("--method reslora-bs --pre-num 0", "--pre-num must be at least 1, or -1 for all, got 0"),
        ("--method reslora-is --pre-num 2", "--pre-num is of reslora-bs, reslora-ms; the run has"),
        ("--method moe-lora --rho 2", "--rho is of goat; the run has moe-lora"),
        ("--method set-and-sequence --basis left", "basis must be one of"),
        ("--method lamda --dora", "--dora is of peft-lora, peft-lora-accelerated, lora; the run"),
        ("--compare frozen,full --rslora", "--rslora is of methods with adapters; the run has"),
        ("--method frozen --lr 1e-3", "--lr is of methods that train; the run has frozen"),
        ("--method frozen --min-lr 1e-5", "--min-lr is of methods that train; the run has frozen"),
    ],
)
def test_refused_before_anything_is_loaded(
    arguments: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "run", lambda *settings, **more: pytest.fail("it would run"))
    check_error(invoke("finetune", *arguments.split(), "--out", str(tmp_path / "out")), words)


@pytest.mark.parametrize(
    ("method", "rank", "limit"),
    [
        ("lora", 5000, "max(in_features, out_features, 512) = 512"),
        ("goat", 66, "min(in_features, out_features)=64"),
        ("set-and-sequence", 66, "min(in_features, out_features)=64"),
    ],
)
def test_an_error_of_the_rank_names_its_option(
    run: Any, method: str, rank: int, limit: str
) -> None:
    result = run(method=method, rank=rank)
    check_error(
        result, f"cannot set up {method}: ", f"--rank must be at most {limit}", f"got {rank}"
    )


@pytest.mark.parametrize("method", ["lora", "peft-lora"])
def test_a_run_with_these_options_is_continued(
    method: str, tiny_model: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped and continued it gives the numbers of a whole one, with the options of its file."""
    words = "--init pissa --rslora --lora-plus-ratio 4 --exclude up_proj --modules-to-save norm"
    arguments = small_run(model=tiny_model, text=text_file, method=method, steps=4)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert invoke("finetune", *arguments, *words.split(), "--out", str(whole)).exit_code == 0
    with monkeypatch.context() as patch:
        stop_at(patch, step=2)
        stopped = invoke("finetune", *arguments, *words.split(), "--out", str(parts))
    assert stopped.exit_code == 130
    assert resume(parts, "--init", "pissa", "--rslora").exit_code == 0
    assert rows(parts)[method]["losses"] == rows(whole)[method]["losses"]
    assert report(parts)["settings"]["lora_plus_ratio"] == 4.0
    check_error(resume(parts, "--init", "gaussian"), "--init was pissa, got gaussian")
    check_error(resume(parts, "--no-dora", "--dora"), "--dora was False, got True")
