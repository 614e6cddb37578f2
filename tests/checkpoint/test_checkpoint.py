"""save_adapter and load_adapter: exactness, atomic replacement, and refusal of damaged files."""

import copy
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowrank_ext as lr
from lowrank_ext.nn import LaMDALinear

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
P = "base_model.model."
DTYPES = [torch.float32, torch.bfloat16]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 10)
        self.body = nn.Sequential(nn.Linear(10, 14), nn.Tanh(), nn.Linear(14, 10))
        self.norm = nn.BatchNorm1d(10)
        self.head = nn.Linear(10, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(torch.tanh(self.embed(x)))))


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(4)
    model = Net().to(dtype).eval()
    with torch.no_grad():  # spectra that differ, for LaMDA++
        model.embed.weight.mul_(0.5 ** torch.arange(12).to(dtype))
    return model


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(9)).to(dtype)


def lora(**options: Any) -> lr.LoRAConfig:
    return lr.LoRAConfig(**{"r": 4, "target_modules": ["embed", "0", "2"], **options})


def lamda(**options: Any) -> lr.LaMDAConfig:
    return lr.LaMDAConfig(**{"r": 4, "target_modules": ["embed", "0", "2"], **options})


def goat(**options: Any) -> lr.GOATConfig:
    names = {"target_modules": ["embed", "0", "2"]}
    return lr.GOATConfig(**{"r": 4, "num_experts": 2, "top_k": 1, **names, **options})


def aflora(**options: Any) -> lr.AFLoRAConfig:
    return lr.AFLoRAConfig(**{"r": 4, "target_modules": ["embed", "0", "2"], **options})


def reslora(**options: Any) -> lr.ResLoRAConfig:
    return lr.ResLoRAConfig(**{"r": 4, "target_modules": ["embed", "0", "2"], **options})


def basis(**options: Any) -> lr.BasisLoRAConfig:
    names = {"target_modules": ["embed", "0", "2"]}
    # Without masks, so that outputs in training mode can be compared.
    masks = {"coef_dropout": 0.0, "residual_coef_dropout": 0.0}
    return lr.BasisLoRAConfig(**{"r": 4, **names, **masks, **options})


AnyConfig = (
    lr.LoRAConfig
    | lr.LaMDAConfig
    | lr.AFLoRAConfig
    | lr.GOATConfig
    | lr.ResLoRAConfig
    | lr.BasisLoRAConfig
)
CONFIGS: dict[str, Callable[[], AnyConfig]] = {
    "lora": lora,
    "lora_base_dtype": lambda: lora(adapter_dtype="base"),
    "lora_modules_to_save": lambda: lora(modules_to_save=["head", "norm"], alpha=9.5, dropout=0.1),
    "lora_rslora_patterns": lambda: lora(
        rslora=True, alpha=3, rank_pattern={"body.0": 2}, alpha_pattern={"embed": 7}
    ),
    "pissa": lambda: lora(init="pissa", alpha=12),
    "pissa_rslora": lambda: lora(init="pissa", alpha=7, rslora=True, rank_pattern={"embed": 3}),
    "lamda": lamda,
    "lamda_base_dtype": lambda: lamda(adapter_dtype="base", alpha=3),
    "lamda_rslora_patterns": lambda: lamda(
        rslora=True, rank_pattern={"embed": 3}, alpha_pattern={"2": 5}
    ),
    "lamda_zero_core": lambda: lamda(init="svd_zero_core", modules_to_save=["norm"]),
    "lamda_released": lambda: lamda(init="lora"),
    "lamda_frozen_b": lambda: lamda(train_lora_b=False),
    "lamda++": lambda: lamda(rank_budget="rank", r=6),
    "aflora": lambda: aflora(alpha=3),
    "aflora_live_modules": lambda: aflora(
        live_modules=["embed", "body.0"], rank_scale_init=0.5, rank_pattern={"embed": 3}
    ),
    "aflora_vectors_alone": lambda: aflora(
        live_modules=(), adapter_dtype="base", modules_to_save=["norm"]
    ),
    "goat": lambda: goat(dropout=0.1, balance_coefficient=0.5, alpha=3),
    "goat_base_dtype": lambda: goat(adapter_dtype="base", shared_dropout=True, rho=3.5),
    "goat_mini_patterns": lambda: goat(
        init="goat_mini",
        residual_factor=0.25,
        rank_pattern={"embed": 8},
        alpha_pattern={"2": 5},
    ),
    "goat_theory": lambda: goat(scale="theory", eta=0.3, rank_pattern={"body.2": 2}),
    "moe_lora": lambda: goat(init="zero", num_experts=4, top_k=3, modules_to_save=["head"]),
    "reslora_input": lambda: reslora(alpha=3, dropout=0.1, merge="input"),
    "reslora_block": lambda: reslora(shortcut="block", pre_num=2, shared_dropout=True),
    "reslora_middle": lambda: reslora(
        shortcut="middle",
        pre_num=-1,
        adapter_dtype="base",
        rslora=True,
        rank_pattern={"embed": 2},
        modules_to_save=["norm"],
    ),
    "set_and_sequence": lambda: basis(alpha=6, coef_dropout=0.7, modules_to_save=["norm"]),
    "set_and_sequence_residuals": lambda: basis(
        residuals=["dance", "wave"], rank_pattern={"embed": 3}, modules_to_save=["head"]
    ),
    "set_and_sequence_up": lambda: basis(
        basis="up", residuals=["dance"], mask_per="sample", mask_rescale=False, mask_identity=True
    ),
    "lamda++params": lambda: lamda(rank_budget="params", direction="concentrated_gets_more", r=6),
}


