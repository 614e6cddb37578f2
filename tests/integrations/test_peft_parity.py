"""PEFT beside ours: the same losses in training, the same bytes in files, odd names and ties.

Every option, in all ways to make an adapter: tests/peers/test_lora_options.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import gpt2, llama, randomize, token_ids
from safetensors.torch import load_file
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft

import lowrank_ext as lr


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=token_ids()).logits


def adapter_values(model: nn.Module) -> dict[str, nn.Parameter]:
    """Adapter parameters by path and kind, without what PEFT puts around them."""
    values = {}
    for name, parameter in model.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".default", "")
        name = name.replace("lora_A.weight", "lora_a").replace("lora_B.weight", "lora_b")
        if name.endswith(("lora_a", "lora_b")):
            values[name] = parameter
    return values


def assert_close(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> None:
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-10, torch.bfloat16: 6e-2}[dtype]
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def losses(model: nn.Module, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    history = []
    for step in range(steps):
        ids = token_ids(step % 3)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    return history


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"r": 4, "alpha": 8}, {"r": 4, "lora_alpha": 8}),
        ({"r": 3, "alpha": 6, "rslora": True}, {"r": 3, "lora_alpha": 6, "use_rslora": True}),
        (
            {"r": 4, "alpha": 8, "init": "gaussian"},
            {"r": 4, "lora_alpha": 8, "init_lora_weights": "gaussian"},
        ),
        (
            {"r": 4, "alpha": 8, "init": "pissa"},
            {"r": 4, "lora_alpha": 8, "init_lora_weights": "pissa"},
        ),
    ],
    ids=["lora", "rslora", "gaussian", "pissa"],
)
def test_twenty_steps_give_the_same_losses(
    make: Callable[[], nn.Module], ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    """The same seed gives the same initial adapters, and 20 steps of AdamW the same losses."""
    targets = ["q_proj", "v_proj", "down_proj"] if make is llama else ["c_attn", "c_fc"]
    model = make()
    torch.manual_seed(3)
    lr.adapt(model, lr.LoRAConfig(target_modules=targets, **ours))
    reference = make()
    torch.manual_seed(3)
    config = peft.LoraConfig(
        target_modules=targets, fan_in_fan_out=make is gpt2, lora_dropout=0.0, **theirs
    )
    reference = peft.get_peft_model(reference, config)

    start, expected = adapter_values(model), adapter_values(reference)
    assert start.keys() == expected.keys()
    if ours.get("init") != "pissa":  # singular vectors are unique up to their signs
        assert all(torch.equal(start[key], expected[key]) for key in start)
    got, wanted = losses(model, 20), losses(reference, 20)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert wanted[-1] < wanted[0] - 0.05


TARGETS = ["q_proj", "v_proj", "o_proj"]
_PATTERNS = {
    "rank_pattern": {"layers.0.self_attn.q_proj": 2, "v_proj": 3},
    "alpha_pattern": {r".*\.1\..*proj": 5, "o_proj": 7},
}
_SAVED = {"modules_to_save": ["lm_head", "embed_tokens"]}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({"r": 4, "alpha": 6}, {"r": 4, "lora_alpha": 6}),
    "patterns": ({"r": 4, "alpha": 8, **_PATTERNS}, {"r": 4, "lora_alpha": 8, **_PATTERNS}),
    "modules_to_save": ({"r": 4, "alpha": 8, **_SAVED}, {"r": 4, "lora_alpha": 8, **_SAVED}),
}


def test_pissa_converted_by_peft_loads_as_plain_lora(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa", lora_alpha=4)
    reference = peft.get_peft_model(llama(), config)
    # PEFT wants the untrained adapter on disk, marked as one that leaves the base alone
    reference.peft_config["default"].init_lora_weights = True
    reference.save_pretrained(tmp_path / "start")
    reference.peft_config["default"].init_lora_weights = "pissa"
    randomize(reference)
    expected = logits(reference)
    reference.save_pretrained(
        tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "start"
    )
    model = lr.load_adapter(llama(), tmp_path / "converted")
    assert model.model.layers[0].self_attn.q_proj.r == 8
    assert_close(logits(model), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_files_equal_pefts(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The tensor file byte for byte, the config value for value."""
    ours, theirs = CASES[case]
    model = lr.adapt(llama(dtype), lr.LoRAConfig(target_modules=TARGETS, **ours))
    randomize(model)
    config = peft.LoraConfig(target_modules=TARGETS, **theirs)
    reference = peft.get_peft_model(llama(dtype), config)
    values = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in adapter_values(reference).items():
            value.copy_(values[name])
        for name, parameter in reference.named_parameters():
            if "modules_to_save" in name:
                own = name.removeprefix("base_model.model.").replace("modules_to_save.default.", "")
                parameter.copy_(values[own])
    lr.save_adapter(model, tmp_path / "ours")
    reference.save_pretrained(tmp_path / "theirs")

    ours_bytes, theirs_bytes = (
        (tmp_path / side / "adapter_model.safetensors").read_bytes() for side in ("ours", "theirs")
    )
    assert ours_bytes == theirs_bytes
    ours_config, theirs_config = (
        json.loads((tmp_path / side / "adapter_config.json").read_text())
        for side in ("ours", "theirs")
    )
    for field in ("target_modules", "modules_to_save"):  # PEFT writes sets in any order
        theirs_config[field] = theirs_config[field] and sorted(theirs_config[field])
    assert ours_config == {key: theirs_config[key] for key in ours_config}


