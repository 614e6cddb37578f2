"""DoRA: values, gradients, starts and files are PEFT's; merging, switching off, what is refused."""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import gpt2, llama, randomize, token_ids
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

pytest.importorskip("peft")

import peft

import lowrank_ext as lr
from lowrank_ext.nn import LoRALinear
from lowrank_ext.nn.dora import column_norms

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5}
K, N = 10, 7


def single(kind: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(4)
    if kind == "conv1d":
        base: nn.Module = Conv1D(N, K).to(dtype)
        nn.init.normal_(base.bias)
    else:
        base = nn.Linear(K, N, bias=kind != "no_bias", dtype=dtype)
    if kind == "observed":
        base.register_forward_hook(lambda module, args, y: y)
    return nn.Sequential(base)


def rows(dtype: torch.dtype, shape: tuple[int, ...] = (3, 5)) -> Tensor:
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(1)).to(dtype)


def pair(
    kind: str, dtype: torch.dtype, dropout: float = 0.0, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """Ours and PEFT's with the same values, as after training."""
    torch.manual_seed(3)
    ours = lr.adapt(
        single(kind, dtype),
        lr.LoRAConfig(r=3, alpha=6, dora=True, dropout=dropout, target_modules=["0"], **options),
    )
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        use_dora=True,
        lora_dropout=dropout,
        target_modules=["0"],
        fan_in_fan_out=kind == "conv1d",
    )
    theirs = peft.get_peft_model(single(kind, dtype), config)
    for mine, name in zip((ours[0].lora_a, ours[0].lora_b, ours[0].magnitude), NAMES, strict=True):
        other = theirs.get_parameter(name)
        # PEFT rounds its start to bfloat16 over a bfloat16 base.
        tolerance = 1e-2 if dtype == torch.bfloat16 else 0
        torch.testing.assert_close(mine, other.to(mine.dtype), rtol=tolerance, atol=0)
        noise = torch.randn(mine.shape, generator=torch.Generator().manual_seed(9))
        with torch.no_grad():
            mine.copy_(other + 0.3 * noise)
            other.copy_(other + 0.3 * noise)
    return ours, theirs


P = "base_model.model.0."
NAMES = (
    f"{P}lora_A.default.weight",
    f"{P}lora_B.default.weight",
    f"{P}lora_magnitude_vector.default.weight",
)


