"""LoRA on stacked expert weights (target_parameters) beside PEFT's, on four layouts of experts."""

import copy
import dataclasses
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_models import DOWN, EXPERT_MODELS, GATE_UP, expert_model, expert_tokens
from safetensors.torch import load_file
from torch import Tensor, nn

pytest.importorskip("peft")

import peft

import lowrank_ext as lr
from lowrank_ext.nn.adapted_experts import AdaptedExperts
from lowrank_ext.nn.experts import ExpertBranch, experts_output

BOTH = {"target_modules": ["o_proj"], "target_parameters": [GATE_UP, DOWN]}
ONLY = {"target_modules": [], "target_parameters": [GATE_UP, DOWN]}
families = pytest.mark.parametrize("name", EXPERT_MODELS)
implementations = pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])


def adapted(name: str, implementation: str = "grouped_mm", **options: Any) -> nn.Module:
    """Adapted, all of the adapters moved."""
    model = expert_model(name, implementation, options.pop("dtype", torch.float32))
    model = lr.adapt(model, lr.LoRAConfig(**{"r": 3, "alpha": 6, **BOTH, **options}))
    move(model)
    return model


def wrapped(model: nn.Module, **options: Any) -> nn.Module:
    """PEFT's model, all of the adapters moved."""
    model = peft.get_peft_model(
        model, peft.LoraConfig(**{"r": 3, "lora_alpha": 6, **BOTH, **options})
    )
    move(model)
    return model


@torch.no_grad()
def move(model: nn.Module) -> None:
    draws = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draws))


def logits(model: nn.Module) -> Tensor:
    output: Tensor = model(input_ids=expert_tokens()).logits
    return output


def loss(model: nn.Module) -> Tensor:
    ids = expert_tokens()
    weight = torch.randn(ids.numel(), 32, generator=torch.Generator().manual_seed(3))
    return (model(input_ids=ids).logits.flatten(0, 1) * weight).sum()


def experts_of(model: nn.Module) -> AdaptedExperts:
    return next(module for module in model.modules() if isinstance(module, AdaptedExperts))


def files_in(path: Path) -> dict[str, Tensor]:
    return load_file(path / "adapter_model.safetensors")


def assert_same_files(ours: Path, theirs: Path) -> None:
    a, b = files_in(ours), files_in(theirs)
    assert a.keys() == b.keys()
    for key, tensor in a.items():
        assert torch.equal(tensor, b[key]), key


# ---------------------------------------------------------------------------------- beside PEFT


@families
@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_the_start_is_pefts_from_the_same_seed(name: str, init: str, tmp_path: Path) -> None:
    ours, base = expert_model(name), expert_model(name)
    torch.manual_seed(7)
    lr.adapt(ours, lr.LoRAConfig(r=3, init=init, **BOTH))
    torch.manual_seed(7)
    kind = True if init == "kaiming" else init
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=3, init_lora_weights=kind, **BOTH))
    lr.save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")