def test_tied_head_saved_by_peft_gets_a_weight_of_its_own(tmp_path: Path) -> None:
    """PEFT trains a copy of the head; loading it must not change the embedding."""
    config = peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["lm_head"])
    reference = peft.get_peft_model(llama(tied=True), config)
    randomize(reference)
    reference.save_pretrained(tmp_path)
    model = llama(tied=True)
    embedding = model.model.embed_tokens.weight.detach().clone()
    lr.load_adapter(model, tmp_path)
    assert_close(logits(model), logits(reference))
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    assert model.lm_head.weight.requires_grad
    assert not model.model.embed_tokens.weight.requires_grad


def test_rslora_survives(tmp_path: Path) -> None:
    """RF-02: alpha 8 and rank 4 give the scaling 4, not 2, before and after saving."""
    base = nn.Sequential(nn.Linear(2, 3, bias=False))
    with torch.no_grad():
        base[0].weight.zero_()
    for rslora, expected in ((True, 32.0), (False, 16.0)):
        path = tmp_path / str(rslora)
        model = nn.Sequential(nn.Linear(2, 3, bias=False))
        model.load_state_dict(base.state_dict())
        lr.adapt(model, lr.LoRAConfig(r=4, alpha=8, rslora=rslora))
        with torch.no_grad():
            model[0].lora_a.fill_(1)
            model[0].lora_b.fill_(1)
        x, y = torch.ones(1, 2), torch.full((1, 3), expected)
        assert torch.equal(model(x), y)
        lr.save_adapter(model, path)
        assert json.loads((path / "adapter_config.json").read_text())["use_rslora"] is rslora
        loaded = nn.Sequential(nn.Linear(2, 3, bias=False))
        loaded.load_state_dict(base.state_dict())
        lr.load_adapter(loaded, path)
        assert torch.equal(loaded(x), y)
        assert torch.equal(lr.merge(loaded)[0].weight, torch.full((3, 2), expected / 2))


class WeightInPaths(nn.Module):
    """RF-08: modules whose paths contain the words that the keys are made of."""

    paths = ("blk.pair_weighted_avg.proj", "weight.weight_norm.lin", "lora_A_net.fc", "default.fc")

    def __init__(self) -> None:
        super().__init__()
        for path in self.paths:
            parent: nn.Module = self
            *parts, last = path.split(".")
            for part in parts:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, nn.Linear(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        for path in self.paths:
            x = torch.tanh(self.get_submodule(path)(x))
        return x


def weight_in_paths() -> WeightInPaths:
    torch.manual_seed(5)
    return WeightInPaths()


@pytest.mark.parametrize("adapter_name", ["default", "weight", "other.v2"])
def test_words_of_the_keys_in_module_paths(adapter_name: str, tmp_path: Path) -> None:
    model = lr.adapt(weight_in_paths(), lr.LoRAConfig(r=2, target_modules=["proj", "lin", "fc"]))
    with torch.no_grad():
        for value, parameter in enumerate(adapter_values(model).values(), start=1):
            parameter.fill_(value / 8)
    lr.save_adapter(model, tmp_path)
    keys = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert set(keys) == {
        f"base_model.model.{path}.lora_{side}.weight"
        for path in WeightInPaths.paths
        for side in "AB"
    }
    again = lr.load_adapter(weight_in_paths(), tmp_path)
    assert adapter_values(again).keys() == adapter_values(model).keys()
    for name, value in adapter_values(model).items():
        assert torch.equal(adapter_values(again)[name], value)
    if adapter_name != "other.v2":  # PEFT refuses a dot in a name
        loaded = peft.PeftModel.from_pretrained(
            weight_in_paths(), tmp_path, adapter_name=adapter_name
        )
        x = torch.randn(4, 3)
        assert_close(loaded(x), model(x))


def test_a_name_that_ends_another_path(tmp_path: Path) -> None:
    """Adapting "fc" but not "inner.fc" needs a pattern that neither library widens."""

    def make() -> nn.Module:
        torch.manual_seed(2)
        model = nn.Module()
        model.add_module("fc", nn.Linear(3, 3))
        model.add_module("inner", nn.Sequential())
        model.inner.add_module("fc", nn.Linear(3, 3))
        model.forward = lambda x: model.inner.fc(torch.tanh(model.fc(x)))
        return model

    model = lr.adapt(make(), lr.LoRAConfig(r=2, alpha=6, target_modules="fc"))
    randomize(model)
    lr.save_adapter(model, tmp_path)
    x = torch.randn(4, 3)
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path)
    assert adapter_values(loaded).keys() == {"fc.lora_a", "fc.lora_b"}
    assert_close(loaded.get_submodule("base_model.model.fc")(x), model.fc(x))
    assert_close(lr.load_adapter(make(), tmp_path).fc(x), model.fc(x))
