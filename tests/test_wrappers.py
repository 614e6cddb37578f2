"""RF-24: wrapped models, and models with wrapped parts, are adapted, saved and loaded as plain."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from distributed_cases import end_worker
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    checkpoint_wrapper,
    offload_wrapper,
)
from torch.optim.swa_utils import AveragedModel

import lowrank_ext as lr
from lowrank_ext.wrappers import canonical_name, named_modules, state_of, submodule, unwrapped

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(6, 6)
        self.module = nn.Linear(6, 6)  # a user's own name

    def forward(self, x: Tensor) -> Tensor:
        return x + self.module(torch.tanh(self.q_proj(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def net() -> Net:
    torch.manual_seed(3)
    return Net().eval()


def inputs() -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def each_block(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[Net], nn.Module]:
    def apply(model: Net) -> nn.Module:
        model.layers = nn.ModuleList(wrap(block) for block in model.layers)
        model.head = wrap(model.head)
        return model

    return apply


def each_linear(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[Net], nn.Module]:
    def apply(model: Net) -> nn.Module:
        for parent in list(model.modules()):
            for name, child in list(parent._modules.items()):
                if isinstance(child, nn.Linear):
                    parent._modules[name] = wrap(child)
        return model

    return apply


def regions(model: Net) -> nn.Module:
    compile_regions = pytest.importorskip("accelerate.utils").compile_regions
    return compile_regions(model, backend="eager")


WRAPS: dict[str, Callable[[Net], nn.Module]] = {
    "compile": compiled,
    "compiled_blocks": each_block(compiled),
    "compiled_linears": each_linear(compiled),
    "compiled_regions": regions,
    "checkpoint_blocks": each_block(checkpoint_wrapper),
    "checkpoint_linears": each_linear(checkpoint_wrapper),
    "offload": offload_wrapper,
    "data_parallel": nn.DataParallel,
    "averaged": AveragedModel,
    "nested": lambda model: nn.DataParallel(
        compiled(each_block(lambda block: checkpoint_wrapper(compiled(block)))(model))
    ),
}
ANCHORED: dict[str, dict[str, Any]] = {
    "whole_paths": {"target_modules": ["layers.0.q_proj", "layers.2.module", "head.0"]},
    "anchored": {
        "target_modules": r"layers\.\d\.(q_proj|module)",
        "exclude_modules": r"layers\.1\.module",
        "rank_pattern": {r"^layers\.0\.q_proj": 3, "layers.2.module": 1},
        "alpha_pattern": {r"^layers\.1\..*": 5, "^layers.2.q_proj": 7},
        "modules_to_save": ["head"],
    },
    "all_linear": {"modules_to_save": ["layers.1"]},
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    for name, module in named_modules(model):
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad:
                seed = sum(map(ord, f"{name}.{key}"))
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                parameter.add_(0.3 * noise)


def same_files(a: Path, b: Path) -> bool:
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in (CONFIG, WEIGHTS))


def table(model: nn.Module) -> list[list[Any]]:
    return [list(column.cells) for column in lr.summary(model).columns]


@pytest.mark.parametrize("wrap", WRAPS)
def test_paths_are_those_of_the_plain_model(wrap: str) -> None:
    model = WRAPS[wrap](net())
    plain = dict(net().named_modules())
    paths = dict(named_modules(model))
    assert list(paths) == list(plain)
    assert [type(m) for m in paths.values()] == [type(m) for m in plain.values()]
    assert all(submodule(model, path) is module for path, module in paths.items())
    assert [canonical_name(model, name) for name, _ in model.named_parameters()] == [
        name for name, _ in net().named_parameters()
    ]
    assert {key for key in state_of(model) if key != "n_averaged"} == net().state_dict().keys()
    assert type(unwrapped(model)) is Net


def test_a_users_own_names_are_kept() -> None:
    own = nn.Module()
    own.add_module("module", nn.Module())
    own.module.add_module("_orig_mod", nn.Linear(2, 2))
    for model in (own, nn.DataParallel(own), compiled(own)):
        assert [path for path, _ in named_modules(model)] == ["", "module", "module._orig_mod"]
    assert canonical_name(nn.DataParallel(own), "module.module._orig_mod.bias") == (
        "module._orig_mod.bias"
    )


def test_deepspeed_is_known_by_its_name() -> None:
    """Its engine holds the model as ``module`` and has taken over its parameters."""

    class DeepSpeedEngine(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    DeepSpeedEngine.__module__ = "deepspeed.runtime.engine"
    DeepSpeedEngine.__qualname__ = "DeepSpeedEngine"
    engine = DeepSpeedEngine(net())
    assert unwrapped(engine) is engine.module
    assert [path for path, _ in named_modules(engine)] == [p for p, _ in net().named_modules()]
    with pytest.raises(ValueError, match="adapt: model must not be inside DeepSpeedEngine"):
        lr.adapt(engine, lr.LoRAConfig(r=2))


def test_a_shared_block_has_every_path() -> None:
    model = net()
    model.layers[2] = model.layers[0]
    paths = [path for path, _ in named_modules(each_block(compiled)(model), remove_duplicate=False)]
    assert "layers.0.q_proj" in paths and "layers.2.q_proj" in paths
    assert sum(m is model.head for _, m in named_modules(model)) == 0  # the wrapper is left out


@pytest.mark.parametrize(
    ("wrap", "names"),
    [
        *((wrap, "anchored") for wrap in WRAPS),
        ("compiled_linears", "whole_paths"),
        ("checkpoint_blocks", "all_linear"),
    ],
)
def test_wrapped_and_plain_are_adapted_and_saved_alike(
    wrap: str, names: str, tmp_path: Path
) -> None:
    config = lr.LoRAConfig(r=2, alpha=4, **ANCHORED[names])
    torch.manual_seed(5)
    plain = lr.adapt(net(), config)
    torch.manual_seed(5)
    given = WRAPS[wrap](net())
    model = lr.adapt(given, config)
    assert model is given
    assert dict(lr.adapt.__globals__["lowrank_modules"](model, "test")).keys() == {
        path for path, m in plain.named_modules() if isinstance(m, lr.nn.LoRALinear)
    }
    randomize(plain)
    randomize(model)
    assert torch.equal(model(inputs()), plain(inputs()))
    assert not torch.equal(plain(inputs()), net()(inputs()))
    assert table(model) == table(plain)
    lr.save_adapter(plain, tmp_path / "plain")
    lr.save_adapter(model, tmp_path / "wrapped")
    assert same_files(tmp_path / "plain", tmp_path / "wrapped")

    loaded = WRAPS[wrap](net())
    loaded(inputs())  # compiled before the adapter is there
    assert lr.load_adapter(loaded, tmp_path / "plain") is loaded
    assert torch.equal(loaded(inputs()), plain(inputs()))
    lr.load_adapter(model, tmp_path / "plain")  # values into a model that is adapted
    lr.save_adapter(loaded, tmp_path / "again")
    assert same_files(tmp_path / "plain", tmp_path / "again")

    lr.merge(loaded)
    merged = {k: t for k, t in state_of(loaded).items() if k != "n_averaged"}
    assert merged.keys() == net().state_dict().keys()
    lr.unmerge(loaded)
    lr.unload(loaded)
    if names == "whole_paths":
        assert torch.equal(loaded(inputs()), net()(inputs()))


@pytest.mark.parametrize("wrap", WRAPS)
def test_wrapping_after_adapting(wrap: str, tmp_path: Path) -> None:
    model = lr.adapt(net(), lr.LoRAConfig(r=2, modules_to_save=["head"]))
    randomize(model)
    lr.save_adapter(model, tmp_path / "plain")
    expected = model(inputs())
    wrapped = WRAPS[wrap](copy.deepcopy(model))
    assert torch.equal(wrapped(inputs()), expected)
    lr.save_adapter(wrapped, tmp_path / "wrapped")
    assert same_files(tmp_path / "plain", tmp_path / "wrapped")


OTHER_METHODS: dict[str, Any] = {
    "reslora_input": lr.ResLoRAConfig(r=2, target_modules=["q_proj"], pre_num=1),
    "reslora_block": lr.ResLoRAConfig(r=2, target_modules="all-linear", shortcut="block"),
    "lamda++": lr.LaMDAConfig(r=3, rank_budget="rank", target_modules=["q_proj", "module"]),
    "aflora": lr.AFLoRAConfig(
        r=2, target_modules=["q_proj"], live_modules=[r"layers.0.q_proj", "layers.2.q_proj"]
    ),
}


@pytest.mark.parametrize(
    ("wrap", "method"),
    [("compiled_blocks", "reslora_input"), *(("checkpoint_blocks", m) for m in OTHER_METHODS)],
)
def test_other_methods(method: str, wrap: str, tmp_path: Path) -> None:
    """Chains, ranks and selections that depend on paths."""
    models = []
    for make in (net, lambda: WRAPS[wrap](net())):
        torch.manual_seed(5)
        models.append(lr.adapt(make(), OTHER_METHODS[method]))
        randomize(models[-1])
        lr.save_adapter(models[-1], tmp_path / str(len(models)))
    assert same_files(tmp_path / "1", tmp_path / "2")
    loaded = lr.load_adapter(WRAPS[wrap](net()), tmp_path / "1")
    for model in (*models, loaded):
        torch.testing.assert_close(model(inputs()), models[0](inputs()))


@pytest.mark.parametrize("wrap", ["compile", "compiled_linears", "checkpoint_blocks", "nested"])
def test_a_bank_on_a_wrapped_model(wrap: str, tmp_path: Path) -> None:
    model = lr.adapt(net(), lr.LoRAConfig(r=2, **ANCHORED["whole_paths"]))
    randomize(model)
    lr.save_adapter(model, tmp_path)
    wrapped = WRAPS[wrap](net())
    before = wrapped(inputs())
    bank = lr.AdapterBank(wrapped)
    bank.load("one", tmp_path)
    with bank.rows(["one", None, "one", None, None]):
        rows = wrapped(inputs())
    torch.testing.assert_close(rows[[0, 2]], model(inputs())[[0, 2]])
    assert torch.equal(rows[[1, 3, 4]], before[[1, 3, 4]])
    bank.close()
    assert torch.equal(wrapped(inputs()), before)


@pytest.mark.parametrize(
    ("prefix", "wrap"),
    [
        ("_orig_mod.", None),
        ("_checkpoint_wrapped_module.", "compiled_blocks"),
        ("_fsdp_wrapped_module._orig_mod.", None),
    ],
)
def test_keys_of_other_tools_with_the_names_of_wrappers(
    prefix: str, wrap: str | None, tmp_path: Path
) -> None:
    model = lr.adapt(net(), lr.LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["head"]))
    randomize(model)
    lr.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    renamed = {
        key.replace("layers.1.", f"layers.1.{prefix}").replace("head.0.", f"head.{prefix}0."): t
        for key, t in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    save_file(renamed, tmp_path / WEIGHTS, {"format": "pt"})
    base = net() if wrap is None else WRAPS[wrap](net())
    assert torch.equal(lr.load_adapter(base, tmp_path)(inputs()), model(inputs()))

    twice = {**tensors, **{key: tensor.clone() for key, tensor in renamed.items()}}
    save_file(twice, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match="names the same tensor as another key"):
        lr.load_adapter(net(), tmp_path)


def fsdp1(model: nn.Module) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({Block}),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )


OWNERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "ddp": nn.parallel.DistributedDataParallel,
    "ddp_of_compiled_blocks": lambda model: nn.parallel.DistributedDataParallel(
        each_block(compiled)(model)
    ),
    "compiled_ddp": lambda model: compiled(nn.parallel.DistributedDataParallel(model)),
    "fsdp1": fsdp1,
    "compiled_fsdp1": lambda model: compiled(fsdp1(model)),
}


@pytest.mark.parametrize(
    ("wrap", "init"),
    [*((wrap, "kaiming") for wrap in OWNERS), ("ddp", "pissa"), ("fsdp1", "pissa")],
)
def test_wrappers_that_own_parameters(
    wrap: str, init: str, one_rank_group: None, tmp_path: Path
) -> None:
    """DDP and FSDP1 are saved like plain models; adapters come before the wrapping."""
    config = lr.LoRAConfig(
        r=2, target_modules=["q_proj", "module"], init=init, modules_to_save=["head"]
    )
    model = lr.adapt(net(), config)
    randomize(model)
    lr.save_adapter(model, tmp_path / "plain")
    expected = model(inputs())
    wrapped = OWNERS[wrap](copy.deepcopy(model))
    torch.testing.assert_close(wrapped(inputs()), expected)
    lr.save_adapter(wrapped, tmp_path / "wrapped")
    assert same_files(tmp_path / "plain", tmp_path / "wrapped")
    torch.testing.assert_close(wrapped(inputs()), expected)

    base = net()
    base.requires_grad_(True)
    base = OWNERS[wrap](base)
    modules = dict(named_modules(base))
    for call in (lr.adapt, lr.load_adapter):
        argument = config if call is lr.adapt else tmp_path / "plain"
        with pytest.raises(ValueError, match=r"model must not be .*before wrapping"):
            call(base, argument)
    assert dict(named_modules(base)) == modules
    if "fsdp1" in wrap:
        with pytest.raises(ValueError, match="load_adapter: model must not be sharded"):
            lr.load_adapter(wrapped, tmp_path / "plain")
    else:
        lr.load_adapter(wrapped, tmp_path / "plain")


def save_on_one_of_two_ranks(rank: int, directory: str) -> None:
    store = torch.distributed.FileStore(f"{directory}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    model = lr.adapt(net(), lr.LoRAConfig(r=2, target_modules=["q_proj"], modules_to_save=["head"]))
    randomize(model)
    if rank == 0:
        lr.save_adapter(model, Path(directory) / "plain")
    wrapped = fsdp1(model)
    assert any(parameter.numel() == 0 for parameter in wrapped.parameters()) or rank == 0
    lr.save_adapter(wrapped, Path(directory) / "wrapped")
    end_worker()


def test_fsdp1_gathers_what_it_has_sharded(tmp_path: Path) -> None:
    mp.spawn(save_on_one_of_two_ranks, (str(tmp_path),), nprocs=2)
    assert same_files(tmp_path / "plain", tmp_path / "wrapped")