@families
@implementations
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_parameters": [DOWN]},
        {"target_modules": [], "target_parameters": ["gate_up_proj"]},
        {"use_rslora": True, "rank_pattern": {GATE_UP: 2}, "alpha_pattern": {"down_proj": 5}},
    ],
    ids=["both", "down", "gate and up", "patterns"],
)
def test_output_gradients_and_files_are_pefts(
    name: str, implementation: str, options: dict[str, Any], tmp_path: Path
) -> None:
    theirs = wrapped(expert_model(name, implementation), **options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = lr.load_adapter(expert_model(name, implementation), tmp_path / "theirs")
    expected = logits(theirs)
    torch.testing.assert_close(logits(ours), expected, rtol=2e-5, atol=2e-5)
    assert (logits(expert_model(name)) - expected).abs().max() > 1e-2, "the adapters act"
    lr.save_adapter(ours, tmp_path / "ours")
    assert_same_files(tmp_path / "ours", tmp_path / "theirs")
    again = peft.PeftModel.from_pretrained(expert_model(name, implementation), tmp_path / "ours")
    assert torch.equal(logits(again), expected)
    for model in (ours, theirs):
        loss(model).backward()
    # Gradients have the layout of the tensors: their files compare them.
    for model in (ours, theirs):
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(parameter.grad)
    lr.save_adapter(ours, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    gradients = files_in(tmp_path / "theirs")
    assert files_in(tmp_path / "ours").keys() == gradients.keys()
    for key, gradient in files_in(tmp_path / "ours").items():
        scale = gradients[key].abs().max().item()
        assert scale > 0, key
        torch.testing.assert_close(gradient, gradients[key], rtol=1e-4, atol=2e-5 * scale)


@families
def test_in_float64_all_digits_are_pefts(name: str, tmp_path: Path) -> None:
    theirs = wrapped(expert_model(name, "eager", torch.float64))
    theirs.save_pretrained(tmp_path)
    ours = lr.load_adapter(expert_model(name, "eager", torch.float64), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-12, atol=1e-12)


def test_five_steps_give_pefts_losses() -> None:
    history = []
    for make in (
        lambda model: lr.adapt(model, lr.LoRAConfig(r=3, alpha=6, **BOTH)),
        lambda model: peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=6, **BOTH)),
    ):
        model = expert_model("Qwen3MoeForCausalLM")
        torch.manual_seed(0)
        model = make(model).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = []
        for _ in range(5):
            step = model(input_ids=expert_tokens(), labels=expert_tokens()).loss
            step.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(step.item())
        history.append(losses)
    assert history[0][-1] < history[0][0]
    assert history[0] == pytest.approx(history[1], rel=2e-5)


def test_export_and_config(tmp_path: Path) -> None:
    """Names as short as select the same weights, alpha of a scaling that was set afterwards."""
    name = "DeepseekV3ForCausalLM"
    model = adapted(name, target_modules=["down_proj"], target_parameters=["experts.down_proj"])
    experts_of(model).adapters()["down_proj"].scaling = 1.5
    lr.export_lora(model, tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["target_modules"] == ["down_proj"], "of the shared experts"
    assert fields["target_parameters"] == ["experts.down_proj"]
    assert fields["fan_in_fan_out"] is False
    expected = logits(model)
    again = lr.load_adapter(expert_model(name), tmp_path)
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="target_parameters must be empty for format='diffusers'"):
        lr.export_lora(model, tmp_path, format="diffusers")


# ------------------------------------------------------------------------------ what always holds


@families
@implementations
def test_base_merging_and_state_dict(name: str, implementation: str, tmp_path: Path) -> None:
    base = expert_model(name, implementation)
    before = logits(base)
    model = lr.adapt(copy.deepcopy(base), lr.LoRAConfig(r=3, **BOTH))
    if implementation == "grouped_mm":
        assert torch.equal(logits(model), before)
    torch.testing.assert_close(logits(model), before, rtol=1e-6, atol=1e-6)
    move(model)
    after = logits(model)
    assert (after - before).abs().max() > 1e-2
    own = {key for key in model.state_dict() if "lora_" in key}
    assert len(own) == 6 and model.state_dict().keys() - own == base.state_dict().keys()
    with lr.disable_adapter(model):
        assert torch.equal(logits(model), before)
    weights = {n: p.clone() for n, p in experts_of(model).base_layer.named_parameters()}
    lr.merge(model)
    torch.testing.assert_close(logits(model), after, rtol=2e-5, atol=2e-5)
    merged = logits(model)
    assert model.state_dict().keys() == base.state_dict().keys()
    plain = copy.deepcopy(base)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(logits(plain), merged)
    with pytest.raises(RuntimeError, match="gate_up_proj is merged: call unmerge"):
        model.load_state_dict(base.state_dict(), strict=False)
    assert torch.equal(logits(model), merged), "nothing was loaded"
    with lr.disable_adapter(model):
        assert torch.equal(logits(model), before)
    lr.unmerge(model)
    assert torch.equal(logits(model), after)
    for n, p in experts_of(model).base_layer.named_parameters():
        assert torch.equal(p, weights[n])
    again = lr.adapt(copy.deepcopy(base), lr.LoRAConfig(r=3, **BOTH))
    again.load_state_dict(model.state_dict())
    assert torch.equal(logits(again), after)
    assert torch.equal(logits(copy.deepcopy(model)), after)
    assert torch.equal(logits(lr.unload(copy.deepcopy(model), merge=True)), merged)
    plain = lr.unload(model)
    assert torch.equal(logits(plain), before)
    assert not any(isinstance(m, AdaptedExperts) for m in plain.modules())
    assert plain.state_dict().keys() == base.state_dict().keys()


