"""disable_adapter: inside of the block a model is what it was before adapt, outside adapted."""

import copy
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from module_cases import (
    ALL_METHODS,
    BASES,
    IN,
    METHODS,
    RANK,
    RESIDUAL,
    RESIDUAL_EXPERTS,
    Method,
    adapted_away_from_start,
    plain_linear,
)
from peft_models import gpt2, llama
from torch import Tensor, nn

import lowrank_ext as lr

peft = pytest.importorskip("peft")

IDS = torch.tensor([[3, 17, 5, 9, 11], [60, 2, 44, 1, 7]])
by_any_method = pytest.mark.parametrize("method", ALL_METHODS, ids=str)
LORA = next(m for m in METHODS if str(m) == "lora-kaiming")


def random_module(method: Method, base: nn.Module) -> nn.Module:
    """An adapted linear in evaluation mode, every tensor of its adapter away from its start."""
    module = method.module.from_linear(base, r=RANK, init=method.init, **method.options(RANK))
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    return module.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def assert_base(method: Method, actual: Tensor, expected: Tensor) -> None:
    """Bits, or what the rounding of a residual weight leaves of them."""
    if method in RESIDUAL + RESIDUAL_EXPERTS:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("make", [llama, gpt2])
@by_any_method
def test_the_base_inside_and_the_adapter_outside(method: Method, make: Callable) -> None:
    base = logits(make().requires_grad_(False))
    model = adapted_away_from_start(method, make(), dropout=0.2)
    expected = logits(model)
    assert not torch.allclose(base, expected, atol=1e-2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with lr.disable_adapter(model):
        assert_base(method, logits(model), base)
        assert_base(method, logits(model.train()), base)
        model.eval()
    assert torch.equal(logits(model), expected)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_merged_models(method: Method) -> None:
    base = logits(llama())
    model = lr.merge(adapted_away_from_start(method, llama()))
    expected, before = logits(model), {n: v.clone() for n, v in model.state_dict().items()}
    with lr.disable_adapter(model):
        assert_base(method, logits(model), base)
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    with lr.disable_adapter(lr.unmerge(model)):
        assert_base(method, logits(model), base)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", [m for m in ALL_METHODS if m.init == "kaiming"], ids=str)
def test_any_base(method: Method, base: str) -> None:
    linear = BASES[base](torch.float32)
    x = torch.randn(3, IN)
    expected = linear(x)
    module = random_module(method, linear)
    with lr.disable_adapter(module):
        assert torch.equal(module(x), expected)
    assert not torch.allclose(module(x), expected, atol=1e-3)


def test_blocks_nest_and_end_by_exceptions() -> None:
    model = adapted_away_from_start(LORA, llama())
    base, expected = logits(llama()), logits(model)
    with pytest.raises(KeyError), lr.disable_adapter(model):
        with lr.disable_adapter(model):
            pass
        assert torch.equal(logits(model), base)
        raise KeyError
    assert torch.equal(logits(model), expected)


def test_a_part_of_a_model() -> None:
    model = adapted_away_from_start(LORA, llama())
    with lr.disable_adapter(model.model.layers[0]):
        partly = logits(model)
    assert not torch.equal(partly, logits(model))
    assert not torch.equal(partly, logits(llama()))


def test_copies_of_the_block_are_adapted_away_from_start() -> None:
    model = adapted_away_from_start(LORA, llama())
    with lr.disable_adapter(model):
        twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))


