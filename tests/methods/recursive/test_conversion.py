"""convert, by the facts that the method promises: full rank is the source, one loop is its bits, a
truncated rank loses what a truncated SVD loses; and what it refuses, with the model as it was."""

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from decoders import FAMILIES, VOCABULARY, decoder, tokens
from small_models import small_gpt2
from snapshots import snapshot
from torch import nn
from torch.nn.utils import parametrizations

pytest.importorskip("transformers")

import transformers

import lowrank_ext as lr
from lowrank_ext.checkpoint import LoRATensors
from lowrank_ext.methods.recursive import RecursiveConfig, RelaxedLinear, convert, unshare

# Experts in one parameter get no adapters, nor do GPT-2's Conv1Ds.
NOT_LINEAR = ("Mixtral", "GPT2")
LINEAR = [family for family in FAMILIES if family not in NOT_LINEAR]


def recursive(family: str = "Llama", num_loops: int = 2, **options: Any) -> Any:
    return convert(decoder(family), RecursiveConfig(num_loops=num_loops, **options))


@pytest.mark.parametrize("family", LINEAR)
def test_full_rank_is_the_source(family: str) -> None:
    source, ids = decoder(family), tokens()
    model = recursive(family, rank=1000)
    torch.testing.assert_close(model(ids).logits, source(ids).logits, rtol=1e-4, atol=1e-4)
    assert type(model).__name__ == type(source).__name__ and isinstance(model, type(source))
    unchanged = recursive(family)
    assert (unchanged(ids).logits - source(ids).logits).abs().max() > 0.03  # ties do change it


@pytest.mark.parametrize("family", FAMILIES)
def test_a_recursive_model_is_its_unshared_one(family: str) -> None:
    """Logits, all hidden states, and tokens generated with a cache for each loop and layer."""
    model, ids = recursive(family, rank=0 if family in NOT_LINEAR else 3), tokens()
    plain = unshare(model)
    assert type(plain) is type(decoder(family))
    own = model(ids, output_hidden_states=True)
    other = plain(ids, output_hidden_states=True)
    torch.testing.assert_close(own.logits, other.logits, rtol=1e-4, atol=1e-5)
    assert len(own.hidden_states) == len(other.hidden_states) == 5
    options = dict(max_new_tokens=4, pad_token_id=0, attention_mask=torch.ones_like(ids))
    greedy = model.generate(ids, do_sample=False, **options)
    assert torch.equal(greedy, plain.generate(ids, do_sample=False, **options))
    assert (
        len({p.data_ptr() for p in plain.parameters()} & {p.data_ptr() for p in model.parameters()})
        == 0
    )


# The norm that a linear of Llama reads.
NORMS = {f"self_attn.{name}_proj": "input_layernorm" for name in "qkv"}
NORMS |= {f"mlp.{name}_proj": "post_attention_layernorm" for name in ("gate", "up")}


