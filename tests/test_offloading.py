"""Adapters on models whose weights accelerate keeps elsewhere between calls, or that have none."""

import contextlib
import copy
from pathlib import Path

import pytest
import torch
from module_cases import ALL_METHODS, IDS, Method, TinyLM, randomize
from torch import Tensor, nn

import lowrank_ext as lr
from lowrank_ext.config import AdapterConfig

accelerate = pytest.importorskip("accelerate")
hooks = pytest.importorskip("accelerate.hooks")

MAP = {"embed": "cpu", "layers.0": "cpu", "layers.1": "disk", "norm": "cpu", "lm_head": "disk"}
OFFLOADED = {
    "cpu_offload": lambda model, directory: accelerate.cpu_offload(model),
    "disk_offload": lambda model, directory: accelerate.disk_offload(
        model, directory, execution_device="cpu"
    ),
    "device_map": lambda model, directory: accelerate.dispatch_model(
        model, MAP, main_device="cpu", offload_dir=directory, force_hooks=True
    ),
}
by_offloading = pytest.mark.parametrize("offload", OFFLOADED.values(), ids=OFFLOADED)
WITHOUT_SVD = [m for m in ALL_METHODS if m.init not in m.module.svd_inits]
# Every method with one way of offloading, every way with one method.
PAIRS = [
    *((method, "cpu_offload") for method in WITHOUT_SVD),
    *((WITHOUT_SVD[0], name) for name in OFFLOADED if name != "cpu_offload"),
]


def config_of(method: Method, **options) -> AdapterConfig:
    return method.config(**{"r": 2, "init": method.init, **method.options(2), **options})


def trained(model: nn.Module, config: AdapterConfig) -> list[Tensor]:
    """Logits before, during and after three steps of the adapters."""
    torch.manual_seed(0)
    lr.adapt(model, config)
    randomize(model)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.1)
    logits = []
    for _ in range(3):
        logits.append(called(model, config))
        logits[-1].square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [*logits, called(model, config), called(model, config)]


def called(model: nn.Module, config: AdapterConfig) -> Tensor:
    """accelerate's hook hides ResLoRA's own forward of the model; the error names reslora_call."""
    chained = isinstance(config, lr.ResLoRAConfig) and config.shortcut != "block"
    with lr.reslora_call(model) if chained else contextlib.nullcontext():
        return model(IDS)


@pytest.mark.parametrize("method, name", PAIRS, ids=str)
def test_adapters_train_as_on_the_whole_model(method: Method, name: str, tmp_path: Path) -> None:
    whole = TinyLM()
    model = OFFLOADED[name](copy.deepcopy(whole), str(tmp_path))
    expected = trained(whole, config_of(method))
    for ours, theirs in zip(trained(model, config_of(method)), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    for module in model.modules():
        if isinstance(module, lr.nn.LowRankLinear):
            assert not any(tensor.is_meta for tensor in module.adapter_tensors().values())


@by_offloading
def test_saving_loading_and_unloading(offload, tmp_path: Path) -> None:
    base = TinyLM()
    plain = base(IDS)
    model = offload(copy.deepcopy(base), str(tmp_path / "weights"))
    logits = trained(model, lr.LoRAConfig(r=2))[-1]
    lr.save_adapter(model, tmp_path / "adapter")
    for other in (copy.deepcopy(base), offload(copy.deepcopy(base), str(tmp_path / "again"))):
        torch.testing.assert_close(lr.load_adapter(other, tmp_path / "adapter")(IDS), logits)
    with pytest.raises(
        ValueError, match=r"merge: layers\.\d\.q_proj: .*must hold values, got a meta"
    ):
        lr.merge(model)
    assert not any(m.merged for m in model.modules() if isinstance(m, lr.nn.LowRankLinear))
    torch.testing.assert_close(model(IDS), logits)
    torch.testing.assert_close(lr.unload(model)(IDS), plain)


@by_offloading
def test_a_bank(offload, tmp_path: Path) -> None:
    base = TinyLM()
    whole = lr.adapt(copy.deepcopy(base), lr.LoRAConfig(r=2))
    randomize(whole)
    lr.save_adapter(whole, tmp_path / "adapter")
    model = offload(base, str(tmp_path / "weights"))
    bank = lr.AdapterBank(model)
    bank.load("a", tmp_path / "adapter")
    with bank.rows(["a", None]):
        both = model(IDS)
    torch.testing.assert_close(both[:1], whole(IDS)[:1])
    torch.testing.assert_close(both[1:], lr.unload(whole)(IDS)[1:])


def place_as_a_whole(model: TinyLM) -> None:
    """A hook on a block that loads the weights of its modules (``preload_module_classes``)."""
    hook = hooks.AlignDevicesHook("cpu", offload=True, place_submodules=True)
    hooks.add_hook_to_module(model.layers[1], hook)


def one_on_meta(model: TinyLM) -> None:
    model.layers[1].q_proj.to("meta")


@pytest.mark.parametrize(
    "prepare, config, message",
    [
        (
            place_as_a_whole,
            lr.LoRAConfig(r=2),
            r"layers\.1\.q_proj: the weight must hold values or",
        ),
        (one_on_meta, lr.LoRAConfig(r=2), r"layers\.1\.q_proj: the weight must hold values or"),
        *(
            (accelerate.cpu_offload, config, rf"layers\.0\.q_proj: init must be .*'{config.init}'")
            for config in (
                lr.LoRAConfig(r=2, init="pissa"),
                lr.LaMDAConfig(r=2),
                lr.LaMDAConfig(r=2, init="svd_zero_core"),
                lr.GOATConfig(r=2, num_experts=2),
            )
        ),
        (
            accelerate.cpu_offload,
            lr.LoRAConfig(r=2, modules_to_save=["norm"]),
            "modules_to_save must hold their values, got norm, which is offloaded",
        ),
    ],
)
def test_refused_before_anything_is_touched(prepare, config, message: str) -> None:
    model = TinyLM()
    prepare(model)
    classes = [type(module) for module in model.modules()]
    state = {name: (p, p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=f"adapt: {message}"):
        lr.adapt(model, config)
    assert [type(module) for module in model.modules()] == classes
    for name, parameter in model.named_parameters():
        assert parameter is state[name][0] and parameter.requires_grad == state[name][1]


def test_a_model_without_weights_is_adapted_on_meta() -> None:
    with accelerate.init_empty_weights():
        model = lr.adapt(TinyLM(), lr.LoRAConfig(r=2))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model(IDS).is_meta
