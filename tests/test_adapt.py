"""adapt, its matching rules and its reports, on plain torch and transformers models."""

import copy
import dataclasses
import io
import json

import pytest
import torch
from module_cases import (
    ALL_METHODS,
    IDS,
    STARTS_AT_BASE,
    ZERO_BRANCH,
    Block,
    Method,
    TinyLM,
    randomize,
)
from rich.console import Console
from small_models import small_gpt2, small_llama
from torch import nn

pytest.importorskip("transformers")

from transformers import (
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from lowrank_ext.activation_checkpointing import prepare_for_checkpointing
from lowrank_ext.adapt import adapt
from lowrank_ext.config import AdapterConfig
from lowrank_ext.merging import unload
from lowrank_ext.methods.aflora.config import AFLoRAConfig
from lowrank_ext.methods.goat.config import GOATConfig
from lowrank_ext.methods.lamda.config import LaMDAConfig
from lowrank_ext.methods.lora.config import LoRAConfig
from lowrank_ext.methods.reslora.config import ResLoRAConfig
from lowrank_ext.methods.set_and_sequence.config import BasisLoRAConfig
from lowrank_ext.nn import LoRALinear, LowRankLinear
from lowrank_ext.summary import summary, trainable_parameters
from lowrank_ext.targets import find_targets

by_method = pytest.mark.parametrize("method", ALL_METHODS, ids=str)
by_method_from_base = pytest.mark.parametrize("method", STARTS_AT_BASE, ids=str)


def config_of(method: Method, **options) -> AdapterConfig:
    return method.config(**{"r": 2, "init": method.init, **method.options(2), **options})


def adapted_paths(model: nn.Module) -> list[str]:
    return [path for path, m in model.named_modules() if isinstance(m, LowRankLinear)]


def trainable_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


TRANSFORMERS = {"llama": small_llama, "gpt2": small_gpt2}


@pytest.mark.parametrize("make_model", TRANSFORMERS.values(), ids=TRANSFORMERS)
@by_method_from_base
def test_the_output_is_the_base_models(method: Method, make_model) -> None:
    model = make_model()
    expected = model(IDS).logits
    assert adapt(model, config_of(method, dropout=0.1)) is model
    if method in ZERO_BRANCH:
        assert torch.equal(model(IDS).logits, expected)
    else:
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    adapt(TinyLM(), LaMDAConfig(r=2, rank_budget="rank"))
    assert capfd.readouterr() == ("", "")


@by_method
def test_only_the_adapters_train(method: Method) -> None:
    model = adapt(TinyLM(), config_of(method, modules_to_save=["norm"]))
    adapters = {
        LoRAConfig: {"lora_a", "lora_b"},
        LaMDAConfig: {"lora_b", "core"},
        AFLoRAConfig: {"lora_a", "lora_b", "rank_scale", "out_scale"},
        GOATConfig: {"lora_a", "lora_b", "router_weight"},
        ResLoRAConfig: {"lora_a", "lora_b"},
        BasisLoRAConfig: {"lora_a", "lora_b"},
    }[method.config]
    expected = {f"{path}.{name}" for path in adapted_paths(model) for name in adapters}
    assert trainable_names(model) == expected | {"norm.weight", "norm.bias"}


def test_all_linear_leaves_the_output_head_alone() -> None:
    inner = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    llama = adapt(small_llama(), LoRAConfig(r=2))
    assert {p.rpartition(".")[2] for p in adapted_paths(llama)} == inner
    assert type(llama.lm_head) is nn.Linear
    assert adapted_paths(adapt(TinyLM(), LoRAConfig(r=2)))[-1] == "layers.1.down_proj"
    gpt2 = adapt(small_gpt2(), LoRAConfig(r=2))
    assert {p.rpartition(".")[2] for p in adapted_paths(gpt2)} == {"c_attn", "c_proj", "c_fc"}


def test_all_linear_leaves_classifiers_and_encoder_decoder_heads_alone() -> None:
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    roberta = RobertaForSequenceClassification(RobertaConfig(vocab_size=32, **sizes))
    paths = adapted_paths(adapt(roberta, LoRAConfig(r=2)))
    assert not any(path.startswith("classifier") for path in paths)  # trained whole
    assert "roberta.encoder.layer.0.output.dense" in paths
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2)
    )
    paths = adapted_paths(adapt(t5, LoRAConfig(r=2)))
    assert "lm_head" not in paths and "decoder.block.0.layer.1.EncDecAttention.q" in paths