@pytest.mark.parametrize("init", ["average", "stepwise", "lower"])
def test_rank_r_loses_the_singular_values_after_it(init: str) -> None:
    rank, source, model = 5, decoder(), recursive(init=init, rank=5)
    for index, (layer, folded) in enumerate(
        zip(source.model.layers, model.model.layers, strict=True)
    ):
        for path, module in folded.named_modules():
            if not isinstance(module, RelaxedLinear):
                continue
            assert (module.r, module.loop) == (rank, index // 2)
            norm = NORMS.get(path)
            gain = layer.get_submodule(norm).weight.double() if norm else 1.0
            own = layer.get_submodule(path).weight.double()
            residual = (own - module.weight.double()) * gain
            lora_a = module.lora_a.double() * gain
            lost = residual - module.lora_b.double() @ lora_a
            expected = torch.linalg.svdvals(residual)[rank:].norm()
            torch.testing.assert_close(lost.norm(), expected, rtol=1e-4, atol=1e-6)
            if residual.any():  # A = V_rᵀ
                eye = torch.eye(rank, dtype=torch.float64)
                torch.testing.assert_close(lora_a @ lora_a.T, eye, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("init", "num_loops", "sources"),
    [
        ("stepwise", 2, [0, 3]),
        ("stepwise", 1, [0, 1, 2, 3]),
        ("stepwise", 4, [0]),
        ("lower", 2, [0, 1]),
    ],
)
def test_tied_weights_of_chosen_layers(init: str, num_loops: int, sources: list[int]) -> None:
    source, model = decoder(), recursive(num_loops=num_loops, init=init)
    for position, index in enumerate(sources):
        expected = source.model.layers[index].state_dict()
        for loop in range(num_loops):
            own = model.model.layers[loop * len(sources) + position].state_dict()
            assert all(torch.equal(own[name], expected[name]) for name in expected)


def test_stepwise_of_ten_layers() -> None:
    source = decoder(num_hidden_layers=10)
    model = convert(copy.deepcopy(source), RecursiveConfig(num_loops=2, init="stepwise"))
    found = [
        next(
            i
            for i, layer in enumerate(source.model.layers)
            if torch.equal(layer.mlp.up_proj.weight, m.mlp.up_proj.weight)
        )
        for m in model.model.layers[:5]
    ]
    assert found == [0, 2, 4, 7, 9]


def test_average_is_the_mean_rounded_once() -> None:
    source = decoder().bfloat16()
    model = convert(copy.deepcopy(source), RecursiveConfig(num_loops=4))
    for name, parameter in model.model.layers[0].named_parameters():
        layers = [layer.get_parameter(name).double() for layer in source.model.layers]
        assert torch.equal(parameter, torch.stack(layers).mean(0).bfloat16()), name
        assert all(layer.get_parameter(name) is parameter for layer in model.model.layers)


def test_where_nothing_is_lost_lora_b_is_zero_and_lora_a_is_not() -> None:
    for options, zero in (
        (dict(init="stepwise"), [True, False, False, True]),
        (dict(init="lower"), [True, True, False, False]),
        (dict(init="average", lora_init="zero"), [True] * 4),
    ):
        model = recursive(rank=4, **options)
        factors = [layer.mlp.down_proj for layer in model.model.layers]
        assert [not m.lora_b.any() for m in factors] == zero
        assert all(m.lora_a.std() > 0.05 for m in factors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [0, 3])
def test_one_loop_is_the_source_bit_for_bit(rank: int, dtype: torch.dtype) -> None:
    source, ids = decoder().to(dtype), tokens()
    model = convert(copy.deepcopy(source), RecursiveConfig(num_loops=1, rank=rank))
    assert torch.equal(model(ids).logits, source(ids).logits)
    assert torch.equal(unshare(model)(ids).logits, source(ids).logits)


def test_unsharing_rounds_once() -> None:
    model = convert(decoder().bfloat16(), RecursiveConfig(num_loops=2, rank=4))
    plain = unshare(model)
    for path, module in model.named_modules():
        if isinstance(module, RelaxedLinear):
            exact = module.weight.double() + module.lora_b.double() @ module.lora_a.double()
            error = (plain.get_submodule(path).weight.double() - exact).abs()
            assert (error <= exact.abs() * 2**-8 * 1.001).all(), path
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}


def test_unsharing_keeps_mode_flags_and_buffers() -> None:
    model = recursive(rank=2).train()
    model.model.embed_tokens.requires_grad_(False)
    model.model.rotary_emb.inv_freq.mul_(0.5)
    plain = unshare(model)
    assert plain.training and not plain.model.embed_tokens.weight.requires_grad
    assert plain.model.layers[3].mlp.up_proj.weight.requires_grad
    assert torch.equal(plain.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    assert not hasattr(plain.config, "recursive") and not lr.recursive.is_recursive(plain)
    with pytest.raises(
        TypeError, match=r"unshare: model must be recursive .*, got a LlamaForCausalLM"
    ):
        unshare(plain)


def test_ranks_and_targets() -> None:
    model = recursive(
        rank={"q_proj": 3, "mlp.*": 100, "k_proj": 0}, targets=["q_proj", "k_proj", "up_proj"]
    )
    ranks = {
        path: module.r
        for path, module in model.model.layers[0].named_modules()
        if isinstance(module, RelaxedLinear)
    }
    assert ranks == {"self_attn.q_proj": 3, "mlp.up_proj": 16}
    assert recursive(rank=2, targets=r".*\.down_proj").model.layers[3].mlp.down_proj.r == 2


def test_rank_512() -> None:
    torch.manual_seed(1)
    weight, bias = nn.Parameter(torch.randn(520, 530) / 20), nn.Parameter(torch.randn(520))
    lora_a, lora_b = torch.randn(512, 530) / 20, torch.randn(520, 512) / 20
    linear = RelaxedLinear(weight, bias, lora_a, lora_b, 0)
    x = torch.randn(3, 530, requires_grad=True)
    out = linear(x)
    wide = [
        t.detach().double().requires_grad_()
        for t in (x, weight, bias, linear.lora_a, linear.lora_b)
    ]
    expected = wide[0] @ (wide[1] + wide[4] @ wide[3]).T + wide[2]
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)
    out.square().sum().backward()
    expected.square().sum().backward()
    for own, other in zip((x, weight, bias, linear.lora_a, linear.lora_b), wide, strict=True):
        torch.testing.assert_close(own.grad.double(), other.grad, rtol=1e-3, atol=1e-2)


