"""lr.accelerate on PEFT's wrappers of stacked expert weights, beside an untouched model."""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import DOWN, EXPERT_MODELS, GATE_UP, expert_model, expert_tokens
from torch import Tensor, nn

pytest.importorskip("peft")

import peft
from peft.tuners import lora

import lowrank_ext as lr
from lowrank_ext.integrations.peft_experts import AcceleratedExperts

BOTH = [GATE_UP, DOWN]
families = pytest.mark.parametrize("name", EXPERT_MODELS)
implementations = pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])


def config(**options: Any) -> peft.LoraConfig:
    fields = {"r": 3, "lora_alpha": 6, "target_modules": ["o_proj"], "target_parameters": BOTH}
    return peft.LoraConfig(**{**fields, **options})


def peft_model(
    name: str = "Qwen3MoeForCausalLM",
    implementation: str = "grouped_mm",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> nn.Module:
    model = peft.get_peft_model(expert_model(name, implementation, dtype), config(**options))
    move(model)
    return model


@torch.no_grad()
def move(model: nn.Module, seed: int = 5) -> None:
    draws = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draws))


def twins(**options: Any) -> tuple[nn.Module, nn.Module]:
    """One accelerated, one as PEFT made it."""
    theirs = peft_model(**options)
    ours = copy.deepcopy(theirs)
    report = lr.accelerate(ours)
    assert not report.left_alone and len(report.accelerated) == 3
    return ours, theirs


def logits(model: nn.Module) -> Tensor:
    output: Tensor = model(input_ids=expert_tokens()).logits
    return output


def wrappers(model: nn.Module) -> list[AcceleratedExperts]:
    return [module for module in model.modules() if isinstance(module, AcceleratedExperts)]


def assert_close(ours: Tensor, theirs: Tensor, tolerance: float = 2e-5) -> None:
    scale = max(1.0, theirs.abs().max().item())
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * scale)


def assert_acts_alike(ours: nn.Module, theirs: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # none runs PEFT's forward
        output = logits(ours)
    assert_close(output, logits(theirs))


@families
def test_ids_of_int32(name: str) -> None:
    ours = copy.deepcopy(peft_model(name))
    lr.accelerate(ours)
    experts = wrappers(ours)[0]
    x, ids, gates = torch.randn(6, 16), torch.randint(0, 4, (6, 2)), torch.rand(6, 2)
    assert torch.equal(experts(x, ids.int(), gates), experts(x, ids, gates))


@families
@implementations
@pytest.mark.parametrize("parameters", [BOTH, [DOWN], [GATE_UP]], ids=["both", "down", "gate up"])
def test_output_and_gradients(name: str, implementation: str, parameters: list[str]) -> None:
    theirs = peft_model(name, implementation, target_parameters=parameters)
    ours = copy.deepcopy(theirs)
    report = lr.accelerate(ours)
    assert len(report.accelerated) == 1 + len(parameters) and not report.left_alone
    assert_acts_alike(ours, theirs)
    upstream = torch.randn(logits(theirs).shape, generator=torch.Generator().manual_seed(1))
    for model in (ours, theirs):
        (logits(model) * upstream).sum().backward()
    trained = 0
    for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.requires_grad == its.requires_grad
        if mine.requires_grad:
            trained += 1
            assert_close(mine.grad, its.grad)
    assert trained == 2 + 2 * len(parameters)


def test_no_weight_of_all_experts_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the sum of weight and delta")

    monkeypatch.setattr(nn.utils.parametrize, "register_parametrization", refuse)
    ours, theirs = twins()
    logits(ours)
    with pytest.raises(AssertionError, match="the sum"):
        logits(theirs)


def add_second(model: nn.Module) -> None:
    model.add_adapter("second", config(r=2, lora_alpha=3))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "second" in name:
                draws = torch.Generator().manual_seed(len(name))
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draws))


STATES: dict[str, Callable[[nn.Module], Any]] = {
    "second": lambda model: model.set_adapter("second"),
    "both": lambda model: model.base_model.set_adapter(["default", "second"]),
    "deleted": lambda model: (model.set_adapter("second"), model.delete_adapter("default")),
    "unmerged": lambda model: (model.merge_adapter(), model.unmerge_adapter()),
    "scaled": lambda model: [w.set_scale("default", 0.5) for w in lora_layers(model)],
}


def lora_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, lora.LoraLayer)]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", ["Qwen3MoeForCausalLM", "GptOssForCausalLM"])
def test_several_adapters(name: str, state: str) -> None:
    ours, theirs = twins(name=name)
    for model in (ours, theirs):
        add_second(model)
        STATES[state](model)
    assert_acts_alike(ours, theirs)


def test_disabled_and_merged_are_pefts_bits(tmp_path: Path) -> None:
    ours, theirs = twins()
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(logits(ours), logits(theirs))
        assert torch.equal(logits(ours), logits(expert_model("Qwen3MoeForCausalLM")))
    for model, path in ((ours, "ours"), (theirs, "theirs")):
        model.save_pretrained(tmp_path / path)
        model.merge_adapter()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    assert torch.equal(logits(ours), logits(theirs))
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(logits(ours), logits(theirs))
    assert torch.equal(logits(ours.merge_and_unload()), logits(theirs.merge_and_unload()))