@families
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_start_has_the_bits_of_the_grouped_product(name: str, dtype: torch.dtype) -> None:
    model = expert_model(name, dtype=dtype)
    before = logits(model)
    assert torch.equal(logits(lr.adapt(model, lr.LoRAConfig(r=3, **ONLY))), before)


def test_a_backward_through_merged_experts_is_refused() -> None:
    model = lr.merge(adapted("MixtralForCausalLM", **ONLY)).train()
    with pytest.raises(RuntimeError, match="must be unmerged to train"):
        loss(model).backward()


def test_merged_is_rounded_once() -> None:
    """bf16: the nearest to W + scaling lora_b lora_a, in either layout."""
    for name in ("MixtralForCausalLM", "GptOssForCausalLM"):
        model = adapted(name, dtype=torch.bfloat16, **ONLY)
        experts = experts_of(model)
        for weight, adapter in experts.adapters().items():
            delta = adapter.scaling * adapter.lora_b.double() @ adapter.lora_a.double()
            stored = experts.base_layer.get_parameter(weight)
            delta = delta.mT if name.startswith("Gpt") else delta
            expected = (stored.float() + delta.float()).bfloat16()
            adapter.merge()
            assert torch.equal(stored, expected)


@families
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_any_implementation_gives_one_result(name: str, implementation: str) -> None:
    torch.testing.assert_close(
        logits(adapted(name, implementation)), logits(adapted(name)), rtol=1e-5, atol=1e-5
    )


# ------------------------------------------------------------------------------ the module alone


def definition(experts: Any, x: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
    """Token by token, in the dtype of the arguments, from the module's formula."""
    base = experts.base_layer

    def projected(weight: str, row: Tensor, e: int) -> Tensor:
        stored = base.get_parameter(weight)[e].to(row.dtype)
        y = row @ (stored if base.is_transposed else stored.mT)
        if base.has_bias:
            y = y + base.get_parameter(f"{weight}_bias")[e].to(row.dtype)
        adapter = experts.adapters()[weight]
        lora_a, lora_b = adapter.lora_a[e].to(row.dtype), adapter.lora_b[e].to(row.dtype)
        return y + adapter.scaling * (row @ lora_a.mT) @ lora_b.mT

    rows = []
    for t in range(len(x)):
        outputs = [
            gates[t, k]
            * projected("down_proj", base._apply_gate(projected("gate_up_proj", x[t], e)), e)
            for k, e in enumerate(ids[t].tolist())
        ]
        rows.append(sum(outputs))
    return torch.stack(rows) if rows else x.clone()


ROUTINGS = {
    "mixed": [[0, 1], [2, 0], [1, 3], [3, 2], [0, 3]],
    "one expert": [[2], [2], [2], [2], [2]],
    "some without a token": [[3, 0], [0, 3], [3, 0], [0, 3], [3, 0]],
}


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM"])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_module_beside_its_definition(name: str, routing: str, dtype: torch.dtype) -> None:
    experts = experts_of(adapted(name, dtype=dtype))
    twin = copy.deepcopy(experts)
    ids = torch.tensor(ROUTINGS[routing])
    results = []
    for module, compute in ((experts, experts), (twin, lambda *a: definition(twin, *a))):
        torch.manual_seed(1)
        x = torch.randn(5, 16, dtype=dtype, requires_grad=True)
        gates = torch.rand(ids.shape, dtype=dtype, requires_grad=True)
        upstream = torch.randn(5, 16, dtype=dtype)
        y = compute(x, ids, gates)
        y.backward(upstream)
        adapters = module.adapters().values()
        results.append([y, x.grad, gates.grad, *(p.grad for a in adapters for p in a.parameters())])
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
    unused = sorted({0, 1, 2, 3} - set(ids.flatten().tolist()))
    for gradient in results[0][3:]:
        assert torch.count_nonzero(gradient[unused]) == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_tokens(dtype: torch.dtype) -> None:
    experts = experts_of(adapted("GptOssForCausalLM", dtype=dtype))
    x = torch.zeros(0, 16, dtype=dtype, requires_grad=True)
    y = experts(x, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2, dtype=dtype))
    assert y.shape == (0, 16) and y.dtype == dtype
    y.sum().backward()
    assert x.grad.shape == x.shape
    for adapter in experts.adapters().values():
        assert torch.count_nonzero(adapter.lora_a.grad) == 0