@torch.no_grad()
def randomize(model: Net) -> None:
    """Values as after training."""
    generator = torch.Generator().manual_seed(11)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.3 * noise.to(parameter.dtype))
    if model.norm.weight.requires_grad:  # its statistics are saved with it
        model.norm.running_mean.fill_(0.25)
        model.norm.num_batches_tracked.fill_(17)


def trained(config: AnyConfig, dtype: torch.dtype = torch.float32) -> Net:
    model = lr.adapt(net(dtype), config)
    randomize(model)
    return model


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    state_a, state_b = a.state_dict(), b.state_dict()
    assert state_a.keys() == state_b.keys()
    for name, value in state_a.items():
        assert value.dtype == state_b[name].dtype, name
        assert torch.equal(value, state_b[name]), name


def edit_config(path: Path, **changes: Any) -> None:
    fields = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps(fields | changes))


def edit_tensors(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path / WEIGHTS)
    edit(tensors)
    save_file(tensors, path / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_loading_on_the_original_base_is_exact(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Adapter, residual base, buffers and outputs: bit for bit."""
    model = trained(CONFIGS[name](), dtype)
    lr.save_adapter(model, tmp_path)
    loaded = net(dtype)
    assert lr.load_adapter(loaded, tmp_path) is loaded
    assert_same_state(loaded, model)
    assert torch.equal(loaded(inputs(dtype)), model(inputs(dtype)))
    assert not torch.equal(loaded(inputs(dtype)), net(dtype)(inputs(dtype)))

    ours = {n: (p.requires_grad, p.dtype) for n, p in model.named_parameters()}
    assert {n: (p.requires_grad, p.dtype) for n, p in loaded.named_parameters()} == ours
    for path, module in model.named_modules():
        if isinstance(module, lr.nn.LowRankLinear):
            other = loaded.get_submodule(path)
            assert type(other) is type(module)
            assert (other.r, other.scaling, other.init) == (module.r, module.scaling, module.init)
            assert other.residual_taken is module.residual_taken

    lr.save_adapter(loaded, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()
    assert (tmp_path / "again" / CONFIG).read_text() == (tmp_path / CONFIG).read_text()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_loading_into_an_adapted_model_is_exact(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = trained(CONFIGS[name](), dtype)
    lr.save_adapter(model, tmp_path)
    other = lr.adapt(net(dtype), CONFIGS[name]())
    kept = dict(other.named_parameters())
    lr.load_adapter(other, tmp_path)
    assert_same_state(other, model)
    assert all(parameter is kept[name] for name, parameter in other.named_parameters())


def test_another_residual_is_replaced_to_one_rounding(tmp_path: Path) -> None:
    model = trained(lamda())
    lr.save_adapter(model, tmp_path)
    other = lr.adapt(net(), lamda())
    for module in other.modules():
        if isinstance(module, LaMDALinear):  # as an SVD with other signs would have it
            module.restore_base()
            for tensor in (module.lora_a.data, module.lora_b.data, module.lora_b_init):
                tensor.neg_()
            module.core_init.mul_(1.5)
            module.take_residual()
    lr.load_adapter(other, tmp_path)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=0, atol=1e-6)
    assert torch.equal(other.body[0].core, model.body[0].core)


@pytest.mark.parametrize("name", ["lora", "pissa", "lamda", "goat", "lora_modules_to_save"])
def test_keys_and_shapes_in_the_file(name: str, tmp_path: Path) -> None:
    lr.save_adapter(trained(CONFIGS[name]()), tmp_path)
    r = 8 if name == "pissa" else 4
    shapes: dict[str, list[int]] = {}
    for path, (n, k) in {"embed": (10, 12), "body.0": (14, 10), "body.2": (10, 14)}.items():
        shapes[f"{P}{path}.lora_A.weight"] = [r, k]
        shapes[f"{P}{path}.lora_B.weight"] = [n, r]
        if name == "goat":
            factors = {"lora_A": [2, 2, k], "lora_B": [2, n, 2]}
            for key, shape in factors.items():
                shapes[f"{P}{path}.{key}.weight"] = shapes[f"{P}{path}.{key}_init.weight"] = shape
            shapes[f"{P}{path}.lora_router.weight"] = [2, k]
        if name == "lamda":
            shapes[f"{P}{path}.lora_core.weight"] = [r, r]
            shapes[f"{P}{path}.lora_B_init.weight"] = [n, r]
            shapes[f"{P}{path}.lora_core_init.weight"] = [r]
    if name == "lora_modules_to_save":
        shapes |= {f"{P}head.weight": [12, 10], f"{P}head.bias": [12]}
        shapes |= {f"{P}norm.{key}": list(v.shape) for key, v in net().norm.state_dict().items()}
    stored = load_file(tmp_path / WEIGHTS)
    assert {key: list(tensor.shape) for key, tensor in stored.items()} == shapes
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["peft_type"] == {"lamda": "LAMDA", "goat": "GOAT"}.get(name, "LORA")
    assert (config["r"], config["bias"]) == (r, "none")


def test_pissa_file_is_a_plain_lora_of_the_original_base(tmp_path: Path) -> None:
    model = trained(lora(init="pissa", alpha=12))
    lr.save_adapter(model, tmp_path)
    edit_tensors(tmp_path, lambda tensors: None)  # loses the mark, as a conversion by others would
    plain = lr.load_adapter(net(), tmp_path)
    assert (plain.embed.r, plain.embed.init, plain.embed.scaling) == (8, "kaiming", 3.0)
    assert torch.equal(plain.embed.weight, net().embed.weight)
    torch.testing.assert_close(plain(inputs()), model(inputs()), rtol=1e-5, atol=1e-5)


def test_pissa_file_with_an_edited_config_means_what_the_config_says(tmp_path: Path) -> None:
    model = trained(lora(init="pissa", alpha=12))
    lr.save_adapter(model, tmp_path)
    edit_config(tmp_path, lora_alpha=0.001)
    nearly_off = lr.load_adapter(net(), tmp_path)
    assert nearly_off.embed.init == "kaiming"
    torch.testing.assert_close(nearly_off(inputs()), net()(inputs()), rtol=1e-3, atol=1e-3)


def test_lamda_plus_plus_ranks_survive_even_when_all_are_equal(tmp_path: Path) -> None:
    model = trained(lamda(rank_budget="rank", r=6))
    ranks = {p: m.r for p, m in model.named_modules() if isinstance(m, LaMDALinear)}
    assert len(set(ranks.values())) > 1
    lr.save_adapter(model, tmp_path)
    fields = json.loads((tmp_path / CONFIG).read_text())
    assert fields["rank_budget"] == "rank" and fields["rank_pattern"]

    equal = trained(lamda(rank_budget="rank", r=6, rank_pattern={".*": 5}))
    lr.save_adapter(equal, tmp_path / "equal")
    edit_config(tmp_path / "equal", rank_pattern={}, r=5, lora_alpha=5)
    loaded = lr.load_adapter(net(), tmp_path / "equal")
    assert [m.r for m in loaded.modules() if isinstance(m, LaMDALinear)] == [5, 5, 5]


@pytest.mark.parametrize(
    ("base", "file", "expected"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.float16, torch.float16, torch.float16),
        (torch.float64, torch.float32, torch.float64),
        (torch.float32, torch.float64, torch.float32),
    ],
    ids=str,
)
def test_adapter_dtype_follows_file_and_base(
    base: torch.dtype, file: torch.dtype, expected: torch.dtype, tmp_path: Path
) -> None:
    model = trained(lora())
    lr.save_adapter(model, tmp_path)

    def convert(tensors: dict[str, Tensor]) -> None:
        tensors.update({key: tensor.to(file) for key, tensor in tensors.items()})

    edit_tensors(tmp_path, convert)
    loaded = lr.load_adapter(net(base), tmp_path)
    assert loaded.embed.lora_a.dtype == expected
    assert torch.equal(loaded.embed.lora_a, model.embed.lora_a.to(file).to(expected))
    assert loaded.embed.weight.dtype == base


def test_saved_tensors_have_the_dtype_of_their_parameters(tmp_path: Path) -> None:
    model = trained(lora(modules_to_save=["head"]), torch.bfloat16)
    lr.save_adapter(model, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    assert stored[f"{P}embed.lora_A.weight"].dtype == torch.float32
    assert stored[f"{P}head.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["lora_modules_to_save", "lamda"])
def test_not_trainable(name: str, tmp_path: Path) -> None:
    lr.save_adapter(trained(CONFIGS[name]()), tmp_path)
    loaded = lr.load_adapter(net(), tmp_path, trainable=False)
    assert not any(p.requires_grad for p in loaded.parameters())
    adapted = lr.load_adapter(lr.adapt(net(), CONFIGS[name]()), tmp_path, trainable=False)
    assert not any(p.requires_grad for p in adapted.parameters())


def test_saving_changes_nothing_and_merged_models_save_the_same(tmp_path: Path) -> None:
    model = trained(lamda())
    before = copy.deepcopy(model)
    state = torch.get_rng_state()
    lr.save_adapter(model, tmp_path / "a")
    assert_same_state(model, before)
    lr.merge(model)
    lr.save_adapter(model, str(tmp_path / "b"))
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    lr.load_adapter(net(), tmp_path / "a")
    assert torch.equal(state, torch.get_rng_state())


def test_wrapped_models_are_saved_like_plain_ones(tmp_path: Path) -> None:
    model = trained(lora())
    lr.save_adapter(model, tmp_path / "plain")
    lr.save_adapter(torch.compile(model, backend="eager"), tmp_path / "compiled")
    for name in (CONFIG, WEIGHTS):
        plain = (tmp_path / "plain" / name).read_bytes()
        assert plain == (tmp_path / "compiled" / name).read_bytes()
    loaded = lr.load_adapter(torch.compile(net(), backend="eager"), tmp_path / "plain")
    assert torch.equal(loaded(inputs()), model(inputs()))


@pytest.mark.parametrize("name", ["lora_modules_to_save", "pissa", "lamda"])
def test_distributed_models_are_saved_like_plain_ones(
    name: str, one_rank_group: None, tmp_path: Path
) -> None:
    from torch.distributed.fsdp import fully_shard

    model = trained(CONFIGS[name]())
    lr.save_adapter(model, tmp_path / "plain")
    lr.save_adapter(nn.parallel.DistributedDataParallel(model), tmp_path / "ddp")
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    lr.save_adapter(sharded := fully_shard(model, mesh=mesh), tmp_path / "fsdp2")
    for wrapped in ("ddp", "fsdp2"):
        for file in (CONFIG, WEIGHTS):
            data = (tmp_path / wrapped / file).read_bytes()
            assert data == (tmp_path / "plain" / file).read_bytes()
    with pytest.raises(ValueError, match=r"load_adapter: .* must not be sharded"):
        lr.load_adapter(sharded, tmp_path / "plain")


def tied_net() -> Net:
    model = net()
    model.head = nn.Linear(12, 10)  # of the shape to tie; these models are not run
    model.head.weight = model.embed.weight
    return model


LOST: dict[str, Callable[[Net], object]] = {
    r"norm\.weight and 1 more require a gradient": lambda m: m.norm.requires_grad_(),
    r"embed\.bias require a gradient": lambda m: m.embed.bias.requires_grad_(),
    r"the scaling of body\.0 was changed, from 1 to 0\.5": lambda m: setattr(
        m.body[0], "scaling", 0.5
    ),
}


@pytest.mark.parametrize("match", LOST)
@pytest.mark.parametrize("wrap", [lambda m: m, torch.compile], ids=["plain", "compiled"])
def test_what_the_files_do_not_hold_is_said(wrap: Any, match: str, tmp_path: Path) -> None:
    model = wrap(lr.adapt(net(), lora()))
    LOST[match](model)
    with pytest.warns(UserWarning, match=f"save_adapter: {match}") as said:
        lr.save_adapter(model, tmp_path)
    assert len(said) == 1 and said[0].filename == __file__


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_values_that_no_load_takes_are_said_where_they_are_saved(
    value: float, tmp_path: Path
) -> None:
    model = lr.adapt(net(), lora(modules_to_save=["norm"]))
    with torch.no_grad():
        model.embed.lora_b[0, 0] = model.norm.weight[0] = value
    with pytest.warns(UserWarning, match="and 1 more hold inf or nan, which load_adap") as said:
        lr.save_adapter(model, tmp_path)
    assert len(said) == 1 and said[0].filename == __file__
    with pytest.raises(ValueError, match="must be finite"):
        lr.load_adapter(net(), tmp_path)


@pytest.mark.parametrize("config", [lora(modules_to_save=["norm"]), lamda(), goat()])
def test_what_the_files_hold_is_not_warned_of(config: lr.LoRAConfig, tmp_path: Path) -> None:
    model = lr.adapt(net(), config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lr.save_adapter(model, tmp_path)
        lr.save_adapter(lr.load_adapter(net(), tmp_path), tmp_path)


def test_tied_modules_to_save(tmp_path: Path) -> None:
    """Both owners saved: equal tensors, and the tie survives. One owner saved: refused."""
    both = lora(target_modules=["0"], modules_to_save=["embed", "head"])
    model = lr.adapt(tied_net(), both)
    randomize(model)
    lr.save_adapter(model, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    assert torch.equal(stored[f"{P}embed.weight"], stored[f"{P}head.weight"])
    loaded = lr.load_adapter(tied_net(), tmp_path)
    assert loaded.head.weight is loaded.embed.weight
    assert_same_state(loaded, model)

    edit_tensors(tmp_path, lambda tensors: tensors[f"{P}head.weight"].mul_(2))
    loaded = lr.load_adapter(tied_net(), tmp_path)
    assert torch.equal(loaded.embed.weight, model.embed.weight)
    assert torch.equal(loaded.head.weight, 2 * model.embed.weight)
    assert loaded.embed.weight.requires_grad and loaded.head.weight.requires_grad

    one = lora(target_modules=["0"], modules_to_save=["head"])
    with pytest.raises(ValueError, match=r"adapt: .* head\.weight without embed\.weight"):
        lr.adapt(tied_net(), one)
    model = lr.adapt(tied_net(), lora(target_modules=["0"]))  # told only afterwards
    model.lowrank_config = one
    with pytest.raises(ValueError, match=r"save_adapter: .* head\.weight without embed\.weight"):
        lr.save_adapter(model, tmp_path / "one")
    assert not (tmp_path / "one").exists()


def test_models_that_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="save_adapter: model must carry adapters"):
        lr.save_adapter(net(), tmp_path / "x")
    by_hand = nn.Sequential(lr.nn.LoRALinear.from_linear(nn.Linear(3, 3), r=2))
    with pytest.raises(ValueError, match="save_adapter: model must have been adapted"):
        lr.save_adapter(by_hand, tmp_path / "x")
    restored = trained(lamda())
    restored.embed.restore_base()
    with pytest.raises(ValueError, match="save_adapter: embed must hold its residual"):
        lr.save_adapter(restored, tmp_path / "x")
    with torch.device("meta"):
        meta = lr.adapt(Net(), lora())
    with pytest.raises(ValueError, match="save_adapter: embed must hold values"):
        lr.save_adapter(meta, tmp_path / "x")
    assert not (tmp_path / "x").exists()


# ------------------------------------------------------------------------- atomic replacement


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture
def two_models(tmp_path: Path) -> tuple[Net, Net]:
    """Two adapters that differ in values and config; the first is saved in tmp_path."""
    old = trained(lora(r=3))
    lr.save_adapter(old, tmp_path)
    (tmp_path / "README.md").write_text("kept")
    return old, trained(lora(r=2, alpha=5))


class DiskFullError(OSError):
    pass


@pytest.mark.parametrize("failing", ["write", "fsync"])
@pytest.mark.parametrize("call", [0, 1])
def test_failed_writes_leave_the_old_pair(
    failing: str,
    call: int,
    two_models: tuple[Net, Net],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = contents(tmp_path)
    calls = 0
    if failing == "fsync":
        real_fsync = os.fsync

        def fsync(descriptor: int) -> None:
            nonlocal calls
            calls += 1
            if calls > call:
                raise DiskFullError
            real_fsync(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
    else:
        real_open = Path.open

        def open_(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            file = real_open(self, mode, *args, **kwargs)
            if "x" in mode:
                calls += 1
                if calls > call:
                    file.write(b"half")
                    file.close()
                    raise DiskFullError
            return file

        monkeypatch.setattr(Path, "open", open_)
    with pytest.raises(DiskFullError):
        lr.save_adapter(two_models[1], tmp_path)
    monkeypatch.undo()
    assert contents(tmp_path) == before
    assert_same_state(lr.load_adapter(net(), tmp_path), two_models[0])


@pytest.mark.parametrize("renames", [0, 1, 2])
def test_a_process_that_dies_leaves_one_whole_pair(
    renames: int, two_models: tuple[Net, Net], tmp_path: Path
) -> None:
    """Killed before each of the three renames: config aside, weights (the commit), config."""
    old, new = two_models
    torch.save(new, tmp_path / "model.pt")
    script = f"""
import os, sys, torch
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_checkpoint
import lowrank_ext as lr
real, left = Path.replace, {renames}
def replace(self, target):
    global left
    if left == 0:
        os._exit(9)
    left -= 1
    return real(self, target)
model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
Path.replace = replace
lr.save_adapter(model, {str(tmp_path)!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    expected = new if renames == 2 else old
    assert_same_state(lr.load_adapter(net(), tmp_path), expected)
    # the next save clears the matter up, whatever it writes
    for model in (old, new):
        lr.save_adapter(model, tmp_path)
        assert_same_state(lr.load_adapter(net(), tmp_path), model)


def test_a_config_that_cannot_be_renamed_still_leaves_a_whole_pair(
    two_models: tuple[Net, Net], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if target.name == CONFIG:
            raise PermissionError(target)
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(PermissionError):
        lr.save_adapter(two_models[1], tmp_path)
    monkeypatch.undo()
    assert_same_state(lr.load_adapter(net(), tmp_path), two_models[1])
    lr.save_adapter(two_models[0], tmp_path)
    assert_same_state(lr.load_adapter(net(), tmp_path), two_models[0])


def test_left_over_config_of_other_weights_is_ignored(tmp_path: Path) -> None:
    model = trained(lora())
    lr.save_adapter(model, tmp_path)
    (tmp_path / f".{CONFIG}.{'0' * 64}.77").write_text("{")
    assert_same_state(lr.load_adapter(net(), tmp_path), model)


def test_directories_are_made_and_other_files_kept(
    two_models: tuple[Net, Net], tmp_path: Path
) -> None:
    lr.save_adapter(two_models[1], tmp_path)
    assert (tmp_path / "README.md").read_text() == "kept"
    assert contents(tmp_path).keys() == {CONFIG, WEIGHTS, "README.md"}
    lr.save_adapter(two_models[0], tmp_path / "deep" / "er")
    assert contents(tmp_path / "deep" / "er").keys() == {CONFIG, WEIGHTS}
    with pytest.raises(OSError, match=r"README\.md"):
        lr.save_adapter(two_models[0], tmp_path / "README.md")
    assert (tmp_path / "README.md").read_text() == "kept"


# ------------------------------------------------------------------------------- refused files

EMBED_A = f"{P}embed.lora_A.weight"
EMBED_B = f"{P}embed.lora_B.weight"


def truncate(path: Path, size: int) -> None:
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(data[:size])


def rename(tensors: dict[str, Tensor], old: str, new: str) -> None:
    tensors[new] = tensors.pop(old)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "json_broken": (lambda p: (p / CONFIG).write_text('{"r": 4,'), rf"{CONFIG} must be JSON"),
    "json_not_text": (lambda p: (p / CONFIG).write_bytes(b"\xff\xfe{}"), rf"{CONFIG} must be JSON"),
    "json_a_list": (lambda p: (p / CONFIG).write_text("[1]"), rf"{CONFIG} must hold an object"),
    "no_type": (
        lambda p: edit_config(p, peft_type=None),
        "peft_type must be one of 'LORA', 'LAMDA', ",
    ),
    "type_unknown": (lambda p: edit_config(p, peft_type="IA3"), "peft_type .* got 'IA3'"),
    "other_method": (lambda p: edit_config(p, peft_type="LAMDA"), "lora_core.weight is missing"),
    "dora": (lambda p: edit_config(p, use_dora=True), "lora_magnitude_vector is missing"),
    "bias": (
        lambda p: edit_config(p, bias="all"),
        "bias is missing, a bias that .* says has been trained",
    ),
    "lora_bias": (lambda p: edit_config(p, lora_bias=True), "lora_B.bias is missing"),
    "replication": (
        lambda p: edit_config(p, layer_replication=[[0, 1]]),
        r"layer_replication=\[\[0, 1\]\] is not supported",
    ),
    "tokens": (
        lambda p: edit_config(p, trainable_token_indices=[3]),
        "trainable_token_indices",
    ),
    "future_switch": (lambda p: edit_config(p, use_magic=True), "use_magic=True is not known"),
    "future_config": (lambda p: edit_config(p, magic={"a": 1}), "magic=.* is not known"),
    "init_olora": (
        lambda p: edit_config(p, init_lora_weights="olora"),
        "init_lora_weights='olora' is not supported",
    ),
    "init_pissa_niter": (
        lambda p: edit_config(p, init_lora_weights="pissa_niter_4"),
        "init_lora_weights='pissa_niter_4' is not supported",
    ),
    "rank_zero": (lambda p: edit_config(p, r=0), "r must be at least 1, got 0"),
    "rank_text": (lambda p: edit_config(p, r="4"), "r must be an int, got '4'"),
    "alpha_text": (lambda p: edit_config(p, lora_alpha="x"), "alpha must be a number"),
    "dropout_two": (lambda p: edit_config(p, lora_dropout=2), "dropout must be between"),
    "pattern_list": (lambda p: edit_config(p, rank_pattern=[1]), "rank_pattern must be an object"),
    "pattern_regex": (
        lambda p: edit_config(p, rank_pattern={"(": 3}),
        "rank_pattern must hold regular expressions",
    ),
    "save_text": (lambda p: edit_config(p, modules_to_save="head"), "must be a list of names"),
    "rank_differs": (
        lambda p: edit_config(p, r=5),
        r"lora_A\.weight must be \[5, \d+\], got \[4, \d+\]",
    ),
    "rank_pattern_differs": (
        lambda p: edit_config(p, rank_pattern={"embed": 3}),
        r"embed\.lora_A\.weight must be \[3, 12\], got \[4, 12\]",
    ),
    "weights_empty": (lambda p: truncate(p, 0), rf"{WEIGHTS} must be a whole safetensors file"),
    "weights_header_cut": (lambda p: truncate(p, 40), rf"{WEIGHTS} must be a whole safetensors"),
    "weights_cut": (lambda p: truncate(p, -4), rf"{WEIGHTS} must be a whole safetensors file"),
    "no_tensors": (lambda p: edit_tensors(p, dict.clear), "must hold adapter tensors, got none"),
    "key_missing": (lambda p: edit_tensors(p, lambda t: t.pop(EMBED_B)), f"{EMBED_B} is missing"),
    "save_missing": (
        lambda p: edit_tensors(p, lambda t: t.pop(f"{P}head.bias")),
        r"head\.bias is missing",
    ),
    "module_unnamed": (
        lambda p: edit_config(p, modules_to_save=None),
        r"head\.(weight|bias) belongs to no adapter and to no module of modules_to_save",
    ),
    "key_extra": (
        lambda p: edit_tensors(p, lambda t: t.update({f"{P}norm.extra": torch.ones(2)})),
        r"norm\.extra belongs to no adapter",
    ),
    "kind_extra": (
        lambda p: edit_tensors(p, lambda t: t.update({f"{P}embed.lora_core.weight": torch.eye(4)})),
        r"embed\.lora_core\.weight is no tensor of LORA",
    ),
    "kind_of_peft": (
        lambda p: edit_tensors(p, lambda t: t.update({f"{P}embed.lora_E": torch.ones(4)})),
        r"embed\.lora_E belongs to no adapter",
    ),
    "prefix": (
        lambda p: edit_tensors(p, lambda t: rename(t, EMBED_A, "embed.lora_A.weight")),
        r"embed\.lora_A\.weight must start with base_model\.model\.",
    ),
    "module_lacking": (
        lambda p: edit_tensors(p, lambda t: rename(t, EMBED_A, f"{P}embde.lora_A.weight")),
        r"embde\.lora_A\.weight must belong to a linear, .* module.*did you mean 'embed'",
    ),
    "module_not_linear": (
        lambda p: edit_tensors(p, lambda t: rename(t, EMBED_A, f"{P}norm.lora_A.weight")),
        r"norm\.lora_A\.weight must belong to a linear, .* module, the model has BatchNorm1d",
    ),
    "shape_wide": (
        lambda p: edit_tensors(p, lambda t: t.update({EMBED_A: torch.ones(4, 13)})),
        r"embed\.lora_A\.weight must be \[4, 12\], got \[4, 13\]",
    ),
    "shape_flat": (
        lambda p: edit_tensors(p, lambda t: t.update({EMBED_B: torch.ones(40)})),
        r"embed\.lora_B\.weight must be \[10, 4\], got \[40\]",
    ),
    "shape_head": (
        lambda p: edit_tensors(p, lambda t: t.update({f"{P}head.bias": torch.ones(5)})),
        r"head\.bias must be \[12\], got \[5\]",
    ),
    "integers": (
        lambda p: edit_tensors(p, lambda t: t.update({EMBED_B: t[EMBED_B].int()})),
        r"embed\.lora_B\.weight must be floating-point, got torch\.int32",
    ),
}


def refuse(model: Net, path: Path, message: str) -> None:
    """load_adapter raises and leaves modules, parameters, values and flags as they were."""
    modules = dict(model.named_modules())
    parameters = {n: (p, p.requires_grad) for n, p in model.named_parameters()}
    before = copy.deepcopy(model.state_dict())
    config = getattr(model, "lowrank_config", None)
    with pytest.raises(ValueError, match=f"^load_adapter: .*{message}"):
        lr.load_adapter(model, path)
    assert dict(model.named_modules()) == modules
    assert {n: (p, p.requires_grad) for n, p in model.named_parameters()} == parameters
    assert getattr(model, "lowrank_config", None) is config
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_damaged_files_are_refused(damage: str, adapted: bool, tmp_path: Path) -> None:
    config = lora(modules_to_save=["head"])
    lr.save_adapter(trained(config), tmp_path)
    spoil, message = DAMAGES[damage]
    spoil(tmp_path)
    refuse(lr.adapt(net(), config) if adapted else net(), tmp_path, message)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("lora_core.weight", "is missing"),
        ("lora_B_init.weight", "is missing"),
        ("lora_core_init.weight", "is missing"),
    ],
)
def test_incomplete_lamda_files_are_refused(kind: str, message: str, tmp_path: Path) -> None:
    lr.save_adapter(trained(lamda()), tmp_path)
    key = f"{P}body.0.{kind}"
    edit_tensors(tmp_path, lambda tensors: tensors.pop(key))
    refuse(net(), tmp_path, f"{key} {message}")
    lr.save_adapter(trained(lamda()), tmp_path)
    edit_config(tmp_path, init="svd_zero_core")
    refuse(net(), tmp_path, "is no tensor of LAMDA")
    edit_config(tmp_path, init="svd")
    refuse(net(), tmp_path, "init must be one of")
    edit_config(tmp_path, init="svd_residual", rank_budget="most")
    refuse(net(), tmp_path, "rank_budget must be one of")


@pytest.mark.parametrize("kind", ["lora_router.weight", "lora_A_init.weight", "lora_B_init.weight"])
def test_incomplete_goat_files_are_refused(kind: str, tmp_path: Path) -> None:
    lr.save_adapter(trained(goat()), tmp_path)
    key = f"{P}body.0.{kind}"
    edit_tensors(tmp_path, lambda tensors: tensors.pop(key))
    refuse(net(), tmp_path, f"{key} is missing")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "zero"}, "_init.weight is no tensor of GOAT"),
        ({"init": "svd"}, "init must be one of"),
        ({"num_experts": 3}, "r, the total rank, must be a multiple of num_experts=3, got 4"),
        ({"num_experts": 4}, r"lora_A\.weight must be \[4, 1, \d+\], got \[2, 2, \d+\]"),
        ({"top_k": 3}, "top_k must be at most num_experts=2, got 3"),
        ({"rho": 0}, "rho must be positive"),
        ({"residual_factor": -1}, "residual_factor must be at least 0"),
        ({"scale": "sqrt"}, "scale must be one of"),
        ({"shared_dropout": 1}, "shared_dropout must be a bool, got 1"),
        ({"balance_coefficient": "x"}, "balance_coefficient must be a number"),
        ({"use_rslora": True}, "rslora must be False"),
    ],
    ids=str,
)
def test_odd_goat_configs_are_refused(changes: dict, message: str, tmp_path: Path) -> None:
    lr.save_adapter(trained(goat()), tmp_path)
    edit_config(tmp_path, **changes)
    refuse(net(), tmp_path, message)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lora(), "peft_type must be 'LORA'|lora_router"),
        (goat(init="goat_mini"), "init must be 'goat_mini'"),
        (goat(num_experts=4), "num_experts must be 4 as in the model, got 2"),
        (goat(top_k=2), "top_k must be 2 as in the model, got 1"),
        (goat(residual_factor=0.25), r"residual_factor must be 0\.25 as in the model, got 0\.5"),
        (goat(alpha=8), r"scaling of .* must be 4\.0 as in the model, got 2\.0"),
        (goat(scale="theory"), "scaling of .* as in the model, got 2"),
    ],
)
def test_another_goat_on_the_model_is_refused(
    other: AnyConfig, message: str, tmp_path: Path
) -> None:
    lr.save_adapter(trained(goat()), tmp_path)
    refuse(lr.adapt(net(), other), tmp_path, message)


