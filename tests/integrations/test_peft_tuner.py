"""The methods as methods of PEFT: get_peft_model, named adapters, files, merging."""

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from small_models import llama_sizes as sizes
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

import lowrank_ext as lr
from lowrank_ext.integrations.peft_tuner.layer import LowRankTunerLayer
from lowrank_ext.nn import LaMDALinear, LowRankLinear, ResLoRALinear
from lowrank_ext.registry import METHODS

CONFIGS = {
    "lora": lr.LoRAConfig(r=4),
    "lamda": lr.LaMDAConfig(r=4),
    "lamda-zero-core": lr.LaMDAConfig(r=4, init="svd_zero_core"),
    "lamda-ranks": lr.LaMDAConfig(r=4, rank_budget="rank"),
    "lamda-rslora": lr.LaMDAConfig(r=4, alpha=3, rslora=True, rank_pattern={"q_proj": 2}),
    "aflora": lr.AFLoRAConfig(r=4),
    "goat": lr.GOATConfig(r=4, num_experts=4, top_k=2),
    "reslora": lr.ResLoRAConfig(r=4),
    "reslora-block": lr.ResLoRAConfig(r=4, shortcut="block"),
    "basis": lr.BasisLoRAConfig(r=4, coef_dropout=0.0),
}
OWN = [name for name in CONFIGS if name != "lora"]
# Their merge is exact: GOAT has none, ResLoRA's other shortcuts an estimate.
MERGEABLE = [name for name in CONFIGS if name not in ("goat", "reslora")]

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*trains without:UserWarning", "ignore:.*checkpointing.*:FutureWarning"
)


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(7)
    return LlamaForCausalLM(sizes()).to(dtype).eval()


def peft_model(name: str, base: nn.Module | None = None, **fields: Any) -> Any:
    torch.manual_seed(11)
    config = lr.peft_config(CONFIGS[name], **{"task_type": "CAUSAL_LM", **fields})
    return peft.get_peft_model(llama() if base is None else base, config)