def test_the_head_is_adapted_when_it_is_named() -> None:
    model = small_llama(tie_word_embeddings=True)
    embedding = model.model.embed_tokens.weight
    expected = model(IDS).logits
    adapt(model, LoRAConfig(r=2, target_modules=["lm_head"]))
    assert adapted_paths(model) == ["lm_head"]
    assert model.get_output_embeddings().weight is embedding
    assert torch.equal(model(IDS).logits, expected)
    model.tie_weights()
    assert model.lm_head.weight is embedding


@pytest.mark.parametrize(
    "target, paths",
    [
        (["q_proj"], ["layers.0.q_proj", "layers.1.q_proj"]),
        (
            ["0.q_proj", "down_proj"],
            ["layers.0.q_proj", "layers.0.down_proj", "layers.1.down_proj"],
        ),
        (["layers.1.q_proj"], ["layers.1.q_proj"]),
        (r"layers\.1\..*", ["layers.1.q_proj", "layers.1.up_proj", "layers.1.down_proj"]),
        (
            r".*\.[qu].*",
            ["layers.0.q_proj", "layers.0.up_proj", "layers.1.q_proj", "layers.1.up_proj"],
        ),
    ],
)
def test_target_modules(target: str | list[str], paths: list[str]) -> None:
    model = adapt(TinyLM(), LoRAConfig(r=2, target_modules=target))
    assert adapted_paths(model) == paths


def test_a_name_matches_whole_components_only() -> None:
    model = nn.ModuleDict({"proj": nn.Linear(4, 4), "in_proj": nn.Linear(4, 4)})
    adapt(model, LoRAConfig(r=2, target_modules=["proj"]))
    assert adapted_paths(model) == ["proj"]


@pytest.mark.parametrize(
    "excluded, paths",
    [
        (
            ["up_proj", "layers.0.down_proj"],
            ["layers.0.q_proj", "layers.1.q_proj", "layers.1.down_proj"],
        ),
        (["layers.0"], ["layers.1.q_proj", "layers.1.up_proj", "layers.1.down_proj"]),
        (r".*(up|down)_proj", ["layers.0.q_proj", "layers.1.q_proj"]),
    ],
)
def test_exclude_modules(excluded: str | list[str], paths: list[str]) -> None:
    assert adapted_paths(adapt(TinyLM(), LoRAConfig(r=2, exclude_modules=excluded))) == paths


def test_rank_and_alpha_patterns() -> None:
    config = LoRAConfig(
        r=4,
        alpha=8,
        rank_pattern={r"layers\.1\..*": 2, "q_proj": 3, "up_proj": 5},
        alpha_pattern={"q_proj": 6},
    )
    model = adapt(TinyLM(), config)
    found = {p: (m.r, m.scaling) for p, m in model.named_modules() if isinstance(m, LoRALinear)}
    assert found == {
        "layers.0.q_proj": (3, 2.0),
        "layers.0.up_proj": (5, 1.6),
        "layers.0.down_proj": (4, 2.0),
        "layers.1.q_proj": (2, 3.0),
        "layers.1.up_proj": (2, 4.0),
        "layers.1.down_proj": (2, 4.0),
    }


def test_patterns_agree_with_peft() -> None:
    peft = pytest.importorskip("peft")
    pattern = {"q_proj": 3, r"1\..*_proj": 2, "^layers.0.up_proj": 5}
    theirs = peft.get_peft_model(
        TinyLM(),
        peft.LoraConfig(
            r=4, rank_pattern=pattern, target_modules=["q_proj", "up_proj", "down_proj"]
        ),
    )
    ours = adapt(TinyLM(), LoRAConfig(r=4, rank_pattern=pattern))
    ranks = {
        name.removeprefix("base_model.model."): m.r["default"]
        for name, m in theirs.named_modules()
        if isinstance(m, peft.tuners.lora.Linear)
    }
    assert {p: m.r for p, m in ours.named_modules() if isinstance(m, LoRALinear)} == ranks