@pytest.mark.parametrize("adapter_dtype", ["float32", "base"])
@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_bfloat16_is_as_near_as_plain_torch(name: str, adapter_dtype: str) -> None:
    experts = experts_of(adapted(name, dtype=torch.bfloat16, adapter_dtype=adapter_dtype))
    torch.manual_seed(0)
    ids = torch.randint(0, 4, (64, 2))
    x, gates = torch.randn(64, 16).bfloat16(), torch.rand(64, 2).bfloat16()
    truth = definition(experts, x.double(), ids, gates.double())
    plain = definition(experts, x, ids, gates)
    error, limit = ((y.double() - truth).abs().max() for y in (experts(x, ids, gates), plain))
    assert error <= 2 * limit


def test_several_branches_on_one_weight() -> None:
    experts = experts_of(adapted("MixtralForCausalLM", dtype=torch.float64)).base_layer
    torch.manual_seed(0)
    branches = {
        weight: [
            ExpertBranch(torch.randn(4, r, k).double(), torch.randn(4, n, r).double(), scaling)
            for r, scaling in ((2, 0.5), (3, 2.0))
        ]
        for weight, k, n in (("gate_up_proj", 16, 48), ("down_proj", 24, 16))
    }
    joined = {
        weight: [
            ExpertBranch(
                torch.cat([b.lora_a for b in both], 1),
                torch.cat([b.scaling * b.lora_b for b in both], 2),
                1.0,
            )
        ]
        for weight, both in branches.items()
    }
    args = torch.randn(6, 16).double(), torch.randint(0, 4, (6, 2)), torch.rand(6, 2).double()
    torch.testing.assert_close(
        experts_output(experts, branches, *args), experts_output(experts, joined, *args)
    )


