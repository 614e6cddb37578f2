"""merge, unmerge and unload of whole models."""

import copy

import pytest
import torch
from module_cases import ALL_METHODS, BASES, IDS, METHODS, RESIDUAL, Method, TinyLM, randomize
from torch import nn
from torch.nn.utils import prune

from lowrank_ext.adapt import adapt
from lowrank_ext.merging import merge, unload, unmerge
from lowrank_ext.methods.lamda.config import LaMDAConfig
from lowrank_ext.methods.lora.config import LoRAConfig
from lowrank_ext.nn import LoRALinear, LowRankLinear

by_method = pytest.mark.parametrize("method", METHODS, ids=str)
DTYPES = [torch.float32, torch.bfloat16]


def trained(method: Method, model: nn.Module, **options) -> nn.Module:
    """An adapted model in eval mode whose adapters have moved."""
    adapt(model, method.config(r=2, init=method.init, **method.options(2), **options))
    randomize(model)
    return model.eval()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" not in n}


def assert_same(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in expected:
            assert torch.equal(parameter, expected[name]), name


@by_method
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_and_unmerge(method: Method, dtype: torch.dtype) -> None:
    model = trained(method, TinyLM(dtype=dtype))
    before, logits = weights(model), model(IDS)
    assert merge(model) is model
    merged = weights(model)
    assert not torch.equal(merged["layers.0.q_proj.weight"], before["layers.0.q_proj.weight"])
    tolerance = dict(rtol=0.1, atol=0.1) if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(model(IDS), logits, **tolerance)
    assert_same(merge(model), merged)
    assert unmerge(model) is model
    assert_same(model, before)
    assert torch.equal(model(IDS), logits)
    assert_same(unmerge(model), before)


@by_method
@pytest.mark.parametrize("merged_before", [False, True])
def test_unload_with_merging_gives_the_merged_plain_model(
    method: Method, merged_before: bool
) -> None:
    plain = TinyLM()
    names = list(plain.state_dict())
    model = trained(method, plain)
    logits = model(IDS)
    if merged_before:
        merge(model)
    assert unload(model, merge=True) is model
    assert list(model.state_dict()) == names
    assert not any(isinstance(m, LowRankLinear) for m in model.modules())
    assert not hasattr(model, "lowrank_config")
    assert not model.training and not model.layers[0].q_proj.training
    torch.testing.assert_close(model(IDS), logits)


@by_method
@pytest.mark.parametrize("merged_before", [False, True])
def test_unload_without_merging_gives_the_base_back(method: Method, merged_before: bool) -> None:
    model = TinyLM(tied=True)
    parameters = dict(model.named_parameters())
    before, logits = weights(model), model(IDS)
    trained(method, model)
    if merged_before:
        merge(model)
    unload(model, merge=False)
    after = dict(model.named_parameters())
    assert after.keys() == parameters.keys()
    assert all(after[name] is parameters[name] for name in after)
    if method in RESIDUAL:
        torch.testing.assert_close(weights(model), before)
    else:
        assert_same(model, before)
        assert torch.equal(model(IDS), logits)
    adapt(model, LoRAConfig(r=2))


@pytest.mark.parametrize("method", ALL_METHODS, ids=str)
def test_unload_keeps_what_was_merged(method: Method) -> None:
    """A merged model unloads to its merged weights, an unmerged one to its base."""
    model = trained(method, TinyLM(), modules_to_save=["norm"])
    with torch.no_grad():
        model.norm.weight.fill_(2.0)
    if not method.module.unmergeable_because:
        merge(model)
        before, logits = weights(model), model(IDS)
        unload(model)
        assert_same(model, before)
        assert torch.equal(model(IDS), logits)
    else:
        unload(model)
    assert not any(isinstance(m, LowRankLinear) for m in model.modules())
    assert torch.equal(model.norm.weight, torch.full((8,), 2.0))


def test_unload_of_a_partly_merged_model_asks() -> None:
    model = trained(METHODS[0], TinyLM())
    logits = model(IDS)
    model.layers[0].q_proj.merge()
    before = weights(model)
    with pytest.raises(
        ValueError,
        match=r"unload: model must be merged as a whole or not at all, got 1 of 6 modules merged, "
        r"layers\.0\.q_proj among them; give merge=True",
    ):
        unload(model)
    assert_same(model, before)
    assert len([m for m in model.modules() if isinstance(m, LowRankLinear)]) == 6
    torch.testing.assert_close(unload(model, merge=True)(IDS), logits)


def test_a_single_merged_module_unloads_to_its_merged_weight() -> None:
    module = LoRALinear.from_linear(nn.Linear(4, 3), r=2)
    randomize(module)
    x = torch.randn(2, 4)
    expected = merge(module)(x)
    assert torch.equal(unload(module)(x), expected)


TOO_LARGE = {"overflow": 300.0, "inf": float("inf"), "nan": float("nan")}


@by_method
@pytest.mark.parametrize("call", [merge, lambda m: unload(m, merge=True)], ids=["merge", "unload"])
@pytest.mark.parametrize("value", TOO_LARGE.values(), ids=TOO_LARGE)
def test_a_merge_that_is_not_finite_touches_nothing(method: Method, call, value: float) -> None:
    """The last module's merged weight has no finite float16 values: none is merged."""
    model = trained(method, TinyLM(dtype=torch.float16))
    last = model.layers[1].down_proj
    last.lora_a.data.fill_(300)
    last.lora_b.data.fill_(value)
    for scale in (last.core, last.rank_scale, last.out_scale):
        if scale is not None:
            scale.data.fill_(1)
    already = model.layers[0].up_proj
    if method.shortcut != "block":  # a chain is merged whole
        already.merge()
    before = weights(model)
    with pytest.raises(
        ValueError,
        match=r"merge: layers\.1\.down_proj: .*must be finite in float16, got inf or nan",
    ):
        call(model)
    assert_same(model, before)
    modules = [m for m in model.modules() if isinstance(m, LowRankLinear)]
    assert len(modules) == 6
    assert [m for m in modules if m.merged] == [m for m in [already] if method.shortcut != "block"]


def test_a_merge_that_is_interrupted_touches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(METHODS[0], TinyLM())
    before = weights(model)

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(model.layers[1].up_proj, "merge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge(model)
    assert_same(model, before)
    assert not any(m.merged for m in model.modules() if isinstance(m, LowRankLinear))


@by_method
@pytest.mark.parametrize("extra", [(), ("norm",)], ids=["adapters", "norm too"])
def test_training_while_merged_says_so(method: Method, extra: tuple[str, ...]) -> None:
    """In place of torch's "element 0 of tensors does not require grad", or of no gradients."""
    model = trained(method, TinyLM(), modules_to_save=extra).train()
    logits = merge(model).eval()(IDS)
    model.train()
    with torch.no_grad():
        assert torch.equal(model(IDS), logits)
    output = model(IDS)
    assert torch.equal(output, logits)
    with pytest.raises(
        RuntimeError, match=r"Linear\.forward: the adapter must be unmerged to train, .*lr\.unmerge"
    ):
        output.sum().backward()
    unmerge(model)(IDS).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_gradients_of_the_input_of_a_merged_model() -> None:
    module = LoRALinear.from_linear(nn.Linear(4, 3), r=2)
    merge(module).eval()
    x = torch.randn(2, 4, requires_grad=True)
    module(x).sum().backward()
    torch.testing.assert_close(x.grad, module.weight.sum(0).expand(2, 4))


def test_a_weight_without_values_is_not_merged() -> None:
    with torch.device("meta"):
        model = adapt(TinyLM(), LoRAConfig(r=2))
    with pytest.raises(
        ValueError, match=r"merge: layers\.0\.q_proj: .*must hold values, got a meta"
    ):
        merge(model)
    assert not model.layers[0].q_proj.merged


@pytest.mark.parametrize(
    "options", [dict(target_modules=["lm_head"]), dict(target_modules=["q_proj"])]
)
def test_a_tied_weight_is_not_merged_and_nothing_is_touched(options: dict) -> None:
    model = TinyLM(tied=True)
    model.layers[1].q_proj.weight = model.layers[0].q_proj.weight
    adapt(model, LoRAConfig(r=2, **options))
    randomize(model)
    before = weights(model)
    for call in (merge, lambda m: unload(m, merge=True)):
        with pytest.raises(
            ValueError, match=r"merge: the weight of .* must be its own, got one tied to"
        ):
            call(model)
        assert_same(model, before)
        assert not any(m.merged for m in model.modules() if isinstance(m, LowRankLinear))


def test_a_shared_module_is_merged_once() -> None:
    model = TinyLM()
    model.layers[1] = model.layers[0]
    adapt(model, LoRAConfig(r=2))
    randomize(model)
    logits = model(IDS)
    torch.testing.assert_close(merge(model)(IDS), logits)
    torch.testing.assert_close(unload(model, merge=True)(IDS), logits)


@pytest.mark.parametrize("kind", ["int8", "doubling", "negated"])
def test_a_base_that_cannot_be_merged_is_named_before_any_weight_is_touched(kind: str) -> None:
    model = nn.ModuleDict({"first": nn.Linear(12, 9), "odd": BASES[kind](torch.float32)})
    adapt(model, LoRAConfig(r=2, target_modules=["first", "odd"]))
    randomize(model)
    before = model.first.weight.detach().clone()
    with pytest.raises(TypeError, match="merge: the base of odd must compute"):
        merge(model)
    assert torch.equal(model.first.weight, before) and not model.first.merged
    unload(model)
    assert type(model.first) is nn.Linear and not isinstance(model.odd, LowRankLinear)


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


COMPUTED = {
    "parametrized": lambda m: nn.utils.parametrize.register_parametrization(m, "weight", Doubled()),
    "pruned": lambda m: prune.l1_unstructured(m, "weight", amount=0.5),
    "spectral norm": lambda m: nn.utils.spectral_norm(m, "weight"),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_weight_that_is_computed_for_each_call_is_not_merged(kind: str) -> None:
    """What a merge writes into it would be gone with the next call."""
    model = TinyLM()
    adapt(model, LoRAConfig(r=2))
    randomize(model)
    COMPUTED[kind](model.layers[1].q_proj)
    model.eval()
    logits = model(IDS)
    for call in (merge, lambda m: unload(m, merge=True)):
        with pytest.raises(TypeError, match=r"merge: the base of layers\.1\.q_proj must compute"):
            call(model)
        assert torch.equal(model(IDS), logits)
    with pytest.raises(TypeError, match=r"LoRALinear\.merge: the base must compute"):
        model.layers[1].q_proj.merge()


def test_models_without_adapters() -> None:
    for name, call in (("merge", merge), ("unmerge", unmerge), ("unload", unload)):
        with pytest.raises(ValueError, match=f"{name}: model must carry adapters, got a TinyLM"):
            call(TinyLM())


def test_a_single_module() -> None:
    module = LoRALinear.from_linear(nn.Linear(4, 3), r=2)
    randomize(module)
    x = torch.randn(2, 4)
    expected = module(x)
    torch.testing.assert_close(merge(module)(x), expected)
    plain = unload(module, merge=True)
    assert type(plain) is nn.Linear
    torch.testing.assert_close(plain(x), expected)


def test_a_merged_models_state_dict_loads_into_the_plain_model() -> None:
    plain = TinyLM()
    model = adapt(copy.deepcopy(plain), LaMDAConfig(r=2))
    randomize(model)
    merge(model)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(plain(IDS), model(IDS))