def test_the_seed_gives_pefts_model() -> None:
    peft = pytest.importorskip("peft")
    base = small_llama()
    names = ["q_proj", "v_proj", "down_proj"]
    torch.manual_seed(7)
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=4, lora_alpha=8, target_modules=names)
    )
    torch.manual_seed(7)
    ours = adapt(base, LoRAConfig(r=4, alpha=8, target_modules=names))
    for path in adapted_paths(ours):
        layer = theirs.base_model.model.get_submodule(path)
        assert torch.equal(ours.get_submodule(path).lora_a, layer.lora_A["default"].weight)


def test_modules_to_save_train_whole_and_are_not_adapted() -> None:
    model = TinyLM()
    model.requires_grad_(False)
    adapt(model, LoRAConfig(r=2, modules_to_save=["layers.1", "lm_head"]))
    assert adapted_paths(model) == [f"layers.0.{n}_proj" for n in ("q", "up", "down")]
    whole = {n for n in dict(model.named_parameters()) if n.startswith(("layers.1", "lm_head"))}
    assert len(whole) == 7 and whole <= trainable_names(model)


@pytest.mark.parametrize(
    "option, value, near",
    [
        ("target_modules", ["q_porj"], "did you mean 'q_proj'"),
        ("target_modules", ["q_proj", "layer.0.up_proj"], "'layers.0.up_proj'"),
        ("target_modules", "q_proj", "give a list of names, ['q_proj']"),
        ("target_modules", "all_linear", "did you mean 'all-linear'"),
        ("exclude_modules", ["down_porj"], "did you mean 'down_proj'"),
        ("modules_to_save", ["nrom"], "did you mean 'norm'"),
        ("rank_pattern", {"q_prj": 2}, "did you mean 'q_proj'"),
        ("alpha_pattern", {"lm_head": 2}, "must match an adapted module"),
    ],
)
def test_a_name_that_matches_nothing(option: str, value, near: str) -> None:
    model = TinyLM()
    with pytest.raises(ValueError, match=rf"adapt: {option} must match .*matches none.*") as info:
        adapt(model, LoRAConfig(r=2, **{option: value}))
    assert near in str(info.value)
    assert not adapted_paths(model) and len(trainable_names(model)) == 16


class AttentionModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.proj = nn.Linear(8, 8)
        self.out = nn.Embedding(4, 8)


def test_modules_that_cannot_be_adapted() -> None:
    config = LoRAConfig(r=2, target_modules=["layers.0"])
    known = "linear, embedding or convolution"
    with pytest.raises(ValueError, match=rf"must name {known} modules, got layers\.0, a Block"):
        adapt(TinyLM(), config)
    with pytest.raises(ValueError, match=r"must name linear modules, got embed, an Embedding"):
        adapt(TinyLM(), LaMDAConfig(r=2, target_modules=["embed", "q_proj"]))
    assert adapted_paths(adapt(AttentionModel(), LoRAConfig(r=2))) == ["proj"]
    with pytest.raises(
        ValueError, match=r"attention\.out_proj, whose weight nn\.MultiheadAttention"
    ):
        adapt(AttentionModel(), LoRAConfig(r=2, target_modules=["out_proj"]))
    with pytest.raises(ValueError, match="target_modules must leave a linear module"):
        adapt(TinyLM(), LoRAConfig(r=2, target_modules=["q_proj"], exclude_modules=["layers"]))


def test_wrong_models_and_configs() -> None:
    with pytest.raises(
        TypeError, match=r"adapt: model must contain modules.*LoRALinear\.from_linear"
    ):
        adapt(nn.Linear(4, 4), LoRAConfig(r=2))
    with pytest.raises(TypeError, match=r"adapt: model must be a torch\.nn\.Module, got str"):
        adapt("model", LoRAConfig())
    with pytest.raises(
        TypeError, match=r"adapt: config must be a LoRAConfig, .* or .*Config, got dict"
    ):
        adapt(TinyLM(), {"r": 2})
    model = adapt(TinyLM(), LoRAConfig(r=2))
    with pytest.raises(
        ValueError, match=r"must not be adapted yet, got a LoRALinear at layers\.0\.q"
    ):
        adapt(model, LaMDAConfig(r=2))