@families
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_ids_of_any_integer_dtype(name: str, dtype: torch.dtype) -> None:
    experts = experts_of(adapted(name))
    x, ids, gates = torch.randn(6, 16), torch.randint(0, 4, (6, 2)), torch.rand(6, 2)
    expected, got = experts(x, ids, gates), experts(x, ids.to(dtype), gates)
    assert torch.equal(got, expected)
    with torch.no_grad():
        for adapter in experts.adapters().values():
            adapter.lora_b.zero_()
    torch.testing.assert_close(experts(x, ids.to(dtype), gates), experts.base_layer(x, ids, gates))


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_runs_on_the_meta_device(name: str) -> None:
    experts = experts_of(adapted(name, dtype=torch.float64)).to("meta")
    ids = torch.zeros(6, 2, dtype=torch.int64, device="meta")
    x, gates = (torch.empty(6, n, dtype=torch.float64, device="meta") for n in (16, 2))
    assert experts(x, ids, gates).shape == (6, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM"])
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a")
def test_compiles_without_a_graph_break(name: str, dtype: torch.dtype) -> None:
    experts = experts_of(adapted(name, dtype=dtype))
    twin = copy.deepcopy(experts)
    torch._dynamo.reset()
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for tokens in (6, 7):
        torch.manual_seed(tokens)
        args = torch.randn(tokens, 16).to(dtype), torch.randint(0, 4, (tokens, 2))
        gates = torch.rand(tokens, 2).to(dtype)
        expected, y = experts(*args, gates), compiled(*args, gates)
        torch.testing.assert_close(y, expected)
        for output in (expected, y):
            output.float().square().sum().backward()
        for ours, other in zip(experts.parameters(), twin.parameters(), strict=True):
            if other.requires_grad:
                torch.testing.assert_close(other.grad, ours.grad)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    gradients = []
    for checkpoints in (False, True):
        model = adapted("Qwen3MoeForCausalLM").train()
        if checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        loss(model).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


def test_autocast_keeps_the_dtype_of_the_products() -> None:
    """As transformers' grouped product, which autocast leaves alone."""
    model = adapted("MixtralForCausalLM")
    seen = []
    experts = experts_of(model)
    experts.register_forward_hook(lambda module, args, y: seen.append((args[0].dtype, y.dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        cast = logits(model)
    assert seen == [(torch.float32, torch.float32)] or seen == [(torch.bfloat16, torch.bfloat16)]
    torch.testing.assert_close(cast.float(), logits(model), rtol=0.1, atol=0.1)


# ------------------------------------------------------------------------------- what is selected


def test_experts_alone_and_all_linear() -> None:
    only = adapted("MixtralForCausalLM", **ONLY)
    assert [n for n, m in only.named_modules() if hasattr(m, "lora_a")] == [
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    ]
    assert {n.rpartition(".")[2] for n, p in only.named_parameters() if p.requires_grad} == {
        "lora_a",
        "lora_b",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is left out
        model = expert_model("MixtralForCausalLM")
        lr.adapt(
            model,
            lr.LoRAConfig(r=2, target_modules="all-linear", target_parameters=[GATE_UP, DOWN]),
        )


def test_what_is_left_out_is_named_with_the_way_to_adapt_it() -> None:
    with pytest.warns(UserWarning, match=re.escape(f"target_parameters={[DOWN, GATE_UP]} adapts")):
        lr.adapt(expert_model("GptOssForCausalLM"), lr.LoRAConfig(r=2))
    model = expert_model("GptOssForCausalLM")
    left = model.model.layers[0].mlp.experts.down_proj.numel()
    with pytest.warns(UserWarning, match=rf"adapt: {left:,} parameters.*\['{DOWN}'\] adapts them"):
        config = lr.LoRAConfig(r=2, target_modules="all-linear", target_parameters=[GATE_UP])
        lr.adapt(model, config)
    table = lr.summary(model)
    rows = list(zip(*(column._cells for column in table.columns), strict=True))
    assert ("gate_up_proj", "LoRAExpert", "1", "16 → 48") in [row[:4] for row in rows]
    left_out = [row for row in rows if row[1] == "GptOssExperts, not adapted"]
    assert [(row[0], *row[6:]) for row in left_out] == [("experts", "0", "6.1 kB")]


class Stacked(nn.Module):
    """Three-dimensional weights without transformers' interface."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.experts = nn.Module()
        self.experts.register_parameter("weight", nn.Parameter(torch.zeros(2, 3, 3)))


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no interface": (
        Stacked,
        {"target_parameters": ["experts.weight"]},
        "adapt: target_parameters must name stacked weights of experts, got experts.weight, one of "
        "a Module, which has no experts interface of transformers 5",
    ),
    "a bias": (
        lambda: expert_model("GptOssForCausalLM"),
        {"target_parameters": ["experts.down_proj_bias"]},
        "got model.layers.0.mlp.experts.down_proj_bias, one of a GptOssExperts, whose stacked "
        "weights are gate_up_proj and down_proj",
    ),
    "a router": (
        lambda: expert_model("MixtralForCausalLM"),
        {"target_parameters": ["gate.weight"]},
        "got model.layers.0.mlp.gate.weight, one of a MixtralTopKRouter, which has no",
    ),
    "no parameter": (
        lambda: expert_model("MixtralForCausalLM"),
        {"target_parameters": ["experts.gate_proj"]},
        "target_parameters must match a parameter of the model, got 'experts.gate_proj', which "
        "matches none; did you mean .*'experts.gate_up_proj'",
    ),
    "dropout": (
        lambda: expert_model("MixtralForCausalLM"),
        {"target_parameters": [DOWN], "dropout": 0.1},
        "adapt: model.layers.0.mlp.experts.down_proj: LoRAExpertLinear: dropout must be 0, as in "
        "PEFT, for target_parameters, got 0.1",
    ),
    "pissa": (
        lambda: expert_model("MixtralForCausalLM"),
        {"target_parameters": [DOWN], "init": "pissa"},
        "init must be 'kaiming' or 'gaussian' for target_parameters, got 'pissa'",
    ),
    "lora_bias": (
        lambda: expert_model("MixtralForCausalLM"),
        {"target_parameters": [DOWN], "lora_bias": True},
        "lora_bias must be False, as in PEFT, for target_parameters, got True",
    ),
    "all biases": (
        lambda: expert_model("GptOssForCausalLM"),
        {"target_parameters": [DOWN], "bias": "all"},
        "bias must be 'none' or 'lora_only' for target_parameters, got 'all'",
    ),
    "saved whole": (
        lambda: expert_model("MixtralForCausalLM"),
        {"target_parameters": [DOWN], "modules_to_save": ["experts"]},
        "modules_to_save must not hold target_parameters, got \\['experts'\\], inside of which "
        "model.layers.0.mlp.experts.down_proj is",
    ),
    "pattern": (
        lambda: expert_model("MixtralForCausalLM"),
        {"target_parameters": [DOWN], "rank_pattern": {"gate_up_proj": 2}},
        "rank_pattern must match an adapted module of the model, got 'gate_up_proj'",
    ),
    "rank": (
        lambda: expert_model("MixtralForCausalLM"),
        {"target_parameters": [DOWN], "r": 513},
        r"r must be at most max\(in_features, out_features, 512\) = 512, got 513",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_leave_the_model_alone(case: str) -> None:
    make, options, message = REFUSED[case]
    model = make()
    modules = list(model.modules())
    with pytest.raises(ValueError, match=message):
        lr.adapt(model, lr.LoRAConfig(**{"r": 2, **options}))
    assert list(model.modules()) == modules
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_experts_with_hooks_of_devices_or_on_several_are_refused() -> None:
    for change, message in (
        (lambda m: setattr(m, "_is_expert_parallel", True), "whose experts lie on several devices"),
        (lambda m: setattr(m, "forward", m.forward), "a forward of its own on the module"),
        (lambda m: m.register_forward_hook(print), "with hooks, which would not run"),
        (lambda m: m.register_forward_pre_hook(print), "with hooks, which would not run"),
        (lambda m: m.register_full_backward_hook(print), "with hooks, which would not run"),
    ):
        model = expert_model("MixtralForCausalLM")
        change(model.model.layers[0].mlp.experts)
        with pytest.raises(ValueError, match=message):
            lr.adapt(model, lr.LoRAConfig(r=2, **ONLY))


def test_experts_alone_unless_modules_are_named() -> None:
    """As in PEFT, whose target_modules are then none; by lr.peft_config, too."""
    both = [GATE_UP, DOWN]
    alone = lr.LoRAConfig(r=2, target_parameters=both)
    assert alone.target_modules == ()
    assert lr.LoRAConfig(target_modules="all-linear", target_parameters=both).target_modules
    assert dataclasses.replace(lr.LoRAConfig(r=2), target_parameters=both) == alone
    assert lr.LoRAConfig().target_modules == "all-linear"
    sizes = set()
    for model in (
        lr.adapt(expert_model("MixtralForCausalLM"), alone),
        peft.get_peft_model(expert_model("MixtralForCausalLM"), lr.peft_config(alone)),
        peft.get_peft_model(
            expert_model("MixtralForCausalLM"), peft.LoraConfig(r=2, target_parameters=both)
        ),
    ):
        sizes.add(lr.trainable_parameters(model).trainable)
    assert len(sizes) == 1


def test_config() -> None:
    with pytest.raises(TypeError, match="target_parameters must be a sequence of names, got the"):
        lr.LoRAConfig(target_parameters="experts.down_proj")
    with pytest.raises(ValueError, match="target_modules must name at least one module"):
        lr.LoRAConfig(target_modules=[])
    config = lr.LoRAConfig(**ONLY)
    assert type(config).from_dict(config.to_dict()) == config
    with pytest.raises(TypeError, match="target_parameters is no option here"):
        lr.AFLoRAConfig(target_parameters=[DOWN])


# -------------------------------------------------------------------------------------- bad files


@pytest.fixture
def files(tmp_path: Path) -> Path:
    lr.save_adapter(adapted("MixtralForCausalLM"), tmp_path)
    return tmp_path


def edit(path: Path, **fields: Any) -> None:
    config = path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))


BAD_FILES: dict[str, tuple[dict[str, Any], str]] = {
    "another model's": (
        {"target_parameters": ["feed_forward.gate_up_proj"]},
        "target_parameters must match a parameter of the model, got 'feed_forward.gate_up_proj'",
    ),
    "no list": ({"target_parameters": "experts"}, "target_parameters must be a list of names"),
    "one weight less": (
        {"target_parameters": ["experts.down_proj"]},
        "experts.base_layer.lora_A.weight",
    ),
    "dropout": ({"lora_dropout": 0.1}, "dropout must be 0, as in PEFT, for target_parameters"),
    "rank": ({"r": 4}, r"experts.base_layer.lora_A.weight must be \[16, 16\], got \[12, 16\]"),
    "of another method": (
        {"peft_type": "LAMDA"},
        "target_parameters=.* is not supported",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_that_do_not_fit(case: str, files: Path) -> None:
    fields, message = BAD_FILES[case]
    edit(files, **fields)
    model = expert_model("MixtralForCausalLM")
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        lr.load_adapter(model, files)
    assert torch.equal(logits(model), before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_bank_refuses_them(files: Path) -> None:
    bank = lr.AdapterBank(expert_model("MixtralForCausalLM"))
    with pytest.raises(ValueError, match="must be a LoRA of linear modules, got target_parameters"):
        bank.load("one", files)


def test_loading_into_an_adapted_model(files: Path) -> None:
    model = lr.adapt(expert_model("MixtralForCausalLM"), lr.LoRAConfig(r=3, alpha=6, **BOTH))
    lr.load_adapter(model, files)
    assert torch.equal(logits(model), logits(adapted("MixtralForCausalLM")))
    other = lr.adapt(expert_model("MixtralForCausalLM"), lr.LoRAConfig(r=3, alpha=6, **ONLY))
    with pytest.raises(ValueError, match="adapted modules must be"):
        lr.load_adapter(other, files)
    frozen = lr.load_adapter(expert_model("MixtralForCausalLM"), files, trainable=False)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
