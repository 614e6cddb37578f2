"""ResLoRA: its three formulas, its chains, what carries their states, and merging."""

import copy
import gc
import io
import itertools
import math
import pickle
import runpy
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import typer
from module_cases import IDS, Block, TinyLM, conv1d, randomize
from saved_bytes import bytes_kept_by
from small_models import small_gpt2
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from typer.testing import CliRunner

import lowrank_ext as lr
from lowrank_ext.methods.reslora.chain_state import current_frame
from lowrank_ext.nn import ResLoRALinear

WIDTH = 8
SHORTCUTS = ["input", "block", "middle"]
STATEFUL = ["input", "middle"]
by_shortcut = pytest.mark.parametrize("shortcut", SHORTCUTS)
by_stateful = pytest.mark.parametrize("shortcut", STATEFUL)


class Stack(nn.Module):
    """Blocks with three chains; `run` calls a block."""

    def __init__(self, depth: int = 3, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(WIDTH, dtype) for _ in range(depth))
        self.order = list(range(depth))
        self.use_reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        for i in self.order:
            if self.use_reentrant is None:
                x = self.layers[i](x)
            else:
                x = checkpoint(self.layers[i], x, use_reentrant=self.use_reentrant)
        return x


def stack(
    shortcut: str,
    depth: int = 3,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **options,
) -> Stack:
    config = lr.ResLoRAConfig(**{"r": 2, "shortcut": shortcut, **options})
    model = lr.adapt(Stack(depth, dtype).to(device), config)
    randomize(model)
    return model.train()


