"""export_lora: the LoRA that PEFT and this library read computes what the exported model does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from module_cases import BLOCK, EXPERTS, INPUT, METHODS, MIDDLE, Method, adapted_away_from_start
from peft_models import gpt2, llama
from torch import Tensor, nn

import lowrank_ext as lr
from lowrank_ext.checkpoint.export import truncated
from lowrank_ext.checkpoint.lora_files import LoRATensors

peft = pytest.importorskip("peft")

IDS = torch.tensor([[3, 17, 5, 9, 11], [60, 2, 44, 1, 7]])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def same_values(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-4)


def check_readers(path: Path, make: Any, expected: Tensor) -> None:
    """PEFT, load_adapter and AdapterBank, each over a base as it was before adapt."""
    assert not torch.allclose(logits(make().eval()), expected, atol=1e-3)
    theirs = peft.PeftModel.from_pretrained(make(), str(path)).eval()
    same_values(logits(theirs), expected)
    ours = lr.load_adapter(make(), path).eval()
    assert type(ours.lowrank_config) is lr.LoRAConfig
    same_values(logits(ours), expected)
    bank = lr.AdapterBank(make().eval())
    bank.load("it", path)
    with bank.rows(["it", "it"]):
        same_values(logits(bank.model), expected)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_readers_of_the_export(method: Method, make: Any, tmp_path: Path) -> None:
    names = {"target_modules": ["q_proj", "down_proj"] if make is llama else ["c_attn", "c_fc"]}
    model = adapted_away_from_start(method, make(), alpha=6, **names)
    expected = logits(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    lr.export_lora(model, tmp_path)
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    check_readers(tmp_path, make, expected)


OPTIONS: dict[str, dict[str, Any]] = {
    "rslora": {"rslora": True, "alpha": 3},
    "patterns": {"rank_pattern": {"q_proj": 2, r"model\.layers\.1\.mlp\.down_proj": 3}, "alpha": 5},
    "alphas": {"alpha_pattern": {"q_proj": 7}, "rslora": True},
    "base": {"adapter_dtype": "base", "dropout": 0.2},
}
SOME = [m for m in METHODS if m.init in ("pissa", "svd_residual", "lora")] + [BLOCK]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("method", SOME, ids=str)
def test_ranks_and_scalings(method: Method, options: dict[str, Any], tmp_path: Path) -> None:
    model = adapted_away_from_start(
        method, llama(), target_modules=["q_proj", "down_proj"], **options
    )
    lr.export_lora(model, tmp_path)
    check_readers(tmp_path, llama, logits(model))


def test_a_lora_is_exported_as_it_is(tmp_path: Path) -> None:
    """Bit for bit the file that save_adapter writes, in any dtype."""
    plain = next(m for m in METHODS if str(m) == "lora-kaiming")
    model = adapted_away_from_start(
        plain, llama(torch.bfloat16), adapter_dtype="base", alpha=3, rslora=True
    )
    lr.save_adapter(model, tmp_path / "saved")
    lr.export_lora(model, tmp_path / "exported")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        exported = (tmp_path / "exported" / file).read_bytes()
        assert exported == (tmp_path / "saved" / file).read_bytes()


@pytest.mark.parametrize("method", [INPUT, MIDDLE], ids=str)
def test_an_estimate_is_that_of_merge(method: Method, tmp_path: Path) -> None:
    model = adapted_away_from_start(method, llama(), target_modules=["q_proj"])
    with pytest.warns(UserWarning, match=r"can only be estimated.*reslora_merge_error"):
        lr.export_lora(model, tmp_path)
    check_readers(tmp_path, llama, logits(lr.merge(model)))


@pytest.mark.parametrize("method", SOME, ids=str)
def test_a_merged_model_and_a_changed_scaling(method: Method, tmp_path: Path) -> None:
    model = adapted_away_from_start(method, llama(), target_modules=["q_proj", "down_proj"])
    for module in model.modules():
        if isinstance(module, method.module):
            module.scaling *= 0.3
    expected = logits(model)
    lr.export_lora(lr.merge(model), tmp_path)
    check_readers(tmp_path, llama, expected)


def test_whole_modules_go_along(tmp_path: Path) -> None:
    plain = next(m for m in METHODS if str(m) == "lora-kaiming")
    model = adapted_away_from_start(
        plain, llama(), target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    lr.export_lora(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(llama(), str(tmp_path)).eval()
    same_values(logits(theirs), logits(model))
    with pytest.raises(ValueError, match=r"modules_to_save must be empty .*\['lm_head'\]"):
        lr.export_lora(model, tmp_path / "no", format="diffusers")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("method", EXPERTS, ids=str)
def test_experts_are_no_lora(method: Method, tmp_path: Path) -> None:
    model = adapted_away_from_start(method, llama(), target_modules=["q_proj"])
    message = "export_lora: model.layers.0.self_attn.q_proj must have a branch that is one matrix"
    with pytest.raises(TypeError, match=message):
        lr.export_lora(model, tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    path = tmp_path / "no"
    with pytest.raises(ValueError, match="export_lora"):
        lr.export_lora(llama(), path)
    plain = next(m for m in METHODS if str(m) == "lora-kaiming")
    with pytest.raises(ValueError, match=r"format must be one of .*got 'kohya'"):
        lr.export_lora(adapted_away_from_start(plain, llama()), path, format="kohya")
    unmeasured = adapted_away_from_start(INPUT, llama(), target_modules=["q_proj"], merge="input")
    with pytest.raises(ValueError, match=r"export_lora: .*q_proj: .*lr.reslora_statistics"):
        lr.export_lora(unmeasured, path)
    assert not path.exists()


@pytest.mark.parametrize("format", ["peft", "diffusers"])
def test_what_is_not_finite_is_said(format: str, tmp_path: Path) -> None:
    plain = next(m for m in METHODS if str(m) == "lora-kaiming")
    model = adapted_away_from_start(plain, llama(), target_modules=["q_proj"])
    module = next(m for m in model.modules() if isinstance(m, plain.module))
    with torch.no_grad():
        module.lora_b[0, 0] = torch.nan
    with pytest.warns(UserWarning, match="export_lora: .* hold inf or nan"):
        lr.export_lora(model, tmp_path, format=format)


def test_a_scaling_is_multiplied_in_without_rounding_or_overflow(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    plain = next(m for m in METHODS if str(m) == "lora-kaiming")
    model = adapted_away_from_start(
        plain, llama(torch.float16), target_modules=["q_proj"], alpha=100, adapter_dtype="base"
    )
    module = next(m for m in model.modules() if isinstance(m, plain.module))
    with torch.no_grad():
        module.lora_b.fill_(3000.0)
    lr.export_lora(model, tmp_path, format="diffusers")
    written = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    lora_b = next(tensor for key, tensor in written.items() if key.endswith("lora_B.weight"))
    assert lora_b.dtype == torch.float32
    torch.testing.assert_close(
        lora_b, torch.full_like(lora_b, 3000.0 * module.scaling), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("scaling", [0.0, -1.0])
def test_a_scaling_that_no_file_can_hold(scaling: float, tmp_path: Path) -> None:
    plain = next(m for m in METHODS if str(m) == "lora-pissa")
    model = adapted_away_from_start(plain, llama(), target_modules=["q_proj"])
    next(m for m in model.modules() if isinstance(m, plain.module)).scaling = scaling
    with pytest.raises(
        ValueError, match=r"export_lora: model\.layers\.0\.self_attn\.q_proj: scaling"
    ):
        lr.export_lora(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stack", [(), (3,)], ids=["linear", "experts"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cut_branches_are_the_nearest_of_their_rank(stack, dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    lora_a, lora_b = (
        torch.randn(*stack, *shape, generator=generator).to(dtype) for shape in ((5, 9), (7, 5))
    )
    low = LoRATensors(lora_a[..., :2, :], lora_b[..., :2], 0.5)
    twice = LoRATensors(*(torch.cat([t, t], d) for t, d in ((low.lora_a, -2), (low.lora_b, -1))), 2)
    whole = {"whole": LoRATensors(lora_a, lora_b, 3.0), "low": low, "twice": twice}
    found, lost = truncated(whole, 2)
    assert found["low"] is low
    assert lost.keys() == {"whole"}  # the rank of "twice" is 2, however it is written
    u, values, v = torch.linalg.svd(lora_b.double() @ lora_a.double(), full_matrices=False)
    nearest = u[..., :2] * values[..., None, :2] @ v[..., :2, :]
    for name, product in (
        ("whole", nearest),
        ("twice", 2 * low.lora_b.double() @ low.lora_a.double()),
    ):
        cut = found[name]
        assert cut.lora_a.shape == (*stack, 2, 9) and cut.lora_b.shape == (*stack, 7, 2)
        assert cut.scaling == whole[name].scaling
        torch.testing.assert_close(cut.lora_b @ cut.lora_a, product.float(), atol=1e-5, rtol=1e-5)
    share = (values[..., 2:].norm() / values.norm()).item()
    assert lost["whole"] == pytest.approx(share)


def test_ranks_that_are_none() -> None:
    model = lr.adapt(nn.Sequential(nn.Linear(4, 4)), lr.LoRAConfig(r=2))
    for rank in (0, 2.0, True):
        with pytest.raises((TypeError, ValueError), match="rank must be"):
            lr.export_lora(model, "never", rank=rank)