def ids() -> Tensor:
    return torch.randint(0, 37, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out: Tensor = model.eval()(ids()).logits
    return out


def trained(model: Any, steps: int = 3) -> Any:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        model(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def moved_and_reloaded(model: Any, base: nn.Module, path: Path) -> Any:
    """The model that its files give over ``base``, once all that trains has been moved."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1)
    model.save_pretrained(path)
    return peft.PeftModel.from_pretrained(base, path)


def close(actual: Tensor, expected: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, **{"rtol": 1e-4, "atol": 1e-5, **tolerance})


by_name = pytest.mark.parametrize("name", CONFIGS)
by_own = pytest.mark.parametrize("name", OWN)


@by_name
def test_starts_at_the_base_and_disables_to_it(name: str) -> None:
    base, model = llama(), peft_model(name)
    if name != "goat":  # at the start on average only
        close(logits(model), logits(base))
    trained(model)
    assert (logits(model) - logits(base)).abs().max() > 1e-3
    with model.disable_adapter():
        close(logits(model), logits(base))
    if CONFIGS[name].init not in ("svd_residual", "goat"):
        with model.disable_adapter():
            assert torch.equal(logits(model), logits(base))


@by_own
def test_computes_what_adapt_does(name: str) -> None:
    """The same values in a model of adapt, and in PEFT's over the same base."""
    model = trained(peft_model(name))
    plain = lr.adapt(llama(), CONFIGS[name])
    source = {path: m for path, m in model.named_modules() if isinstance(m, LowRankLinear)}
    targets = [m for m in plain.modules() if isinstance(m, LowRankLinear)]
    assert len(source) == len(targets) == 14
    for own, target in zip(source.values(), targets, strict=True):
        assert (own.r, own.scaling) == (target.r, target.scaling)
        for key, tensor in target.adapter_tensors().items():
            tensor.data.copy_(own.adapter_tensors()[key])
    assert torch.equal(logits(model), logits(plain))


@by_own
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_saves_and_loads(name: str, low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model = trained(peft_model(name))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(again), logits(model))
    assert not any(p.requires_grad for p in again.parameters())


@by_own
def test_files_are_those_of_lowrank_ext(name: str, tmp_path: Path) -> None:
    model = trained(peft_model(name))
    model.save_pretrained(tmp_path / "peft")
    ours = lr.load_adapter(llama(), tmp_path / "peft")
    assert torch.equal(logits(ours), logits(model))
    lr.save_adapter(ours, tmp_path / "lr")
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "lr")
    assert torch.equal(logits(again), logits(model))


@by_own
def test_what_trains_is_the_methods_choice(name: str, tmp_path: Path) -> None:
    model = peft_model(name)
    expected = {
        path.replace("base_model.model.", ""): p.requires_grad
        for path, m in model.named_modules()
        if isinstance(m, LowRankLinear)
        for path, p in m.named_parameters(prefix=path)
    }
    plain = lr.adapt(llama(), CONFIGS[name])
    assert sum(expected.values()) == sum(p.requires_grad for p in plain.parameters()) > 0
    assert not any(p.requires_grad for k, p in model.named_parameters() if "_adapters" not in k)
    before = {k for k, p in model.named_parameters() if p.requires_grad}
    with model.disable_adapter():
        pass
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    for each in (model, again):
        assert {k for k, p in each.named_parameters() if p.requires_grad} == before


@by_own
def test_a_second_adapter_keeps_the_first(name: str, tmp_path: Path) -> None:
    """As TRL makes DPO's reference: a copy of the trained adapter, by names of parameters."""
    model = trained(peft_model(name))
    expected, trains = logits(model), [k for k, p in model.named_parameters() if p.requires_grad]
    model.add_adapter("ref", model.peft_config["default"])
    for key, parameter in list(model.named_parameters()):
        if ".default." in key:
            model.get_parameter(key.replace(".default.", ".ref.")).data.copy_(parameter.data)
    assert [k for k, p in model.named_parameters() if p.requires_grad] == trains
    model.set_adapter("ref")
    assert torch.equal(logits(model), expected)
    assert not any(p.requires_grad for k, p in model.named_parameters() if ".default." in k)
    model.set_adapter("default")
    assert [k for k, p in model.named_parameters() if p.requires_grad] == trains
    moved = logits(trained(model))
    assert not torch.equal(moved, expected)
    model.set_adapter("ref")
    assert torch.equal(logits(model), expected)
    model.save_pretrained(tmp_path, selected_adapters=["ref"])
    again = peft.PeftModel.from_pretrained(llama(), tmp_path / "ref")
    close(logits(again), expected)
    with pytest.warns(UserWarning, match="was active"):
        model.delete_adapter("ref")
    assert torch.equal(logits(model), moved)


@by_own
def test_loads_into_a_model_that_carries_the_method(name: str, tmp_path: Path) -> None:
    model = trained(peft_model(name))
    model.save_pretrained(tmp_path)
    other = trained(peft_model(name))
    other.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(other), logits(model))
    other.load_adapter(tmp_path, "more")
    other.set_adapter("more")
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("name", MERGEABLE)
def test_merges(name: str) -> None:
    model = trained(peft_model(name))
    expected = logits(model)
    model.merge_adapter()
    close(logits(model), expected)
    model.unmerge_adapter()
    close(logits(model), expected)  # PEFT's LoRA takes the branch out again, ours has kept the bits
    if name != "lora":
        assert torch.equal(logits(model), expected)
    merged = model.merge_and_unload()
    assert type(merged) is LlamaForCausalLM
    assert merged.state_dict().keys() == llama().state_dict().keys()
    close(logits(merged), expected)


@by_own
def test_unload_gives_the_base(name: str) -> None:
    base = trained(peft_model(name)).unload()
    assert base.state_dict().keys() == llama().state_dict().keys()
    close(logits(base), logits(llama()))


def test_goat_refuses_to_merge() -> None:
    with pytest.raises(TypeError, match="a branch that is one matrix"):
        peft_model("goat").merge_and_unload()


@by_own
def test_a_tied_weight_is_not_merged(name: str) -> None:
    """Two modules share it: each would add its branch to the weight of both."""
    base = llama()
    layers = base.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    config = dataclasses.replace(CONFIGS[name], target_modules=["mlp.up_proj"], rank_pattern={})
    if config.init in ("svd_residual", "goat"):
        with pytest.raises(ValueError, match="tied to"):
            peft.get_peft_model(base, lr.peft_config(config))
        return
    model = trained(peft.get_peft_model(base, lr.peft_config(config)))
    expected = logits(model)
    with pytest.raises(ValueError, match="must be its own, got one tied to"):
        model.merge_adapter()
    assert torch.equal(logits(model), expected)


@by_own
def test_copies_and_whole_states(name: str) -> None:
    model = trained(peft_model(name))
    expected = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other), expected)
        trained(other)  # of its own
        assert torch.equal(logits(model), expected)
    fresh = peft_model(name)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), expected)