def inputs(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(*(shape or (2, 5)), WIDTH, dtype=dtype, device=device)


def run(model: nn.Module, x: Tensor, seed: int = 3) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and gradients of what trains and of x."""
    torch.manual_seed(seed)
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = model(x)
    y.double().square().mean().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return y.detach(), {**gradients, "x": x.grad}


def assert_equal_runs(
    actual: tuple[Tensor, dict[str, Tensor]],
    expected: tuple[Tensor, dict[str, Tensor]],
    exact: bool = True,
) -> None:
    """The same output, bit for bit, and gradients, which may have been added in another order."""
    assert torch.equal(actual[0], expected[0]) or not exact
    torch.testing.assert_close(actual[0], expected[0])
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(actual[1][name], gradient, msg=lambda m, n=name: f"{n}: {m}")


def llama(depth: int) -> LlamaForCausalLM:
    sizes = dict(hidden_size=16, intermediate_size=24, vocab_size=32)
    heads = dict(num_attention_heads=2, num_key_value_heads=1)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=depth, **sizes, **heads)).eval()


class Definition:
    """The published formulas in plain torch, one linear after the other, for the dtype of x."""

    def __init__(self, model: Stack) -> None:
        self.model = model
        self.seen: dict[str, list[tuple[ResLoRALinear, Tensor]]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        for layer in self.model.layers:
            x = x + self.linear("q_proj", layer, x)
            x = x + self.linear("down_proj", layer, torch.tanh(self.linear("up_proj", layer, x)))
        return x

    def linear(self, name: str, layer: nn.Module, x: Tensor) -> Tensor:
        module = getattr(layer, name)
        earlier = self.seen.setdefault(name, [])
        y = F.linear(x, module.weight.to(x), module.bias.to(x)) + self.branch(module, earlier, x)
        earlier.insert(0, (module, x))
        return y

    def branch(
        self, module: ResLoRALinear, earlier: list[tuple[ResLoRALinear, Tensor]], x: Tensor
    ) -> Tensor:
        def a(m: ResLoRALinear) -> Tensor:
            return m.lora_a.to(x).mT

        def b(m: ResLoRALinear) -> Tensor:
            return m.lora_b.to(x).mT

        reach = earlier if module.pre_num == -1 else earlier[: module.pre_num]
        if module.shortcut == "input":
            previous = earlier[0][1] if earlier else x
            return module.scaling * (x + previous) @ a(module) @ b(module)
        if module.shortcut == "block":
            return sum(m.scaling * x @ a(m) @ b(m) for m, _ in [(module, x), *reach])
        total = sum(before @ a(m) for m, before in [(module, x), *reach])
        return module.scaling * total @ b(module)


# ------------------------------------------------------------------------------------ the formulas


@pytest.mark.parametrize("pre_num", [1, 2, -1])
@by_shortcut
def test_forward_and_gradients_are_the_formula(device: str, shortcut: str, pre_num: int) -> None:
    model = stack(
        shortcut, 4, torch.float64, device, pre_num=pre_num, alpha=3.0, adapter_dtype="float64"
    )
    x = inputs(dtype=torch.float64, device=device)
    y, gradients = run(model, x)
    assert len(gradients) == 4 * 3 * 2 + 1
    model.zero_grad()
    x = x.requires_grad_()
    expected = Definition(model)(x)
    torch.testing.assert_close(y, expected)
    expected.square().mean().backward()
    torch.testing.assert_close(gradients["x"], x.grad)
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(gradients[name], parameter.grad, msg=f"{name}: {{}}".format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@by_shortcut
def test_low_precision_is_as_good_as_plain_torch(
    device: str, shortcut: str, dtype: torch.dtype
) -> None:
    model = stack(shortcut, 6, dtype, device, pre_num=-1)
    x = inputs(64, dtype=dtype, device=device)
    with torch.no_grad():
        exact = Definition(model)(x.double())
        plain = (Definition(model)(x).double() - exact).abs()
        ours = (model.eval()(x).double() - exact).abs()
    floor = torch.finfo(dtype).eps * exact.abs().mean()
    assert ours.mean() <= 2 * plain.mean() + floor
    assert ours.max() <= 2 * plain.max() + 4 * floor


@by_shortcut
def test_ranks_and_scalings_may_differ_along_a_chain(shortcut: str) -> None:
    """Terms of "block" bring their own; "middle", whose sums need one rank, breaks its chain."""
    config = lr.ResLoRAConfig(
        r=2,
        shortcut=shortcut,
        alpha=2,
        pre_num=-1,
        adapter_dtype="float64",
        rank_pattern={r"layers\.1\..*": 3} if shortcut != "middle" else {},
        alpha_pattern={r"layers\.2\..*": 5},
    )
    model = lr.adapt(Stack(3, torch.float64), config)
    randomize(model)
    x = inputs(dtype=torch.float64)
    torch.testing.assert_close(model(x), Definition(model)(x))
    if shortcut == "middle":
        ranks = dict(rank_pattern={r"layers\.1\..*": 3})
        broken = lr.adapt(Stack(3), lr.ResLoRAConfig(r=2, shortcut=shortcut, **ranks))
        assert chains(broken) == {}


@by_shortcut
def test_the_parameters_are_loras(shortcut: str) -> None:
    torch.manual_seed(1)
    ours = lr.adapt(Stack(), lr.ResLoRAConfig(r=2, shortcut=shortcut))
    torch.manual_seed(1)
    theirs = lr.adapt(Stack(), lr.LoRAConfig(r=2))
    assert lr.trainable_parameters(ours) == lr.trainable_parameters(theirs)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (2, 1, 3)], ids=str)
@by_shortcut
def test_shapes_and_strides(shortcut: str, shape: tuple[int, ...]) -> None:
    model = stack(shortcut)
    x = torch.randn(*shape, WIDTH)
    strided = torch.randn(*shape, 2 * WIDTH)[..., ::2].copy_(x)
    y = model(x)
    assert y.shape == x.shape and torch.equal(model(strided), y)
    y.sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all()


@by_shortcut
def test_two_runs_give_the_same_bits(shortcut: str) -> None:
    model, x = stack(shortcut, dropout=0.3), inputs()
    first, second = run(model, x), run(model, x)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][n], second[1][n]) for n in first[1])


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@by_shortcut
def test_autocast(shortcut: str, half: torch.dtype) -> None:
    model, x = stack(shortcut), inputs()
    with torch.autocast("cpu", half):
        y = model(x)
    expected = model(x)
    assert (y.float() - expected).norm() < 0.05 * expected.norm()
    assert not torch.equal(y, expected)
    y.sum().backward()
    assert model.layers[0].q_proj.lora_a.grad.dtype == torch.float32


@by_shortcut
def test_other_bases(shortcut: str) -> None:
    """Conv1D and a base that is more than its weight, in one chain."""

    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    for make in (lambda: conv1d(torch.float64), lambda: Scaled(12, 9, dtype=torch.float64)):
        bases = [make(), make()]
        back = [nn.Linear(9, 12, dtype=torch.float64) for _ in bases]
        layers = nn.ModuleList(nn.Sequential(b, c) for b, c in zip(bases, back, strict=True))
        model = nn.Sequential(*layers)
        x = torch.randn(3, 12, dtype=torch.float64)
        start = model(x)
        lr.adapt(model, lr.ResLoRAConfig(r=2, shortcut=shortcut, adapter_dtype="float64"))
        torch.testing.assert_close(model(x), start)
        randomize(model)
        first, second = model[0][0], model[1][0]
        assert (first.position, second.position) == (0, 1) and second.earlier().__next__() is first
        seen = {}
        first.register_forward_pre_hook(lambda m, args, seen=seen: seen.update(a=args[0]))
        second.register_forward_pre_hook(lambda m, args, seen=seen: seen.update(b=args[0]))
        second.register_forward_hook(lambda m, args, y, seen=seen: seen.update(y=y))
        model(x)
        a, b = seen["a"], seen["b"]
        branch = {
            "input": (a + b) @ second.lora_a.mT @ second.lora_b.mT,
            "block": b @ (second.lora_b @ second.lora_a + first.lora_b @ first.lora_a).mT,
            "middle": (b @ second.lora_a.mT + a @ first.lora_a.mT) @ second.lora_b.mT,
        }[shortcut]
        torch.testing.assert_close(seen["y"], second.base_output(b) + branch)


# ----------------------------------------------------------------------------------------- dropout


def two_linears(shortcut: str, **options) -> nn.Sequential:
    """A chain of two without a base of their own; lora_a and lora_b hold ones."""
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(2)))
    with torch.no_grad():
        for linear in model:
            linear.weight.zero_()
    lr.adapt(model, lr.ResLoRAConfig(r=1, shortcut=shortcut, dropout=0.5, **options))
    for module in model:
        nn.init.ones_(module.lora_a), nn.init.ones_(module.lora_b)
    return model.train()


@pytest.mark.parametrize("shared", [False, True])
def test_terms_of_block_draw_their_own_dropout_unless_shared(shared: bool) -> None:
    model = two_linears("block", shared_dropout=shared)
    nn.init.constant_(model[0].lora_a, -1)
    # Under one mask the two terms cancel.
    assert (not model[1](torch.ones(20, 64)).any()) is shared


def test_dropout_of_input_falls_on_the_sum_and_of_middle_on_each_input() -> None:
    model = two_linears("input")
    x = torch.ones(1, 64)
    with lr.reslora_call(model):
        model[0](x)
        y = model[1](3 * x)
    # Elements of the sum, 4, are dropped or doubled: a multiple of 8. Dropped apart it would be
    # multiples of 2 and 6.
    kept = y[0, 0].item() / 8
    assert kept == int(kept) and 0 < kept < 64
    model = two_linears("middle")
    with lr.reslora_call(model):
        first = model[0](x)[0, 0]
        second = model[1](torch.zeros_like(x))[0, 0]
    assert torch.equal(first, second) and 0 < first < 128  # the very h that the first one made


@pytest.mark.parametrize("ranks", [{}, {r"layers\.1\..*": 3}], ids=["one rank", "ranks"])
def test_both_ways_of_block_compute_the_same(ranks: dict[str, int]) -> None:
    """A probability that rounds to zero takes the way of dropout and drops nothing."""
    options = dict(
        rank_pattern=ranks, alpha=3, alpha_pattern={r"layers\.0\..*": 1}, pre_num=-1,
        adapter_dtype="float64", dtype=torch.float64,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = stack("block", 4, **options)
    dropping = copy.deepcopy(plain)
    for module in dropping.modules():
        if isinstance(module, ResLoRALinear):
            module.dropout = 1e-9
    x = inputs(dtype=torch.float64)
    assert_equal_runs(run(dropping, x), run(plain, x), exact=False)


@by_shortcut
def test_dropout_is_off_in_evaluation_and_one_drops_the_branch(shortcut: str) -> None:
    model, x = stack(shortcut, dropout=0.5), inputs()
    for module in model.modules():
        if isinstance(module, ResLoRALinear):
            module.dropout = 1.0  # a config refuses it
    plain = copy.deepcopy(model)
    lr.unload(plain)
    torch.testing.assert_close(model(x), plain(x))
    state = torch.get_rng_state()
    y = model.eval()(x)
    assert torch.equal(torch.get_rng_state(), state) and not torch.allclose(y, plain(x))


# ------------------------------------------------------------------------------------------ chains


def chains(model: nn.Module) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path, module in model.named_modules():
        if isinstance(module, ResLoRALinear) and module.chain is not None:
            found.setdefault(module.chain, []).append(path)
            assert module.position == len(found[module.chain]) - 1
    return {
        name.partition("#")[0] + f"#{i}": paths for i, (name, paths) in enumerate(found.items())
    }


def adapted(model: nn.Module, shortcut: str = "input", **options) -> nn.Module:
    return lr.adapt(model, lr.ResLoRAConfig(r=2, shortcut=shortcut, **options))


def test_chains_are_the_modules_of_one_name() -> None:
    attention, mlp = ("q", "k", "v", "o"), ("gate", "up", "down")
    names = [f"self_attn.{p}_proj" for p in attention] + [f"mlp.{p}_proj" for p in mlp]
    assert chains(adapted(llama(2))) == {
        f"model.layers.*.{name}#{i}": [f"model.layers.{n}.{name}" for n in range(2)]
        for i, name in enumerate(names)
    }
    assert len(chains(adapted(small_gpt2()))) == 4
    assert chains(adapted(Stack(), target_modules=["q_proj"], exclude_modules=["layers.1"])) == {
        "layers.*.q_proj#0": ["layers.0.q_proj", "layers.2.q_proj"]
    }
    # Numbers inside of a block tell its parts apart.
    mlps = [nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(2)]
    assert list(chains(adapted(nn.Sequential(*mlps))).values()) == [["0.0", "1.0"], ["0.2", "1.2"]]


@pytest.mark.parametrize("change", ["block removed", "block copied"])
@pytest.mark.parametrize("shortcut", ["input", "block", "middle"])
def test_blocks_that_change_after_adapt(shortcut: str, change: str, tmp_path: Path) -> None:
    """What is saved computes the same when it is loaded, or is not saved."""

    def changed(model: TinyLM) -> TinyLM:
        if change == "block removed":
            del model.layers[0]
        else:
            model.layers[1] = copy.deepcopy(model.layers[1])
        return model

    model = TinyLM()
    base = copy.deepcopy(model)
    adapted(model, shortcut)
    randomize(model)
    changed(model).eval()
    with torch.no_grad():
        if change == "block copied":  # what the copy reads is its own copy
            model.layers[0].q_proj.lora_b.add_(1)
        logits = model(IDS)
        if shortcut == "block":
            with pytest.raises(ValueError, match=r"save_adapter: layers\..* lost or copied blocks"):
                lr.save_adapter(model, tmp_path)
            torch.testing.assert_close(lr.merge(model)(IDS), logits)
        else:
            lr.save_adapter(model, tmp_path)
            loaded = lr.load_adapter(changed(base).eval(), tmp_path)
            torch.testing.assert_close(loaded(IDS), logits)


def test_chains_break_where_sizes_change() -> None:
    sizes = [4, 4, 4, 6, 6, 4, 4]
    linears = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    model = adapted(nn.Sequential(*linears))
    assert list(chains(model).values()) == [["0", "1"]]
    assert [m.position for m in model] == [0, 1, 0, 0, 0, 0]
    assert model(torch.randn(3, 4)).shape == (3, 4)


def test_chains_run_through_nested_lists() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.to_q(x)

    class Down(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attentions = nn.ModuleList(Attention() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for attention in self.attentions:
                x = attention(x)
            return x

    model = adapted(nn.Sequential(Down(), Down()))
    (paths,) = chains(model).values()
    assert paths == [f"{i}.attentions.{j}.to_q" for i in range(2) for j in range(2)]
    randomize(model)
    x = torch.randn(3, 4)
    modules = [model.get_submodule(path) for path in paths]
    expected, previous = x, x
    for m in modules:
        z = expected + previous
        previous, expected = expected, F.linear(expected, m.weight, m.bias)
        expected = expected + z @ m.lora_a.mT @ m.lora_b.mT
    torch.testing.assert_close(model(x), expected)


@by_stateful
def test_encoder_and_decoder_have_chains_of_their_own(shortcut: str) -> None:
    config = T5Config(vocab_size=32, d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2)
    config.decoder_start_token_id = 0
    model = T5ForConditionalGeneration(config).eval()
    ids = {"input_ids": torch.tensor([[3, 4, 5]]), "decoder_input_ids": torch.tensor([[1, 2]])}
    before = model(**ids).logits
    adapted(model, shortcut)
    torch.testing.assert_close(model(**ids).logits, before)
    assert all(len(paths) == 2 for paths in chains(model).values())
    randomize(model)
    together = model(**ids).logits
    assert not torch.allclose(together, before)
    encoded = model.get_encoder()(input_ids=ids["input_ids"])  # on its own, as generate does
    apart = model(encoder_outputs=encoded, decoder_input_ids=ids["decoder_input_ids"]).logits
    assert torch.equal(apart, together)
    tokens = model.generate(ids["input_ids"], max_new_tokens=3, do_sample=False)
    assert torch.equal(
        tokens, model.generate(ids["input_ids"], max_new_tokens=3, do_sample=False, use_cache=False)
    )


@by_stateful
def test_a_sequential_may_be_called_or_looped_over(shortcut: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))
            self.loop = False

        def forward(self, x: Tensor) -> Tensor:
            if not self.loop:
                return self.body(x)
            for linear in self.body:
                x = linear(x)
            return x

    model = adapted(Net(), shortcut)
    randomize(model)
    x = inputs()
    expected = model(x)
    assert torch.equal(model.body(x), expected)
    model.loop = True
    assert torch.equal(model(x), expected)


@by_stateful
def test_a_skipped_block_is_skipped_by_the_chain(shortcut: str) -> None:
    model, x = (
        stack(shortcut, 3, torch.float64, adapter_dtype="float64"),
        inputs(dtype=torch.float64),
    )
    model.order = [0, 2]
    shorter = Stack(2, torch.float64)
    shorter.layers = nn.ModuleList([model.layers[0], model.layers[2]])
    torch.testing.assert_close(model(x), Definition(shorter)(x))


@by_stateful
def test_a_chain_that_runs_again_starts_anew(shortcut: str) -> None:
    model, x = stack(shortcut), inputs()
    once = model(x)
    twice = model(once)
    model.order = [0, 1, 2, 0, 1, 2]
    assert torch.equal(model(x), twice)


# ----------------------------------------------------------------- what carries the chains' states


@by_stateful
def test_a_call_outside_of_the_owner_is_refused(shortcut: str) -> None:
    model, x = stack(shortcut), inputs()
    expected = model(x)
    first = model.layers[0](x)  # nothing comes before it
    message = r"module 1 of the chain layers\.\*\.q_proj must run in a forward of the module"
    with pytest.raises(RuntimeError, match=message):
        model.layers[1](first)
    with lr.reslora_call(model):
        y = x
        for layer in model.layers:
            y = layer(y)
    assert torch.equal(y, expected)
    with (
        pytest.raises(ValueError, match="reslora_call: model must contain a ResLoRALinear"),
        lr.reslora_call(nn.Linear(2, 2)),
    ):
        raise AssertionError


def test_blocks_of_the_block_shortcut_need_no_owner() -> None:
    model, x = stack("block"), inputs()
    y = x
    for layer in model.layers:
        y = layer(y)
    assert torch.equal(y, model(x))
    assert type(model) is Stack


@by_stateful
def test_other_rows_are_refused(shortcut: str) -> None:
    model = stack(shortcut)
    hook = model.layers[1].register_forward_pre_hook(lambda module, args: args[0][:, :3])
    with pytest.raises(
        ValueError,
        match=r"x of module 1 of the chain layers\.\*\.q_proj must have .*\[2, 5\], got \[2, 3\]",
    ):
        model(inputs(2, 5))
    hook.remove()
    assert current_frame() is None and model(inputs(2, 5)).shape == (2, 5, WIDTH)


@by_stateful
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_call_that_ends_early_leaves_nothing(shortcut: str, error: type[BaseException]) -> None:
    model, x = stack(shortcut), inputs()
    expected = model(x)

    def stop(module: nn.Module, args: tuple[Tensor]) -> None:
        raise error

    hook = model.layers[1].up_proj.register_forward_pre_hook(stop)
    with pytest.raises(error):
        model(x)
    assert current_frame() is None
    hook.remove()
    assert torch.equal(model(x), expected)


@by_stateful
def test_nested_calls_do_not_mix(shortcut: str) -> None:
    model, x, other = stack(shortcut).eval(), inputs(), inputs(3, 4)
    expected, expected_other = model(x), model(other)
    inner: list[Tensor] = []

    def call_again(module: nn.Module, args: tuple[Tensor]) -> None:
        if len(inner) < 2 and args[0].shape[:2] == (2, 5):
            inner.append(model(other))

    for layer in model.layers[1:]:
        layer.register_forward_pre_hook(call_again)
    assert torch.equal(model(x), expected)
    assert [torch.equal(y, expected_other) for y in inner] == [True, True]


@by_stateful
def test_threads_do_not_mix(shortcut: str) -> None:
    model = stack(shortcut).eval()
    xs = [inputs(), inputs()]
    expected = [model(x) for x in xs]
    both = threading.Barrier(2, timeout=60)

    def wait(module: nn.Module, args: tuple[Tensor]) -> None:
        both.wait()

    for layer in model.layers:  # the two calls go block by block together
        layer.register_forward_pre_hook(wait)
    results: dict[int, Tensor] = {}

    def work(i: int) -> None:
        results[i] = model(xs[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(torch.equal(results[i], expected[i]) for i in range(2))


@pytest.mark.parametrize("use_reentrant", [None, False])
@pytest.mark.parametrize("trains", [False, True])
@by_stateful
def test_no_activation_outlives_its_call(
    shortcut: str, trains: bool, use_reentrant: bool | None
) -> None:
    model = stack(shortcut, dropout=0.1)
    model.use_reentrant = use_reentrant
    alive: list[weakref.ref[Tensor]] = []
    for module in model.modules():
        if isinstance(module, ResLoRALinear):
            module.register_forward_pre_hook(
                lambda module, args: alive.append(weakref.ref(args[0])) or None
            )
    with torch.set_grad_enabled(trains):
        y = model(inputs().requires_grad_(trains))
        if trains:
            y.sum().backward()
    del y
    gc.collect()
    assert len(alive) >= 9 and not any(ref() is not None for ref in alive)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: torch.load(saved(model), weights_only=False),
}


def saved(model: nn.Module) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
@by_shortcut
def test_copies(shortcut: str, make_copy: Callable[[nn.Module], nn.Module]) -> None:
    model, x = stack(shortcut, dropout=0.2), inputs()
    expected = run(model, x)
    twin = make_copy(model)
    assert_equal_runs(run(twin, x), expected)
    with torch.no_grad():  # on its own: what changes in one is not seen by the other
        for parameter in twin.parameters():
            parameter.zero_()
    assert not run(twin, x)[0].sub(x).any()
    assert_equal_runs(run(model, x), expected)


def test_a_copy_and_its_original_may_run_inside_each_other() -> None:
    model, x = stack("middle").eval(), inputs()
    twin = copy.deepcopy(model)
    expected = model(x)
    inner: list[Tensor] = []
    model.layers[1].register_forward_pre_hook(lambda module, args: inner.append(twin(x)) or None)
    assert torch.equal(model(x), expected) and torch.equal(inner[0], expected)


def test_the_model_stays_what_it_was() -> None:
    model = llama(2)
    classes = {path: type(module) for path, module in model.named_modules()}
    adapted(model)
    assert type(model) is classes[""]
    for path, module in model.named_modules():
        if not path.endswith("_proj"):
            assert isinstance(module, classes[path])
            for name in ("__name__", "__qualname__", "__module__"):
                assert getattr(type(module), name) == getattr(classes[path], name)
    lr.unload(model)
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert not any("_owned_chains" in vars(module) for module in model.modules())
    assert chains(adapted(model, "middle"))


# ---------------------------------------------------------------------- checkpointing and compiling


@pytest.mark.parametrize("use_reentrant", [False, True])
@by_shortcut
def test_checkpointing_by_transformers(shortcut: str, use_reentrant: bool) -> None:
    model = adapted(llama(3), shortcut, dropout=0.2)
    randomize(model)
    model.train()
    embeddings = model.get_input_embeddings()(IDS).detach()

    def step() -> tuple[Tensor, dict[str, Tensor]]:
        return run(
            lambda_module(lambda x: model(inputs_embeds=x, use_cache=False).logits, model),
            embeddings,
        )

    expected = step()
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    for _ in range(2):
        assert_equal_runs(step(), expected)
    model.activation_checkpointing_disable()
    assert_equal_runs(step(), expected)


def lambda_module(function: Callable[[Tensor], Tensor], model: nn.Module) -> nn.Module:
    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    return Call()


@pytest.mark.parametrize("use_reentrant", [False, True])
@by_shortcut
def test_checkpointing_by_the_owner(shortcut: str, use_reentrant: bool) -> None:
    """The older way of transformers, and diffusers' way: the owner hands its blocks over."""

    class Owner(Stack):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = self._gradient_checkpointing_func(layer, x)
            return x

    expected_model, x = stack(shortcut, dropout=0.2), inputs()
    expected = run(expected_model, x)
    model = adapted(Owner(), shortcut, dropout=0.2)
    model.load_state_dict(expected_model.state_dict())
    with pytest.raises(AttributeError, match="_gradient_checkpointing_func"):
        model(x)
    model._gradient_checkpointing_func = partial(checkpoint, use_reentrant=use_reentrant)
    assert_equal_runs(run(model, x), expected)
    assert_equal_runs(run(copy.deepcopy(model), x), expected)


@by_shortcut
def test_checkpointing_around_blocks(shortcut: str) -> None:
    model, x = stack(shortcut, dropout=0.2), inputs()
    expected = run(model, x)
    model.use_reentrant = False
    assert_equal_runs(run(model, x), expected)
    # Two forwards before their backwards: each block finds what it had.
    model.zero_grad()
    xs = [x.clone().requires_grad_(), inputs().requires_grad_()]
    torch.manual_seed(3)
    losses = [model(x).double().square().mean() for x in xs]
    losses[0].backward()
    torch.testing.assert_close(xs[0].grad, expected[1]["x"])
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[1][name])


