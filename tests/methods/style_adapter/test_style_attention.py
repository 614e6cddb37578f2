"""TwoPathCrossAttention: the two paths, λ, and when K_s and V_s are computed anew."""

import copy
import gc
import math
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from saved_bytes import storages_kept
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowrank_ext.methods.style_adapter import StylePath, StylePathConfig, TwoPathCrossAttention
from lowrank_ext.methods.style_adapter.attention import attend

DIM, TEXT_DIM, HEADS = 24, 10, 3
BATCH, PIXELS, WORDS, TOKENS = 4, 5, 7, 3
SHARING = [(True, True), (False, True), (True, False), (False, False)]


def layer(
    dtype: torch.dtype = torch.float32, device: str = "cpu", **options
) -> TwoPathCrossAttention:
    """A layer whose style path and λ have values of their own."""
    module = TwoPathCrossAttention(
        DIM, TEXT_DIM, num_heads=HEADS, config=StylePathConfig(**{"lam_init": 0.7, **options})
    )
    if options.get("init") != "zero":
        with torch.no_grad():
            for name, parameter in module.style_path.named_parameters():
                if name != "lam":
                    parameter.copy_(torch.randn_like(parameter) / 3)
    return module.to(device, dtype)


def inputs(
    dtype: torch.dtype = torch.float32, device: str = "cpu", styles: int = BATCH
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((BATCH, PIXELS, DIM), (BATCH, WORDS, TEXT_DIM), (styles, TOKENS, TEXT_DIM))
    x, text, style = (torch.randn(shape).to(device, dtype) for shape in shapes)
    return x, text, style


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.mT / math.sqrt(DIM // HEADS)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def expected_output(
    module: TwoPathCrossAttention,
    x: Tensor,
    text: Tensor,
    style: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """The definition, λ multiplying the style path's output."""
    path = module.style_path
    query = module.to_q(x)
    text_out = softmax_attention(query, module.to_k(text), module.to_v(text), mask)
    style_query = query if path.to_q_style is None else path.to_q_style(x)
    style_out = softmax_attention(style_query, path.to_k_style(style), path.to_v_style(style))
    if path.to_out_style is None:
        return module.to_out(text_out + path.lam * style_out)
    return module.to_out(text_out) + path.lam * path.to_out_style(style_out)


# ----------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("share_query", "share_out"), SHARING)
def test_output_and_gradients(
    device: str, share_query: bool, share_out: bool, masked: bool
) -> None:
    module = layer(torch.float64, device, share_query=share_query, share_out=share_out)
    tensors = [t.requires_grad_() for t in inputs(torch.float64, device)]
    mask = torch.rand(BATCH, 1, 1, WORDS, device=device) < 0.6 if masked else None
    if mask is not None:
        mask[..., 0] = True
    trained = [p for p in module.parameters() if p.requires_grad]
    assert len(trained) == 3 + (not share_query) + (not share_out)
    found = module(*tensors, text_mask=mask)
    expected = expected_output(module, *tensors, mask)
    torch.testing.assert_close(found, expected)
    dout = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, [*tensors, *trained], dout),
        torch.autograd.grad(expected, [*tensors, *trained], dout),
    )


def test_gradcheck() -> None:
    module = layer(torch.float64)
    x, text, style = (t[:2].requires_grad_() for t in inputs(torch.float64))
    path = module.style_path
    trained = (path.to_k_style.weight, path.to_v_style.weight, path.lam)
    rows = torch.tensor([0.5, 2.0], dtype=torch.float64)

    def run(*tensors: Tensor) -> Tensor:
        return module(*tensors[:3], scale=rows)

    assert torch.autograd.gradcheck(run, (x, text, style, *trained), fast_mode=True)


