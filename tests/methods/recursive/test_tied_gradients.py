"""Gradients of tied parameters: those of the loops, summed wide, rounded once."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from decoders import checkpoint_activations, decoder, tokens
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

pytest.importorskip("transformers")

import lowrank_ext as lr
from lowrank_ext.methods.recursive import RecursiveConfig, convert, loop_logits, tied_gradients

Gradients = dict[str, Tensor]
LOOPS = 4


def recursive(family: str, dtype: torch.dtype = torch.float32, rank: int = 3) -> Any:
    """One stored layer: whatever rounds a sum at each loop does so three times."""
    config = RecursiveConfig(num_loops=LOOPS, rank=rank)
    return convert(decoder(family).to(dtype), config).train()


def untied(model: Any) -> Any:
    """The same model with parameters of its own in every layer."""
    own = copy.deepcopy(model)
    for module in (
        own.model.layers.modules() if hasattr(own, "model") else own.transformer.h.modules()
    ):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach().clone())
    return own


def next_token(model: Any) -> Tensor:
    ids = tokens()
    return model(ids, labels=ids, use_cache=False).loss


def every_loop(model: Any) -> Tensor:
    outputs = loop_logits(model, input_ids=tokens())
    assert len(outputs) == LOOPS
    return sum((i + 1) * out.float().logsumexp(-1).mean() for i, out in enumerate(outputs))


class Case(NamedTuple):
    family: str
    dtype: torch.dtype = torch.float32
    autocast: bool = False
    loss: Callable[[Any], Tensor] = next_token
    reentrant: bool | None = None  # None: no checkpointing
    steps: int = 1  # of gradient accumulation
    rank: int = 3


def gradients(model: Any, case: Case) -> Gradients:
    model.zero_grad()
    if case.reentrant is not None:
        checkpoint_activations(model, case.reentrant)
    for _ in range(case.steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=case.autocast):
            loss = case.loss(model)
        loss.backward()
    return {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


BF16 = torch.bfloat16
EXACT = {
    "bf16": Case("Llama", BF16),
    "bf16, checkpoints": Case("Llama", BF16, reentrant=False),
    "bf16, every loop": Case("Llama", BF16, loss=every_loop),
    "bf16, every loop, checkpoints": Case("Llama", BF16, loss=every_loop, reentrant=False),
    "bf16, biases and norms": Case("Phi", BF16),
    "bf16, experts": Case("Mixtral", BF16),
    "fp16": Case("Llama", torch.float16),
    "bf16 under autocast": Case("Llama", BF16, autocast=True),
    "autocast": Case("Llama", autocast=True),
    "autocast, no adapters": Case("Llama", autocast=True, rank=0),
    "autocast, checkpoints": Case("Llama", autocast=True, reentrant=False),
    "autocast, every loop": Case("Llama", autocast=True, loss=every_loop),
    "autocast, Conv1D": Case("GPT2", autocast=True, rank=0),
    "autocast, experts": Case("Mixtral", autocast=True),
    "fp32": Case("Llama"),
    "fp64": Case("Qwen2", torch.float64),
}


@pytest.mark.parametrize("name", EXACT)
def test_loops_are_summed_wide_and_rounded_once(name: str) -> None:
    case = EXACT[name]
    model = recursive(case.family, case.dtype, case.rank)
    own, apart = gradients(model, case), gradients(untied(model), case)
    assert own.keys() == {key for key, _ in model.named_parameters()}
    ties = model.all_tied_weights_keys
    num_tied = 0
    for key, grad in own.items():
        parts = [
            apart[key],
            *(apart[other] for other, first in ties.items() if first == key and other in apart),
        ]
        total = torch.stack([part.double() for part in parts]).sum(0)
        num_tied += len(parts) == LOOPS
        # fp32's sum of four, then one rounding.
        error, size = (grad.double() - total).abs(), sum(part.double().abs() for part in parts)
        unit = torch.finfo(grad.dtype).eps / 2
        wide = LOOPS * torch.finfo(torch.promote_types(grad.dtype, torch.float32)).eps
        tiny = torch.finfo(grad.dtype).smallest_normal * unit
        assert (error <= unit * total.abs() + wide * size + tiny).all(), key
        assert total.any(), key
    assert num_tied >= 9


@pytest.mark.parametrize(
    "case", [Case("Llama", BF16), Case("Llama", autocast=True), Case("GPT2", autocast=True, rank=0)]
)
def test_autograd_alone_would_be_off(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above would notice: the same without aliases."""
    model = recursive(case.family, case.dtype, case.rank)
    own = gradients(model, case)
    own = {key: grad.clone() for key, grad in own.items()}
    monkeypatch.setattr(tied_gradients, "_alias_dtype", lambda *_: None)
    assert any(not torch.equal(own[key], grad) for key, grad in gradients(model, case).items())


def test_accumulated_steps() -> None:
    model = recursive("Llama", BF16)
    once = {key: grad.clone() for key, grad in gradients(model, Case("Llama", BF16)).items()}
    for key, grad in gradients(model, Case("Llama", BF16, steps=3)).items():
        assert torch.equal(grad, once[key] + once[key] + once[key]), key