def test_what_the_source_has_is_kept() -> None:
    """Which parameters train, position by position; modes; hooks of layers; the default config."""
    source = decoder()
    source.model.layers[1].requires_grad_(False)
    source.model.layers[1].mlp.train()
    calls: list[int] = []
    source.model.layers[2].register_forward_hook(lambda *_: calls.append(2))
    done: list[tuple[int, int]] = []
    model = convert(
        source, RecursiveConfig(num_loops=2, rank=2), on_layer=lambda *n: done.append(n)
    )
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    trains = [{p.requires_grad for p in layer.parameters()} for layer in model.model.layers]
    assert trains == [{True}, {False}, {True}, {False}]
    assert model.model.layers[1].mlp.up_proj.training and not model.model.layers[3].mlp.training
    model(tokens())
    assert calls == [2]


def with_module(path: str, make: Callable[[nn.Module], nn.Module]) -> Callable[[Any], Any]:
    def change(model: Any) -> Any:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, make(model.get_submodule(path)))
        return model

    return change


def hooked(model: Any) -> Any:
    model.model.layers[3].mlp.up_proj.register_forward_hook(lambda *_: None)
    return model


def saved_by_a_hook(model: Any) -> Any:
    model.model.layers[3].mlp.up_proj.register_state_dict_post_hook(lambda *_: None)
    return model


def sharing_inside(model: Any) -> Any:
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[1].mlp.gate_proj.weight
    return model


def one_layer_twice(model: Any) -> Any:
    model.model.layers[2] = model.model.layers[0]
    return model


def quantized(linear: nn.Linear) -> nn.Module:
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)
    return linear


def not_finite(model: Any) -> Any:
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[0, 0] = float("nan")
    return model


def wider(linear: nn.Linear) -> nn.Module:
    return nn.Linear(16, 25, bias=False)


class Subclass(nn.Linear):
    pass


