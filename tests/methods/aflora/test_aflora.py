"""AFLoRALinear and AFLoRAConfig: the start, the gradients, what is kept for backward, merging."""

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from module_cases import IDS, IN, OUT, RANK, TinyLM, branch, plain_linear, randomize
from safetensors.torch import load_file
from saved_bytes import bytes_kept_by
from torch import Tensor, nn

import lowrank_ext as lr
from lowrank_ext.nn import AFLoRALinear, LoRALinear

ROWS = 50
LINEARS = ("q_proj", "up_proj", "down_proj")  # of each block of TinyLM


def aflora(base: nn.Module | None = None, **options: Any) -> AFLoRALinear:
    return AFLoRALinear.from_linear(base or plain_linear(), **{"r": RANK, **options})


def randomized(base: nn.Module | None = None, **options: Any) -> AFLoRALinear:
    module = aflora(base, **options)
    randomize(module)
    return module


# ------------------------------------------------------------------------------------ the start


def test_start() -> None:
    """Bounds sqrt(6 / fan_in): Kaiming's with gain sqrt(2), fan_in K for lora_a, r for lora_b."""
    module = AFLoRALinear.from_linear(nn.Linear(96, 64), r=16)
    for projection, fan_in in ((module.lora_a, 96), (module.lora_b, 16)):
        bound = math.sqrt(6 / fan_in)
        assert 0.98 * bound < projection.abs().max() <= bound
        assert abs(projection.mean()) < 0.05 * bound
    assert torch.equal(module.rank_scale, torch.full((16,), 0.1))
    assert torch.equal(module.out_scale, torch.zeros(64))
    assert module.scaling == 1.0  # and not alpha / r of some default alpha


def test_the_seed_gives_the_same_numbers_in_every_dtype() -> None:
    starts = []
    for dtype in (torch.float32, torch.bfloat16):
        base = plain_linear(dtype)
        torch.manual_seed(1)
        starts.append(aflora(base))
    assert torch.equal(starts[0].lora_a, starts[1].lora_a)
    assert torch.equal(starts[0].lora_b, starts[1].lora_b)


def test_only_out_scale_has_a_gradient_at_first() -> None:
    """out_scale is zero, which all other gradients are multiplied by; from then on all train."""
    module = aflora()
    x = torch.randn(ROWS, IN)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
    for first in (True, False):
        optimizer.zero_grad()
        module(x).square().mean().backward()
        trained = {n for n, p in module.named_parameters() if p.grad is not None and p.grad.any()}
        everything = {"lora_a", "lora_b", "rank_scale", "out_scale"}
        assert trained == ({"out_scale"} if first else everything)
        optimizer.step()


def test_scaling() -> None:
    assert aflora(alpha=6).scaling == 2.0
    assert aflora(alpha=6, rslora=True).scaling == pytest.approx(6 / math.sqrt(RANK), rel=1e-15)
    assert aflora(rank_scale_init=0.5).rank_scale.tolist() == [0.5] * RANK


# --------------------------------------------------------------------- the gradients and their cost


