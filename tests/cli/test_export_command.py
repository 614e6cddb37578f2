"""`lowrank-ext export-lora`: a plain LoRA that PEFT loads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
from finetune_runs import check_error, invoke
from saved_adapters import IDS, load_plain, save_adapter

import lowrank_ext as lr

LORA = {"r": 4, "target_modules": ["q_proj", "down_proj"]}
EXACT: dict[str, tuple[Any, int]] = {
    "lora": (lr.LoRAConfig(**LORA), 4),
    "rslora": (lr.LoRAConfig(**LORA, rslora=True, alpha=3), 4),
    "pissa": (lr.LoRAConfig(**LORA, init="pissa"), 8),
    "lamda": (lr.LaMDAConfig(**LORA), 4),
    "aflora": (lr.AFLoRAConfig(**LORA), 4),
    "reslora, block": (lr.ResLoRAConfig(**LORA, shortcut="block"), 8),
    "set-and-sequence": (lr.BasisLoRAConfig(**LORA), 4),
    "modules_to_save": (lr.LoRAConfig(**LORA, modules_to_save=["norm"]), 4),
}


def export(adapter: Path, out: Path, *flags: str) -> Any:
    return invoke("export-lora", str(adapter), "--out", str(out), *flags)


def in_peft(base: Path, path: Path) -> torch.Tensor:
    return peft.PeftModel.from_pretrained(load_plain(base), str(path)).eval()(IDS).logits


@pytest.mark.parametrize("kind", EXACT)
def test_peft_computes_what_the_adapted_model_did(tiny_model, tmp_path, kind) -> None:
    config, rank = EXACT[kind]
    expected = save_adapter(tiny_model, tmp_path / "adapter", config)
    result = export(tmp_path / "adapter", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA"
    assert max([written["r"], *written["rank_pattern"].values()]) == rank
    torch.testing.assert_close(
        in_peft(tiny_model, tmp_path / "out"), expected, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lr.GOATConfig(r=4, num_experts=2, target_modules=["q_proj"]), "branch that is one matrix"),
        (lr.LoRAConfig(**LORA, dora=True), "ordinary LoRA at inference"),
        (lr.LoRAConfig(**LORA, lora_bias=True), "ordinary LoRA at inference"),
    ],
    ids=["goat", "dora", "lora_bias"],
)
def test_what_is_no_lora_is_said(tiny_model, tmp_path, config, words) -> None:
    save_adapter(tiny_model, tmp_path / "adapter", config)
    check_error(export(tmp_path / "adapter", tmp_path / "out"), "cannot export", words)
    assert not (tmp_path / "out").exists()


def test_a_smaller_rank_is_the_best_approximation(tiny_model, tmp_path) -> None:
    save_adapter(tiny_model, tmp_path / "adapter", lr.LaMDAConfig(**LORA))
    assert export(tmp_path / "adapter", tmp_path / "whole").exit_code == 0
    result = export(tmp_path / "adapter", tmp_path / "cut", "--rank", "3")
    assert result.exit_code == 0, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning: export_lora: 4 of 4 branches lose by rank=3, most of all ")
    whole, cut = (_products(tmp_path / name) for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    lost = {}
    for name, (product, _) in whole.items():
        u, values, v = torch.linalg.svd(product)
        best = (u[:, :3] * values[:3]) @ v[:3]
        torch.testing.assert_close(cut[name][0], best, atol=1e-5, rtol=1e-4)
        assert cut[name][1] == 3
        lost[name] = float(values[3:].norm() / values.norm())
    assert f"{max(lost.values()):.2g} of its norm" in line


def _products(path: Path) -> dict[str, tuple[torch.Tensor, int]]:
    """scaling · lora_B lora_A and rank of each module, from PEFT's files alone."""
    model = peft.PeftModel.from_pretrained(load_plain_of(path), str(path))
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    return {
        name: (layer.get_delta_weight("default").detach(), layer.r["default"])
        for name, layer in layers.items()
    }


def load_plain_of(path: Path) -> Any:
    config = json.loads((path / "adapter_config.json").read_text())
    return load_plain(Path(config["base_model_name_or_path"]))


def test_a_rank_that_is_enough_changes_nothing(tiny_model, tmp_path) -> None:
    expected = save_adapter(tiny_model, tmp_path / "adapter", lr.LoRAConfig(**LORA))
    assert export(tmp_path / "adapter", tmp_path / "out", "--rank", "4").stderr == ""
    torch.testing.assert_close(
        in_peft(tiny_model, tmp_path / "out"), expected, atol=1e-5, rtol=1e-5
    )
    check_error(export(tmp_path / "adapter", tmp_path / "no", "--rank", "0"), "--rank must be at")


def test_the_adapter_itself_is_never_replaced(tiny_model, tmp_path) -> None:
    save_adapter(tiny_model, tmp_path / "adapter", lr.LoRAConfig(**LORA))
    check_error(export(tmp_path / "adapter", tmp_path / "adapter"), "holds the input")
    save_adapter(tiny_model, tmp_path / "other", lr.LoRAConfig(**LORA))
    check_error(
        export(tmp_path / "adapter", tmp_path / "other"), "must be new, empty or written by"
    )
    assert export(tmp_path / "adapter", tmp_path / "out").exit_code == 0
    assert export(tmp_path / "adapter", tmp_path / "out").exit_code == 0