class Reader(nn.Module):
    """Multiplies by the weight of a child that it never calls."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.inner.weight.T


def read_only(model: Any) -> Any:
    for layer in model.model.layers:
        layer.mlp.up_proj = Reader(layer.mlp.up_proj)
    return model


def in_a_bank(model: Any) -> Any:
    factors = LoRATensors(torch.ones(1, 16), torch.ones(24, 1), 1.0)
    lr.AdapterBank(model).add("one", {UP: factors})
    return model


def offloaded(model: Any) -> Any:
    model.model.layers[2].mlp.to("meta")
    return model


def two_lists(model: Any) -> Any:
    model.more = nn.ModuleList(nn.Sequential(nn.Tanh(), nn.Tanh()) for _ in range(4))
    return model


RELAXED = RecursiveConfig(num_loops=2, rank=2)
PURE = RecursiveConfig(num_loops=2)
UP = "model.layers.3.mlp.up_proj"


def t5() -> nn.Module:
    sizes = dict(d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2, vocab_size=8)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))


def bert() -> nn.Module:
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    return transformers.BertForMaskedLM(transformers.BertConfig(**sizes, vocab_size=8))


# The model; a change of it; the config; the error and its message.
REFUSED: dict[str, tuple[Callable[[], Any], Callable[[Any], Any] | None, Any, type, str]] = {
    "no module": (lambda: 3, None, PURE, TypeError, "model must be a torch.nn.Module, got int"),
    "no config": (
        decoder,
        None,
        {"num_loops": 2},
        TypeError,
        "config must be a RecursiveConfig, got dict",
    ),
    "torch": (
        lambda: nn.Sequential(nn.Linear(2, 2)),
        None,
        PURE,
        TypeError,
        "must be a transformers model, got a Sequential",
    ),
    "encoder-decoder": (t5, None, PURE, TypeError, "must be a decoder .* got a T5For"),
    "masked": (bert, None, PURE, TypeError, "must be a decoder .* got a BertForMaskedLM"),
    "no head": (
        lambda: decoder().model,
        None,
        PURE,
        TypeError,
        "with a language modelling head .* LlamaModel",
    ),
    "twice": (recursive, None, PURE, ValueError, "must not be recursive already"),
    "two lists": (
        decoder,
        two_lists,
        PURE,
        ValueError,
        "one list of its 4 layers, got model.layers, more",
    ),
    "loops": (
        decoder,
        None,
        RecursiveConfig(num_loops=3),
        ValueError,
        "num_loops must divide the 4 layers .* got 3; possible: 1, 2, 4",
    ),
    "shapes": (
        decoder,
        with_module(UP, wider),
        PURE,
        ValueError,
        r"layers 1 and 3 must be alike .*up_proj.weight of \[24, 16\] float32 on cpu and .25, 16",
    ),
    "dtypes": (
        decoder,
        with_module(UP, lambda m: m.bfloat16()),
        PURE,
        ValueError,
        "float32 on cpu and .* bfloat16",
    ),
    "classes": (
        decoder,
        with_module("model.layers.3", lambda m: nn.Sequential(m, nn.Tanh())),
        PURE,
        ValueError,
        "got LlamaDecoderLayer and Sequential",
    ),
    "bias": (
        decoder,
        with_module(UP, lambda m: nn.Linear(16, 24)),
        PURE,
        ValueError,
        r"bias of none and \[24\]",
    ),
    "quantized": (
        decoder,
        with_module(UP, quantized),
        PURE,
        ValueError,
        "up_proj must have a dense floating-point weight, got a Linear",
    ),
    "integers": (
        decoder,
        lambda m: (
            m.model.layers[0].register_parameter(
                "n", nn.Parameter(torch.ones(2, dtype=torch.int), False)
            )
            or m
        ),
        PURE,
        ValueError,
        r"layers.0.n must be an ordinary floating-point parameter, got a Parameter of int32",
    ),
    "no values": (
        decoder,
        offloaded,
        PURE,
        ValueError,
        "gate_proj.weight must hold values, got a meta tensor",
    ),
    "shared inside": (
        decoder,
        sharing_inside,
        PURE,
        ValueError,
        "must share no parameters .*gate_proj.weight, .*up_proj.weight",
    ),
    "shared layer": (decoder, one_layer_twice, PURE, ValueError, "must share no parameters"),
    "parametrized": (
        decoder,
        with_module(UP, parametrizations.weight_norm),
        PURE,
        ValueError,
        "up_proj must ",
    ),
    "adapted": (
        decoder,
        lambda m: lr.adapt(m, lr.LoRAConfig(r=2, target_modules=["up_proj"])),
        PURE,
        ValueError,
        "must carry no adapters, got a LoRALinear at model.layers.0.mlp.up_proj",
    ),
    "bank": (
        decoder,
        in_a_bank,
        PURE,
        ValueError,
        "must carry no adapters, got a MultiLoRA",
    ),
    "compiled": (
        decoder,
        torch.compile,
        PURE,
        ValueError,
        "must not be wrapped, got a OptimizedModule at the model itself",
    ),
    "parallel": (
        decoder,
        nn.DataParallel,
        PURE,
        ValueError,
        "must not be wrapped, got a DataParallel",
    ),
    "compiled inside": (
        decoder,
        with_module("model.layers.1", torch.compile),
        PURE,
        ValueError,
        "must not be wrapped, got a OptimizedModule at model.layers.1;",
    ),
    "hook": (decoder, hooked, RELAXED, ValueError, "layers.3.mlp.up_proj must have no hooks"),
    "hook of state": (
        decoder,
        saved_by_a_hook,
        RELAXED,
        ValueError,
        "layers.3.mlp.up_proj must have no hooks",
    ),
    "subclass": (
        decoder,
        with_module(UP, lambda m: Subclass(16, 24, bias=False)),
        RELAXED,
        ValueError,
        "up_proj must be an nn.Linear to get adapters, got its subclass Subclass",
    ),
    "read": (
        decoder,
        read_only,
        RELAXED,
        ValueError,
        "targets must leave out mlp.up_proj.inner, whose weight Reader.forward reads",
    ),
    "not finite": (
        decoder,
        not_finite,
        RELAXED,
        ValueError,
        "model.layers.3.mlp.down_proj.weight must be finite",
    ),
    "no linears": (
        small_gpt2,
        None,
        RELAXED,
        ValueError,
        "rank must be 0 for a model whose layers have no nn.Linear",
    ),
    "target": (
        decoder,
        None,
        RecursiveConfig(num_loops=2, rank=2, targets=["q_proj", "typo"]),
        ValueError,
        "targets must name linears, got 'typo'; linears of a layer: self_attn.q_proj,",
    ),
    "rank": (
        decoder,
        None,
        RecursiveConfig(num_loops=2, rank={"q_proj": 2, "typo": 3}),
        ValueError,
        "rank must name linears, got 'typo'",
    ),
    "none selected": (
        decoder,
        None,
        RecursiveConfig(num_loops=2, rank={"q_proj": 2}, targets=["k_proj"]),
        ValueError,
        "targets and rank must select a linear",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_stays_as_it_was(case: str) -> None:
    make, change, config, error, message = REFUSED[case]
    model = make() if change is None else change(make())
    before = described(model)
    with pytest.raises(error, match=f"^convert: .*{message}"):
        convert(model, config)
    assert described(model) == before


def test_an_error_while_weights_are_computed_changes_nothing() -> None:
    model = decoder()
    before = described(model)

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(model, RELAXED, on_layer=stop)
    assert described(model) == before


def described(model: Any) -> Any:
    """Modules, classes, hooks, tensors to the bit, and config."""
    if not isinstance(model, nn.Module):
        return model
    config = getattr(model, "config", None)
    tensors = dict(model.named_parameters())
    if any(tensor.is_meta for tensor in tensors.values()):  # no bits
        return {name: id(tensor) for name, tensor in tensors.items()}, config.to_dict()
    return snapshot(model), None if config is None else config.to_dict()


def test_layers_of_two_kinds_in_turn() -> None:
    """Two loops of three have one kind at each position, but "stepwise" would take the weights of
    another one's."""

    def source() -> Any:
        model = decoder(num_hidden_layers=6)
        for index in (1, 4):
            model.model.layers[index].mlp.up_proj = nn.Linear(16, 24)
        return model

    bias = convert(source(), RELAXED).model.layers[4].mlp.up_proj.bias
    assert bias is not None and bias.shape == (24,)
    model = source()
    before = described(model)
    with pytest.raises(
        ValueError, match=r"layers 1 and 2 must be alike .*init='stepwise', got mlp"
    ):
        convert(model, RecursiveConfig(num_loops=2, init="stepwise"))
    assert described(model) == before