@by_own
@pytest.mark.parametrize("autocast", [True, False])
def test_dtypes_of_a_bfloat16_base(name: str, autocast: bool) -> None:
    config = lr.peft_config(CONFIGS[name], task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama(torch.bfloat16), config, autocast_adapter_dtype=autocast)
    trained(model)
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32 if autocast else torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16 and torch.isfinite(logits(model)).all()


@by_own
def test_heads_train_and_are_saved(name: str, tmp_path: Path) -> None:
    def base() -> LlamaForSequenceClassification:
        torch.manual_seed(7)
        return LlamaForSequenceClassification(sizes(num_labels=3, pad_token_id=0)).eval()

    model = peft_model(name, base(), task_type="SEQ_CLS").train()
    model(input_ids=ids(), labels=torch.tensor([0, 2])).loss.backward()
    trains = {k for k, p in model.named_parameters() if p.grad is not None and p.requires_grad}
    assert any("score" in key for key in trains) and any("_adapters" in key for key in trains)
    again = moved_and_reloaded(model, base(), tmp_path)
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", [name for name in OWN if name != "lamda-rslora"])
def test_conv1d(name: str, tmp_path: Path) -> None:
    def base() -> GPT2LMHeadModel:
        torch.manual_seed(7)
        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=37)).eval()

    model = trained(peft_model(name, base()))
    assert sum(isinstance(m, LowRankTunerLayer) for m in model.modules()) == 8
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(base(), tmp_path)), logits(model))


def test_one_op_for_base_and_branch() -> None:
    """The base is not computed by itself: what adapt gives, PEFT's models have too."""
    model = peft_model("lamda")
    calls = []
    layer = next(m for m in model.modules() if isinstance(m, LowRankTunerLayer))
    with torch.profiler.profile() as profile:
        layer(torch.randn(3, 16))
    calls = [event.key for event in profile.key_averages()]
    assert "lowrank_ext::lowrank_linear" in calls and "aten::linear" not in calls
    layer.base_layer.register_forward_hook(lambda *_: calls.append("hook"))
    layer(torch.randn(3, 16))
    assert calls[-1] == "hook"


def test_lora_is_pefts_on_the_fused_ops(tmp_path: Path) -> None:
    config = lr.peft_config(lr.LoRAConfig(r=4, rank_pattern={"q_proj": 2}), task_type="CAUSAL_LM")
    assert isinstance(config, peft.LoraConfig)
    model = trained(peft.get_peft_model(llama(), config))
    classes = {type(m).__name__ for m in model.modules() if hasattr(m, "lora_A")}
    assert classes == {"AcceleratedLinear"}
    scalings = {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")}
    assert scalings == {1.0}  # alpha is each module's own rank
    model.save_pretrained(tmp_path)
    close(logits(peft.PeftModel.from_pretrained(llama(), tmp_path)), logits(model))
    close(logits(lr.load_adapter(llama(), tmp_path)), logits(model))


def test_chains_of_named_adapters_are_their_own() -> None:
    model = peft_model("reslora")
    model.add_adapter("other", lr.peft_config(CONFIGS["reslora"]))
    chains: dict[str, set[str]] = {"default": set(), "other": set()}
    for path, module in model.named_modules():
        if isinstance(module, ResLoRALinear):
            assert module.chain is not None
            chains[path.rpartition(".")[2]].add(module.chain)
    assert len(chains["default"]) == 7 and chains["default"].isdisjoint(chains["other"])
    model.set_adapter("other")
    assert logits(trained(model)).isfinite().all()


def test_layers_to_transform(tmp_path: Path) -> None:
    names = ["q_proj", "down_proj"]
    config = lr.LaMDAConfig(r=4, target_modules=names, layers_to_transform=[1])
    model = peft.get_peft_model(llama(), lr.peft_config(config))
    paths = [path for path, m in model.named_modules() if isinstance(m, LaMDALinear)]
    assert len(paths) == 2 and all(".layers.1." in path for path in paths)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(llama(), tmp_path)), logits(model))


def test_a_module_at_two_paths_is_adapted_at_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.second(self.first(x))
            return out

    model = peft.get_peft_model(Twice(), lr.peft_config(lr.AFLoRAConfig(r=2)))
    assert model.base_model.model.first is model.base_model.model.second
    assert isinstance(model.base_model.model.first, LowRankTunerLayer)
    plain = model.merge_and_unload()
    assert plain.first is plain.second and type(plain.first) is nn.Linear