@by_stateful
def test_calls_that_cannot_be_told_apart_are_refused(shortcut: str) -> None:
    constant = inputs().requires_grad_()

    class Fixed(nn.Module):
        """The second block gets the same tensor in every call."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Block(WIDTH) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            first = checkpoint(self.layers[0], x, use_reentrant=False)
            return first + checkpoint(self.layers[1], constant, use_reentrant=False)

    fixed = adapted(Fixed(), shortcut)
    randomize(fixed)
    for _ in range(2):  # one after the other they can
        fixed(inputs()).sum().backward()
    first, second = fixed(inputs()), fixed(inputs())
    with pytest.raises(RuntimeError, match="must get a tensor of its own in each call"):
        first.sum().backward()
    del first
    second.sum().backward()


def test_reentrant_checkpointing_around_blocks_is_refused() -> None:
    """Gradients could not leave a block by the chain. The block shortcut has none to leave."""
    x = inputs()
    for shortcut in STATEFUL:
        model = stack(shortcut)
        expected = model(x)
        model.use_reentrant = True
        y = model(x.clone().requires_grad_())
        assert torch.equal(y, expected)
        with pytest.raises(RuntimeError, match="use_reentrant=False to checkpoint them yourself"):
            y.sum().backward()
    model = stack("block", dropout=0.2)
    expected = run(model, x)
    model.use_reentrant = True
    assert_equal_runs(run(model, x), expected)


@by_shortcut
def test_one_graph_for_all_numbers_of_rows(shortcut: str) -> None:
    model = stack(shortcut, 2, target_modules=["q_proj"])
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 7, 4):
        x = inputs(2, rows)
        assert_equal_runs(run(compiled, x), prefixed(run(model, x)), exact=False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert current_frame() is None


def prefixed(result: tuple[Tensor, dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    """With the names that a compiled model's parameters have."""
    y, gradients = result
    return y, {n if n == "x" else f"_orig_mod.{n}": g for n, g in gradients.items()}