def test_a_peft_model_is_refused() -> None:
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(TinyLM(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="must carry no PEFT adapter"):
        adapt(wrapped, LoRAConfig(r=2))


def state_of(model: nn.Module) -> dict:
    return {
        name: (tensor.clone(), tensor.requires_grad)
        for name, tensor in model.state_dict(keep_vars=True).items()
    }


@pytest.mark.parametrize(
    "config, message",
    [
        (
            LaMDAConfig(r=9),
            r"adapt: layers\.0\.q_proj: LaMDALinear: r must be at most .*=8 .*got 9",
        ),
        (
            LaMDAConfig(r=2, rank_pattern={"1.down_proj": 20}),
            r"adapt: layers\.1\.down_proj: .*got 20",
        ),
        (LoRAConfig(r=2, adapter_dtype="bfloat16"), "adapter_dtype must be 'base'"),
        (
            LoRAConfig(r=2, init="pissa", target_modules=["lm_head"]),
            "lm_head: .*is tied to embed.weight",
        ),
        (
            LaMDAConfig(r=2, target_modules=["q_proj", "lm_head"]),
            "lm_head: .*is tied to embed.weight",
        ),
    ],
)
def test_errors_come_before_any_change(config: AdapterConfig, message: str) -> None:
    model = TinyLM(tied=True)
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        adapt(model, config)
    for name, (tensor, trains) in state_of(model).items():
        assert torch.equal(tensor, before[name][0]) and trains == before[name][1]
    assert not adapted_paths(model) and not hasattr(model, "lowrank_config")


def test_a_weight_that_is_not_finite_has_no_svd() -> None:
    model = TinyLM()
    with torch.no_grad():
        model.layers[1].up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.up_proj: weight must be finite"):
        adapt(model, LoRAConfig(r=2, init="pissa"))
    assert not adapted_paths(model)


@pytest.mark.parametrize("view", [lambda w: w[:8], lambda w: w[2:10], lambda w: w[3:].t()])
def test_ties_through_views_are_seen(view) -> None:
    model = TinyLM()
    model.layers[1].q_proj.weight = nn.Parameter(view(model.embed.weight.data))
    with pytest.raises(ValueError, match=r"layers\.1\.q_proj: .*tied to embed\.weight"):
        adapt(model, LoRAConfig(r=2, init="pissa"))
    assert not adapted_paths(model)


def test_neighbors_in_one_storage_are_not_ties() -> None:
    model = TinyLM()
    both = torch.randn(2, 8, 8)
    model.layers[0].q_proj.weight = nn.Parameter(both[0])
    model.layers[1].q_proj.weight = nn.Parameter(both[1])
    assert len(adapted_paths(adapt(model, LaMDAConfig(r=2)))) == 6


@by_method_from_base
def test_a_module_at_two_paths_is_adapted_once_and_stays_shared(method: Method) -> None:
    model = TinyLM()
    model.layers[1] = model.layers[0]
    model.alias = model.layers[0].q_proj
    expected = model(IDS)
    adapt(model, config_of(method))
    assert adapted_paths(model) == [f"layers.0.{n}_proj" for n in ("q", "up", "down")]
    assert model.layers[1] is model.layers[0] and model.alias is model.layers[0].q_proj
    torch.testing.assert_close(model(IDS), expected)
    unload(model)
    assert type(model.alias) is nn.Linear and model.alias is model.layers[1].q_proj


@pytest.mark.parametrize("method", ZERO_BRANCH, ids=str)
def test_linears_that_share_a_weight_stay_tied(method: Method) -> None:
    model = TinyLM()
    model.layers[1].q_proj.weight = model.layers[0].q_proj.weight
    adapt(model, config_of(method))
    first, second = model.layers[0].q_proj, model.layers[1].q_proj
    assert first is not second and first.weight is second.weight


@pytest.mark.parametrize("direction", ["flat_gets_more", "concentrated_gets_more"])
@pytest.mark.parametrize("budget", ["rank", "params"])
def test_lamda_plus_plus_allocates_ranks(budget: str, direction: str) -> None:
    model = nn.ModuleDict(
        {name: nn.Linear(16, 16) for name in ("flat0", "peak0", "flat1", "peak1")}
    )
    with torch.no_grad():
        for name, linear in model.items():
            spectrum = torch.ones(16) if name.startswith("flat") else 4.0 ** -torch.arange(16)
            linear.weight.copy_(spectrum.diag())
    plain = copy.deepcopy(model)
    config = LaMDAConfig(r=4, rank_budget=budget, direction=direction)
    adapt(model, config)
    ranks = {name: module.r for name, module in model.items()}
    flat, peak = ranks["flat0"] + ranks["flat1"], ranks["peak0"] + ranks["peak1"]
    assert flat > peak if direction == "flat_gets_more" else peak > flat
    cost = sum(r if budget == "rank" else r * r for r in ranks.values())
    assert cost <= 4 * (4 if budget == "rank" else 16)
    stored = model.lowrank_config
    assert list(stored.rank_pattern.values()) == list(ranks.values())
    assert config.rank_pattern == {}
    again = adapt(plain, LaMDAConfig.from_dict(json.loads(json.dumps(stored.to_dict()))))
    assert {name: module.r for name, module in again.items()} == ranks


def test_the_config_is_kept_and_round_trips_through_json() -> None:
    for config in (
        LoRAConfig(r=3, alpha=6, rslora=True, dropout=0.1, target_modules={"q_proj", "up_proj"}),
        LaMDAConfig(
            r=2, exclude_modules="layers.0.*", modules_to_save=["norm"], train_lora_b=False
        ),
        LoRAConfig(r=2, rank_pattern={"q_proj": 4}, adapter_dtype=torch.bfloat16),
        GOATConfig(init="goat_mini", scale="theory", eta=0.5, top_k=3, residual_factor=0.0),
        ResLoRAConfig(shortcut="block", pre_num=-1, shared_dropout=True, merge="input"),
    ):
        values = json.loads(json.dumps(config.to_dict()))
        assert values["peft_type"] == config.peft_type
        assert AdapterConfig.from_dict(values) == config == type(config).from_dict(values)
    model = TinyLM()
    assert adapt(model, LoRAConfig(r=2)).lowrank_config == LoRAConfig(r=2)
    assert copy.deepcopy(model).lowrank_config == LoRAConfig(r=2)


@pytest.mark.parametrize(
    "options, error, message",
    [
        (dict(r=0), ValueError, "LoRAConfig: r must be at least 1, got 0"),
        (dict(r=True), TypeError, "LoRAConfig: r must be an int, got True"),
        (dict(alpha=-1), ValueError, "LoRAConfig: alpha must be positive and finite, got -1"),
        (dict(alpha="2"), TypeError, "LoRAConfig: alpha must be a number or None, got '2'"),
        (dict(dropout=1.0), ValueError, "LoRAConfig: dropout must be below 1, .* got 1.0"),
        (
            dict(target_modules=None),
            TypeError,
            "target_modules must be names, .* or 'all-linear', got None; leave it out",
        ),
        (dict(lora_alpha=8), TypeError, "LoRAConfig: lora_alpha is called alpha here"),
        (dict(lora_dropout=0.1), TypeError, "LoRAConfig: lora_dropout is called dropout here"),
        (dict(use_rslora=True), TypeError, "LoRAConfig: use_rslora is called rslora here"),
        (dict(init_lora_weights="pissa"), TypeError, "init_lora_weights is called init here"),
        (dict(task_type="CAUSAL_LM"), TypeError, "task_type is no option here: the model's class"),
        (dict(use_dora=True), TypeError, "use_dora is called dora here"),
        (dict(targets=["q"]), TypeError, "'targets' is no option; did you mean 'target_modules'"),
        (dict(dropout=-0.1), ValueError, "LoRAConfig: dropout must be between 0 and 1"),
        (dict(init="svd_residual"), ValueError, "LoRAConfig: init must be one of .*'svd_residual'"),
        (dict(target_modules=[]), ValueError, "LoRAConfig: target_modules must name at least one"),
        (dict(target_modules="("), ValueError, "target_modules must be a valid regular expression"),
        (dict(target_modules=[3]), TypeError, "target_modules must hold non-empty strings, got 3"),
        (dict(modules_to_save="norm"), TypeError, "modules_to_save must be a sequence of names"),
        (dict(rank_pattern={"q": 0}), ValueError, r"rank_pattern\['q'\] must be at least 1, got 0"),
        (
            dict(rank_pattern={"(": 1}),
            ValueError,
            "rank_pattern must be a valid regular expression",
        ),
        (dict(alpha_pattern={"q": 0}), ValueError, r"alpha_pattern\['q'\] must be positive"),
        (dict(adapter_dtype="int8"), ValueError, "adapter_dtype must be one of"),
    ],
)
def test_config_errors(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        LoRAConfig(**options)


def test_every_option_of_peft_has_a_message() -> None:
    """Its name here, or that it is not here and what to do."""
    peft = pytest.importorskip("peft")
    ours = {field.name for field in dataclasses.fields(LoRAConfig)}
    theirs = {field.name for field in dataclasses.fields(peft.LoraConfig)} - ours
    assert {"lora_alpha", "task_type", "use_qalora"} <= theirs
    for name in theirs:
        with pytest.raises(TypeError, match=rf"^LoRAConfig: {name} is (called \w+|no option) here"):
            LoRAConfig(**{name: None})
        with pytest.raises(TypeError, match=rf"^LoRALinear.*: {name} is "):
            LoRALinear.from_linear(nn.Linear(4, 4), **{name: None})
    with pytest.raises(
        TypeError, match=r"GOATConfig: 'experts' is no option; did you mean '.*expert"
    ):
        GOATConfig(experts=2)


def test_more_config_errors() -> None:
    with pytest.raises(ValueError, match="train_lora_b must be True with init='lora'"):
        LaMDAConfig(init="lora", train_lora_b=False)
    with pytest.raises(ValueError, match="LaMDAConfig: rank_budget must be one of"):
        LaMDAConfig(rank_budget="mean")
    with pytest.raises(ValueError, match="LaMDAConfig: direction must be one of"):
        LaMDAConfig(direction="up")
    with pytest.raises(TypeError, match=r"AdapterConfig: use LoRAConfig, .* or .*Config"):
        AdapterConfig()
    with pytest.raises(ValueError, match=r"from_dict: peft_type must be one of .*, got 'IA3'"):
        AdapterConfig.from_dict({"peft_type": "IA3"})
    with pytest.raises(ValueError, match=r"LoRAConfig\.from_dict: peft_type must be 'LORA'"):
        LoRAConfig.from_dict({"peft_type": "LAMDA"})
    with pytest.raises(
        ValueError, match="'rnak_pattern' is not a field; did you mean 'rank_pattern'"
    ):
        LoRAConfig.from_dict({"rnak_pattern": {}})


def test_trainable_parameters() -> None:
    model = adapt(TinyLM(tied=True), LoRAConfig(r=2, target_modules=["q_proj"]))
    base = 11 * 8 + 16 + 2 * (8 * 8 + 8 + 16 * 8 + 16 + 8 * 16 + 8)
    adapters = 2 * 2 * (8 + 8)
    numbers = trainable_parameters(model)
    assert numbers == (adapters, base + adapters, 100 * adapters / (base + adapters))
    assert trainable_parameters(nn.Identity()) == (0, 0, 0.0)


def rendered(table) -> list[list[str]]:
    console = Console(width=200, file=io.StringIO())
    console.print(table)
    lines = console.file.getvalue().splitlines()
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_summary() -> None:
    config = LoRAConfig(
        r=4, alpha=8, rank_pattern={"1.q_proj": 2}, modules_to_save=["layers.1.up_proj", "norm"]
    )
    rows = rendered(summary(adapt(TinyLM(), config)))
    assert ["q_proj", "LoRA", "2", "8 → 8", "2 … 4", "2 … 4", "96", "384 bytes"] in rows
    assert ["up_proj", "LoRA", "1", "8 → 16", "4", "2", "96", "384 bytes"] in rows
    assert ["norm", "LayerNorm", "1", "", "", "", "16", "64 bytes"] in rows
    assert ["layers.1.up_proj", "Linear", "1", "", "", "", "144", "576 bytes"] in rows
    assert any("544 of 1,280 parameters train (42.5 %)" in row[0] for row in rows)
    lamda = rendered(summary(adapt(TinyLM(), LaMDAConfig(r=2, target_modules=["q_proj"]))))
    # Trainable: lora_b and core. Size: with lora_a and the buffers of the residual.
    tensors = 16 + 16 + 4 + 16 + 2
    assert ["q_proj", "LaMDA", "2", "8 → 8", "2", "1", "40", f"{8 * tensors} bytes"] in lamda
    experts = GOATConfig(r=2, num_experts=2, target_modules=["q_proj"])
    goat = rendered(summary(adapt(TinyLM(), experts)))
    # Trainable: lora_a, lora_b and the router. Size: with the two starts.
    assert ["q_proj", "GOAT", "2", "8 → 8", "2", "2", "96", f"{8 * (48 + 32)} bytes"] in goat
    with pytest.raises(ValueError, match="summary: model must carry adapters, got a TinyLM"):
        summary(TinyLM())


@by_method
def test_training_moves_the_adapters_and_nothing_else(method: Method) -> None:
    model = TinyLM()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    adapt(model, config_of(method, modules_to_save=["norm"], dropout=0.1)).train()
    if method.init in method.module.residual_inits:
        weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    lora_a = {p: model.get_submodule(p).lora_a.detach().clone() for p in adapted_paths(model)}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.05)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    trained = trainable_names(model)
    for name, parameter in model.named_parameters():
        if name in weights:
            assert torch.equal(parameter, weights[name]) is (name not in trained)
    for path in adapted_paths(model):
        moved = not torch.equal(model.get_submodule(path).lora_a, lora_a[path])
        assert moved is (method.config is not LaMDAConfig)
        assert model.get_submodule(path).lora_b.any()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_fused_encoder_layers_do_not_bypass_the_adapters() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()
    x, padding = torch.randn(2, 5, 8), torch.arange(5) >= torch.tensor([[5], [3]])
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        adapt(model, LoRAConfig(r=2))
        assert adapted_paths(model) == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
        kept = ~padding
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[kept], expected[kept])
        randomize(model)
        assert not torch.allclose(model(x, src_key_padding_mask=padding)[kept], expected[kept])
        unload(model)
    assert model.layers[0].activation_relu_or_gelu == 1 and model.use_nested_tensor
    assert torch.equal(model(x, src_key_padding_mask=padding)[kept], expected[kept])