def test_an_optimizer_made_before_is_told() -> None:
    model = decoder()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match="convert: an optimizer holds parameters"):
        convert(model, PURE)
    del optimizer
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(decoder(), PURE)


def test_weights_that_may_be_read_without_a_call_are_told() -> None:
    sizes = dict(hidden_size=16, n_layer=2, n_head=2, vocab_size=VOCABULARY)
    bloom = transformers.BloomForCausalLM(transformers.BloomConfig(**sizes))
    with pytest.warns(UserWarning, match="self_attention.dense does not act where Bloom"):
        convert(bloom, RELAXED)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(num_loops=0), ValueError, "num_loops must be at least 1, got 0"),
        (dict(num_loops=True), TypeError, "num_loops must be an int, got True"),
        (dict(num_loops=2, init="middle"), ValueError, "init must be "),
        (dict(num_loops=2, lora_init="gaussian"), ValueError, "lora_init must be "),
        (dict(num_loops=2, rank=-1), ValueError, "rank must be at least 0, got -1"),
        (dict(num_loops=2, rank={"a": 1.5}), TypeError, r"rank\['a'\] must be an int, got 1.5"),
        (dict(num_loops=2, rank={3: 1}), TypeError, "rank must have names as keys, got 3"),
        (dict(num_loops=2, rank={"(": 1}), ValueError, "valid regular expression"),
        (dict(num_loops=2, targets=[]), ValueError, "targets must name at least one linear"),
        (dict(num_loops=2, ranks=3), TypeError, "rank"),
    ],
    ids=str,
)
def test_options_out_of_range(options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=f"RecursiveConfig.*{message}"):
        RecursiveConfig(**options)


def test_a_config_is_itself_after_json() -> None:
    for config in (
        RecursiveConfig(
            num_loops=3, rank={"q_proj": 3}, targets=["q_proj", "k_proj"], init="lower"
        ),
        RecursiveConfig(num_loops=1, rank=7, lora_init="zero", targets="x|y"),
    ):
        assert RecursiveConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="'num_lops' is not a field; did you mean 'num_loops'"):
        RecursiveConfig.from_dict({"num_lops": 2})
    with pytest.raises(ValueError, match="num_loops must be given"):
        RecursiveConfig.from_dict({"rank": 2})
    assert re.match("all-linear", str(RecursiveConfig(num_loops=1).targets))