@pytest.mark.parametrize("adapter", ["float64", "float32"])
def test_gradients_are_the_papers(adapter: str) -> None:
    """dB = b ⊙ Q and db = rowsum(B ⊙ Q) with Q = s dyᵀ u, u = d ⊙ h; dA = d ⊙ K and
    dd = rowsum(A ⊙ K) with K = pᵀ x, p = s (dy ⊙ b) B."""
    dtype = getattr(torch, adapter)
    module = randomized(plain_linear(dtype), alpha=6.0, adapter_dtype=adapter)
    x = torch.randn(ROWS, IN, dtype=dtype, requires_grad=True)
    dy = torch.randn(ROWS, OUT, dtype=dtype)
    module(x).backward(dy)
    a, b = module.lora_a.detach(), module.lora_b.detach()
    d, scale = module.rank_scale.detach(), module.out_scale.detach()
    q = module.scaling * dy.mT @ (d * (x.detach() @ a.mT))
    p = module.scaling * (dy * scale) @ b
    k = p.mT @ x.detach()
    expected = {
        "lora_b": scale.unsqueeze(1) * q,
        "out_scale": (b * q).sum(1),
        "lora_a": d.unsqueeze(1) * k,
        "rank_scale": (a * k).sum(1),
    }
    for name, gradient in expected.items():
        torch.testing.assert_close(module.get_parameter(name).grad, gradient, rtol=1e-4, atol=1e-4)
    dx = dy @ module.weight + (p * d) @ a
    torch.testing.assert_close(x.grad, dx, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_bytes_kept_for_backward(device: str, dropout: float) -> None:
    """Never the [M, N] product whose row sums are db; x only while lora_a trains."""
    dtype, k, n, r = torch.bfloat16, 96, 80, 4
    linear = nn.Linear(k, n, device=device, dtype=dtype)
    module = AFLoRALinear.from_linear(linear, r=r, dropout=dropout)
    x = torch.randn(ROWS, k, device=device, dtype=dtype)
    x_bytes, h_bytes, seed_bytes = ROWS * k * 2, ROWS * r * 2, 8 if dropout else 0
    assert bytes_kept_by(module, x) == x_bytes + h_bytes + seed_bytes
    module.lora_b.requires_grad_(False)
    assert bytes_kept_by(module, x) == x_bytes + h_bytes + seed_bytes
    module.lora_a.requires_grad_(False)
    assert bytes_kept_by(module, x) == h_bytes + seed_bytes
    module.lora_b.requires_grad_(True)
    assert bytes_kept_by(module, x) == h_bytes + seed_bytes


def test_the_branch_is_lora_with_folded_vectors(device: str) -> None:
    """A' = diag(d) A, B' = diag(b) B: forward, and the merged weight."""
    base = plain_linear(torch.float64).to(device)
    module = randomized(base, alpha=2.0)
    folded = LoRALinear.from_linear(copy.deepcopy(base), r=RANK, alpha=2.0)
    with torch.no_grad():
        folded.lora_a.copy_(module.rank_scale.unsqueeze(1) * module.lora_a)
        folded.lora_b.copy_(module.out_scale.unsqueeze(1) * module.lora_b)
    x = torch.randn(ROWS, IN, dtype=torch.float64, device=device)
    torch.testing.assert_close(module(x), folded(x))
    torch.testing.assert_close(module.delta_weight(), folded.delta_weight())
    before = base.weight.detach().clone()
    y = module(x)
    module.merge()
    torch.testing.assert_close(module(x), y)
    module.unmerge()
    assert torch.equal(module.weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_merging_rounds_once(dtype: torch.dtype) -> None:
    module = randomized(nn.Linear(48, 40, dtype=dtype))
    a, b = module.lora_a.double(), module.lora_b.double()
    delta = module.out_scale.double().unsqueeze(1) * ((b * module.rank_scale.double()) @ a)
    expected = (module.weight.double() + delta.float().double()).to(dtype)
    module.merge()
    assert torch.equal(module.weight, expected)


def test_autocast_and_half_bases_agree_with_the_definition() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        module = randomized(nn.Linear(64, 48, dtype=dtype), r=8)
        x = torch.randn(ROWS, 64, dtype=dtype)
        y = module(x)
        base = nn.functional.linear(x.double(), module.weight.double(), module.bias.double())
        expected = base + branch(module, x)
        assert y.dtype == dtype
        bound = 8 * torch.finfo(dtype).eps * expected.abs().max()
        assert (y.double() - expected).abs().max() <= bound
    module = randomized()
    with torch.autocast("cpu", torch.bfloat16):
        y = module(torch.randn(5, IN))
        y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 for p in module.parameters() if p.requires_grad)


def test_compiles_with_any_number_of_rows_and_notices_freezing() -> None:
    module = randomized()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for live in (True, False):
        module.lora_a.requires_grad_(live)
        for rows in (7, 1, 20):
            x = torch.randn(rows, IN)
            module.zero_grad()
            compiled(x).square().sum().backward()
            ours = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
            module.zero_grad()
            module(x).square().sum().backward()
            assert ("lora_a" in ours) is live
            for name, gradient in ours.items():
                torch.testing.assert_close(gradient, module.get_parameter(name).grad)


# --------------------------------------------------------------------------- which modules are live


def live_paths(model: nn.Module) -> list[str]:
    modules = {path: m for path, m in model.named_modules() if isinstance(m, AFLoRALinear)}
    for module in modules.values():
        assert module.lora_a.requires_grad == module.lora_b.requires_grad
        assert module.rank_scale.requires_grad and module.out_scale.requires_grad
    return [path for path, module in modules.items() if module.lora_a.requires_grad]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (None, [f"layers.{i}.{name}" for i in (0, 1) for name in LINEARS]),
        (["up_proj", "0.q_proj"], ["layers.0.q_proj", "layers.0.up_proj", "layers.1.up_proj"]),
        (r"layers\.1\..*_proj", [f"layers.1.{name}" for name in LINEARS]),
        ((), []),
    ],
    ids=str,
)
def test_live_modules_are_chosen_by_name(names: Any, expected: list[str], tmp_path: Path) -> None:
    model = lr.adapt(TinyLM(), lr.AFLoRAConfig(r=2, live_modules=names))
    assert live_paths(model) == expected
    # and a checkpoint remembers them
    lr.save_adapter(model, tmp_path)
    loaded = lr.load_adapter(TinyLM(), tmp_path)
    assert live_paths(loaded) == expected
    assert loaded.lowrank_config.live_modules == model.lowrank_config.live_modules
    stored = json.loads(json.dumps(model.lowrank_config.to_dict()))
    assert lr.AFLoRAConfig.from_dict(stored) == model.lowrank_config