@by_any_method
def test_gradients_go_to_the_input_alone(method: Method) -> None:
    module = random_module(method, plain_linear()).train()
    x = torch.randn(3, IN, requires_grad=True)
    with lr.disable_adapter(module):
        module(x).sum().backward()
    assert all(parameter.grad is None for parameter in module.parameters())
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("method", [LORA, RESIDUAL[0]], ids=str)
def test_compiled_models_notice(method: Method) -> None:
    module = random_module(method, plain_linear())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(RANK, IN)
    expected = module(x)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), expected)
        with lr.disable_adapter(module):
            torch.testing.assert_close(compiled(x), module(x))
            assert not torch.allclose(compiled(x), expected, atol=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_recomputation_outside_of_the_block_is_an_error() -> None:
    """Activation checkpointing would run the adapted module for a forward that was not."""
    model = adapted_away_from_start(LORA, llama()).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    with lr.disable_adapter(model):
        loss = model(IDS).logits.sum()
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        loss.backward()


def test_what_cannot_be_disabled() -> None:
    with pytest.raises(ValueError, match="disable_adapter"), lr.disable_adapter(llama()):
        pass
    model = adapted_away_from_start(
        LORA, llama(), target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    message = r"disable_adapter: modules_to_save must be empty.*\['lm_head'\]"
    with pytest.raises(ValueError, match=message), lr.disable_adapter(model):
        pass
    assert not any(module.blocks for module in model.modules() if hasattr(module, "blocks"))
    message = r"model must be a torch\.nn\.Module, got None"
    with pytest.raises(TypeError, match=message), lr.disable_adapter(None):  # type: ignore[arg-type]
        pass
    other = peft.get_peft_model(llama(), peft.LoraConfig(r=2))
    with pytest.raises(ValueError, match=r"with model\.disable_adapter"), lr.disable_adapter(other):
        pass


@pytest.mark.parametrize("method", [LORA, *RESIDUAL, *RESIDUAL_EXPERTS], ids=str)
def test_a_scaling_set_afterwards_belongs_to_the_branch_alone(method: Method) -> None:
    base = logits(llama().requires_grad_(False))
    model = adapted_away_from_start(method, llama())
    for module in model.modules():
        if isinstance(module, method.module):
            module.scaling *= 0.5
    with lr.disable_adapter(model):
        assert_base(method, logits(model), base)
    assert_base(method, logits(lr.unload(model, merge=False)), base)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("first", [0, 1])
def test_blocks_that_overlap(first: int, merged: bool) -> None:
    """As of two generators: whichever ends first, the adapter is off until both have."""

    def outputs(model: nn.Module) -> Iterator[Tensor]:
        with lr.disable_adapter(model):
            while True:
                yield logits(model)

    base = logits(llama().requires_grad_(False))
    model = adapted_away_from_start(LORA, llama())
    if merged:
        lr.merge(model)
    expected = logits(model)
    runs = [outputs(model), outputs(model)]
    assert all(torch.equal(next(run), base) for run in runs)
    runs[first].close()
    assert torch.equal(next(runs[1 - first]), base)
    runs[1 - first].close()
    assert torch.equal(logits(model), expected)
    assert {m.merged for m in model.modules() if isinstance(m, LORA.module)} == {merged}


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("action", [lr.merge, lr.unload])
def test_no_merging_inside_of_a_block(action: Callable, merged: bool) -> None:
    base = logits(llama().requires_grad_(False))
    model = adapted_away_from_start(LORA, llama())
    if merged:
        lr.merge(model)
    expected = logits(model)
    with lr.disable_adapter(model):
        with pytest.raises(ValueError, match=r"lr\.disable_adapter"):
            action(model)
        with pytest.raises(ValueError, match="the adapter must act"):
            next(m for m in model.modules() if isinstance(m, LORA.module)).merge()
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("raises", [False, True])
def test_a_merge_on_leaving_is_done_whole_or_not_at_all(raises: bool) -> None:
    model = lr.merge(adapted_away_from_start(LORA, llama()))
    modules = [m for m in model.modules() if isinstance(m, LORA.module)]
    plain = [m.unmerged_weight.clone() for m in modules]
    message = r"disable_adapter: model\.layers\.1\..*must be finite"
    with pytest.raises(KeyError if raises else ValueError) as caught, lr.disable_adapter(model):
        with torch.no_grad():
            modules[-1].lora_b.fill_(torch.inf)
        if raises:
            raise KeyError("the caller's own")
    said = caught.value.__notes__[0] if raises else str(caught.value)
    assert re.search(message, said)
    assert not any(m.merged or m.blocks for m in modules)
    assert all(torch.equal(m.weight, w) for m, w in zip(modules, plain, strict=True))
