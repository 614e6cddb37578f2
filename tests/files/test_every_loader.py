"""Every loader on damaged files of every kind: it loads the same, or raises, nothing changed."""

import dataclasses
import json
import unicodedata
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from damaged_files import copied, damages
from small_models import small_llama
from snapshots import bits, snapshot
from torch import Tensor, nn

import lowrank_ext as lr
from lowrank_ext.checkpoint import LoRATensors
from lowrank_ext.config import AdapterConfig
from lowrank_ext.methods.lora_guard import GuardModel


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 5)
        self.body = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5))
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(torch.tanh(self.embed(x)))))


def net() -> Net:
    torch.manual_seed(4)
    return Net().eval()


def trained(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    return model


class Loader(NamedTuple):
    """Saves into a directory; makes what is loaded into; loads, and returns the model then."""

    save: Callable[[Path], object]
    make: Callable[[], Any]
    load: Callable[[Any, Path], nn.Module]


NAMES = ["embed", "0", "2"]
CONFIGS: dict[str, AdapterConfig] = {
    "lora": lr.LoRAConfig(
        r=2,
        alpha=3,
        dropout=0.25,
        target_modules=NAMES,
        modules_to_save=["head", "norm"],
        rank_pattern={"embed": 3},
        alpha_pattern={"body.0": 5},
    ),
    "pissa": lr.LoRAConfig(r=2, target_modules=NAMES, init="pissa"),
    "lamda": lr.LaMDAConfig(r=2, target_modules=NAMES, rank_budget="rank"),
    "aflora": lr.AFLoRAConfig(r=2, target_modules=NAMES, live_modules="embed|body.0"),
    "goat": lr.GOATConfig(r=4, num_experts=2, top_k=1, target_modules=NAMES, dropout=0.25),
    "reslora": lr.ResLoRAConfig(r=2, target_modules=NAMES, shortcut="block", pre_num=2),
    "set_and_sequence": lr.BasisLoRAConfig(r=2, target_modules=NAMES, residuals=["dance"]),
}


def adapter_loader(config: AdapterConfig, adapted: bool) -> Loader:
    return Loader(
        lambda path: lr.save_adapter(trained(lr.adapt(net(), config)), path),
        (lambda: lr.adapt(net(), config)) if adapted else net,
        lambda model, path: lr.load_adapter(model, path),
    )


def bank_loader() -> Loader:
    config = lr.LoRAConfig(r=2, alpha=3, target_modules=["0", "2"])

    def make() -> lr.AdapterBank:
        bank = lr.AdapterBank(net())
        factors = torch.ones(1, 6), torch.ones(5, 1)
        bank.add("old", {"embed": LoRATensors(*factors, 1.0)})
        bank.add("other", {"body.2": LoRATensors(torch.ones(1, 7), torch.ones(5, 1), 1.0)})
        return bank

    def load(bank: lr.AdapterBank, path: Path) -> nn.Module:
        bank.load("new", path)
        return bank.model

    return Loader(lambda path: lr.save_adapter(trained(lr.adapt(net(), config)), path), make, load)


def residual_loader() -> Loader:
    config = lr.BasisLoRAConfig(r=2, target_modules=NAMES)

    def stage_1() -> nn.Module:
        return trained(lr.adapt(net(), config))

    def save(path: Path) -> None:
        model = trained(lr.motion.begin_residual_stage(stage_1(), "dance"))
        lr.motion.save_residual(model, path, "dance")

    return Loader(save, stage_1, lambda model, path: lr.motion.load_residual(model, path))


def guard_loader() -> Loader:
    def base() -> nn.Module:
        torch.manual_seed(2)
        return small_llama()

    return Loader(
        lambda path: GuardModel(
            base(), r=2, num_categories=3, category_names=["a", "b", "c"]
        ).save_pretrained(path),
        base,
        lambda model, path: GuardModel.from_pretrained(model, path),
    )


def style_loader() -> Loader:
    diffusers = pytest.importorskip("diffusers")

    def unet() -> nn.Module:
        torch.manual_seed(11)
        return diffusers.UNet2DConditionModel(
            sample_size=4,
            layers_per_block=1,
            block_out_channels=(4,),
            norm_num_groups=2,
            down_block_types=("CrossAttnDownBlock2D",),
            up_block_types=("UpBlock2D",),
            cross_attention_dim=6,
            attention_head_dim=2,
        ).eval()

    def save(path: Path) -> None:
        model = unet()
        lr.style.add_style_path(model)
        embedder = lr.style.StyleEmbedder(4, 6, num_tokens=2, num_layers=1, num_heads=2)
        lr.style.save_style(trained(model), path, embedder)

    def load(model: nn.Module, path: Path) -> nn.Module:
        return nn.ModuleList([model, lr.style.load_style(model, path)])

    return Loader(save, unet, load)


def recursive_loader() -> Loader:
    def save(path: Path) -> None:
        config = lr.recursive.RecursiveConfig(num_loops=2, rank={"q_proj": 2, "up_proj": 3})
        lr.recursive.convert(small_llama(), config).save_pretrained(path)

    return Loader(save, net, lambda model, path: lr.recursive.load(path))


LOADERS: dict[str, Callable[[], Loader]] = {
    **{
        name: lambda config=config: adapter_loader(config, False)
        for name, config in CONFIGS.items()
    },
    "lora, adapted": lambda: adapter_loader(CONFIGS["lora"], True),
    "pissa, adapted": lambda: adapter_loader(CONFIGS["pissa"], True),
    "bank": bank_loader,
    "residual": residual_loader,
    "guard": guard_loader,
    "style": style_loader,
    "recursive": recursive_loader,
}


def outcome(model: nn.Module) -> tuple[str, dict[str, bytes]]:
    """Options, as the model prints them, and bits."""
    return repr(model), {key: bits(tensor) for key, tensor in model.state_dict().items()}


def check_message(error: Exception, path: Path) -> None:
    text = str(error)
    assert len(text) < 1000, text
    assert not [c for c in text if unicodedata.category(c).startswith("C")], ascii(text)
    assert str(path) in text, f"the file is not named: {text}"


@pytest.mark.parametrize("name", LOADERS)
def test_damaged_files_load_the_same_or_change_nothing(name: str, tmp_path: Path) -> None:
    loader = LOADERS[name]()
    good = tmp_path / "good"
    loader.save(good)
    expected = outcome(loader.load(loader.make(), good))
    target = loader.make()
    before = snapshot(target)
    for index, damage in enumerate(damages(good, seed=sum(map(ord, name)))):
        path = copied(good, tmp_path / str(index), damage)
        files = snapshot(path)
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                loaded = loader.load(target, path)
        except (ValueError, OSError) as error:
            check_message(error, path)
            assert snapshot(target) == before, damage.name
        else:
            # A config that selects fewer modules than the file holds is followed, and that is said.
            narrowed = any("does not select" in str(warning.message) for warning in said)
            assert outcome(loaded) == expected or narrowed, damage.name
            target = loader.make()
            before = snapshot(target)
        assert snapshot(path) == files, damage.name


def edit(path: Path, **fields: Any) -> None:
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, **fields}))