@by_stateful
@torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True)
def test_compiled_checkpointing(shortcut: str) -> None:
    model, x = stack(shortcut, 2, target_modules=["q_proj"]), inputs()
    expected = prefixed(run(model, x))
    model.use_reentrant = False
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_equal_runs(run(compiled, x), expected, exact=False)


@by_stateful
def test_blocks_compiled_one_by_one(shortcut: str) -> None:
    """Their owner is not in the graph: dynamo breaks it, the numbers are right."""
    model, x = stack(shortcut, 2, target_modules=["q_proj"]).eval(), inputs()
    expected = model(x)
    for layer in model.layers:
        layer.compile(backend="aot_eager")
    torch.testing.assert_close(model(x), expected)


@by_shortcut
def test_generation_and_hidden_states(shortcut: str) -> None:
    model = adapted(llama(3), shortcut)
    randomize(model)
    options = dict(max_new_tokens=3, do_sample=False, pad_token_id=0)
    cached, whole = (model.generate(IDS, use_cache=use, **options) for use in (True, False))
    assert torch.equal(cached, whole)
    output = model(IDS, output_hidden_states=True)
    assert len(output.hidden_states) == 4
    assert all(h.shape == (2, 4, 16) for h in output.hidden_states)
    assert torch.equal(output.logits, model(IDS).logits)
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, output.logits)
    with torch.inference_mode():
        assert torch.equal(model(IDS).logits, output.logits)