def test_there_are_two_softmaxes() -> None:
    """Values of one: each path attends with all its mass, however many tokens the other has."""
    ones = torch.ones(BATCH, WORDS, DIM)
    query = torch.randn(BATCH, PIXELS, DIM)
    module = layer()
    path = module.style_path
    with torch.no_grad():
        path.to_v_style.weight.fill_(1 / TEXT_DIM)
    for tokens in (1, 50):
        style = torch.ones(1, tokens, TEXT_DIM)
        out = attend(query, query[:, :1].expand_as(ones), ones, HEADS)
        out = out + path(query, query, style)
        torch.testing.assert_close(out, torch.full_like(out, 1.7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("styles", [1, 2, BATCH])
def test_rows_of_styles_repeat_over_the_batch(styles: int, dtype: torch.dtype, device: str) -> None:
    module = layer(dtype, device)
    x, text, style = inputs(dtype, device, styles)
    y = module(x, text, style)
    for row in range(BATCH):
        alone = module(x[[row]], text[[row]], style[[row % styles]])
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(y[[row]], alone, rtol=tolerance, atol=tolerance)


# -------------------------------------------------------------------------------- no style, λ = 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("share_query", "share_out"), SHARING)
def test_without_a_style_the_text_path_is_alone(
    device: str, dtype: torch.dtype, share_query: bool, share_out: bool
) -> None:
    module = layer(dtype, device, share_query=share_query, share_out=share_out)
    x, text, style = inputs(dtype, device)
    text_out = attend(module.to_q(x), module.to_k(text), module.to_v(text), HEADS)
    expected = module.to_out(text_out)
    assert not torch.equal(module(x, text, style), expected)
    assert torch.equal(module(x, text), expected)
    assert torch.equal(module(x, text, style[:, :0]), expected), "n = 0"
    assert torch.equal(module(x, text, style, scale=0.0), expected)
    with torch.no_grad():
        module.style_path.lam.zero_()
    assert torch.equal(module(x, text, style), expected), "λ = 0"


def test_gradients_at_lambda_zero() -> None:
    module = layer(lam_init=0.0)
    module(*inputs()).square().sum().backward()
    path = module.style_path
    assert path.lam.grad != 0
    assert not path.to_k_style.weight.grad.any() and not path.to_v_style.weight.grad.any()


def test_a_start_at_zero_values() -> None:
    module = layer(init="zero")
    x, text, style = inputs()
    assert torch.equal(module(x, text, style), module(x, text))
    module(x, text, style).square().sum().backward()
    assert module.style_path.to_v_style.weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("share_out", [True, False])
def test_plain_rows_beside_styled_ones(device: str, dtype: torch.dtype, share_out: bool) -> None:
    module = layer(dtype, device, share_out=share_out)
    x, text, style = inputs(dtype, device, styles=2)
    scale = torch.tensor([0.0, 1.0, 0.5, 0.0], device=device)
    y, plain = module(x, text, style, scale=scale), module(x, text)
    assert torch.equal(y[[0, 3]], plain[[0, 3]])
    assert torch.equal(y[1], module(x, text, style)[1])
    half = module(x, text, style, scale=0.5)
    assert torch.equal(y[2], half[2]) and not torch.equal(half, plain)


def test_empty_batches() -> None:
    module = layer()
    x, text, style = inputs()
    assert module(x[:0], text[:0], style[:0]).shape == (0, PIXELS, DIM)
    assert module(x[:0], text[:0], style[:1]).shape == (0, PIXELS, DIM)
    assert module(x[:, :0], text, style).shape == (BATCH, 0, DIM)
    module(x[:0], text[:0], style[:1]).sum().backward()
    assert not module.style_path.to_v_style.weight.grad.any()


def test_any_strides() -> None:
    module = layer(torch.float64)
    x, text, style = inputs(torch.float64)
    expected = module(x, text, style)
    torch.testing.assert_close(module(x.mT.contiguous().mT, text, style), expected)
    wide = torch.randn(2 * BATCH, TOKENS, 2 * TEXT_DIM, dtype=torch.float64)
    wide[::2, :, ::2] = style
    torch.testing.assert_close(module(x, text, wide[::2, :, ::2]), expected)
    one = style[:1].expand(BATCH, -1, -1)
    torch.testing.assert_close(module(x, text, one), module(x, text, one.contiguous()))


# ----------------------------------------------------------------------------- low precision and λ


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adapter_dtype", ["base", "float32"])
def test_low_precision(device: str, dtype: torch.dtype, adapter_dtype: str) -> None:
    """Combined in fp32: at most the error of the formula written in that dtype with λ in fp32."""
    module = layer(device=device)
    low = copy.deepcopy(module).to(dtype)
    if adapter_dtype == "float32":
        low.style_path.float()
    exact = copy.deepcopy(low).double()
    tensors = [(3 * t).to(dtype) for t in inputs(device=device)]
    expected = exact(*(t.double() for t in tensors))
    found = low(*tensors)
    naive = copy.deepcopy(low)
    naive.style_path.to(dtype)
    plain = expected_output(naive, *tensors)
    error, allowed = ((t.double() - expected).abs().max() for t in (found, plain))
    assert found.dtype == dtype
    assert error <= 2 * allowed + 1e-3 * torch.finfo(dtype).eps

    dout = torch.randn_like(expected).to(dtype)
    (dlam,) = torch.autograd.grad(found, low.style_path.lam, dout)
    (exact_dlam,) = torch.autograd.grad(expected, exact.style_path.lam, dout.double())
    assert dlam.dtype == torch.float32
    scale = (dout.double().abs() * expected.abs()).sum()
    assert (dlam - exact_dlam).abs() <= torch.finfo(dtype).eps * scale / 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_lambda_is_never_narrower_than_float32(dtype: torch.dtype) -> None:
    module = layer(lam_init=0.1)
    lam = module.style_path.lam
    value = lam.detach().clone()
    for cast in (module.to, lambda d: module.to(torch.float32).to(d)):
        cast(dtype)
        assert module.style_path.lam is lam
        assert lam.dtype == torch.promote_types(dtype, torch.float32)
        assert lam == value
        assert module.style_path.to_k_style.weight.dtype == dtype
    state = layer().state_dict()
    module.load_state_dict(state)
    assert torch.equal(module.style_path.lam.detach().float(), state["style_path.lam"])


def test_autocast(device: str) -> None:
    module = layer(device=device)
    x, text, style = inputs(device=device)
    with torch.autocast(device, torch.bfloat16):
        y = module(x, text, style)
        again = module(x, text, style)
    assert y.dtype == torch.bfloat16 and torch.equal(y, again)
    y.float().sum().backward()
    assert module.style_path.lam.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), module(x, text, style), rtol=0.05, atol=0.05)


