"""lr.motion: stages, scales, rows, residual files and export, on whole models."""

import copy
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from module_cases import IDS, TinyLM
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import lowrank_ext as lr
from lowrank_ext.methods.set_and_sequence.stages import basis_modules
from lowrank_ext.nn import BasisLoRALinear

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SIDES = ["down", "up"]
by_side = pytest.mark.parametrize("basis", SIDES)


@torch.no_grad()
def fill(model: nn.Module, seed: int = 3) -> nn.Module:
    """What trains at values as after training."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def base_model() -> TinyLM:
    torch.manual_seed(11)
    return TinyLM()


def stage1(model: nn.Module | None = None, **options: Any) -> nn.Module:
    config = lr.BasisLoRAConfig(**{"r": 4, "alpha": 6, **options})
    return fill(lr.adapt(model or base_model(), config)).eval()


def stage2(*names: str, model: nn.Module | None = None, **options: Any) -> nn.Module:
    """All residuals ``names``, each trained."""
    model = stage1(model, **options)
    for index, name in enumerate(names):
        fill(lr.motion.begin_residual_stage(model, name), seed=20 + index)
    return model


def trains(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value), name


# ---------------------------------------------------------------------------------------- stages


@by_side
def test_both_stages_train_and_leave_the_rest_alone(basis: str) -> None:
    """Masks, momentum and weight decay on: only what a stage trains moves, and its loss falls."""
    model = lr.adapt(
        base_model(),
        lr.BasisLoRAConfig(r=4, basis=basis, coef_dropout=0.3, modules_to_save=["norm"]),
    ).train()
    targets = IDS.flip(0)
    expected = base_model()(IDS)
    assert torch.equal(model(IDS), expected)
    stages = ({"lora_a", "lora_b"}, {"lora_residual_dance"}, {"lora_residual_wave"})
    for name, moving in zip((None, "dance", "wave"), stages, strict=True):
        if name is not None:
            assert lr.motion.begin_residual_stage(model, name, coef_dropout=0.2) is model
        adapters = {n for n in trains(model) if not n.startswith("norm.")}
        assert {n.rpartition(".")[2] for n in adapters} == moving
        assert ("norm.weight" in trains(model)) is (name is None)
        before = state_of(model)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1)
        losses = []
        for _ in range(30):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(IDS).flatten(0, 1), targets.flatten())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]) is (key not in trains(model)), key


@by_side
def test_motion_zero_is_the_model_of_stage_1(basis: str) -> None:
    model = stage1(basis=basis)
    first, base = model(IDS), base_model()(IDS)
    lr.motion.begin_residual_stage(model)
    assert torch.equal(model(IDS), first)
    fill(model)
    second = model(IDS)
    assert not torch.allclose(second, first)
    assert lr.motion.set_scales(model, motion=0.0) is model
    assert torch.equal(model(IDS), first)
    lr.motion.set_scales(model, motion=1)
    assert torch.equal(model(IDS), second)
    lr.motion.set_scales(model, identity=0, motion={"motion": 0})
    assert torch.equal(model(IDS), base)


def test_merging_is_at_the_present_scales() -> None:
    model = stage2("dance", "wave")
    weights = {n: p.clone() for n, p in model.named_parameters() if n.endswith("proj.weight")}
    lr.motion.set_scales(model, identity=0.5, motion={"dance": 1.0, "wave": -0.5})
    expected = model(IDS)
    torch.testing.assert_close(lr.merge(model)(IDS), expected)
    with pytest.raises(ValueError, match=r"set_scales: .*must not be merged"):
        lr.motion.set_scales(model, motion=0)
    with pytest.raises(ValueError, match=r"begin_residual_stage: .*must not be merged"):
        lr.motion.begin_residual_stage(model, "third")
    lr.unmerge(model)
    for name, value in weights.items():
        assert torch.equal(model.get_parameter(name), value)
    torch.testing.assert_close(lr.unload(model, merge=True)(IDS), expected)
    assert not any(isinstance(m, BasisLoRALinear) for m in model.modules())


def test_the_config_follows_the_stages() -> None:
    model = stage2("dance")
    assert model.lowrank_config.residuals == ("dance",)
    lr.motion.begin_residual_stage(model, "wave", coef_dropout=0.1)
    assert model.lowrank_config.residuals == ("dance", "wave")
    assert model.lowrank_config.residual_coef_dropout == 0.1
    table = lr.summary(model)
    assert table.title.startswith(f"{sum(m.out_features * 4 for m in layers(model)):,} of ")
    again = lr.BasisLoRAConfig.from_dict(json.loads(json.dumps(model.lowrank_config.to_dict())))
    assert again == model.lowrank_config


def layers(model: nn.Module) -> list[BasisLoRALinear]:
    return list(basis_modules(model, "test").values())


def test_wrong_calls_change_nothing() -> None:
    model = stage2("dance")
    before, config = state_of(model), model.lowrank_config
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: lr.motion.begin_residual_stage(model, "dance"), "must be new, got 'dance' again"),
        (lambda: lr.motion.begin_residual_stage(model, "a.b"), "letters, digits, _ and -, got"),
        (lambda: lr.motion.begin_residual_stage(model, "x", coef_dropout=3), "coef_dropout must"),
        (lambda: lr.motion.set_scales(model, identity=0, motion={"wave": 1}), "got 'wave'"),
        (lambda: lr.motion.set_scales(model, identity=0, motion=float("inf")), "must be finite"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
    assert_unchanged(model, before)
    assert model.lowrank_config is config and "lora_residual_dance" in str(trains(model))
    assert all(m.identity_scale == 1 and m.residual_scales == {"dance": 1} for m in layers(model))


def test_models_of_other_methods_are_refused() -> None:
    for model in (lr.adapt(base_model(), lr.LoRAConfig(r=2)), base_model()):
        with pytest.raises(ValueError, match="begin_residual_stage: model must have been adapted"):
            lr.motion.begin_residual_stage(model)
        with pytest.raises(ValueError, match=r"set_scales: model must contain .* TinyLM with none"):
            lr.motion.set_scales(model, motion=1)
    wrapped = nn.Sequential(stage1())
    with pytest.raises(ValueError, match="must have been adapted with BasisLoRAConfig, got a"):
        lr.motion.begin_residual_stage(wrapped)


def test_a_compiled_model_goes_through_its_stages() -> None:
    model = stage1()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    first = compiled(IDS)
    torch.testing.assert_close(first, model(IDS))
    lr.motion.begin_residual_stage(model, "dance")
    fill(model)
    torch.testing.assert_close(compiled(IDS), model(IDS))
    lr.motion.set_scales(model, motion=0.0)
    torch.testing.assert_close(compiled(IDS), first)


# ------------------------------------------------------------------------------------------ rows


@by_side
def test_each_row_moves_by_its_own_residual(basis: str) -> None:
    model = stage2("dance", "wave", basis=basis)
    ids = torch.randint(0, 11, (4, 5))
    names = ["wave", None, "dance", "wave"]
    alone = []
    for name, row in zip(names, ids, strict=True):
        lr.motion.set_scales(model, motion={n: float(n == name) for n in ("dance", "wave")})
        alone.append(model(row.unsqueeze(0)))
    lr.motion.set_scales(model, motion=0.25)
    outside = model(ids)
    with lr.motion.rows(model, names):
        inside, again = model(ids), model(ids)
    torch.testing.assert_close(inside, torch.cat(alone))
    assert torch.equal(inside, again)
    assert torch.equal(model(ids), outside)


def test_blocks_nest_and_belong_to_their_context() -> None:
    model, other = stage2("dance", "wave"), stage2("dance")
    results: dict[str, Tensor] = {}

    def in_a_thread() -> None:
        results["thread"] = model(IDS)

    plain, plain_other = model(IDS), other(IDS)
    with lr.motion.rows(model, ["dance"] * 2):
        dance = model(IDS)
        assert torch.equal(other(IDS), plain_other)
        with lr.motion.rows(model, ["wave", None]), lr.motion.rows(other, [None, None]):
            mixed = model(IDS)
            assert not torch.allclose(other(IDS), plain_other)
        assert torch.equal(model(IDS), dance)
        thread = threading.Thread(target=in_a_thread)
        thread.start()
        thread.join()
        copied = copy.deepcopy(model)
        assert torch.equal(copied(IDS), plain)
    assert torch.equal(results["thread"], plain)
    assert not torch.allclose(mixed, dance)
    assert torch.equal(model(IDS), plain)


def test_a_compiled_model_in_and_out_of_blocks() -> None:
    model = stage2("dance", "wave")
    lr.motion.set_scales(model, motion={"dance": 0.5})
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    plain = model(IDS)
    torch.testing.assert_close(compiled(IDS), plain)
    for names in (["dance", None], [None, "wave"]):
        with lr.motion.rows(model, names):
            torch.testing.assert_close(compiled(IDS), model(IDS))
        torch.testing.assert_close(compiled(IDS), plain)


def test_rows_that_cannot_be() -> None:
    model = stage2("dance")
    refused: list[tuple[Any, type[Exception], str]] = [
        ("dance", TypeError, "names must be a sequence of names and None, got 'dance'"),
        ([1], TypeError, "names must be a sequence"),
        (["danse"], ValueError, r"among \['dance'\], got 'danse'; did you mean 'dance'"),
        ([""], ValueError, "got ''"),
    ]
    for names, error, message in refused:
        with (
            pytest.raises(error, match=rf"^motion\.rows: .*{message}"),
            lr.motion.rows(model, names),
        ):
            pass
    with (
        lr.motion.rows(model, ["dance"]),
        pytest.raises(
            ValueError, match=r"^motion\.rows: the batch must have 1 rows, one for each name"
        ),
    ):
        model(IDS)
    with (
        pytest.raises(RuntimeError, match=r"must be in evaluation mode, call model\.eval"),
        lr.motion.rows(model.train(), ["dance"]),
    ):
        pass
    model.eval()
    with (
        pytest.raises(ValueError, match=r"motion\.rows: layers\.0\.q_proj must not be merged"),
        lr.motion.rows(lr.merge(model), ["dance"]),
    ):
        pass


# ----------------------------------------------------------------------------------------- files


@by_side
def test_a_residual_travels_alone(basis: str, tmp_path: Path) -> None:
    """Stage 1 once, residuals beside it: each puts its model together again, bit for bit."""
    model = stage1(basis=basis)
    lr.save_adapter(model, tmp_path / "stage1")
    outputs = {}
    for name, seed in (("dance", 20), ("wave", 21)):
        fill(lr.motion.begin_residual_stage(model, name), seed)
        outputs[name] = model(IDS)
        lr.motion.save_residual(model, tmp_path / name, name)
    assert {*load_file(tmp_path / "dance" / WEIGHTS)} == {
        f"base_model.model.{path}.lora_residual_dance.weight"
        for path in basis_modules(model, "test")
    }
    loaded = lr.load_adapter(base_model().eval(), tmp_path / "stage1")
    assert lr.motion.load_residual(loaded, tmp_path / "wave") is loaded
    assert torch.equal(loaded(IDS), outputs["wave"])
    assert {n.rpartition(".")[2] for n in trains(loaded)} == {"lora_residual_wave"}
    lr.motion.load_residual(loaded, tmp_path / "dance", name="renamed")
    assert torch.equal(loaded(IDS), outputs["dance"])
    with lr.motion.rows(loaded, ["renamed", "wave"]):
        both = loaded(IDS)
    with lr.motion.rows(model, ["dance", "wave"]):
        assert torch.equal(model(IDS), both)
    lr.motion.save_residual(loaded, tmp_path / "again", "wave")
    for file in (CONFIG, WEIGHTS):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "wave" / file).read_bytes()


def test_stage_2_without_its_stage_1_is_an_error(tmp_path: Path) -> None:
    model = stage2("dance")
    lr.save_adapter(model, tmp_path / "whole")
    lr.motion.save_residual(model, tmp_path / "residual", "dance")

    plain = base_model()
    before = state_of(plain)
    with pytest.raises(ValueError, match=r"^load_adapter: .*lora_A\.weight is missing"):
        lr.load_adapter(plain, tmp_path / "residual")
    with pytest.raises(
        ValueError, match=r"^load_residual: model must have been adapted with Basis"
    ):
        lr.motion.load_residual(plain, tmp_path / "residual")
    tensors = load_file(tmp_path / "whole" / WEIGHTS)
    without = {key: t for key, t in tensors.items() if "lora_A" not in key}
    save_file(without, tmp_path / "whole" / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=r"^load_adapter: .*lora_A\.weight is missing"):
        lr.load_adapter(plain, tmp_path / "whole")
    assert_unchanged(plain, before)

    another = lr.adapt(base_model(), lr.BasisLoRAConfig(r=4, alpha=6))
    before = state_of(another)
    message = r"basis_digest of layers\.0\.q_proj must be .* as in the model.*stage 1"
    with pytest.raises(ValueError, match=rf"^load_residual: .*{message}"):
        lr.motion.load_residual(another, tmp_path / "residual")
    assert_unchanged(another, before)


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    model = stage2("dance")
    lr.motion.save_residual(model, tmp_path / "dance", "dance")
    refused: list[tuple[nn.Module, str, str]] = [
        (stage2("dance"), "dance", "must be new, got 'dance' again"),
        (stage1(r=3, alpha=4.5), "dance", r"must be floating-point \[8, 3\], got .*\[8, 4\]"),
        (stage1(alpha=3), "dance", r"scaling of layers\.0\.q_proj must be 0\.75 .*got 1\.5"),
        (stage1(basis="up"), "dance", "basis must be 'up' as in the model, got 'down'"),
        (stage1(target_modules=["q_proj"]), "dance", "tensors must be"),
        (stage1(), "stage1", "must be of one residual, as save_residual writes it"),
    ]
    lr.save_adapter(stage1(), tmp_path / "stage1")
    for target, name, message in refused:
        before = state_of(target)
        with pytest.raises(ValueError, match=message):
            lr.motion.load_residual(target, tmp_path / name)
        assert_unchanged(target, before)
    with pytest.raises(FileNotFoundError, match=r"load_residual: .* does not exist"):
        lr.motion.load_residual(stage1(), tmp_path / "none")
    with pytest.raises(ValueError, match=r"save_residual: .*among \['dance'\] .*got 'wave'"):
        lr.motion.save_residual(model, tmp_path / "wave", "wave")
    assert not (tmp_path / "wave").exists()


def test_a_checkpoint_of_another_stage_is_refused(tmp_path: Path) -> None:
    lr.save_adapter(stage2("dance"), tmp_path)
    model = stage1()
    before = state_of(model)
    with pytest.raises(ValueError, match=r"residuals must be \(\) as in the model, got \('dance',"):
        lr.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_a_stage_begun_module_by_module_is_not_saved(tmp_path: Path) -> None:
    model = stage1()
    model.layers[0].q_proj.begin_residual_stage("dance")
    message = (
        r"layers\.0\.q_proj must have the residuals \[\] of the model's config, got \['dance'\]"
    )
    with pytest.raises(ValueError, match=f"save_adapter: {message}"):
        lr.save_adapter(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


# ---------------------------------------------------------------------------------------- export


def small_llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, vocab_size=32)
    heads = dict(num_attention_heads=2, num_key_value_heads=1)
    torch.manual_seed(5)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).eval()


@by_side
@pytest.mark.parametrize("options", [{}, {"rslora": True, "rank_pattern": {"q_proj": 2}}], ids=str)
def test_peft_reads_the_export(basis: str, options: dict, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = stage2("dance", "wave", model=small_llama(), basis=basis, **options)
    lr.motion.set_scales(model, identity=0.8, motion={"dance": 1.0, "wave": 0.5})
    expected = model(IDS).logits
    before = state_of(model)
    lr.export_lora(model, tmp_path)
    assert_unchanged(model, before)
    theirs = peft.PeftModel.from_pretrained(small_llama(), str(tmp_path))
    torch.testing.assert_close(theirs(IDS).logits, expected)
    assert not torch.allclose(small_llama()(IDS).logits, expected)
    assert type(theirs.peft_config["default"]) is peft.LoraConfig
    assert theirs.peft_config["default"].r == 4
    ours = lr.load_adapter(small_llama(), tmp_path)
    assert type(ours.lowrank_config) is lr.LoRAConfig
    torch.testing.assert_close(ours(IDS).logits, expected)
    bank = lr.AdapterBank(small_llama())
    bank.load("dancer", tmp_path)
    with bank.rows(["dancer", None]):
        torch.testing.assert_close(bank.model(IDS).logits[0], expected[0])


def small_dit() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(6)
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=3,
        out_channels=3,
        text_dim=8,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    ).eval()


def dit_inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    return {
        "hidden_states": torch.randn(2, 3, 3, 4, 4, generator=generator),
        "timestep": torch.tensor([100.0, 700.0]),
        "encoder_hidden_states": torch.randn(2, 5, 8, generator=generator),
    }


def adapted_dit(basis: str = "down") -> nn.Module:
    names = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    return stage2("dance", model=small_dit(), target_modules=names, basis=basis)


@by_side
def test_diffusers_reads_the_export(basis: str, tmp_path: Path) -> None:
    """A model alone by load_lora_adapter, and in its pipeline by load_lora_weights."""
    diffusers = pytest.importorskip("diffusers")
    model = adapted_dit(basis)
    expected = model(**dit_inputs()).sample
    lr.export_lora(model, tmp_path, format="diffusers")
    assert [file.name for file in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]

    theirs = small_dit()
    assert not torch.allclose(theirs(**dit_inputs()).sample, expected)
    theirs.load_lora_adapter(
        str(tmp_path),
        prefix="transformer",
        weight_name="pytorch_lora_weights.safetensors",
        local_files_only=True,
    )
    torch.testing.assert_close(theirs(**dit_inputs()).sample, expected)

    pipeline = diffusers.WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=small_dit(),
    )
    pipeline.load_lora_weights(str(tmp_path), use_safetensors=True, local_files_only=True)
    torch.testing.assert_close(pipeline.transformer(**dit_inputs()).sample, expected)


def test_exports_that_cannot_be(tmp_path: Path) -> None:
    where = tmp_path / "x"
    with pytest.raises(ValueError, match=r"export_lora: format must be one of .*got 'kohya'"):
        lr.export_lora(stage1(), where, format="kohya")
    with pytest.raises(
        ValueError, match=r"export_lora: modules_to_save must be empty .*\['norm'\]"
    ):
        lr.export_lora(stage1(modules_to_save=["norm"]), where, format="diffusers")
    assert not where.exists()


def test_sharded_models_are_saved_whole_or_not_at_all(tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    if torch.distributed.is_initialized():
        pytest.skip("needs torch.distributed with no group of its own yet")
    model = stage2("dance")
    lr.save_adapter(model, tmp_path / "plain")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        lr.save_adapter(model, tmp_path / "sharded")
        for call in (
            lambda: lr.motion.save_residual(model, tmp_path / "x", "dance"),
            lambda: lr.export_lora(model, tmp_path / "x"),
        ):
            with pytest.raises(ValueError, match="must not be sharded"):
                call()
    finally:
        torch.distributed.destroy_process_group()
    for file in (CONFIG, WEIGHTS):
        sharded = (tmp_path / "sharded" / file).read_bytes()
        assert sharded == (tmp_path / "plain" / file).read_bytes()
    assert not (tmp_path / "x").exists()


def test_export_replaces_its_file_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stage2("dance")
    lr.export_lora(model, tmp_path, format="diffusers")
    (file,) = tmp_path.iterdir()
    old = file.read_bytes()
    fill(model)

    def full(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="disk full"):
            lr.export_lora(model, tmp_path, format="diffusers")
    assert [f.name for f in tmp_path.iterdir()] == [file.name] and file.read_bytes() == old
    lr.export_lora(model, tmp_path, format="diffusers")
    assert file.read_bytes() != old


def test_a_video_model_goes_through_both_stages() -> None:
    """Frames one by one, then the clip, with a flow-matching loss; what is frozen stays."""
    model = small_dit()
    clip, text = torch.randn(1, 3, 3, 4, 4), torch.randn(1, 5, 8)
    options = {"r": 4, "target_modules": ["to_q", "to_v", "ffn.net.2"], "coef_dropout": 0.5}
    lr.adapt(model, lr.BasisLoRAConfig(**options)).train()
    frames = clip.transpose(1, 2).flatten(0, 1).unsqueeze(2)  # [frames, 3, 1, 4, 4]
    for data in (frames, clip):
        before = state_of(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            flow_loss(model, data, text.expand(len(data), -1, -1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]) is (name not in trains(model)), name
        lr.motion.begin_residual_stage(model, f"after{data.shape[2]}")


def flow_loss(model: nn.Module, data: Tensor, text: Tensor) -> Tensor:
    noise, t = torch.randn_like(data), torch.rand(len(data), 1, 1, 1, 1)
    noisy = (1 - t) * data + t * noise
    velocity = model(noisy, timestep=1000 * t.flatten(), encoder_hidden_states=text).sample
    return (velocity - (noise - data)).square().mean()