def test_undone() -> None:
    ours, theirs = twins()
    report = lr.accelerate(ours)
    assert "ParamWrapper" in str(report) and "3 of 3 LoRA layers accelerated" in str(report)
    assert repr(ours) == repr(theirs)
    report.undo()
    assert not wrappers(ours)
    assert {type(layer) for layer in lora_layers(ours)} == {lora.Linear, lora.ParamWrapper}
    assert torch.equal(logits(ours), logits(theirs))


def test_copies_and_pickles() -> None:
    ours, theirs = twins()
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert len(wrappers(again)) == 2
        assert_acts_alike(again, theirs)


def test_files_of_peft_and_of_adapt(tmp_path: Path) -> None:
    ours, _ = twins()
    ours.save_pretrained(tmp_path)
    expected = logits(ours)
    again = peft.PeftModel.from_pretrained(expert_model("Qwen3MoeForCausalLM"), tmp_path)
    lr.accelerate(again)
    assert torch.equal(logits(again), expected)
    assert torch.equal(
        logits(lr.load_adapter(expert_model("Qwen3MoeForCausalLM"), tmp_path)), expected
    )


def test_a_config_of_ours_gives_accelerated_layers() -> None:
    options = dict(r=3, alpha=6, target_modules=["o_proj"], target_parameters=BOTH)
    made = peft.get_peft_model(
        expert_model("GptOssForCausalLM"), lr.peft_config(lr.LoRAConfig(**options))
    )
    move(made)
    assert len(wrappers(made)) == 2
    assert_acts_alike(made, peft_model("GptOssForCausalLM"))
    add_second(made)
    assert len(wrappers(made)) == 2, "the second adapter lies in the same wrappers"


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_bfloat16_is_as_near_as_peft(adapter_dtype: torch.dtype) -> None:
    theirs = peft_model("MixtralForCausalLM", dtype=torch.bfloat16)
    for layer in lora_layers(theirs):
        for adapters in (layer.lora_A, layer.lora_B):
            adapters.to(adapter_dtype)
    ours = copy.deepcopy(theirs)
    lr.accelerate(ours)
    outer, exact = wrappers(ours)[0], copy.deepcopy(theirs).double()
    exact.set_experts_implementation("eager")
    torch.manual_seed(0)
    args = torch.randint(0, 4, (64, 2)), torch.rand(64, 2).bfloat16()
    x = torch.randn(64, 16).bfloat16()
    path = next(name for name, module in ours.named_modules() if module is outer)
    truth = exact.get_submodule(path)(x.double(), args[0], args[1].double())
    error, limit = (
        (module(x, *args).double() - truth).abs().max()
        for module in (outer, theirs.get_submodule(path))
    )
    assert error <= 2 * limit


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    gradients = []
    for checkpoints in (False, True):
        model, _ = twins()
        model.train()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        logits(model).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a")
def test_compiles_without_a_graph_break(dtype: torch.dtype) -> None:
    ours = peft_model("GptOssForCausalLM", dtype=dtype)
    lr.accelerate(ours)
    outer = wrappers(ours)[0]
    torch._dynamo.reset()
    compiled = torch.compile(outer, backend="aot_eager", fullgraph=True)
    x, ids, gates = torch.randn(6, 16).to(dtype), torch.randint(0, 4, (6, 2)), torch.rand(6, 2)
    args = x, ids, gates.to(dtype)
    torch.testing.assert_close(compiled(*args), outer(*args))


def hook_experts(model: nn.Module) -> None:
    wrappers(model)[-1].base_layer.register_forward_hook(lambda module, args, y: 2 * y)


def hook_adapter(model: nn.Module) -> None:
    wrappers(model)[-1].lora_A["default"].register_forward_hook(lambda module, args, y: y)


def spread(model: nn.Module) -> None:
    wrappers(model)[-1].base_layer._is_expert_parallel = True


AFTERWARDS: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "a hook on the experts": (hook_experts, "hooks, or a forward, were put on a module inside"),
    "a hook on an adapter": (hook_adapter, "lora_A or lora_B is wrapped, hooked"),
    "expert parallel": (spread, "whose experts lie on several devices"),
}


@pytest.mark.parametrize("case", AFTERWARDS)
def test_what_a_call_reveals_runs_pefts_forward(case: str) -> None:
    change, because = AFTERWARDS[case]
    ours, _ = twins(name="MixtralForCausalLM")
    change(ours)
    theirs = lr.decelerate(copy.deepcopy(ours))
    with pytest.warns(UserWarning, match=f"runs through PEFT's own forward: .*{because}"):
        output = logits(ours)
    assert torch.equal(output, logits(theirs))
    left = lr.accelerate(ours).left_alone
    assert all(because in why for why in left.values())
    assert bool(left) == (case != "a hook on an adapter" or len(left) == 1)


def test_adapter_names_are_refused_as_by_peft() -> None:
    ours, _ = twins()
    with pytest.raises(ValueError, match="does not support mixed"):
        ours.eval()(input_ids=expert_tokens(), adapter_names=["default", "default"])


def test_parameters_without_the_interface_are_left_alone() -> None:
    model = peft_model("MixtralForCausalLM", target_parameters=["gate.weight", DOWN])
    untouched = copy.deepcopy(model)
    report = lr.accelerate(model)
    assert [why for path, why in report.left_alone.items() if path.endswith("gate")] == [
        "adapts one of a MixtralTopKRouter, which has no experts interface of transformers 5"
    ]
    assert len(report.accelerated) == 2
    assert_acts_alike(model, untouched)
