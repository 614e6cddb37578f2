"""lora_plus_groups: PEFT's groups, every parameter that trains in exactly one of them."""

from typing import Any

import pytest
import torch
from module_cases import ALL_METHODS, Method
from peft_models import gpt2, llama, token_ids
from torch import nn

pytest.importorskip("peft")

import peft
from peft.optimizers import create_loraplus_optimizer

import lowrank_ext as lr

RATES: dict[str, Any] = {"lr": 1e-3, "ratio": 8.0, "weight_decay": 0.1, "embedding_lr": 1e-5}


def settings(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of each parameter, which is in one group alone."""
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, tuple[float, float]] = {}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name not in found
            found[name] = (group["lr"], group["weight_decay"])
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora_bias": True},
        {"bias": "all"},
        {"target_modules": ["wte", "c_attn"]},
        {"modules_to_save": ["ln_f", "wpe"]},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_the_groups_are_pefts(options: dict[str, Any]) -> None:
    options = {"r": 2, "target_modules": ["c_attn", "c_fc"], **options}
    config = peft.LoraConfig(fan_in_fan_out=True, **options)
    model = peft.get_peft_model(gpt2(), config)
    theirs = create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=1e-3,
        loraplus_lr_ratio=8.0,
        loraplus_weight_decay=0.1,
        loraplus_lr_embedding=1e-5,
    )
    expected = settings(model, theirs.param_groups)
    assert settings(model, lr.lora_plus_groups(model, **RATES)) == expected
    lr.accelerate(model)
    assert settings(model, lr.lora_plus_groups(model, **RATES)) == expected
    ours = lr.adapt(gpt2(), lr.LoRAConfig(**options))
    got = settings(ours, lr.lora_plus_groups(ours, **RATES))
    assert sorted(got.values()) == sorted(expected.values())
    for name, (rate, decay) in got.items():
        if name.endswith("wte.lora_b"):
            assert (rate, decay) == (1e-5, 0.1)
        elif name.endswith(".lora_b"):
            assert (rate, decay) == (8e-3, 0.1)
        elif name.endswith("c_attn.lora_a"):
            assert (rate, decay) == (1e-3, 0.1)
        elif name.endswith("bias"):
            assert (rate, decay) == (8e-3, 0.0)


@pytest.mark.parametrize("saved", [["model.norm"], ["post_attention_layernorm", "lm_head"]])
def test_norms_that_are_no_layer_norms_decay_as_in_peft(saved: list[str]) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved)
    theirs = peft.get_peft_model(llama(), config)
    expected = settings(
        theirs,
        create_loraplus_optimizer(
            theirs,
            torch.optim.AdamW,
            lr=1e-3,
            loraplus_lr_ratio=8.0,
            loraplus_weight_decay=0.1,
            loraplus_lr_embedding=1e-5,
        ).param_groups,
    )
    assert settings(theirs, lr.lora_plus_groups(theirs, **RATES)) == expected
    ours = lr.adapt(llama(), lr.LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=saved))
    got = settings(ours, lr.lora_plus_groups(ours, **RATES))
    assert sorted(got.values()) == sorted(expected.values())
    norms = [setting for name, setting in got.items() if "norm" in name]
    assert norms and set(norms) == {(8e-3, 0.1)}


@pytest.mark.parametrize("method", ALL_METHODS, ids=str)
def test_every_method(method: Method) -> None:
    options = {"target_modules": ["q_proj", "v_proj"], "init": method.init, **method.options(2)}
    config = method.config(r=2, **options)
    models = [lr.adapt(llama(), config)]
    if method.init != "pissa":
        models.append(peft.get_peft_model(llama(), lr.peft_config(config)))
    for model in models:
        found = settings(model, lr.lora_plus_groups(model, **RATES))
        for name, (rate, decay) in found.items():
            fast = (
                "lora_b" in name
                or "lora_B" in name
                or dict(model.named_parameters())[name].ndim < 2
            )
            assert (rate, decay) == (8e-3 if fast else 1e-3, 0.1)


def test_trains() -> None:
    """The first step of Adam is as long as the learning rate."""
    model = lr.adapt(llama(), lr.LoRAConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for layer in model.model.layers:
            nn.init.normal_(layer.self_attn.q_proj.lora_b)
    layer = model.model.layers[0].self_attn.q_proj
    before = layer.lora_a.detach().clone(), layer.lora_b.detach().clone()
    optimizer = torch.optim.Adam(lr.lora_plus_groups(model, lr=1e-3, ratio=4))
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    optimizer.step()
    steps = [
        (now - old).abs().median().item()
        for now, old in zip((layer.lora_a, layer.lora_b), before, strict=True)
    ]
    torch.testing.assert_close(steps, [1e-3, 4e-3], rtol=0.01, atol=0)


@pytest.mark.parametrize("way", ["optimizers", "optimizer_cls_and_kwargs"])
def test_in_the_trainer(way: str, tmp_path: Any) -> None:
    from transformers import Trainer, TrainingArguments

    model = lr.adapt(llama(), lr.LoRAConfig(r=2, target_modules=["q_proj"]))
    groups = lr.lora_plus_groups(model, lr=1e-3, ratio=4)
    options: dict[str, Any] = {"optimizers": (torch.optim.AdamW(groups), None)}
    if way == "optimizer_cls_and_kwargs":
        options = {way: (torch.optim.AdamW, {"params": groups, "lr": 1e-3})}
    arguments = TrainingArguments(
        tmp_path,
        max_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        lr_scheduler_type="constant",
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in token_ids()]
    trainer = Trainer(model, arguments, train_dataset=rows, **options)
    trainer.train()
    assert sorted({group["lr"] for group in trainer.optimizer.param_groups}) == [1e-3, 4e-3]


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"lr": 0}, ValueError, "lr must be positive and finite, got 0"),
        ({"ratio": "16"}, TypeError, "ratio must be a number, got '16'"),
        ({"ratio": float("inf")}, ValueError, "ratio must be positive and finite, got inf"),
        ({"weight_decay": -1}, ValueError, "weight_decay must be at least 0 and finite, got -1"),
        ({"embedding_lr": None}, TypeError, "embedding_lr must be a number, got None"),
    ],
)
def test_wrong_numbers(options: dict[str, Any], error: type, message: str) -> None:
    model = lr.adapt(llama(), lr.LoRAConfig(r=2))
    with pytest.raises(error, match=f"lora_plus_groups: {message}"):
        lr.lora_plus_groups(model, **{**RATES, **options})


def test_models_without_a_lora_b_that_trains() -> None:
    frozen = lr.adapt(llama(), lr.LaMDAConfig(r=2, train_lora_b=False))
    for model in (llama(), frozen, peft.get_peft_model(llama(), peft.IA3Config())):
        with pytest.raises(ValueError, match="model must have a lora_b that trains, got a"):
            lr.lora_plus_groups(model, **RATES)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        lr.lora_plus_groups("model", **RATES)