def test_what_is_saved_for_backward() -> None:
    """λ adds nothing of [B, S, C] to queries and both outputs, which attention saves."""
    batch, pixels = 2, 64
    module = layer(torch.bfloat16)
    x = torch.randn(batch, pixels, DIM, dtype=torch.bfloat16, requires_grad=True)
    text = torch.randn(batch, WORDS, TEXT_DIM, dtype=torch.bfloat16)
    style = torch.randn(1, TOKENS, TEXT_DIM, dtype=torch.bfloat16)
    kept = storages_kept(lambda: module(x, text, style))
    large = [entry for entry in kept.values() if entry[0] >= batch * pixels * DIM]
    assert large == 3 * [(batch * pixels * DIM * 2, torch.bfloat16)]


# ---------------------------------------------------------------------------- what is kept, and not


def projections(module: TwoPathCrossAttention) -> list[int]:
    """How often K_s has been computed."""
    count = [0]

    def hook(*_) -> None:
        count[0] += 1

    module.style_path.to_k_style.register_forward_hook(hook)
    return count


def test_keys_and_values_are_computed_once_per_style() -> None:
    module = layer()
    x, text, style = inputs()
    count = projections(module)
    with torch.no_grad():
        expected = module(x, text, style)
        for _ in range(3):
            assert torch.equal(module(x, text, style), expected)
        assert count == [1]
        module(x, text, style.clone())  # another tensor may have other values
        assert count == [2]
        assert torch.equal(module(x, text, style[:, :2]), module(x, text, style[:, :2].clone()))


CHANGES: dict[str, Callable[[TwoPathCrossAttention, Tensor], object]] = {
    "style in place": lambda module, style: style.mul_(2),
    "a step of an optimizer": lambda module, style: step(module),
    "load_state_dict": lambda module, style: module.load_state_dict(
        {k: v * 1.5 for k, v in module.state_dict().items()}
    ),
    "load_state_dict, assigned": lambda module, style: module.load_state_dict(
        {k: v * 1.5 for k, v in module.state_dict().items()}, assign=True
    ),
    "a new Parameter": lambda module, style: setattr(
        module.style_path.to_v_style, "weight", nn.Parameter(torch.ones(DIM, TEXT_DIM))
    ),
    "new data": lambda module, style: setattr(
        module.style_path.to_v_style.weight, "data", torch.ones(DIM, TEXT_DIM)
    ),
    "λ": lambda module, style: module.style_path.lam.mul_(3),
    "dtype": lambda module, style: module.style_path.bfloat16(),
}


def step(module: TwoPathCrossAttention) -> None:
    with torch.enable_grad():
        module(*inputs()).sum().backward()
    torch.optim.SGD(module.style_path.parameters(), lr=0.1).step()