def gradients(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and all gradients, by the names of ours."""
    x = rows(dtype).requires_grad_()
    torch.manual_seed(17)  # of dropout
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)).sum().backward()
    found = {"x": x.grad, "y": y.detach()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            short = dict(zip(NAMES, ("0.lora_a", "0.lora_b", "0.magnitude"), strict=True))
            found[short.get(name, name)] = parameter.grad
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "no_bias", "conv1d", "observed"])
def test_values_and_gradients_are_pefts(kind: str, dtype: torch.dtype, dropout: float) -> None:
    """With the same seed the dropout is the same, too: torch draws it."""
    ours, theirs = pair(kind, dtype, dropout)
    for model in (ours, theirs):
        model.train()
    got, expected = gradients(ours, dtype), gradients(theirs, dtype)
    assert got.keys() == expected.keys() == {"x", "y", "0.lora_a", "0.lora_b", "0.magnitude"}
    for name, value in expected.items():
        tolerance = TOLERANCES[dtype]
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance, msg=name)
    x = rows(dtype)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("adapter_dtype", ["float32", "base"])
def test_bfloat16_is_no_worse_than_peft(adapter_dtype: str, dropout: float) -> None:
    bf16 = torch.bfloat16
    ours, theirs = pair("plain", bf16, dropout, adapter_dtype=adapter_dtype)
    if adapter_dtype == "base":
        for parameter, name in zip(
            (ours[0].lora_a, ours[0].lora_b, ours[0].magnitude), NAMES, strict=True
        ):
            theirs.get_parameter(name).data = parameter.data.clone()
    exact = copy.deepcopy(theirs).double()
    runs = (ours, bf16), (theirs, bf16), (exact, torch.float64)
    for model, _ in runs:
        model.train()
    got, plain, truth = (gradients(model, dtype) for model, dtype in runs)
    if dropout:  # torch draws another mask in another dtype: only the two are comparable
        for name in got:
            torch.testing.assert_close(got[name].float(), plain[name].float(), rtol=0.1, atol=0.15)
        return
    for name, value in truth.items():
        error, plain_error = ((v[name].double() - value).norm() for v in (got, plain))
        floor = 4 * torch.finfo(bf16).eps * value.norm()
        assert error <= 2 * plain_error + floor, name
        assert got[name].dtype == (
            bf16 if adapter_dtype == "base" or name in "xy" else torch.float32
        )


def test_small_changes_of_a_magnitude_are_not_rounded_away() -> None:
    layer = LoRALinear.from_linear(nn.Linear(512, N, dtype=torch.bfloat16), r=2, dora=True)
    x = torch.full((1, 512), 1.0, dtype=torch.bfloat16)
    before = layer(x).float()
    with torch.no_grad():
        layer.magnitude.mul_(1.003)  # bfloat16 knows 1 and 1.0078
        layer.bias.zero_()
    ratios = [1.003 * value for value in layer.base_output(x).float().flatten().tolist()]
    torch.testing.assert_close(
        layer(x).flatten(), torch.tensor(ratios, dtype=torch.bfloat16), rtol=1 / 256, atol=0
    )
    assert before.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(7, 10), (300, 20_000)])
def test_norms(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    """In one piece and in blocks of rows; of a row of zeros too, and where the branch cancels W."""
    torch.manual_seed(0)
    weight = torch.randn(shape).to(dtype)
    lora_a, lora_b = torch.randn(4, shape[1]), torch.randn(shape[0], 4)
    weight[1], lora_b[1] = 0, 0
    expected = (weight.double() + 0.7 * lora_b.double() @ lora_a.double()).norm(dim=1)
    got = column_norms(weight, lora_a, lora_b, 0.7)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-9)


REMAINING = (1.0, 0.1, 1e-2, 1e-3, 3e-4)


def cancelling(remaining: float) -> tuple[Tensor, Tensor, Tensor]:
    """W, A and B of float32, with s = 2: that share is left of every second row of W + s B A."""
    torch.manual_seed(0)
    weight = torch.randn(48, 64) / 8
    u, s, v_t = torch.linalg.svd(weight.double(), full_matrices=False)
    shares = torch.tensor([1.0, remaining], dtype=torch.float64).repeat(24).unsqueeze(1)
    return weight, v_t.float(), (-(u * s) * (1 - shares) / 2).float()


@pytest.mark.parametrize("remaining", REMAINING)
@pytest.mark.parametrize("way", ["adapt", "merge", "accelerate"])
def test_a_branch_that_nearly_cancels_rows(way: str, remaining: float) -> None:
    """Every output is as near to the formula in float64 as PEFT's, whose norm is the sum's own."""
    weight, lora_a, lora_b = cancelling(remaining)
    base = nn.Linear(64, 48, bias=False)
    base.weight.data = weight.clone()
    config = peft.LoraConfig(r=48, lora_alpha=96, use_dora=True, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), config).eval()
    theirs.get_parameter(NAMES[0]).data = lora_a.clone()
    theirs.get_parameter(NAMES[1]).data = lora_b.clone()
    if way == "accelerate":
        ours = copy.deepcopy(theirs)
        assert lr.accelerate(ours).accelerated
    else:
        options = lr.LoRAConfig(r=48, alpha=96, dora=True, target_modules=["0"])
        ours = lr.adapt(nn.Sequential(base), options).eval()
        ours[0].lora_a.data, ours[0].lora_b.data = lora_a.clone(), lora_b.clone()
    if way == "merge":
        lr.merge(ours)
        theirs.merge_adapter()
    x = torch.randn(4, 64)
    direction = weight.double() + 2 * lora_b.double() @ lora_a.double()
    factor = weight.double().norm(dim=1) / direction.norm(dim=1)
    expected = (x.double() @ direction.mT) * factor
    error, plain_error = ((model(x).double() - expected).norm(dim=0) for model in (ours, theirs))
    scale = expected.norm(dim=0)
    # Both cancel: the floor is what float32 leaves of the terms, whose size is 1 beside the sum.
    floor = 4 * torch.finfo(torch.float32).eps * (1 + 1 / remaining)
    assert ((error - plain_error) / scale).max() <= floor
    assert (error / scale).max() <= 2 * (plain_error / scale).max() + 1e-6


@pytest.mark.parametrize("remaining", REMAINING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_of_rows_that_nearly_cancel(dtype: torch.dtype, remaining: float) -> None:
    weight, lora_a, lora_b = cancelling(remaining)
    weight = weight.to(dtype)
    expected = (weight.double() + 2 * lora_b.double() @ lora_a.double()).norm(dim=1)
    got = column_norms(weight, lora_a, lora_b, 2.0).double()
    torch.testing.assert_close(got, expected, rtol=1e-6 / remaining, atol=0)


def test_starts_at_the_base() -> None:
    base = nn.Linear(K, N)
    with torch.no_grad():
        base.weight[2] = 0
    x = rows(torch.float32)
    expected = base(x)
    layer = LoRALinear.from_linear(base, r=3, dora=True)
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(layer.magnitude[2], torch.tensor(0.0))
    y = layer(x)
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in (layer.lora_a, layer.lora_b, layer.magnitude))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["plain", "no_bias", "conv1d", "observed"])
def test_runs_on_the_meta_device(kind: str, dropout: float) -> None:
    ours, _ = pair(kind, torch.float32, dropout)
    y = ours.to("meta").train()(torch.empty(3, K, device="meta"))
    assert y.is_meta and y.shape == (3, N)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.is_meta for p in ours.parameters() if p.requires_grad)


def test_a_changed_weight_counts_at_once() -> None:
    layer = LoRALinear.from_linear(nn.Linear(K, N), r=3, dora=True)
    nn.init.normal_(layer.lora_b)
    x = rows(torch.float32)
    layer(x)
    new = torch.randn(N, K)
    layer.weight.data.copy_(new)  # which autograd does not see
    direction = new + layer.lora_b @ layer.lora_a
    factor = layer.magnitude / direction.norm(dim=1)
    expected = x @ (factor.unsqueeze(1) * direction).mT + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "no_bias", "conv1d", "observed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging(kind: str, dtype: torch.dtype) -> None:
    ours, theirs = pair(kind, dtype)
    ours.eval()
    before = {name: t.clone() for name, t in ours.state_dict().items()}
    x = rows(dtype)
    expected = ours(x)
    lr.merge(ours)
    tolerance = 2e-5 if dtype == torch.float32 else 6e-2
    torch.testing.assert_close(ours(x), expected, rtol=tolerance, atol=tolerance)
    theirs.merge_adapter()
    merged = theirs.base_model.model[0].base_layer.weight
    own = ours[0].weight if ours[0].base_layer is None else ours[0].base_layer.weight
    torch.testing.assert_close(own, merged, rtol=tolerance, atol=tolerance)
    assert not any("lora" in name or "magnitude" in name for name in ours.state_dict())
    again = copy.deepcopy(ours)
    lr.unmerge(ours)
    after = ours.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(ours(x), expected)
    plain = lr.unload(again)[0]
    assert type(plain) is (Conv1D if kind == "conv1d" else nn.Linear)
    torch.testing.assert_close(plain(x), expected, rtol=tolerance, atol=tolerance)


def test_switched_off_it_is_the_base() -> None:
    expected = single("plain", torch.float32)(rows(torch.float32))
    ours, _ = pair("plain", torch.float32)
    for merged in (False, True):
        if merged:
            lr.merge(ours.eval())
        with lr.disable_adapter(ours):
            assert torch.equal(ours(rows(torch.float32)), expected)
    lr.unload(ours, merge=False)
    assert torch.equal(ours(rows(torch.float32)), expected)


# --------------------------------------------------------------------------- models and files


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "alpha": 8},
    "rslora": {"r": 4, "alpha": 8, "rslora": True},
    "pissa": {"r": 4, "alpha": 8, "init": "pissa"},
    "patterns": {"r": 4, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3}},
}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=token_ids()).logits


@pytest.mark.parametrize("case", OPTIONS)
def test_our_files_in_peft_and_here(case: str, tmp_path: Path) -> None:
    names = ["q_proj", "down_proj"]
    config = lr.LoRAConfig(dora=True, target_modules=names, **OPTIONS[case])
    model = lr.adapt(llama(), config)
    randomize(model, 0.1)
    expected = logits(model)
    assert not torch.allclose(expected, logits(llama()), atol=1e-2)
    lr.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(theirs), expected, rtol=5e-5, atol=5e-5)
    loaded = lr.load_adapter(llama(), tmp_path)
    assert torch.equal(logits(loaded), expected)
    assert loaded.lowrank_config.dora
    again = lr.adapt(llama(), config)
    assert torch.equal(logits(lr.load_adapter(again, tmp_path)), expected)
    assert json.loads((tmp_path / CONFIG).read_text())["use_dora"] is True


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("init", [True, "gaussian", "pissa"])
def test_pefts_files_here(make: Any, init: Any, tmp_path: Path) -> None:
    names = ["q_proj", "down_proj"] if make is llama else ["c_attn"]
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        use_dora=True,
        init_lora_weights=init,
        target_modules=names,
        fan_in_fan_out=make is gpt2,
    )
    theirs = peft.get_peft_model(make(), config)
    randomize(theirs, 0.1)
    theirs.save_pretrained(tmp_path)
    model = lr.load_adapter(make(), tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=5e-5, atol=5e-5)
    lr.merge(model)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=5e-5, atol=5e-5)
    assert "magnitude" in str(load_file(tmp_path / WEIGHTS).keys())


def test_twenty_steps_are_pefts() -> None:
    def losses(model: nn.Module) -> list[float]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        history = []
        for step in range(20):
            ids = token_ids(step % 3)
            loss = model.train()(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append(loss.item())
        return history

    names = ["q_proj", "down_proj"]
    torch.manual_seed(3)
    ours = lr.adapt(llama(), lr.LoRAConfig(r=4, alpha=8, dora=True, target_modules=names))
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=names)
    theirs = peft.get_peft_model(llama(), config)
    got, wanted = losses(ours), losses(theirs)
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)
    assert wanted[18] < wanted[0] - 0.02


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    model = lr.adapt(llama(), lr.LoRAConfig(r=2, dora=True, target_modules=["q_proj"]))
    lr.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    key = next(key for key in tensors if key.endswith("lora_magnitude_vector"))
    for change, message in (
        ({}, "lora_magnitude_vector is missing"),
        ({key: torch.ones(5)}, r"lora_magnitude_vector must be \[32\], got \[5\]"),
    ):
        save_file({k: t for k, t in tensors.items() if k != key} | change, tmp_path / WEIGHTS)
        with pytest.raises(ValueError, match=message):
            lr.load_adapter(llama(), tmp_path)
    save_file(tensors, tmp_path / WEIGHTS)
    plain = lr.adapt(llama(), lr.LoRAConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="dora must be False as in the model, got True"):
        lr.load_adapter(plain, tmp_path)
    with pytest.raises(ValueError, match="a LoRA at inference, got one with magnitudes of its"):
        lr.AdapterBank(llama()).load("a", tmp_path)
    with pytest.raises(ValueError, match=r"export_lora: .* got one with magnitudes .*save_adapter"):
        lr.export_lora(model, tmp_path / "exported")
    fields = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**fields, "use_dora": False}))
    with pytest.raises(ValueError, match="lora_magnitude_vector is no tensor of LORA"):
        lr.load_adapter(llama(), tmp_path)


def test_state_dicts_and_summary() -> None:
    from rich.console import Console

    names = ["q_proj"]
    models = [lr.adapt(llama(), lr.LoRAConfig(r=2, dora=True, target_modules=names)) for _ in "ab"]
    randomize(models[0])
    models[1].load_state_dict(models[0].state_dict())
    assert torch.equal(logits(models[1]), logits(models[0]))
    assert "model.layers.0.self_attn.q_proj.magnitude" in models[0].state_dict()
    copied = copy.deepcopy(models[0])
    assert torch.equal(logits(copied), logits(models[0]))
    table = lr.summary(models[0])
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    assert "DoRA" in capture.get()


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_compiles_without_graph_breaks(dropout: float) -> None:
    ours, theirs = pair("plain", torch.float32, dropout)
    for model in (ours, theirs):
        model.train(mode=not dropout)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    got, expected = gradients(compiled, torch.float32), gradients(theirs, torch.float32)
    for name, value in expected.items():
        key = name if name in got else f"_orig_mod.{name}"
        torch.testing.assert_close(got[key], value, rtol=2e-5, atol=2e-5)


def test_autocast() -> None:
    ours, theirs = pair("plain", torch.float32)
    x = rows(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = ours(x), theirs(x)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), expected.float(), rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"dora": True, "lora_bias": True}, "lora_bias must be False with dora=True"),
        ({"use_dora": True}, "use_dora is called dora here"),
        ({"dora": "yes"}, "dora must be a bool, got 'yes'"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=f"LoRAConfig: {message}"):
        lr.LoRAConfig(r=2, **options)


class Doubling(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "base, message",
    [
        (Doubling(8, 4), "dora must be False over a Doubling that is not x weight"),
        (nn.Embedding(8, 4), "dora must be False over any but linear modules"),
        (nn.Conv1d(8, 4, 3), "dora must be False over any but linear modules"),
    ],
)
def test_bases_that_have_no_norms(base: nn.Module, message: str) -> None:
    model = nn.Sequential(base, nn.Linear(4, 4))
    with pytest.raises(ValueError, match=f"adapt: 0: .*{message}"):
        lr.adapt(model, lr.LoRAConfig(r=2, dora=True, target_modules=["0"]))
    assert model[0] is base and base.weight.requires_grad


def test_an_offloaded_weight_has_no_norm() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"dora must be False where the weight, .* is offloaded"):
        lr.adapt(model, lr.LoRAConfig(r=2, dora=True, target_modules=["0"]))


# --------------------------------------------------------------------------- in PEFT's models


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kind", ["plain", "no_bias", "conv1d"])
def test_accelerated(kind: str, dtype: torch.dtype, dropout: float) -> None:
    _, theirs = pair(kind, dtype, dropout)
    ours = copy.deepcopy(theirs)
    report = lr.accelerate(ours)
    assert len(report.accelerated) == 1 and not report.left_alone and not report.partly
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of PEFT's own forward
        got, expected = gradients(ours.train(), dtype), gradients(theirs.train(), dtype)
    for name, value in expected.items():
        tolerance = TOLERANCES[dtype]
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance, msg=name)
    ours.eval().merge_adapter()
    theirs.eval().merge_adapter()
    assert torch.equal(ours(rows(dtype)), theirs(rows(dtype)))
    ours.unmerge_adapter()
    with ours.disable_adapter():
        torch.testing.assert_close(
            ours(rows(dtype)), single(kind, dtype)(rows(dtype)), rtol=1e-4, atol=1e-4
        )


def test_dora_beside_other_adapters_is_pefts() -> None:
    _, theirs = pair("plain", torch.float32)
    theirs.add_adapter("other", peft.LoraConfig(r=2, target_modules=["0"]))
    nn.init.normal_(theirs.base_model.model[0].lora_B["other"].weight)
    ours = copy.deepcopy(theirs)
    lr.accelerate(ours)
    x = rows(torch.float32)
    for model in (ours, theirs):
        model.base_model.set_adapter(["default", "other"])
    with pytest.warns(UserWarning, match="PEFT's own forward: DoRA beside other adapters"):
        got = ours(x)
    assert torch.equal(got, theirs(x))
    for model in (ours, theirs):
        model.base_model.set_adapter("default")
    torch.testing.assert_close(ours(x), theirs(x), rtol=2e-5, atol=2e-5)


def test_peft_config() -> None:
    config = lr.LoRAConfig(r=4, alpha=8, dora=True, target_modules=["q_proj"])
    model = peft.get_peft_model(llama(), lr.peft_config(config))
    assert len(lr.accelerate(model).accelerated) == 2
    theirs = peft.get_peft_model(
        llama(), peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["q_proj"])
    )
    for each in (model, theirs):
        randomize(each)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=2e-5, atol=2e-5)