@by_method_from_base
def test_generate_and_config_work_as_before(method: Method) -> None:
    model = small_llama()
    config = copy.deepcopy(model.config.to_dict())
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0)
    expected = model.generate(IDS, **options)
    adapt(model, config_of(method))
    assert torch.equal(model.generate(IDS, **options), expected)
    assert model.config.to_dict() == config
    assert type(model) is LlamaForCausalLM


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_trains_the_adapters(checkpointing: bool, tmp_path) -> None:
    model = adapt(small_gpt2(), LoRAConfig(r=2, dropout=0.1))
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": True})
    data = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    with prepare_for_checkpointing(model):
        Trainer(model=model, args=arguments, train_dataset=data).train()
    assert all(model.get_submodule(path).lora_b.any() for path in adapted_paths(model))


def test_prepare_for_checkpointing_needs_an_embedding() -> None:
    with pytest.raises(
        ValueError, match="prepare_for_checkpointing: model must have input embeddings"
    ):
        prepare_for_checkpointing(Block(4))


def test_prepare_for_checkpointing_can_be_undone() -> None:
    model = adapt(TinyLM(), LoRAConfig(r=2))
    handle = prepare_for_checkpointing(model)
    assert model.embed(IDS).requires_grad
    with torch.no_grad():
        assert not model.embed(IDS).requires_grad
    handle.remove()
    assert not model.embed(IDS).requires_grad and not model.embed.weight.requires_grad


def test_a_meta_model_is_adapted_without_memory() -> None:
    with torch.device("meta"):
        model = TinyLM()
    adapt(model, LaMDAConfig(r=2))
    assert all(p.is_meta for p in model.parameters())
    assert len(find_targets(TinyLM(), LaMDAConfig(r=2))) == len(adapted_paths(model))


def test_compiles_without_graph_breaks() -> None:
    model = adapt(TinyLM(), LoRAConfig(r=2))
    randomize(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS), model(IDS))


@pytest.mark.parametrize("alpha", [1e-44, 1e308], ids=str)
@pytest.mark.parametrize("field", ["alpha", "alpha_pattern"])
def test_scalings_that_float32_does_not_hold_are_refused(alpha: float, field: str) -> None:
    """The ops take the scaling in float32: it would be lost, or overflow in forward."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    config = LoRAConfig(r=2, **{field: alpha if field == "alpha" else {"1": alpha}})
    before = list(model.modules())
    with pytest.raises(ValueError, match=r"^adapt: [01]: LoRALinear: scaling must be from"):
        adapt(model, config)
    assert list(model.modules()) == before and all(p.requires_grad for p in model.parameters())