@pytest.mark.parametrize("change", list(CHANGES))
def test_changes_are_seen(change: str) -> None:
    module = layer()
    x, text, style = inputs()
    with torch.no_grad():
        before = module(x, text, style)
        CHANGES[change](module, style)
        found = module(x, text, style)
        assert not torch.equal(found, before)
        assert torch.equal(found, copy.deepcopy(module)(x, text, style.clone()))


def test_autocast_is_seen() -> None:
    module = layer()
    x, text, style = inputs()
    with torch.no_grad():
        expected = module(x, text, style)
        with torch.autocast("cpu", torch.bfloat16):
            assert module(x, text, style).dtype == torch.bfloat16
        assert torch.equal(module(x, text, style), expected)


def test_nothing_is_kept_while_something_trains() -> None:
    module = layer()
    x, text, style = inputs()
    count = projections(module)
    with torch.no_grad():
        module(x, text, style)
    module(x, text, style).sum().backward()
    assert count == [2] and module.style_path.to_k_style.weight.grad.any()
    module.style_path.requires_grad_(False)
    module(x, text, style)  # nothing here needs a gradient: what was kept serves
    assert count == [2]
    module(x, text, style.requires_grad_()).sum().backward()
    assert count == [3] and style.grad.any()


class Box:
    """What a graph saves; it goes when the graph goes."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def test_no_graph_is_kept_alive() -> None:
    module = layer()
    x, text, style = inputs()
    boxes: list[weakref.ref[Box]] = []

    def pack(tensor: Tensor) -> Box:
        boxes.append(weakref.ref(box := Box(tensor)))
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        made = style.requires_grad_().square()
    assert boxes[0]() is not None
    with torch.no_grad():
        module(x, text, made)
    module(x, text, made)
    gc.disable()
    try:
        del made
        assert boxes[0]() is None
    finally:
        gc.enable()


def test_after_inference_mode_training_goes_on() -> None:
    module = layer()
    x, text, style = inputs()
    with torch.inference_mode():
        expected = module(x, text, style)
    module.style_path.requires_grad_(False)
    y = module(x.requires_grad_(), text, style)
    y.sum().backward()  # the keys that were kept are saved for it
    assert x.grad.any()
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied: Callable[[nn.Module], nn.Module]) -> None:
    module = layer(share_query=False)
    tensors = inputs()
    with torch.no_grad():
        expected = module(*tensors)
        other = copied(module)
        assert torch.equal(other(*tensors), expected)
        other.style_path.lam.zero_()
        assert torch.equal(module(*tensors), expected)
    assert other.state_dict().keys() == module.state_dict().keys()


# ------------------------------------------------------------------------------ in a training loop


@pytest.mark.parametrize(("share_query", "share_out"), SHARING)
def test_only_the_style_path_trains(share_query: bool, share_out: bool) -> None:
    module = layer(share_query=share_query, share_out=share_out)
    before = {name: t.clone() for name, t in module.state_dict().items()}
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.02, weight_decay=0.1)
    tensors = inputs()
    target, losses = torch.randn(BATCH, PIXELS, DIM), []
    for _ in range(25):
        loss = (module(*tensors) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.startswith("style_path"), name


def test_two_runs_give_the_same_bits(device: str) -> None:
    module = layer(device=device)
    tensors = [t.requires_grad_() for t in inputs(device=device, styles=2)]
    trained = [*tensors, *module.style_path.parameters()]
    runs = [
        torch.autograd.grad(module(*tensors).square().sum(), trained, retain_graph=False)
        for _ in range(2)
    ]
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    module = layer()
    tensors = [t.requires_grad_() for t in inputs()]
    trained = [*tensors, *module.style_path.parameters()]
    found = []
    for run in (module, lambda *t: checkpoint(module, *t, use_reentrant=reentrant)):
        for tensor in trained:
            tensor.grad = None
        run(*tensors).square().sum().backward()
        found.append([tensor.grad for tensor in trained])
    for direct, checkpointed in zip(*found, strict=True):
        assert torch.equal(direct, checkpointed)


def test_compiled() -> None:
    module = layer()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch, pixels in ((4, 5), (2, 3)):
        x, text = torch.randn(batch, pixels, DIM), torch.randn(batch, WORDS, TEXT_DIM)
        style = torch.randn(2, TOKENS, TEXT_DIM)
        scale = torch.rand(batch)
        for _ in range(2):
            torch.testing.assert_close(
                compiled(x, text, style, scale=scale), module(x, text, style, scale=scale)
            )
            with torch.no_grad():  # a graph of earlier weights would give earlier numbers
                module.style_path.to_k_style.weight.mul_(-1)
    lam = module.style_path.lam
    found = torch.autograd.grad(compiled(x, text, style, scale=scale).sum(), lam)
    expected = torch.autograd.grad(module(x, text, style, scale=scale).sum(), lam)
    torch.testing.assert_close(found, expected)


def test_compiled_without_gradients() -> None:
    """What was kept before is not baked into the graph."""
    module = layer()
    tensors = inputs()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(*tensors), module(*tensors))
            module.style_path.to_k_style.weight.mul_(-1)


# ---------------------------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"style_dim": 0}, ValueError, "style_dim must be at least 1, got 0"),
        ({"style_dim": 2.0}, TypeError, "style_dim must be an int, got 2.0"),
        ({"share_query": 1}, TypeError, "share_query must be a bool, got 1"),
        ({"share_out": None}, TypeError, "share_out must be a bool, got None"),
        ({"lam": "row"}, ValueError, r"lam must be one of \['layer', 'global'\], got 'row'"),
        ({"lam_init": math.nan}, ValueError, "lam_init must be finite, got nan"),
        ({"lam_init": "1"}, TypeError, "lam_init must be a number, got '1'"),
        ({"init": "svd"}, ValueError, r"init must be one of \['text', 'random', 'zero'\]"),
        ({"adapter_dtype": "int8"}, ValueError, "adapter_dtype must be one of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_options(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"StylePathConfig: {message}"):
        StylePathConfig(**options)


def test_options_survive_a_dict() -> None:
    config = StylePathConfig(style_dim=4, share_out=False, adapter_dtype=torch.bfloat16)
    assert StylePathConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="'lam_int' is not a field; did you mean 'lam_init'"):
        StylePathConfig.from_dict({"lam_int": 1.0})
    with pytest.raises(ValueError, match="peft_type must be 'STYLE_ADAPTER', got 'LORA'"):
        StylePathConfig.from_dict({"peft_type": "LORA"})


def test_wrong_layers() -> None:
    for options, message in (
        ({"query_dim": 10, "num_heads": 3}, "query_dim must be a multiple of num_heads=3, got 10"),
        ({"query_dim": 0}, "query_dim must be at least 1, got 0"),
        (
            {"query_dim": 8, "config": StylePathConfig(style_dim=5)},
            "style_dim must be that of a text token, 768, with init='text', got 5",
        ),
    ):
        with pytest.raises(ValueError, match=f"TwoPathCrossAttention: {message}"):
            TwoPathCrossAttention(**options)
    with pytest.raises(ValueError, match="StylePath: inner_dim must be a multiple of num_heads=3"):
        StylePath(8, 10, 4, 3)


def test_rows_that_do_not_fit() -> None:
    module = layer()
    x, text, style = inputs(styles=3)
    with pytest.raises(ValueError, match="divides the batch, 4, got 3"):
        module(x, text, style)
    with pytest.raises(ValueError, match="divides the scale, 4, got 3"):
        module(x, text, style, scale=torch.ones(4))
    with pytest.raises(ValueError, match="divides the batch, 4, got 0"):
        module(x, text, style[:0])


# ------------------------------------------------------------------------------------ how it starts


def test_starts() -> None:
    config = {"share_query": False, "share_out": False}
    module = TwoPathCrossAttention(DIM, TEXT_DIM, num_heads=HEADS, config=StylePathConfig(**config))
    path = module.style_path
    for own, text in (
        (path.to_k_style, module.to_k),
        (path.to_v_style, module.to_v),
        (path.to_q_style, module.to_q),
        (path.to_out_style, module.to_out),
    ):
        assert torch.equal(own.weight, text.weight) and own.weight is not text.weight
        assert own.weight.requires_grad and not text.weight.requires_grad
    assert path.lam == 1

    starts = []
    for init in ("random", "zero"):
        torch.manual_seed(1)
        options = StylePathConfig(init=init, style_dim=6, share_query=False)
        path = TwoPathCrossAttention(DIM, TEXT_DIM, num_heads=HEADS, config=options).style_path
        assert path.to_k_style.weight.shape == (DIM, 6)
        assert 0 < path.to_k_style.weight.abs().max() <= 1 / math.sqrt(6)
        starts.append(path)
    assert torch.equal(starts[0].to_k_style.weight, starts[1].to_k_style.weight)
    assert starts[0].to_v_style.weight.any() and not starts[1].to_v_style.weight.any()