def check_refused(name: str, loader: Loader, target: Any, path: Path, message: str) -> None:
    before = snapshot(target)
    with pytest.raises(ValueError, match=message):
        loader.load(target, path)
    assert snapshot(target) == before


@pytest.mark.parametrize("alpha", [5e-324, 1e-40, 1e39, 1e308], ids=str)
@pytest.mark.parametrize("field", ["lora_alpha", "alpha_pattern"])
@pytest.mark.parametrize("name", ["lora", "lora, adapted", "bank", "guard"])
def test_scalings_that_float32_does_not_hold(
    name: str, field: str, alpha: float, tmp_path: Path
) -> None:
    loader = LOADERS[name]()
    loader.save(tmp_path)
    last = "v_proj" if name == "guard" else "2"  # after modules whose scaling fits
    edit(tmp_path, **{field: alpha if field == "lora_alpha" else {last: alpha}})
    message = "(scaling|alpha).* must be (positive|from 1.18e-38)"
    check_refused(name, loader, loader.make(), tmp_path, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"style_dim": 10**9, "init": "random"}, r"must be \[C, style_dim=1000000000\], got"),
        ({"embedder": {"width": 10**9}}, r"embedder\.proj must be \[1000000000, 6\], got \[4, 6\]"),
        ({"embedder": {"out_dim": 10**12}}, r"embedder\.proj must be \[4, 1000000000000\], got"),
        ({"embedder": {"num_tokens": 10**9}}, r"embedder\.queries must be \[1000000000, 4\], got"),
        ({"embedder": {"num_layers": 10**9}}, "num_layers must be 1 as in the tensor file, got"),
        ({"embedder": {"device": "cuda"}}, "embedder: options must be num_heads, "),
    ],
    ids=lambda value: str(value)[:40],
)
def test_style_files_allocate_nothing_before_shapes_are_compared(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    loader = style_loader()
    loader.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    if "embedder" in changes:
        changes = {"embedder": {**config["embedder"], **changes["embedder"]}}
    edit(tmp_path, **changes)
    check_refused("style", loader, loader.make(), tmp_path, message)


def test_values_that_overflow_in_the_models_dtype(tmp_path: Path) -> None:
    """float32 in the file, float16 in the model: inf, without a check."""
    config = lr.LoRAConfig(r=2, target_modules=["0"], modules_to_save=["head"])
    model = lr.adapt(net(), config)
    lr.save_adapter(model, tmp_path / "good")
    with torch.no_grad():
        model.head.bias[3] = 1e6
    lr.save_adapter(model, tmp_path / "head")
    with torch.no_grad():
        model.head.bias[3] = 1
        model.body[0].lora_b[1, 1] = 1e6
    lr.save_adapter(model, tmp_path / "adapter")
    plain = lr.LoRAConfig(r=2, target_modules=["0"], adapter_dtype="float16")
    for target, name, message in (
        (net().half(), "head", r"head\.bias must be finite in torch\.float16"),
        (
            lr.adapt(net().half(), dataclasses.replace(plain, modules_to_save=["head"])),
            "adapter",
            r"lora_B\.weight must be finite in torch\.float16",
        ),
        (lr.AdapterBank(net().half()), "bank", r"lora_b must be finite in torch\.float16"),
    ):
        path = tmp_path / name
        if name == "bank":
            model.lowrank_config = dataclasses.replace(model.lowrank_config, modules_to_save=())
            lr.save_adapter(model, path)
        before = snapshot(target)
        with pytest.raises(ValueError, match=message):
            target.load("a", path) if name == "bank" else lr.load_adapter(target, path)
        assert snapshot(target) == before