@by_own
def test_saves_while_merged(name: str, tmp_path: Path) -> None:
    if name == "goat":
        pytest.skip("cannot be merged")
    model = trained(peft_model(name))
    expected = logits(model)
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(llama(), tmp_path)), expected)


@pytest.mark.parametrize("name", [name for name in OWN if name != "lamda-ranks"])  # from weights
def test_a_model_built_without_values_takes_a_whole_state(name: str) -> None:
    """Residual weights come along with what rebuilds the base."""
    model = trained(peft_model(name))
    with torch.device("meta"):
        base = LlamaForCausalLM(sizes())
    other = peft.get_peft_model(base, lr.peft_config(CONFIGS[name])).to_empty(device="cpu")
    rotary = base.model.rotary_emb
    rotary.inv_freq.copy_(llama().model.rotary_emb.inv_freq)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    with other.disable_adapter():
        close(logits(other), logits(llama()))
    close(logits(other.unload()), logits(llama()))


@by_own
def test_injected_without_a_peft_model(name: str) -> None:
    source = trained(peft_model(name))
    state = peft.get_peft_model_state_dict(source)
    model = peft.inject_adapter_in_model(lr.peft_config(CONFIGS[name]), llama())
    own = peft.get_peft_model_state_dict(model)
    assert {key.removeprefix("base_model.model.") for key in state} == set(own)
    for given in (state, {key.removeprefix("base_model.model."): t for key, t in state.items()}):
        peft.set_peft_model_state_dict(model, given)
        assert torch.equal(logits(model), logits(source))


@pytest.mark.parametrize("name", ["lora", "aflora", "lamda-zero-core"])
@pytest.mark.parametrize("task_type", ["TOKEN_CLS", "QUESTION_ANS", "SEQ_CLS", None])
def test_new_heads(name: str, task_type: str | None, tmp_path: Path) -> None:
    """With "all-linear" heads train whole and are saved, whether the task is told or not."""
    if name == "lora" and task_type in ("TOKEN_CLS", "QUESTION_ANS", None):
        pytest.skip("PEFT's own")
    sized = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    labels = 2 if task_type == "QUESTION_ANS" else 3
    options = BertConfig(vocab_size=37, num_attention_heads=2, num_labels=labels, **sized)
    kinds = {
        "TOKEN_CLS": BertForTokenClassification,
        "QUESTION_ANS": BertForQuestionAnswering,
        None: BertForTokenClassification,
    }

    def base() -> nn.Module:
        torch.manual_seed(5)
        made: nn.Module = kinds.get(task_type, BertForSequenceClassification)(options).eval()
        return made

    model = peft_model(name, base(), task_type=task_type)
    head = "qa_outputs" if task_type == "QUESTION_ANS" else "classifier"
    trains = [key for key, p in model.named_parameters() if p.requires_grad]
    assert any(f"{head}.modules_to_save" in key for key in trains)
    assert not any(
        head in path for path, m in model.named_modules() if isinstance(m, LowRankLinear)
    )
    again = moved_and_reloaded(model, base(), tmp_path)
    with torch.no_grad():
        outputs = [m.eval()(ids()).to_tuple() for m in (model, again)]
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_names_that_peft_reads_from_the_config() -> None:
    model = peft_model("lamda")
    config = model.peft_config["default"]
    assert config.peft_type is peft.PeftType.LAMDA
    assert model.get_model_status().peft_types == {"default": "LAMDA"}
    with pytest.raises(ValueError, match="LAMDA"):
        peft.get_peft_model(llama(), lr.peft_config(CONFIGS["lamda"]), mixed=True)


def test_patterns_of_ranks_and_alphas_in_pefts_lora() -> None:
    config = lr.LoRAConfig(
        r=4,
        rank_pattern={"q_proj": 8, "mlp.up_proj": 2},
        alpha_pattern={"q_proj": 7, "layers.0.mlp.up_proj": 3},
    )
    ours = lr.adapt(llama(), config)
    theirs = peft.get_peft_model(llama(), lr.peft_config(config)).base_model.model
    for path, module in ours.named_modules():
        if isinstance(module, LowRankLinear):
            layer = theirs.get_submodule(path)
            assert (layer.r["default"], layer.scaling["default"]) == (module.r, module.scaling)


# ---- refused