def test_live_modules_must_match_an_adapted_module() -> None:
    for names in (["down_prj"], ["down_proj"], r".*k_proj"):
        model = TinyLM()
        config = lr.AFLoRAConfig(r=2, target_modules=["q_proj", "up_proj"], live_modules=names)
        name = names if isinstance(names, str) else names[0]
        with pytest.raises(
            ValueError, match=r"adapt: live_modules must match an adapted"
        ) as caught:
            lr.adapt(model, config)
        assert repr(name) in str(caught.value)
        assert not any(isinstance(m, AFLoRALinear) for m in model.modules())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank_scale_init": 0}, ValueError, "rank_scale_init must be positive and finite, got 0"),
        ({"rank_scale_init": -1.0}, ValueError, "rank_scale_init must be positive"),
        ({"rank_scale_init": math.nan}, ValueError, "rank_scale_init must be positive"),
        ({"rank_scale_init": "1"}, TypeError, "rank_scale_init must be a number"),
        ({"init": "zero"}, ValueError, r"init must be one of \['kaiming'\], got 'zero'"),
        ({"r": 0}, ValueError, "r must be at least 1, got 0"),
    ],
    ids=str,
)
def test_bad_options(options: dict[str, Any], error: type, message: str) -> None:
    base = plain_linear()
    with pytest.raises(error, match=f"AFLoRALinear: {message}"):
        aflora(base, **options)
    assert base.weight.requires_grad
    with pytest.raises(error, match=f"AFLoRAConfig: {message}"):
        lr.AFLoRAConfig(**options)


def test_bad_live_modules() -> None:
    with pytest.raises(TypeError, match="AFLoRAConfig: live_modules must hold non-empty strings"):
        lr.AFLoRAConfig(live_modules=["q_proj", 3])
    with pytest.raises(ValueError, match="live_modules must be a valid regular expression"):
        lr.AFLoRAConfig(live_modules="(")


# ------------------------------------------------------------------------------------ the model


def test_rank_may_exceed_the_layer_and_k_v_may_be_narrow() -> None:
    """The released GLUE scripts use 1024 on layers of 768; square is not the same as attention."""
    module = randomized(r=4 * IN)
    x = torch.randn(ROWS, IN)
    expected = nn.functional.linear(x, module.weight, module.bias) + branch(module, x)
    torch.testing.assert_close(module(x), expected.float(), rtol=1e-4, atol=1e-4)


def test_file_keys(tmp_path: Path) -> None:
    model = lr.adapt(TinyLM(), lr.AFLoRAConfig(r=2, alpha=3, target_modules=["up_proj"]))
    randomize(model)
    lr.save_adapter(model, tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    shapes = {"lora_A": (2, 8), "lora_B": (16, 2), "lora_rank_scale": (2,), "lora_out_scale": (16,)}
    assert {key: tuple(tensor.shape) for key, tensor in stored.items()} == {
        f"base_model.model.layers.{i}.up_proj.{name}.weight": shape
        for i in (0, 1)
        for name, shape in shapes.items()
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "AFLORA"
    assert (config["lora_alpha"], config["rank_scale_init"]) == (3, 0.1)
    assert config["live_modules"] is None


def test_merge_unmerge_unload_on_a_model() -> None:
    plain = TinyLM()
    model = lr.adapt(copy.deepcopy(plain), lr.AFLoRAConfig(r=4))
    assert torch.equal(model(IDS), plain(IDS))
    randomize(model)
    y = model(IDS)
    assert not torch.allclose(y, plain(IDS))
    assert lr.merge(model) is model
    torch.testing.assert_close(model(IDS), y, rtol=1e-4, atol=1e-5)
    lr.unmerge(model)
    assert torch.equal(model(IDS), y)
    lr.unload(model, merge=True)
    assert not any(isinstance(m, AFLoRALinear) for m in model.modules())
    torch.testing.assert_close(model(IDS), y, rtol=1e-4, atol=1e-5)


def test_summary_counts_what_trains() -> None:
    model = lr.adapt(TinyLM(), lr.AFLoRAConfig(r=2, live_modules=["down_proj"]))
    vectors = sum(2 + m.out_features for m in model.modules() if isinstance(m, AFLoRALinear))
    assert lr.trainable_parameters(model).trainable == vectors + 2 * (2 * 16 + 8 * 2)
    kinds = lr.summary(model).columns[1]._cells
    assert kinds == ["AFLoRA"] * 3


def test_copies_and_pickles() -> None:
    module = randomized(dropout=0.1)
    x = torch.randn(ROWS, IN)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other.eval()(x), module.eval()(x))
        with torch.no_grad():
            other.out_scale.zero_()
        assert module.out_scale.any()


def test_training_lowers_the_loss() -> None:
    """A target that a low-rank change of the weight reaches."""
    torch.manual_seed(3)
    base = nn.Linear(24, 20)
    update = 0.5 * torch.randn(20, 2) @ torch.randn(2, 24)
    x = torch.randn(256, 24)
    target = nn.functional.linear(x, base.weight.detach() + update, base.bias.detach())
    module = AFLoRALinear.from_linear(base, r=4)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.02)
    losses: list[Tensor] = []
    for _ in range(150):
        optimizer.zero_grad()
        losses.append((module(x) - target).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.05 * losses[0]
