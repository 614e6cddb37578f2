"""Patterns in files where one module's path is the end of another's: ``proj``, ``inner.proj``."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lowrank_ext as lr
from lowrank_ext.checkpoint.peft_config import pattern_of
from lowrank_ext.checks import matching_pattern


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(12, 12)
        self.inner = nn.ModuleDict({"proj": nn.Linear(12, 12), "other": nn.Linear(12, 12)})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["other"](self.inner["proj"](self.proj(x)))


def net() -> Net:
    torch.manual_seed(4)
    model = Net()
    with torch.no_grad():  # a spectrum that falls fast for one of the two
        model.proj.weight.mul_(0.3 ** torch.arange(12.0))
    return model


def ranks(model: nn.Module) -> dict[str, tuple[int, float]]:
    modules = {path: m for path, m in model.named_modules() if isinstance(m, lr.nn.LowRankLinear)}
    return {path: (module.r, module.alpha) for path, module in modules.items()}


CONFIGS: dict[str, Any] = {
    "anchored": lr.LoRAConfig(r=2, rank_pattern={"^proj": 4}, alpha_pattern={"^proj": 9}),
    "escaped": lr.LoRAConfig(r=2, rank_pattern={r"^inner\.proj": 4, "proj": 3}),
    "in_order": lr.LoRAConfig(r=2, rank_pattern={"inner.proj": 4, "proj": 3}),
    "found": lr.LaMDAConfig(r=6, rank_budget="rank"),
    "found_with_alpha": lr.LaMDAConfig(r=6, rank_budget="rank", alpha=3),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_ranks_survive(case: str, tmp_path: Path) -> None:
    model = lr.adapt(net(), CONFIGS[case])
    before = ranks(model)
    assert before["proj"] != before["inner.proj"]
    lr.save_adapter(model, tmp_path)
    loaded = lr.load_adapter(net(), tmp_path)
    assert ranks(loaded) == before
    x = torch.randn(3, 12)
    assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    "values",
    [
        {"proj": 4, "inner.proj": 2},
        {"proj": 2, "inner.proj": 4},
        {"proj": 4, "inner.proj": 5},
        {"a.proj": 1, "b.a.proj": 2, "proj": 3},
        {"a+b.proj": 4, "aab.proj": 2},
        {"a.b": 4, "axb": 2},
    ],
    ids=str,
)
def test_a_pattern_made_for_paths_gives_every_path_its_value(values: dict[str, float]) -> None:
    """Anchored and escaped, in both libraries' rule."""
    pattern = pattern_of({"no such module": 7}, 2, values)
    for path, value in values.items():
        key = matching_pattern(pattern, path)
        assert (2 if key is None else pattern[key]) == value, pattern
        assert all(key.startswith("^") for key in pattern)


def test_a_config_that_never_saw_the_ranks_is_corrected(tmp_path: Path) -> None:
    """The ranks are the modules', whatever the model's config says of them."""
    model = lr.adapt(net(), lr.LoRAConfig(r=2, rank_pattern={"^proj": 4}))
    model.lowrank_config = lr.LoRAConfig(r=2)
    lr.save_adapter(model, tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["rank_pattern"] == {"^proj": 4}
    assert ranks(lr.load_adapter(net(), tmp_path)) == ranks(model)