@pytest.mark.parametrize(
    "action",
    [
        lr.merge,
        lr.unmerge,
        lr.unload,
        lambda model: lr.save_adapter(model, "nowhere"),
        lambda model: lr.export_lora(model, "nowhere"),
        lambda model: lr.disable_adapter(model).__enter__(),
    ],
)
def test_functions_for_adapted_models_name_pefts(action: Any) -> None:
    model = trained(peft_model("aflora"))
    model.add_adapter("other", lr.peft_config(CONFIGS["aflora"]))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="of PEFT; use"):
        action(model)
    assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())


def test_reslora_merge_error_leaves_a_peft_model_alone() -> None:
    model = trained(peft_model("reslora"))
    expected = logits(model)
    with pytest.raises(ValueError, match="of PEFT; use"):
        lr.reslora_merge_error(model, lambda: model(ids()).logits)
    assert torch.equal(logits(model), expected)


def test_one_residual_start_is_merged_once() -> None:
    model = trained(peft_model("lamda"))
    model.add_adapter("other", model.peft_config["default"])
    expected = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="one adapter must be merged over a residual"):
            merge(adapter_names=["default", "other"])
        model.unmerge_adapter()
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", ["lamda", "aflora"])
def test_nothing_is_loaded_into_merged_adapters(name: str, tmp_path: Path) -> None:
    model = trained(peft_model(name))
    model.save_pretrained(tmp_path)
    expected = logits(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="adapters must be unmerged to load one"):
        model.load_adapter(tmp_path, "default")
    model.unmerge_adapter()
    assert torch.equal(logits(model), expected)


def test_layers_to_transform_needs_names(tmp_path: Path) -> None:
    """In a file: a config of lr checks it itself."""
    peft_model("aflora").save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    fields |= {"target_modules": ".*q_proj", "layers_to_transform": [1]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match="layers_to_transform must be None where target_modules"):
        peft.PeftModel.from_pretrained(llama(), tmp_path)


def test_names_that_cannot_be_told_apart() -> None:
    model = peft_model("aflora")
    with pytest.raises(ValueError, match="must not be called aflora_adapters"):
        model.add_adapter("aflora_adapters", lr.peft_config(CONFIGS["aflora"]))
    with pytest.raises(TypeError, match="peft_config: r is config's own"):
        lr.peft_config(CONFIGS["aflora"], r=3)


@by_own
def test_an_adapter_without_values_does_not_run(name: str, tmp_path: Path) -> None:
    peft_model(name).save_pretrained(tmp_path)
    config = type(lr.peft_config(CONFIGS[name])).from_pretrained(tmp_path)
    model = peft.get_peft_model(llama(), config)
    for action in (lambda: logits(model), model.merge_and_unload):
        if name == "goat" and action is not logits:
            continue
        with pytest.raises(RuntimeError, match="the adapter 'default' has no values"):
            action()


def test_adapters_that_share_a_residual_weight_must_fit() -> None:
    model = peft_model("lamda")
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for config in (lr.LaMDAConfig(r=2), lr.LaMDAConfig(r=4, init="lora")):
        with pytest.raises(ValueError, match="shares the residual base weight"):
            model.add_adapter("other", lr.peft_config(config))
    plain = peft_model("lamda-zero-core")
    with pytest.raises(ValueError, match="shares the residual base weight"):
        plain.add_adapter("other", lr.peft_config(CONFIGS["lamda"]))
    assert list(model.peft_config) == list(plain.peft_config) == ["default"]
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_files_of_another_residual_weight_are_refused_beside_it(tmp_path: Path) -> None:
    torch.manual_seed(3)
    other = LlamaForCausalLM(sizes())  # other weights, so other singular vectors
    peft_model("lamda", other).save_pretrained(tmp_path)
    model = peft_model("lamda")
    with pytest.raises(ValueError, match="initial factors are others"):
        model.load_adapter(tmp_path, "other")