def test_odd_pissa_files_are_refused(tmp_path: Path) -> None:
    lr.save_adapter(trained(lora(init="pissa")), tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(data.replace(b"embed.lora_B.weight", b"embed.lora_X.weight"))
    refuse(net(), tmp_path, r"embed\.lora_B\.weight is missing")


@pytest.mark.parametrize("lacking", [CONFIG, WEIGHTS])
def test_missing_files(lacking: str, tmp_path: Path) -> None:
    lr.save_adapter(trained(lora()), tmp_path)
    (tmp_path / lacking).unlink()
    with pytest.raises(FileNotFoundError, match=f"load_adapter: .*{lacking} does not exist"):
        lr.load_adapter(net(), tmp_path)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lamda(), "lora_core.weight is missing|peft_type must be 'LAMDA'"),
        (lora(init="pissa"), "init must be 'pissa'"),
        (lora(r=3), "rank of embed must be 3 as in the model, got 4"),
        (lora(r=5), "rank of embed must be 5 as in the model, got 4"),
        (lora(alpha=9), r"scaling of embed must be 2\.25 as in the model, got 1\.0"),
        (lora(rslora=True), r"scaling of embed must be 2\.0 as in the model, got 1\.0"),
        (lora(target_modules=["embed", "0"]), "adapted modules must be"),
        (lora(target_modules=["embed", "0", "2", "head"]), "adapted modules must be"),
        (lora(modules_to_save=["norm"]), r"modules_to_save must be \['norm'\]"),
    ],
)
def test_another_adapter_on_the_model_is_refused(
    other: AnyConfig, message: str, tmp_path: Path
) -> None:
    lr.save_adapter(trained(lora()), tmp_path)
    refuse(lr.adapt(net(), other), tmp_path, message)


def test_models_that_cannot_take_an_adapter(tmp_path: Path) -> None:
    lr.save_adapter(trained(lora()), tmp_path)
    merged = lr.merge(lr.adapt(net(), lora()))
    with pytest.raises(ValueError, match=r"load_adapter: body\.0 must not be merged"):
        lr.load_adapter(merged, tmp_path)
    with torch.device("meta"):
        meta = Net()
    with pytest.raises(ValueError, match=r"load_adapter: embed\.weight must hold values"):
        lr.load_adapter(meta, tmp_path)
    lr.save_adapter(trained(lamda(target_modules=["embed"])), tmp_path / "residual")
    tied = tied_net()
    refuse(tied, tmp_path / "residual", r"embed: .*tied to head\.weight")