@pytest.mark.parametrize("loss", [next_token, every_loop])
@pytest.mark.parametrize("autocast", [False, True])
def test_reentrant_checkpoints(loss: Callable[[Any], Tensor], autocast: bool) -> None:
    """Each layer's backward is one of its own there: bfloat16 parameters get a rounding a loop."""
    dtype = torch.float32 if autocast else BF16
    model = recursive("Llama", dtype)
    case = Case("Llama", dtype, autocast, loss)
    plain = {key: grad.clone() for key, grad in gradients(model, case).items()}
    tolerance = 1e-5 if autocast else 2**-5
    for key, grad in gradients(model, case._replace(reentrant=True)).items():
        scale = plain[key].abs().max().item()
        torch.testing.assert_close(grad, plain[key], rtol=0, atol=tolerance * scale)


def test_plain_float32_has_no_aliases(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any) -> None:
        raise AssertionError("an alias")

    monkeypatch.setattr(tied_gradients._Aliases, "apply", refused)
    model = recursive("Llama")
    next_token(model).backward()
    with torch.no_grad(), torch.autocast("cpu", BF16):
        next_token(model)
    next_token(recursive("Llama", torch.float64)).backward()
    frozen = recursive("Llama", BF16).requires_grad_(False)
    frozen.model.embed_tokens.requires_grad_()
    next_token(frozen).backward()
    one_loop = convert(decoder().to(BF16), RecursiveConfig(num_loops=1, rank=2)).train()
    next_token(one_loop).backward()
    with pytest.raises(AssertionError, match="an alias"):
        next_token(recursive("Llama", BF16))


def test_logits_of_an_exit_make_no_aliases(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    apply = tied_gradients._Aliases.apply

    def counted(*args: Any) -> Any:
        made.append(1)
        return apply(*args)

    monkeypatch.setattr(tied_gradients._Aliases, "apply", counted)
    model = recursive("Llama", BF16)
    next_token(model)
    num_tied = len(made)
    every_loop(model)
    assert 0 < num_tied == len(made) - num_tied


def test_parameters_are_back_after_an_exception() -> None:
    model = recursive("Llama", BF16)
    before = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    seen: list[bool] = []

    def stop(module: nn.Module, args: Any) -> None:
        seen.append(isinstance(module._parameters["weight"], nn.Parameter))
        raise KeyboardInterrupt

    handle = model.model.layers[2].mlp.up_proj.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        next_token(model)
    assert seen == [False]  # an alias
    assert {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)} == before
    handle.remove()
    next_token(model).backward()
    assert {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)} == before


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled(autocast: bool) -> None:
    """No graph break; the backend runs the graph as it is."""
    dtype = torch.float32 if autocast else BF16
    source = decoder(num_hidden_layers=2).to(dtype)
    model = convert(source, RecursiveConfig(num_loops=2, rank={"q_proj": 3, "up_proj": 3})).train()
    case = Case("Llama", dtype, autocast)
    eager = {key: grad.clone() for key, grad in gradients(model, case).items()}
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for key, grad in gradients(compiled, case).items():
        expected = eager[key.removeprefix("_orig_mod.")]
        scale = expected.abs().max().item()
        torch.testing.assert_close(grad, expected, rtol=0, atol=2**-6 * scale)


@pytest.mark.parametrize("path", ["", "model.layers.0", "model.layers.3"])
def test_logits_of_loops_through_wrappers(path: str) -> None:
    model, ids = recursive("Llama"), tokens()
    expected = loop_logits(model, input_ids=ids)
    wrapper = AveragedModel(model.get_submodule(path))
    if path:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, wrapper)
    for own, other in zip(
        loop_logits(model if path else wrapper, input_ids=ids), expected, strict=True
    ):
        assert torch.equal(own, other)


@pytest.mark.parametrize("path", ["", "model"])
def test_logits_of_loops_of_what_is_compiled_in_place(path: str) -> None:
    """What module.compile() makes is bound to the module, and is not called for a part of it."""
    model, ids = recursive("Llama"), tokens()
    expected = loop_logits(model, input_ids=ids)
    model.get_submodule(path).compile(disable=True)  # bound all the same
    for own, other in zip(loop_logits(model, input_ids=ids), expected, strict=True):
        torch.testing.assert_close(own, other)


def test_gradients_of_exits_are_those_of_hidden_states() -> None:
    """The last loop's logits are the model's own, earlier ones those of its hidden states."""
    model = recursive("Gemma2")
    ids = tokens()
    output = model(ids, output_hidden_states=True, use_cache=False)
    logits = loop_logits(model, input_ids=ids)
    assert torch.equal(logits[-1], output.logits)
    for loop in range(LOOPS - 1):
        state = output.hidden_states[loop + 1]
        assert torch.equal(logits[loop], lr.recursive.exit_logits(model, state))
    with pytest.raises(TypeError, match="model must be recursive"):
        loop_logits(decoder(), input_ids=ids)