def test_one_active_adapter() -> None:
    model = peft_model("aflora")
    model.add_adapter("other", lr.peft_config(CONFIGS["aflora"]))
    with pytest.raises(ValueError, match="one adapter of AFLORA must be active"):
        model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"lr\.AdapterBank"):
        model(ids(), adapter_names=["default", "other"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(next(k for k in t if "lora_A" in k)), "is missing"),
        (lambda t: t.update({next(iter(t)): torch.zeros(1)}), r"must be \[\d+, \d+\], got \[1\]"),
        (lambda t: t[next(iter(t))].fill_(torch.nan), "must be finite"),
        (
            lambda t: t.update({"base_model.model.extra.lora_A.weight": torch.zeros(2, 2)}),
            "of the model's adapters alone",
        ),
    ],
)
def test_damaged_files_are_refused(change: Any, message: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    peft_model("aflora").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        peft.PeftModel.from_pretrained(llama(), tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lr.LoRAConfig(r=4, init="pissa"), "init must be 'kaiming' or 'gaussian'"),
        (lr.LaMDAConfig(r=4, adapter_dtype="base"), "adapter_dtype must be 'float32'"),
    ],
)
def test_configs_that_peft_would_read_otherwise(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lr.peft_config(config)


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="config must be a LoRAConfig"):
        lr.peft_config("lamda")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="unexpected keyword argument 'tasktype'"):
        lr.peft_config(CONFIGS["lamda"], tasktype="CAUSAL_LM")
    config = type(lr.peft_config(CONFIGS["lamda"]))
    with pytest.raises(ValueError, match="bias must be 'none'"):
        config(bias="all")
    with pytest.raises(ValueError, match="r must be"):
        config(r=0)


@by_own
def test_fields_of_the_config_file(name: str, tmp_path: Path) -> None:
    """The same fields and values as save_adapter writes."""
    peft_model(name).save_pretrained(tmp_path / "peft")
    lr.save_adapter(lr.adapt(llama(), CONFIGS[name]), tmp_path / "lr")
    theirs, ours = (
        json.loads((tmp_path / where / "adapter_config.json").read_text())
        for where in ("peft", "lr")
    )
    assert theirs.keys() - ours.keys() == {"peft_version"}
    assert ours.keys() <= theirs.keys()
    differing = {key for key in ours if ours[key] != theirs[key]} - {
        *("target_modules", "task_type", "auto_mapping", "fan_in_fan_out")
    }
    assert not differing, {key: (ours[key], theirs[key]) for key in differing}


def test_every_method_is_registered() -> None:
    lr.register_with_peft()
    lr.register_with_peft()
    assert set(METHODS) <= set(peft.PeftType)
    assert peft.PeftType("LAMDA") is peft.PeftType.LAMDA
    assert pickle.loads(pickle.dumps(peft.PeftType.LAMDA)) is peft.PeftType.LAMDA


def test_a_failing_merge_leaves_no_layer_merged() -> None:
    model = peft_model("lamda")
    *_, last = (m for m in model.modules() if isinstance(m, LowRankTunerLayer))
    with torch.no_grad():
        last.adapter("default").lora_b.fill_(float("inf"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="inf"):
        model.merge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(m.merged_adapters for m in model.modules() if isinstance(m, LowRankTunerLayer))


def test_a_merged_adapter_stays_merged_where_none_is_active() -> None:
    """As in PEFT: in a module that the active adapter does not have."""
    model = peft.get_peft_model(
        llama(), lr.peft_config(lr.AFLoRAConfig(r=4, target_modules=["q_proj"]))
    )
    model.add_adapter("other", lr.peft_config(lr.AFLoRAConfig(r=4, target_modules=["v_proj"])))
    for layer in (m for m in model.modules() if isinstance(m, LowRankTunerLayer)):
        for adapter in layer.named_adapters().values():
            nn.init.normal_(adapter.out_scale)
    model.set_adapter("other")
    only_other = logits(model)
    model.set_adapter("default")
    before = logits(model)
    model.merge_adapter(["other"])
    merged = logits(model)
    assert not torch.allclose(merged, before, atol=1e-3)
    assert torch.equal(logits(model), merged)
    model.unmerge_adapter()
    assert torch.equal(logits(model), before) and not torch.equal(only_other, before)


def test_a_failing_unload_leaves_the_model_as_it_was() -> None:
    model = peft_model("aflora")
    *_, last = (m for m in model.modules() if isinstance(m, LowRankTunerLayer))
    with torch.no_grad():
        last.adapter("default").out_scale.fill_(float("inf"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="inf"):
        model.merge_and_unload()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_is_taken_for_a_config_of_peft() -> None:
    with pytest.raises(AttributeError, match=r"PEFT and TRL take lr\.peft_config\(config\)"):
        peft.get_peft_model(llama(), lr.AFLoRAConfig())
    with pytest.raises(TypeError, match="give it to PEFT as it is"):
        lr.peft_config(peft.LoraConfig())
    with pytest.raises(TypeError, match="got LoraConfig of PEFT"):
        lr.adapt(llama(), peft.LoraConfig())