@by_shortcut
def test_checkpoints(shortcut: str, tmp_path) -> None:
    model = adapted(TinyLM(), shortcut, pre_num=1)
    randomize(model)
    plain = TinyLM()
    plain.load_state_dict(
        {n: v for n, v in model.state_dict().items() if "lora_" not in n}, strict=True
    )
    lr.save_adapter(model, tmp_path)
    loaded = lr.load_adapter(plain, tmp_path)
    assert torch.equal(loaded(IDS), model(IDS))
    assert loaded.lowrank_config.shortcut == shortcut and chains(loaded)
    other = adapted(TinyLM(), "block" if shortcut == "input" else "input")
    with pytest.raises(ValueError, match=r"load_adapter: .*shortcut must be"):
        lr.load_adapter(other, tmp_path)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_is_kept_for_backward(dropout: float) -> None:
    """q, k and v, which see one input, share one sum; middle keeps x and rank columns."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("q", "k", "v"):
                setattr(self, name, nn.Linear(WIDTH, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) + self.k(x) + self.v(x)

    rows, rank, fp32, seed = 50, 2, 4, 8
    seeds = 3 * seed if dropout else 0
    for shortcut in STATEFUL:
        model = adapted(nn.Sequential(Attention(), Attention()), shortcut, dropout=dropout)
        second = model[1]
        x = torch.randn(rows, WIDTH)
        with lr.reslora_call(model), torch.no_grad():
            model[0](x)
            with torch.enable_grad():
                kept = bytes_kept_by(second, x)
        own = rows * WIDTH + (3 * rows * rank if shortcut == "input" else 3 * (rows + rank) * rank)
        assert kept == fp32 * own + seeds, shortcut


# ----------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_block_merges_exactly(dtype: torch.dtype) -> None:
    model = stack("block", 4, dtype, pre_num=2, alpha=3).eval()
    x, before = inputs(dtype=dtype), copy.deepcopy(model.state_dict())
    exact = model(x)
    error = lr.reslora_merge_error(model, lambda: model(x))
    assert error.output < 40 * torch.finfo(dtype).eps
    assert max(error.modules.values()) < 10 * torch.finfo(dtype).eps
    lr.merge(model)
    lr.unmerge(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(x), exact)


def expected_ratios(model: Stack, name: str, merge: str, sizes: dict[str, list[Tensor]]) -> list:
    """|x_{n-j}| / |x_n| for j = 1 … n of every module n, from the definitions."""
    modules = [getattr(layer, name) for layer in model.layers]
    if merge == "input":
        rms = [torch.stack([x.square().mean().sqrt() for x in xs]).mean() for xs in sizes[name]]
        return [[rms[n - j] / rms[n] for j in range(1, n + 1)] for n in range(len(modules))]
    norms: list[Tensor] = []
    ratios: list[list[Tensor]] = []
    for n, module in enumerate(modules):
        # ratio_1 of n is F_{n-2} / F_{n-1}, 1 for the first two; further ones are its products.
        steps = [
            norms[k - 2] / norms[k - 1] if k > 1 else torch.tensor(1.0) for k in range(1, n + 1)
        ]
        ratios.append([math.prod(steps[n - j :], start=torch.tensor(1.0)) for j in range(1, n + 1)])
        norms.append((module.weight + expected_delta(modules, n, ratios[n])).norm())
    return ratios


def expected_delta(modules: list[ResLoRALinear], n: int, ratios: list[Tensor]) -> Tensor:
    own = modules[n]
    if own.shortcut == "input":
        return (1 + (ratios[0] if n else 1)) * own.scaling * own.lora_b @ own.lora_a
    reach = n if own.pre_num == -1 else min(own.pre_num, n)
    lora_a = own.lora_a + sum(ratios[j - 1] * modules[n - j].lora_a for j in range(1, reach + 1))
    return own.scaling * own.lora_b @ lora_a


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)], ids=str)
@pytest.mark.parametrize("merge", ["weight", "input"])
@pytest.mark.parametrize("shortcut, pre_num", [("input", 4), ("middle", 2), ("middle", -1)])
def test_estimated_merges(shortcut: str, pre_num: int, merge: str, order: tuple[int, ...]) -> None:
    model = stack(
        shortcut, 4, torch.float64, pre_num=pre_num, alpha=3, merge=merge, adapter_dtype="float64"
    ).eval()
    batches = [inputs(dtype=torch.float64) * scale for scale in (1, 5, 2)]
    names = ("q_proj", "up_proj", "down_proj")
    sizes: dict[str, list[list[Tensor]]] = {name: [[] for _ in model.layers] for name in names}
    for name in names:
        for n, layer in enumerate(model.layers):
            getattr(layer, name).register_forward_pre_hook(
                lambda m, args, into=sizes[name][n]: into.append(args[0].detach())
            )
    with lr.reslora_statistics(model) as statistics:
        for batch in batches:
            model(batch)
    assert set(statistics.calls.values()) == {3}
    with torch.no_grad():
        deltas = {}
        for name in names:
            modules = [getattr(layer, name) for layer in model.layers]
            ratios = expected_ratios(model, name, merge, sizes)
            deltas[name] = [expected_delta(modules, n, ratios[n]) for n in range(4)]
        weights = {name: [getattr(m, name).weight.clone() for m in model.layers] for name in names}
        exact = model(batches[0])
        for name in names:
            for n in order:  # one by one: the order makes no difference
                module = getattr(model.layers[n], name)
                tolerance = dict(rtol=1e-6, atol=1e-6)  # sizes are measured in float32
                torch.testing.assert_close(module.delta_weight(), deltas[name][n], **tolerance)
                module.merge()
                torch.testing.assert_close(
                    module.weight, weights[name][n] + deltas[name][n], **tolerance
                )
        merged = model(batches[0])
        lr.unmerge(model)
        for name in names:
            for n, weight in enumerate(weights[name]):
                assert torch.equal(getattr(model.layers[n], name).weight, weight)
        assert torch.equal(model(batches[0]), exact)
    error = lr.reslora_merge_error(model, lambda: model(batches[0]))
    assert error.output == pytest.approx(((merged - exact).norm() / exact.norm()).item(), rel=1e-9)
    assert error.output > 1e-3 and set(error.modules) == {
        f"layers.{n}.{name}" for n in range(4) for name in names
    }
    assert max(error.modules[f"layers.0.{name}"] for name in names) < 1e-12
    assert not any(m.merged for m in model.modules() if isinstance(m, ResLoRALinear))


@by_stateful
def test_the_merge_is_exact_where_inputs_are_multiples_of_each_other(shortcut: str) -> None:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3)))
    with torch.no_grad():
        for linear, factor in zip(model, (2, -0.5, 3), strict=True):
            linear.weight.copy_(factor * torch.eye(WIDTH))
    adapted(model, shortcut, merge="input", pre_num=-1)
    with torch.no_grad():
        for module in model:  # a projection on the first element, which has the only value
            module.lora_a.zero_()[0, 0] = 1
            module.lora_b.zero_()[0, 0] = 0.25
    x = torch.zeros(4, WIDTH)
    x[:, 0] = torch.tensor([1.0, 1.0, -1.0, 1.0])
    with torch.no_grad():
        model[1].weight.neg_()  # estimates are sizes: without signs
        with lr.reslora_statistics(model):
            model(x)
    assert lr.reslora_merge_error(model, lambda: model(x)).output < 1e-6


def test_sizes_are_measured_over_a_window_whatever_the_batch() -> None:
    model = adapted(Stack(1), merge="input")
    module = model.layers[0].q_proj
    with lr.reslora_statistics(model, window=2) as statistics, torch.no_grad():
        for value, rows in ((9.0, 1), (2.0, 3), (4.0, 50), (1.0, 0)):
            model(torch.full((rows, WIDTH), value))
    assert module.input_rms.item() == 3.0  # the last two that had rows
    assert statistics.calls["layers.0.q_proj"] == 3
    model(torch.full((2, WIDTH), 100.0))
    assert module.input_rms.item() == 3.0 and "input_rms" not in model.state_dict()
    assert copy.deepcopy(model).layers[0].q_proj.input_rms.item() == 3.0
    with lr.reslora_statistics(model):
        pass  # nothing measured: the old size stays
    assert module.input_rms.item() == 3.0
    with pytest.raises(ValueError, match="reslora_statistics: window must be at least 1, got 0"):
        lr.reslora_statistics(model, window=0)
    with pytest.raises(ValueError, match="reslora_statistics: model must contain a ResLoRALinear"):
        lr.reslora_statistics(nn.Linear(2, 2))


def test_a_compiled_model_is_measured_too() -> None:
    model, x = stack("input", merge="input"), inputs()
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x)
    with lr.reslora_statistics(model):
        compiled(x)
    expected = x.square().mean().sqrt()
    torch.testing.assert_close(model.layers[0].q_proj.input_rms, expected)


@by_stateful
def test_inputs_of_size_zero_count_as_equal(shortcut: str) -> None:
    model = adapted(Stack(2), shortcut, merge="input")
    randomize(model)
    for module in model.modules():
        if isinstance(module, ResLoRALinear):
            module.input_rms = torch.zeros(())
    first, second = model.layers[0].q_proj, model.layers[1].q_proj
    a = 2 * second.lora_a if shortcut == "input" else first.lora_a + second.lora_a
    torch.testing.assert_close(second.delta_weight(), second.lora_b @ a)


@by_stateful
def test_merging_from_inputs_needs_their_sizes(shortcut: str) -> None:
    model = stack(shortcut, merge="input").eval()
    before = copy.deepcopy(model.state_dict())
    message = r"layers\.1\.q_proj: ResLoRALinear: merge='input' needs the sizes .*reslora_statist"
    for call in (lr.merge, lambda m: lr.unload(m, merge=True)):
        with pytest.raises(ValueError, match=f"merge: {message}"):
            call(model)
    with pytest.raises(ValueError, match="ResLoRALinear: merge='input' needs the sizes"):
        model.layers[1].q_proj.merge()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.layers[0].q_proj.merge()  # the first of a chain is known exactly
    model.layers[0].q_proj.unmerge()


@by_stateful
def test_chains_are_merged_whole(shortcut: str) -> None:
    model, x = stack(shortcut).eval(), inputs()
    model.layers[0].q_proj.merge()
    with pytest.raises(ValueError, match=r"chain layers\.\*\.q_proj must all be merged or none"):
        model(x)
    with pytest.raises(ValueError, match=r"unmerged and in evaluation mode, got layers\.0\.q_proj"):
        lr.reslora_merge_error(model, lambda: model(x))
    lr.merge(model)
    merged = model(x)
    assert torch.equal(lr.unload(model, merge=True)(x), merged) and type(model) is Stack


def test_the_error_is_measured_in_evaluation_mode() -> None:
    model, x = stack("input", dropout=0.1), inputs()
    with pytest.raises(ValueError, match=r"got layers\.0\.q_proj in training mode with dropout"):
        lr.reslora_merge_error(model, lambda: model(x))
    with pytest.raises(ValueError, match="reslora_merge_error: model must contain a ResLoRALinear"):
        lr.reslora_merge_error(nn.Linear(2, 2), lambda: x)
    model.eval()

    def fail() -> Tensor:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        lr.reslora_merge_error(model, fail)
    assert not any(module._forward_hooks for module in model.modules())


# ----------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"shortcut": "output"},
            ValueError,
            r"shortcut must be one of \['input', 'block', 'middle",
        ),
        ({"pre_num": 0}, ValueError, "pre_num must be at least 1, or -1 for all, got 0"),
        ({"pre_num": -2}, ValueError, "pre_num must be at least 1, or -1 for all, got -2"),
        ({"pre_num": 1.0}, TypeError, "pre_num must be an int, got 1.0"),
        ({"pre_num": True}, TypeError, "pre_num must be an int, got True"),
        ({"shared_dropout": 1}, TypeError, "shared_dropout must be a bool, got 1"),
        ({"merge": "both"}, ValueError, r"merge must be one of \['weight', 'input'\], got 'both'"),
        ({"init": "pissa"}, ValueError, r"init must be one of \['kaiming'\], got 'pissa'"),
    ],
    ids=str,
)
def test_bad_options(options: dict, error: type, message: str) -> None:
    base = nn.Linear(4, 4)
    with pytest.raises(error, match=f"ResLoRALinear: {message}"):
        ResLoRALinear.from_linear(base, **options)
    assert base.weight.requires_grad
    with pytest.raises(error, match=f"ResLoRAConfig: {message}"):
        lr.ResLoRAConfig(**options)


def test_repr_names_the_shortcut_and_the_place() -> None:
    model = stack("middle", pre_num=2)
    assert repr(model.layers[1].q_proj).endswith("shortcut=middle, pre_num=2, position=1)")
    assert repr(ResLoRALinear.from_linear(nn.Linear(4, 4))).endswith("shortcut=input)")


def test_the_example_runs(tmp_path) -> None:
    example = Path(__file__).parents[3] / "examples" / "reslora.py"
    app = typer.Typer()
    app.command()(runpy.run_path(str(example))["main"])
    result = CliRunner().invoke(app, ["--quick", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "reslora.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["reslora.png"]
    for name in ("LoRA", "input", "block", "middle"):
        assert name in result.output
