"""BasisLoRALinear: stages, masks on coefficients, scales, and what backward keeps."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from devices import DtypePair
from module_cases import BASES, IN, OUT, RANK, plain_linear, weight_of
from saved_bytes import bytes_kept_by
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import lowrank_ext as lr
from lowrank_ext import reference
from lowrank_ext.nn import BasisLoRALinear

SIDES = ["down", "up"]
by_side = pytest.mark.parametrize("basis", SIDES)
by_unit = pytest.mark.parametrize("mask_per", ["call", "sample"])
by_stage = pytest.mark.parametrize("stage", [1, 2])


def make(base: nn.Module | None = None, **options: Any) -> BasisLoRALinear:
    return BasisLoRALinear.from_linear(base or plain_linear(), **{"r": RANK, **options})


@torch.no_grad()
def randomize(layer: BasisLoRALinear) -> BasisLoRALinear:
    """Every tensor of the adapter at values of order one, frozen or not."""
    for tensor in layer.adapter_tensors().values():
        tensor.copy_(torch.randn(tensor.shape) / tensor.shape[-1] ** 0.5)
    return layer


def at_stage(stage: int, base: nn.Module | None = None, **options: Any) -> BasisLoRALinear:
    """In training mode with random values; stage 2 has the residual ``dance``."""
    layer = make(base, **options)
    if stage == 2:
        layer.begin_residual_stage("dance")
    return randomize(layer).train()


def trained(layer: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in layer.named_parameters() if p.requires_grad}


# --------------------------------------------------------------------------------- definition


def masked(coefficients: Tensor, layer: BasisLoRALinear, p: float, samples: int) -> Tensor:
    """[samples, …] of the definition: mask from the seed that the layer draws next."""
    seed = torch.randint(0, 2**63 - 1, (1,)).item()
    rows = coefficients if layer.basis == "down" else coefficients.mT
    count = samples if layer.mask_per == "sample" else 1
    mask = reference.dropout_mask(seed, count * rows.shape[0], RANK, p).view(count, -1, RANK)
    factor = reference.dropout_scale(p) if layer.mask_rescale else 1.0
    dropped = rows * mask * factor
    return (dropped if layer.basis == "down" else dropped.mT).expand(samples, *coefficients.shape)


def definition(layer: BasisLoRALinear, x: Tensor, p: float) -> Tensor:
    """The forward of training mode for x [samples, T, K], in plain torch."""
    samples = x.shape[0]
    one = layer.lora_b if layer.basis == "down" else layer.lora_a
    if layer.trained_residual is None:
        total = masked(one, layer, p, samples)
    elif layer.mask_identity:
        total = masked(one + layer.lora_residual_dance, layer, p, samples)
    else:
        total = one + masked(layer.lora_residual_dance, layer, p, samples)
    if layer.basis == "down":
        low = torch.einsum("btk,rk->btr", x, layer.lora_a)
        branch = torch.einsum("btr,bnr->btn", low, total)
    else:
        low = torch.einsum("btk,brk->btr", x, total)
        branch = torch.einsum("btr,nr->btn", low, layer.lora_b)
    return F.linear(x, layer.weight, layer.bias) + layer.scaling * branch


@by_side
@by_unit
@by_stage
@pytest.mark.parametrize("flags", [{}, {"mask_rescale": False}, {"mask_identity": True}], ids=str)
def test_training_is_the_formula(basis: str, mask_per: str, stage: int, flags: dict) -> None:
    """Outputs and gradients, with the masks that the seed gives."""
    layer = at_stage(
        stage,
        plain_linear(torch.float64),
        alpha=5.0,
        basis=basis,
        mask_per=mask_per,
        coef_dropout=0.6,
        residual_coef_dropout=0.3,
        **flags,
    )
    x = torch.randn(3, 4, IN, dtype=torch.float64, requires_grad=True)
    dout = torch.randn(3, 4, OUT, dtype=torch.float64)
    inputs = [x, *trained(layer).values()]
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    expected = definition(layer, x, 0.6 if stage == 1 else 0.3)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y, inputs, dout), torch.autograd.grad(expected, inputs, dout)
    )


@by_side
def test_the_mask_drops_elements_of_the_coefficients(basis: str) -> None:
    """About p of them, kept ones times 1/(1-p); each call draws its own; samples differ."""
    layer = make(nn.Linear(64, 64), r=16, basis=basis, coef_dropout=0.8)
    with torch.no_grad():
        layer._identity.fill_(1.0)
    drawn = [layer.branch_factors(training=True)[basis == "down"] for _ in range(2)]
    for coefficients in drawn:
        kept = coefficients != 0
        assert 0.15 < kept.float().mean() < 0.25
        scale = reference.dropout_scale(0.8)
        torch.testing.assert_close(coefficients[kept], torch.full((int(kept.sum()),), scale))
    assert not torch.equal(*drawn)
    per_sample = layer._coefficients({}, 0.8, num_masks=3)
    assert per_sample.shape == (3, *layer._identity.shape)
    assert not torch.equal(per_sample[0], per_sample[1])


def test_without_rescaling_kept_coefficients_are_what_they_were() -> None:
    layer = at_stage(1, nn.Linear(64, 64), mask_rescale=False)
    coefficients = layer.branch_factors(training=True)[1]
    kept = coefficients != 0
    assert 0.1 < kept.float().mean() < 0.3
    torch.testing.assert_close(coefficients[kept], layer.lora_b[kept], rtol=3e-7, atol=0)


@by_side
@by_unit
def test_a_mask_that_drops_everything(basis: str, mask_per: str) -> None:
    """p = 1: stage 1 is the base, stage 2 is stage 1, bit for bit; gradients are zeros."""
    options = {"basis": basis, "mask_per": mask_per, "coef_dropout": 1.0}
    layer = at_stage(1, **options, residual_coef_dropout=1.0, mask_rescale=False)
    x = torch.randn(3, 4, IN, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, F.linear(x, layer.weight, layer.bias))
    y.sum().backward()
    assert all(not p.grad.any() for p in trained(layer).values())
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(x.shape))

    stage1 = layer.eval()(x).detach()
    layer.begin_residual_stage("dance")
    randomize_residuals(layer)
    y = layer.train()(x)
    if mask_per == "call":
        assert torch.equal(y, stage1)
    else:  # by another op, which sums in another order
        torch.testing.assert_close(y, stage1)
    y.sum().backward()
    assert not layer.lora_residual_dance.grad.any()


@torch.no_grad()
def randomize_residuals(layer: BasisLoRALinear) -> None:
    for name in layer.residuals:
        layer._residual(name).normal_()


@pytest.mark.parametrize("kind", BASES)
@by_side
def test_the_start_is_the_base_bit_for_bit(basis: str, kind: str, dtypes: DtypePair) -> None:
    """Right after from_linear, with masks and in training mode; and an early residual too."""
    base = BASES[kind](dtypes.base)
    x = torch.randn(4, IN, dtype=dtypes.base)
    expected = base(x)
    asked = str(dtypes.adapter).removeprefix("torch.")
    layer = make(base, basis=basis, adapter_dtype=asked).train()
    assert torch.equal(layer(x), expected)
    layer.begin_residual_stage()
    assert torch.equal(layer(x), expected)


def test_which_factor_starts_random() -> None:
    base = plain_linear()
    torch.manual_seed(3)
    down = make(copy.deepcopy(base))
    torch.manual_seed(3)
    assert torch.equal(down.lora_a, lr.nn.LoRALinear.from_linear(base, r=RANK).lora_a)
    assert down.lora_a.any() and not down.lora_b.any()
    up = make(nn.Linear(100, 400), basis="up", r=50)
    assert up.lora_b.any() and not up.lora_a.any()
    assert 0.95 / 20 < up.lora_b.abs().max() <= 1 / 20
    gaussian = make(nn.Linear(400, 400), basis="up", r=50, init="gaussian")
    assert gaussian.lora_b.std().item() == pytest.approx(1 / 50, rel=0.1)


# --------------------------------------------------------------------------------------- stages


@by_side
def test_a_new_stage_trains_the_residual_alone(basis: str) -> None:
    layer = at_stage(1, basis=basis)
    assert set(trained(layer)) == {"lora_a", "lora_b"}
    x = torch.randn(5, IN)
    stage1 = layer.eval()(x)
    layer(x).sum().backward()
    layer.begin_residual_stage("dance", coef_dropout=0.25)
    assert set(trained(layer)) == {"lora_residual_dance"}
    assert layer.lora_residual_dance.shape == layer._identity.shape
    assert torch.equal(layer(x), stage1)
    assert layer.residual_coef_dropout == 0.25
    assert layer.lora_a.grad is None and layer.lora_b.grad is None
    assert "dance=1" in repr(layer) and f"basis={basis}" in repr(layer)


@by_side
@by_unit
def test_frozen_tensors_never_change(basis: str, mask_per: str) -> None:
    """Not by the optimizer of stage 1 either, whose momentum and weight decay are still there."""
    layer = at_stage(1, basis=basis, mask_per=mask_per, coef_dropout=0.5)
    x = torch.randn(8, IN)
    old = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        old.zero_grad()
        layer(x).square().mean().backward()
        old.step()
    layer(x).square().mean().backward()  # gradients that nobody has used
    layer.begin_residual_stage("dance")
    frozen = copy.deepcopy(layer.state_dict())
    residual = [p for p in layer.parameters() if p.requires_grad]
    new = torch.optim.AdamW(residual, lr=0.1, weight_decay=0.1)
    losses = []
    for _ in range(40):
        new.zero_grad()
        loss = layer(x).square().mean()
        loss.backward()
        old.step()
        new.step()
        losses.append(loss.item())
    for name, value in layer.state_dict().items():
        assert torch.equal(value, frozen[name]) is (name != "lora_residual_dance"), name
    assert sum(losses[-5:]) < sum(losses[:5])


@by_side
@pytest.mark.parametrize("merged", [False, True])
def test_motion_zero_is_stage_1_bit_for_bit(
    basis: str, merged: bool, device: str, dtypes: DtypePair
) -> None:
    base = nn.Linear(IN, OUT, dtype=dtypes.base, device=device)
    asked = str(dtypes.adapter).removeprefix("torch.")
    layer = at_stage(1, base, basis=basis, adapter_dtype=asked, alpha=7.0).eval()
    x = torch.randn(6, IN, dtype=dtypes.base, device=device)
    base_out, stage1 = F.linear(x, layer.weight, layer.bias), layer(x)
    weight = (layer.weight + layer.delta_weight()).to(dtypes.base)
    layer.begin_residual_stage("dance")
    with torch.no_grad():
        layer.lora_residual_dance.fill_(torch.nan)  # nothing of it may be touched
    layer.set_scales(motion=0.0)
    if merged:
        layer.merge()
        assert torch.equal(layer.weight, weight)
        layer.unmerge()
    assert torch.equal(layer(x), stage1)
    layer.set_scales(identity=0.0)
    assert torch.equal(layer(x), base_out)


@by_side
def test_scales_and_several_residuals(basis: str) -> None:
    layer = at_stage(2, plain_linear(torch.float64), basis=basis, alpha=2.0).eval()
    layer.begin_residual_stage("wave")
    assert layer.residual_scales == {"dance": 0.0, "wave": 1.0}
    assert set(trained(layer)) == {"lora_residual_wave"}
    randomize_residuals(layer)
    x = torch.randn(5, IN, dtype=torch.float64)

    def expected(identity: float, dance: float, wave: float) -> Tensor:
        total = identity * layer._identity
        total = total + dance * layer.lora_residual_dance + wave * layer.lora_residual_wave
        a, b = (layer.lora_a, total) if basis == "down" else (total, layer.lora_b)
        return F.linear(x, layer.weight, layer.bias) + layer.scaling * (x @ a.mT) @ b.mT

    torch.testing.assert_close(layer(x), expected(1, 0, 1))
    layer.set_scales(motion=0.5)
    torch.testing.assert_close(layer(x), expected(1, 0.5, 0.5))
    layer.set_scales(identity=-0.25, motion={"dance": 2})
    torch.testing.assert_close(layer(x), expected(-0.25, 2, 0.5))
    unmerged = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), unmerged)


@by_side
@pytest.mark.parametrize("stage", [1, 2])
def test_evaluation_has_no_masks_and_draws_nothing(basis: str, stage: int) -> None:
    layer = at_stage(stage, basis=basis, dropout=0.5)
    x = torch.randn(32, IN)
    state = torch.get_rng_state()
    outputs = [layer.eval()(x) for _ in range(2)]
    assert torch.equal(*outputs) and torch.equal(torch.get_rng_state(), state)
    unmasked = at_stage_like(layer)
    assert torch.equal(unmasked.train()(x), outputs[0])
    assert not torch.equal(layer.train()(x), outputs[0])


def at_stage_like(layer: BasisLoRALinear) -> BasisLoRALinear:
    """A copy that drops nothing in training mode."""
    twin = copy.deepcopy(layer)
    twin.dropout = twin.coef_dropout = twin.residual_coef_dropout = 0.0
    return twin


def test_merging_is_of_the_coefficients_without_masks(dtypes: DtypePair) -> None:
    asked = str(dtypes.adapter).removeprefix("torch.")
    layer = at_stage(2, plain_linear(dtypes.base), adapter_dtype=asked)
    before = layer.weight.clone()
    total = (layer.lora_b + layer.lora_residual_dance).double()
    wide = torch.promote_types(dtypes.base, torch.float32)
    delta = (total @ layer.lora_a.double()).to(wide)
    layer.merge()
    assert torch.equal(layer.weight, (before.to(wide) + delta).to(dtypes.base))
    assert layer.state_dict().keys() == {"weight", "bias"}
    for call in (layer.begin_residual_stage, lambda: layer.set_scales(motion=0)):
        with pytest.raises(ValueError, match="the adapter must not be merged, call unmerge first"):
            call()
    layer.unmerge()
    assert torch.equal(layer.weight, before)
    assert "lora_residual_dance" in layer.state_dict()


@pytest.mark.parametrize("kind", BASES)
@by_side
def test_every_base(basis: str, kind: str) -> None:
    base = BASES[kind](torch.float64)
    twin = copy.deepcopy(base)
    layer = at_stage(2, base, basis=basis, adapter_dtype="float64").eval()
    x = torch.randn(4, IN, dtype=torch.float64)
    a, b = layer.branch_factors(training=False)
    torch.testing.assert_close(layer(x), twin(x) + (x @ a.mT) @ b.mT)
    if kind in ("linear", "conv1d"):
        plain = layer.to_linear(merge=True)
        torch.testing.assert_close(weight_of(plain), weight_of(twin) + b @ a)


# -------------------------------------------------------------------------- what backward keeps

ROWS, NUM_IN, NUM_OUT = 50, 96, 80


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stage_2_keeps_h_and_no_x(device: str, dtype: torch.dtype, p: float) -> None:
    """Of the rows h alone; of the weights their sum, and with a mask its seed and two identities of
    one storage. Stage 1 keeps x too."""
    linear = nn.Linear(NUM_IN, NUM_OUT, device=device, dtype=dtype)
    layer = make(linear, r=RANK, coef_dropout=p, residual_coef_dropout=p)
    x = torch.randn(ROWS, NUM_IN, device=device, dtype=dtype)
    x_bytes, h_bytes = ROWS * NUM_IN * dtype.itemsize, ROWS * RANK * dtype.itemsize
    mask_bytes = 8 + RANK * RANK * 4 if p else 0
    sum_bytes = NUM_OUT * RANK * 4
    stage1 = x_bytes + h_bytes + mask_bytes + (sum_bytes if p else 0)
    assert bytes_kept_by(layer, x) == stage1
    layer.begin_residual_stage()
    assert bytes_kept_by(layer, x) == h_bytes + sum_bytes + mask_bytes


def test_stage_2_over_an_up_basis_keeps_x(device: str) -> None:
    linear = nn.Linear(NUM_IN, NUM_OUT, device=device)
    layer = make(linear, basis="up")
    layer.begin_residual_stage(coef_dropout=0.0)
    x = torch.randn(ROWS, NUM_IN, device=device)
    assert bytes_kept_by(layer, x) == ROWS * NUM_IN * 4 + RANK * NUM_IN * 4


def test_masks_per_sample_keep_no_mask(device: str) -> None:
    samples, tokens = 5, 10
    layer = make(nn.Linear(NUM_IN, NUM_OUT, device=device), mask_per="sample")
    layer.begin_residual_stage()
    x = torch.randn(samples, tokens, NUM_IN, device=device)
    h, coefficients = samples * tokens * RANK * 4, samples * NUM_OUT * RANK * 4
    seed, eye, ids, scaling = 8, RANK * RANK * 4, samples * 8, samples * 8
    assert bytes_kept_by(layer, x) == h + coefficients + seed + eye + ids + scaling


# ------------------------------------------------------------------------------------ invariants


@by_side
@by_unit
@by_stage
def test_strides_sizes_and_repeats(basis: str, mask_per: str, stage: int) -> None:
    layer = at_stage(stage, basis=basis, mask_per=mask_per, dropout=0.2)
    whole = torch.randn(3, IN, 7)
    layouts: dict[str, Tensor] = {
        "transposed": whole.transpose(1, 2),
        "sliced": torch.randn(6, 5, IN)[::2],
        "expanded": torch.randn(1, 1, IN).expand(4, 3, IN),
        "4-D": torch.randn(2, 1, 3, IN),
        "no tokens": torch.randn(3, 0, IN),
        "no samples": torch.randn(0, 3, IN),
        "one row": torch.randn(1, IN),
    }
    for name, x in layouts.items():
        results = []
        for given in (x, x.contiguous(), x):
            torch.manual_seed(2)
            given = given.detach().requires_grad_()
            y = layer(given)
            assert y.shape == (*x.shape[:-1], OUT), name
            grads = torch.autograd.grad(y.square().sum(), [given, *trained(layer).values()])
            results.append((y, *grads))
        for strided, contiguous, again in zip(*results, strict=True):
            torch.testing.assert_close(strided, contiguous)
            assert torch.equal(strided, again), name
    y = layer(torch.randn(IN))
    assert y.shape == (OUT,)


@pytest.mark.parametrize("r", [1, 2, 7, 8, 9, 16, 17, 24])
@by_side
def test_every_rank_that_fits(r: int, basis: str) -> None:
    layer = at_stage(2, nn.Linear(40, 24, dtype=torch.float64), r=r, basis=basis).eval()
    x = torch.randn(5, 40, dtype=torch.float64)
    a, b = layer.branch_factors(training=False)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias) + x @ (b @ a).mT)


@by_side
@by_unit
@by_stage
def test_autocast(basis: str, mask_per: str, stage: int) -> None:
    """The op runs in bfloat16; coefficients and gradients stay float32, unrounded."""
    layer = at_stage(stage, basis=basis, mask_per=mask_per)
    x = torch.randn(3, 4, IN)
    drawn = []
    for enabled in (True, False):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            drawn.append(layer._coefficients(layer.residual_scales, 0.5))
    assert torch.equal(*drawn) and drawn[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16
    for parameter in trained(layer).values():
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()


@by_side
@by_unit
@by_stage
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_draws_the_same_masks(
    basis: str, mask_per: str, stage: int, reentrant: bool
) -> None:
    layer = at_stage(stage, basis=basis, mask_per=mask_per)
    x = torch.randn(3, 4, IN, requires_grad=True)
    inputs = [x, *trained(layer).values()]
    results = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)):
        torch.manual_seed(4)
        for tensor in inputs:
            tensor.grad = None
        run(x).square().sum().backward()
        results.append([tensor.grad.clone() for tensor in inputs])
    for plain, again in zip(*results, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("basis, mask_per", [("down", "call"), ("up", "sample")])
@by_stage
def test_compiled_for_any_number_of_rows(basis: str, mask_per: str, stage: int) -> None:
    layer = at_stage(stage, basis=basis, mask_per=mask_per)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    counts = set()
    for shape in ((3, 4), (5, 2), (2, 9)):
        x = torch.randn(*shape, IN)
        results = []
        for run in (compiled, layer):
            torch.manual_seed(6)
            y = run(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), trained(layer).values())])
        for ours, eager in zip(*results, strict=True):
            torch.testing.assert_close(ours, eager)
        counts.add(counter.frame_count)
    assert len(counts) == 1  # the first shape's code is good for the others
    evaluated = layer.eval()(x)
    torch.testing.assert_close(compiled(x), evaluated)


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies(how: str) -> None:
    layer = at_stage(2)
    layer.set_scales(identity=0.5, motion=2.0)
    twin = COPIES[how](layer)
    x = torch.randn(3, IN)
    assert torch.equal(twin.eval()(x), layer.eval()(x))
    assert twin.residual_scales == {"dance": 2.0} and set(trained(twin)) == set(trained(layer))
    twin.begin_residual_stage("wave")
    assert layer.residuals == ("dance",)


def test_state_dict_of_another_stage_is_named() -> None:
    stage1, stage2 = at_stage(1), at_stage(2)
    with pytest.raises(RuntimeError, match=r'Missing key.*"lora_residual_dance"'):
        stage2.load_state_dict(stage1.state_dict())
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"lora_residual_dance"'):
        stage1.load_state_dict(stage2.state_dict())
    other = at_stage(2)
    other.load_state_dict(stage2.state_dict())
    assert torch.equal(other.lora_residual_dance, stage2.lora_residual_dance)


def test_reset_adapter_empties_the_residuals() -> None:
    layer = at_stage(2).eval()
    layer.reset_adapter()
    x = torch.randn(3, IN)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert not layer.lora_residual_dance.any() and layer.lora_a.any()


def test_on_meta_and_back() -> None:
    with torch.device("meta"):
        layer = make(nn.Linear(IN, OUT), residuals=["dance"])
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    x = torch.randn(2, IN)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"basis": "left"}, ValueError, r"basis must be one of \['down', 'up'\], got 'left'"),
        ({"coef_dropout": 1.5}, ValueError, "coef_dropout must be between 0 and 1, got 1.5"),
        ({"coef_dropout": "1"}, TypeError, "coef_dropout must be a number, got '1'"),
        ({"residual_coef_dropout": -1}, ValueError, "residual_coef_dropout must be between"),
        ({"mask_per": "step"}, ValueError, r"mask_per must be one of \['call', 'sample'\]"),
        ({"mask_rescale": 1}, TypeError, "mask_rescale must be a bool, got 1"),
        ({"mask_identity": None}, TypeError, "mask_identity must be a bool, got None"),
        ({"residuals": "dance"}, TypeError, "residuals must be a sequence of names, got 'dance'"),
        ({"residuals": ["a.b"]}, ValueError, "must consist of letters, digits, _ and -, got 'a.b'"),
        ({"residuals": [""]}, ValueError, "must consist of letters"),
        ({"residuals": ["a", "a"]}, ValueError, "must be new, got 'a' again"),
        ({"init": "pissa"}, ValueError, r"init must be one of \['kaiming', 'gaussian'\]"),
    ],
    ids=str,
)
def test_bad_options(options: dict, error: type, message: str) -> None:
    base = plain_linear()
    with pytest.raises(error, match=f"^BasisLoRALinear: .*{message}"):
        make(base, **options)
    assert base.weight.requires_grad
    with pytest.raises(error, match=f"^BasisLoRAConfig: .*{message}"):
        lr.BasisLoRAConfig(**options)


def test_a_rank_above_the_smaller_side_is_refused() -> None:
    with pytest.raises(ValueError, match=r"r must be at most min\(.*\)=9, got 10"):
        make(r=10)
    assert make(r=9).r == 9
    model = nn.Sequential(nn.Linear(20, 12), nn.Linear(12, 5))
    with pytest.raises(ValueError, match=r"adapt: 1: BasisLoRALinear: r must be at .*=5, got 8"):
        lr.adapt(model, lr.BasisLoRAConfig(r=8))
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.begin_residual_stage("dance"), ValueError, "must be new, got 'dance' again"),
        (lambda m: m.begin_residual_stage("a b"), ValueError, "must consist of letters"),
        (lambda m: m.begin_residual_stage("x", coef_dropout=2), ValueError, "coef_dropout must be"),
        (lambda m: m.set_scales(motion={"wave": 1}), ValueError, r"among \['dance'\], got 'wave'"),
        (lambda m: m.set_scales(motion="1"), TypeError, r"motion\['dance'\] must be a number"),
        (lambda m: m.set_scales(identity=float("inf")), ValueError, "identity must be finite"),
        (lambda m: m.set_scales(identity=2, motion=float("nan")), ValueError, "must be finite"),
    ],
)
def test_wrong_calls_change_nothing(call: Callable, error: type, message: str) -> None:
    layer = at_stage(2)
    with pytest.raises(error, match=rf"^BasisLoRALinear\.\w+: .*{message}"):
        call(layer)
    assert layer.residual_scales == {"dance": 1.0} and layer.identity_scale == 1.0
    assert layer.residual_coef_dropout == 0.5


def test_no_motion_before_its_stage() -> None:
    with pytest.raises(ValueError, match="motion must be None before a residual stage, got 1"):
        make().set_scales(motion=1)
