"""lr.accelerate: PEFT's LoRA layers on the fused ops, beside the same model as PEFT runs it."""

import copy
import io
import json
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import DtypePair
from torch import Tensor, nn
from torch.utils.data import Dataset

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
import rich
from module_cases import IDS, DoublingLinear, TinyLM
from peft.tuners import lora
from peft_models import gpt2, llama, randomize, token_ids
from saved_bytes import bytes_kept_by, storages_kept
from transformers import BertConfig, BertForSequenceClassification

import lowrank_ext as lr
from lowrank_ext.integrations.peft_layer import AcceleratedLoRA
from lowrank_ext.nn.quantized import keep_unpacked

FP64 = torch.float64
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 6e-2}


@pytest.fixture(autouse=True)
def no_unexpected_fallback() -> Iterator[None]:
    """A layer that silently ran through PEFT's forward would make every comparison pass."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="accelerate: a layer runs through PEFT")
        yield


def bert(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=67,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config).to(dtype).eval()


MODELS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "llama": (llama, {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "bert": (bert, {"target_modules": ["query", "value", "dense"], "task_type": "SEQ_CLS"}),
}


def peft_model(name: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A PEFT model whose adapters have values as after training."""
    make, own = MODELS[name]
    torch.manual_seed(3)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **own, **options})
    model = peft.get_peft_model(make(dtype), config).eval()
    if dtype == torch.float64:  # PEFT makes its adapters in the base's dtype, then at most float32
        model.double()
    randomize(model)
    return model


def pair(name: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """The same model twice: accelerated, and PEFT's."""
    ours, theirs = peft_model(name, dtype, **options), peft_model(name, dtype, **options)
    report = lr.accelerate(ours)
    assert report.accelerated and not report.partly
    return ours, theirs


def logits(model: nn.Module, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids(), **kwargs).logits


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def assert_same_logits(ours: nn.Module, theirs: nn.Module, **kwargs: Any) -> None:
    assert_close(logits(ours, **kwargs), logits(theirs, **kwargs))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """One backward of the model's own loss, in training mode: the logits, then every gradient."""
    model.train().zero_grad()
    ids = token_ids()
    labels = ids if "lm_head" in str(model) else ids[:, 0] % 3
    output = model(input_ids=ids, labels=labels)
    output.loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.eval()
    return {"logits": output.logits.detach(), **found}


def assert_same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    got, expected = gradients(ours), gradients(theirs)
    assert got.keys() == expected.keys() and len(got) > 2
    for name in expected:
        assert_close(got[name], expected[name])


def layers_of(model: nn.Module) -> list[AcceleratedLoRA]:
    return [m for m in model.modules() if isinstance(m, AcceleratedLoRA)]


# --------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_pefts(name: str, dtype: torch.dtype) -> None:
    ours, theirs = pair(name, dtype, lora_dropout=0.0)
    assert not torch.allclose(logits(ours), logits(MODELS[name][0](dtype)), atol=1e-2)
    assert_same_logits(ours, theirs)
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True},
        {"rank_pattern": {"v_proj": 2, "down_proj": 7}, "alpha_pattern": {"q_proj": 3}},
        {"init_lora_weights": "pissa"},
        {"modules_to_save": ["lm_head"], "target_modules": ["q_proj", "v_proj"]},
        {"bias": "lora_only", "target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["lm_head", "up_proj"]},
        {"layers_to_transform": [1], "target_modules": ["q_proj"]},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_of_lora_config(options: dict[str, Any]) -> None:
    by_svd = "init_lora_weights" in options  # PEFT has no SVD of float64 weights
    ours, theirs = pair(dtype=torch.float32 if by_svd else FP64, **options)
    assert_same_logits(ours, theirs)
    assert_same_gradients(ours, theirs)


def test_trained_biases_and_weights_of_the_base() -> None:
    """bias="all" trains the biases under the adapters; a weight of the base may train as well."""
    ours, theirs = pair("bert", FP64, bias="all")
    for model in (ours, theirs):
        for layer in model.modules():
            if isinstance(layer, lora.Linear):
                layer.base_layer.weight.requires_grad_()
    assert any("base_layer.weight" in name for name in gradients(ours))
    assert_same_gradients(ours, theirs)


def assert_no_worse_than_peft(
    got: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor]
) -> None:
    """The low-precision rule: at most twice the error of plain torch, PEFT's, plus a floor."""
    assert got.keys() == plain.keys() == truth.keys()
    for name, exact in truth.items():
        assert got[name].dtype == plain[name].dtype, name
        error, plain_error = ((v[name].double() - exact).norm() for v in (got, plain))
        floor = 4 * torch.finfo(got[name].dtype).eps * exact.norm()
        assert error <= 2 * plain_error + floor, name
        assert plain_error < 0.3 * exact.norm(), name  # so that it means something


@pytest.mark.parametrize("adapter_float32", [True, False], ids=["float32", "base"])
def test_bfloat16_models(adapter_float32: bool) -> None:
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    theirs = peft.get_peft_model(
        llama(torch.bfloat16), config, autocast_adapter_dtype=adapter_float32
    )
    randomize(theirs, 0.1)
    ours = copy.deepcopy(theirs)
    lr.accelerate(ours)
    factor = layers_of(ours)[0].lora_A["default"].weight
    assert factor.dtype == (torch.float32 if adapter_float32 else torch.bfloat16)
    truth = gradients(copy.deepcopy(theirs).double())
    # The rule's plain torch has adapters of the base's dtype.
    plain = gradients(copy.deepcopy(theirs).to(torch.bfloat16))
    got, expected = gradients(ours), gradients(theirs)
    assert all(got[name].dtype == value.dtype for name, value in expected.items())
    assert_no_worse_than_peft(
        got, {name: value.to(got[name].dtype) for name, value in plain.items()}, truth
    )


def layer_pair(
    dtypes: DtypePair, device: str, base: nn.Module | None = None, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """One LoRA layer, 40 to 24, accelerated; and the same layer as PEFT runs it."""
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["0"], **options})
    base = nn.Linear(40, 24) if base is None else base
    model = peft.inject_adapter_in_model(config, nn.Sequential(base.to(dtypes.base)))
    randomize(model)
    layer = model[0].to(device)
    for factors in (layer.lora_A, layer.lora_B):
        factors.to(dtypes.adapter)
    ours = copy.deepcopy(layer)
    assert lr.accelerate(nn.Sequential(ours)).accelerated
    return ours, layer


def run_layer(layer: nn.Module, x: Tensor, dout: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    factors = {"lora_a": layer.lora_A["default"].weight, "lora_b": layer.lora_B["default"].weight}
    grads = torch.autograd.grad(y, [x, *factors.values()], dout)
    return {"y": y.detach(), **dict(zip(["dx", *factors], grads, strict=True))}


def test_one_layer_in_every_pair_of_dtypes(device: str, dtypes: DtypePair) -> None:
    ours, theirs = layer_pair(dtypes, device)
    x, dout = (torch.randn(50, n, device=device).to(dtypes.base) for n in (40, 24))
    truth = run_layer(copy.deepcopy(theirs).double(), x.double(), dout.double())
    plain = run_layer(copy.deepcopy(theirs).to(dtypes.base), x, dout)
    got = run_layer(ours, x, dout)
    for name, value in got.items():
        assert value.dtype == (dtypes.adapter if name.startswith("lora") else dtypes.base)
    assert_no_worse_than_peft(got, {n: v.to(got[n].dtype) for n, v in plain.items()}, truth)


@pytest.mark.parametrize("base", ["doubling", "hooked", "returns-bfloat16", "returns-float64"])
def test_bases_that_are_more_than_a_linear(base: str, device: str) -> None:
    linear: nn.Module = DoublingLinear(40, 24) if base == "doubling" else nn.Linear(40, 24)
    if base == "hooked":
        linear.register_forward_hook(lambda module, args, output: -output)
    elif base.startswith("returns"):
        dtype = getattr(torch, base.removeprefix("returns-"))
        linear.register_forward_hook(lambda module, args, output: output.to(dtype))
    pair_of_float32 = DtypePair(torch.float32, torch.float32)
    ours, theirs = layer_pair(pair_of_float32, device, linear)
    x = torch.randn(5, 40, device=device)
    got, expected = (run_layer(layer, x, layer(x).detach()) for layer in (ours, theirs))
    for name, value in expected.items():
        assert got[name].dtype == value.dtype
        tolerance = max(TOLERANCE[torch.float32], torch.finfo(value.dtype).eps)
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance)


def test_arguments_for_the_base_reach_it() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor, factor: float = 1.0, *, shift: float = 0.0) -> Tensor:
            return factor * super().forward(x) + shift

    ours, theirs = layer_pair(DtypePair(FP64, FP64), "cpu", Scaled(40, 24))
    x = torch.randn(5, 40, dtype=FP64)
    assert_close(ours(x, 3.0, shift=2.0), theirs(x, 3.0, shift=2.0))
    assert not torch.allclose(ours(x, 3.0, shift=2.0), ours(x))


@pytest.mark.parametrize("shape", [(40,), (0, 40), (1, 40), (2, 0, 40), (3, 5, 40), (2, 1, 3, 40)])
def test_any_shape(shape: tuple[int, ...], device: str) -> None:
    ours, theirs = layer_pair(DtypePair(FP64, FP64), device)
    x = torch.randn(shape, device=device, dtype=FP64)
    assert_close(ours(x), theirs(x))


def test_any_strides(device: str) -> None:
    ours, theirs = layer_pair(DtypePair(FP64, FP64), device)
    wide = torch.randn(6, 80, 4, device=device, dtype=FP64)
    for x in (wide[:, ::2].mT, wide[:, 1:41, 0], wide[:1, :40, 1].expand(7, 40)):
        assert_close(ours(x), theirs(x))
        x = x.detach().requires_grad_()
        got, expected = (torch.autograd.grad(m(x).sum(), x)[0] for m in (ours, theirs))
        assert_close(got, expected)


def test_autocast() -> None:
    ours, theirs = pair()
    truth = gradients(copy.deepcopy(theirs).double())
    with torch.autocast("cpu", torch.bfloat16):
        got, plain = gradients(ours), gradients(theirs)
    assert got["logits"].dtype == torch.bfloat16
    assert_no_worse_than_peft(got, plain, truth)


# --------------------------------------------------------------------------- dropout and training


def test_dropout_has_nn_dropouts_distribution(device: str) -> None:
    """Rows of ones with lora_A = lora_B = 1, r = 1: every output counts what was kept."""
    base = nn.Linear(64, 1, bias=False)
    nn.init.zeros_(base.weight)
    config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=["0"], lora_dropout=0.25)
    model = peft.inject_adapter_in_model(config, nn.Sequential(base))
    for factors in (model[0].lora_A, model[0].lora_B):
        nn.init.ones_(factors["default"].weight)
    lr.accelerate(model.to(device))
    x = torch.ones(4000, 64, device=device)
    model.train()
    kept = model(x).flatten().double() * 0.75
    assert (kept - kept.round()).abs().max() < 1e-3  # whole numbers of kept elements
    assert abs(kept.mean() - 48) < 4 * (64 * 0.75 * 0.25 / 4000) ** 0.5
    assert abs(kept.var() - 12) < 1.5
    assert torch.equal(model.eval()(x), torch.full_like(x[:, :1], 64))
    model.train()
    model[0].lora_dropout.eval()  # PEFT asks the dropout module, not the layer
    assert torch.equal(model(x), torch.full_like(x[:, :1], 64))
    model[0].lora_dropout["default"].p = 1.0
    assert torch.equal(model.train()(x), torch.zeros_like(x[:, :1]))


def test_two_runs_give_the_same_bits() -> None:
    ours, _ = pair(lora_dropout=0.3)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(gradients(ours))
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])
    assert not torch.equal(runs[0]["logits"], runs[2]["logits"])


def test_dropout_draws_the_masks_of_lora_linear() -> None:
    """From the same seed an accelerated model and lr.adapt's LoRA have the same bits."""
    ours = peft_model(lora_dropout=0.3, task_type="CAUSAL_LM")
    lr.accelerate(ours)
    adapted = lr.adapt(
        llama(), lr.LoRAConfig(r=4, alpha=6, dropout=0.3, target_modules="all-linear")
    )
    pairs = dict(zip(layers_of(ours), lr_layers(adapted), strict=True))
    with torch.no_grad():
        for layer, linear in pairs.items():
            linear.lora_a.copy_(layer.lora_A["default"].weight)
            linear.lora_b.copy_(layer.lora_B["default"].weight)
    outputs = []
    for model in (ours, adapted):
        torch.manual_seed(8)
        outputs.append(gradients(model)["logits"])
    assert torch.equal(*outputs)
    for layer, linear in pairs.items():
        assert torch.equal(layer.lora_A["default"].weight.grad, linear.lora_a.grad)
        assert torch.equal(layer.lora_B["default"].weight.grad, linear.lora_b.grad)


def lr_layers(model: nn.Module) -> list[lr.nn.LoRALinear]:
    return [m for m in model.modules() if isinstance(m, lr.nn.LoRALinear)]


def test_twenty_steps_and_the_files_afterwards(tmp_path: Path) -> None:
    """AdamW on both from PEFT's start: the same losses; frozen tensors keep their bits."""
    ours, theirs = pair()
    for model in (ours, theirs):
        torch.manual_seed(1)
        for layer in model.modules():
            if isinstance(layer, lora.Linear):
                layer.reset_lora_parameters("default", True)
    frozen = {n: p.detach().clone() for n, p in ours.named_parameters() if not p.requires_grad}
    history: list[list[float]] = []
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        model.train()
        history.append([])
        for step in range(20):
            ids = token_ids(step % 3)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            history[-1].append(loss.item())
    torch.testing.assert_close(history[0], history[1], rtol=0, atol=1e-5)
    assert history[1][-1] < history[1][0] - 0.05
    assert all(torch.equal(ours.get_parameter(n), value) for n, value in frozen.items())
    ours.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert_same_logits(ours.eval(), again)


class Tokens(Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, idx: int) -> dict[str, Tensor]:
        ids = token_ids(idx)[0]
        return {"input_ids": ids, "labels": ids}


def test_transformers_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    histories = []
    for model, out in zip(pair(), ("ours", "theirs"), strict=True):
        args = TrainingArguments(
            output_dir=str(tmp_path / out),
            max_steps=4,
            per_device_train_batch_size=3,
            learning_rate=1e-2,
            logging_steps=1,
            save_steps=4,
            report_to=[],
            use_cpu=True,
            gradient_checkpointing=True,
        )
        trainer = Trainer(model, args, train_dataset=Tokens())
        trainer.train()
        histories.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(histories[0]) == 4
    torch.testing.assert_close(histories[0], histories[1], rtol=0, atol=2e-4)
    saved = tmp_path / "ours" / "checkpoint-4"
    assert (saved / "adapter_model.safetensors").is_file()
    again = peft.PeftModel.from_pretrained(llama(), saved)
    assert lr.accelerate(again).accelerated


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    """The recomputed forward draws the same masks: the gradients have the same bits."""
    ours, _ = pair(lora_dropout=0.2)
    torch.manual_seed(5)
    expected = gradients(ours)
    ours.enable_input_require_grads()
    ours.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(5)
    got = gradients(ours)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)


# --------------------------------------------------------------------------- memory


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_keeps_x_and_h(dropout: float, adapter: torch.dtype, device: str) -> None:
    dtypes = DtypePair(torch.bfloat16, adapter)
    ours, theirs = layer_pair(dtypes, device, lora_dropout=dropout)
    x = torch.randn(50, 40, device=device, dtype=torch.bfloat16)
    rows = x.shape[0]
    expected = rows * 40 * 2 + rows * 3 * 2 + (8 if dropout else 0)
    assert bytes_kept_by(ours, x) == expected
    # PEFT's: x as cast to the adapter's dtype and dropped, what dropout needs, h.
    copies = 2 if dropout else 1
    assert bytes_kept_by(theirs, x) >= copies * rows * 40 * adapter.itemsize + rows * 3 * 2


def test_x_is_not_kept_where_lora_a_is_frozen(device: str) -> None:
    ours, _ = layer_pair(DtypePair(torch.bfloat16, torch.float32), device, lora_dropout=0.1)
    x = torch.randn(50, 40, device=device, dtype=torch.bfloat16)
    ours.lora_A.requires_grad_(False)
    assert bytes_kept_by(ours, x) == 50 * 3 * 2 + 8
    ours.lora_B.requires_grad_(False)
    assert bytes_kept_by(ours, x) == 8
    with torch.no_grad():
        assert not storages_kept(lambda: ours(x))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_keeps_less_than_pefts(name: str) -> None:
    ours, theirs = pair(name, lora_dropout=0.1)
    parameters = {
        p.untyped_storage().data_ptr() for model in (ours, theirs) for p in model.parameters()
    }
    kept = []
    for model in (ours, theirs):
        model.train()
        storages = storages_kept(lambda model=model: model(input_ids=token_ids()).logits)
        kept.append(sum(size for where, (size, _) in storages.items() if where not in parameters))
    assert kept[0] < 0.85 * kept[1]


# --------------------------------------------------------------------------- files


def file_bytes(directory: Path) -> tuple[bytes, dict[str, Any]]:
    config = json.loads((directory / "adapter_config.json").read_text())
    for field in ("target_modules", "modules_to_save"):  # PEFT writes sets in any order
        config[field] = sorted(config[field]) if isinstance(config[field], list) else config[field]
    return (directory / "adapter_model.safetensors").read_bytes(), config


@pytest.mark.parametrize("name", MODELS)
def test_saved_files_are_pefts(name: str, tmp_path: Path) -> None:
    ours, theirs = pair(name, rank_pattern={"v_proj": 2}, use_rslora=True)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    assert file_bytes(tmp_path / "ours") == file_bytes(tmp_path / "theirs")
    states = [peft.get_peft_model_state_dict(model) for model in (ours, theirs)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    ours.print_trainable_parameters()


def test_loading_before_and_after(tmp_path: Path) -> None:
    ours, theirs = pair(modules_to_save=["lm_head"], target_modules=["q_proj", "v_proj"])
    ours.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path)
    lr.accelerate(loaded)
    assert_same_logits(loaded, theirs)
    fresh, _ = pair(modules_to_save=["lm_head"], target_modules=["q_proj", "v_proj"], r=7)
    fresh.load_adapter(tmp_path, adapter_name="second")
    fresh.set_adapter("second")
    assert_same_logits(fresh, theirs)
    with torch.no_grad():
        for layer in layers_of(fresh):
            layer.lora_B["second"].weight.zero_()
    peft.set_peft_model_state_dict(fresh, peft.get_peft_model_state_dict(theirs), "second")
    assert_same_logits(fresh, theirs)


# --------------------------------------------------------------------------- PEFT's own methods


def test_merge_and_unmerge() -> None:
    ours, theirs = pair(dtype=FP64)
    expected = logits(theirs)
    for model in (ours, theirs):
        model.merge_adapter()
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    assert torch.equal(logits(ours), logits(theirs))
    with pytest.raises(ValueError, match="merged adapters"):
        ours(input_ids=token_ids(), adapter_names=["default"] * 3)
    ours.unmerge_adapter()
    assert_close(logits(ours), expected)
    with ours.disable_adapter():  # unmerges what is merged
        assert_close(logits(ours), logits(llama(FP64)))


@pytest.mark.parametrize("merge", [True, False], ids=["merge_and_unload", "unload"])
@pytest.mark.parametrize("name", MODELS)
def test_unloading(name: str, merge: bool) -> None:
    plain = []
    for model in pair(name):
        plain.append(model.merge_and_unload() if merge else model.unload())
        assert not any(isinstance(m, lora.LoraLayer) for m in plain[-1].modules())
    assert torch.equal(logits(plain[0]), logits(plain[1]))


@pytest.mark.parametrize("name", MODELS)
def test_unloading_keeps_what_was_merged(name: str) -> None:
    plain = []
    for model in pair(name):
        model.merge_adapter()
        merged = logits(model)
        plain.append(model.unload())
        assert not any(isinstance(m, lora.LoraLayer) for m in plain[-1].modules())
        assert torch.equal(logits(plain[-1]), merged)
    assert torch.equal(logits(plain[0]), logits(plain[1]))


def with_second_adapter(model: nn.Module, **options: Any) -> None:
    """An adapter of other rank, scaling and targets, with values of its own."""
    torch.manual_seed(9)
    own = {"r": 7, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], **options}
    model.add_adapter("second", peft.LoraConfig(**own))
    model.set_adapter("second")
    randomize(model)
    model.set_adapter("default")


def pair_of_two(dtype: torch.dtype = FP64, **options: Any) -> tuple[Any, Any]:
    """A second adapter is added after accelerate."""
    ours, theirs = pair(dtype=dtype, target_modules=["q_proj", "v_proj", "down_proj"])
    for model in (ours, theirs):
        with_second_adapter(model, **options)
        model.to(dtype)
    return ours, theirs


def test_adapters_are_added_chosen_switched_off_and_deleted() -> None:
    ours, theirs = pair_of_two()
    first = logits(ours)
    for model in (ours, theirs):
        model.set_adapter("second")
    assert_same_logits(ours, theirs)
    assert_same_gradients(ours, theirs)
    assert not torch.allclose(logits(ours), first)
    for model in (ours, theirs):
        model.disable_adapter_layers()
    assert torch.equal(logits(ours), logits(theirs))
    assert torch.equal(logits(ours), logits(llama(FP64)))
    for model in (ours, theirs):
        model.enable_adapter_layers()
    with ours.disable_adapter(), theirs.disable_adapter():
        assert torch.equal(logits(ours), logits(theirs))
    assert_same_logits(ours, theirs)
    for model in (ours, theirs):
        model.delete_adapter("second")
        model.set_adapter("default")
    assert_close(logits(ours), first)
    assert_same_gradients(ours, theirs)


def test_several_active_adapters() -> None:
    """q_proj and down_proj have both, v_proj has one."""
    ours, theirs = pair_of_two()
    for model in (ours, theirs):
        model.base_model.set_adapter(["second", "default"])
    assert_same_logits(ours, theirs)
    assert_same_gradients(ours, theirs)
    for model in (ours, theirs):
        model.base_model.merge_adapter(adapter_names=["second"])
    assert torch.equal(logits(ours), logits(theirs))


def test_several_active_adapters_in_bfloat16() -> None:
    ours, theirs = pair_of_two(torch.bfloat16)
    for model in (ours, theirs):
        model.base_model.set_adapter(["second", "default"])
    assert_same_logits(ours, theirs)


def test_no_adapter_active_in_a_layer() -> None:
    ours, theirs = pair_of_two(target_modules=["down_proj"])
    for model in (ours, theirs):
        model.set_adapter("second")
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
def test_add_weighted_adapter(combination: str) -> None:
    ours, theirs = pair_of_two(r=4)
    for model in (ours, theirs):
        model.add_weighted_adapter(
            ["default", "second"], [0.7, -0.4], "sum", combination_type=combination
        )
        model.set_adapter("sum")
    assert_same_logits(ours, theirs)


def test_scale_of_an_adapter() -> None:
    ours, theirs = pair(dtype=FP64)
    for layer in layers_of(ours):
        layer.scale_layer(0.5)
    for layer in theirs.modules():
        if isinstance(layer, lora.Linear):
            layer.scale_layer(0.5)
    assert_same_logits(ours, theirs)
    assert not torch.allclose(logits(ours), logits(peft_model(dtype=FP64)))


def test_gradients_follow_requires_grad() -> None:
    ours, theirs = pair(dtype=FP64)
    for model in (ours, theirs):
        for name, parameter in model.named_parameters():
            if "lora_A" in name or "q_proj" in name:
                parameter.requires_grad_(False)
    assert_same_gradients(ours, theirs)
    assert not any("lora_A" in name for name in gradients(ours))


# --------------------------------------------------------------------------- adapter_names


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "names",
    [
        ["default", "second", "__base__"],
        ["second", "second", "second"],
        ["__base__", "__base__", "default"],
    ],
    ids="-".join,
)
def test_adapter_names(names: list[str], dtype: torch.dtype) -> None:
    """v_proj has no "second": its sequences get the base there, as in PEFT."""
    ours, theirs = pair_of_two(dtype)
    assert_same_logits(ours, theirs, adapter_names=names)


def test_a_sequence_without_adapter_has_the_bits_of_the_base() -> None:
    ours, _ = pair_of_two(torch.float32)
    got = logits(ours, adapter_names=["__base__", "default", "__base__"])
    base = logits(llama())
    assert torch.equal(got[[0, 2]], base[[0, 2]])
    assert not torch.equal(got[1], base[1])


def test_adapter_names_differentiate(device: str) -> None:
    """On a layer by itself: in training PEFT does not take adapter_names on a model."""
    ours, theirs = layer_pair(DtypePair(FP64, FP64), device)
    for layer in (ours, theirs):
        torch.manual_seed(2)
        layer.update_layer("other", 6, lora_alpha=9, config=peft.LoraConfig(r=6))
        randomize(layer)
        layer.double()
        layer.requires_grad_(True)
    names = ["other", "__base__", "default", "other"]
    x = torch.randn(4, 5, 40, device=device, dtype=FP64)
    grads = []
    for layer in (ours, theirs):
        layer.zero_grad()
        layer(x, adapter_names=names).square().sum().backward()
        grads.append({n: p.grad for n, p in layer.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[1].items():
        assert_close(grads[0][name], grad)


def test_adapter_names_and_dropout_are_pefts(device: str) -> None:
    ours, theirs = layer_pair(DtypePair(FP64, FP64), device, lora_dropout=0.3)
    x = torch.randn(2, 5, 40, device=device, dtype=FP64)
    outputs = []
    for layer in (ours.train(), theirs.train()):
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs.append(layer(x, adapter_names=["default", "__base__"]))
    assert torch.equal(*outputs)


def test_adapter_names_when_generating() -> None:
    ours, theirs = pair_of_two(torch.float32)
    options = {
        "input_ids": token_ids(),
        "attention_mask": torch.ones_like(token_ids()),
        "adapter_names": ["default", "__base__", "second"],
        "max_new_tokens": 5,
        "pad_token_id": 0,
        "do_sample": False,
    }
    assert torch.equal(ours.generate(**options), theirs.generate(**options))
    options |= {"num_beams": 2}
    assert torch.equal(ours.generate(**options), theirs.generate(**options))


def test_wrong_adapter_names_raise_as_in_peft() -> None:
    ours, _ = pair_of_two()
    with pytest.raises(ValueError, match="non-existing adapter"):
        logits(ours, adapter_names=["default", "sekond", "default"])
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        logits(ours, adapter_names=["default"])


# --------------------------------------------------------------------------- what stays PEFT's


def hook_lora_a(layer: Any) -> None:
    layer.lora_A["default"].register_forward_hook(lambda module, args, output: 2 * output)


def parametrize_lora_b(layer: Any) -> None:
    nn.utils.parametrizations.orthogonal(layer.lora_B["default"])


def replace_dropout(layer: Any) -> None:
    layer.lora_dropout["default"] = nn.Hardtanh()


def tensor_scaling(layer: Any) -> None:
    layer.scaling["default"] = torch.tensor(0.5, dtype=FP64)


def other_dtype(layer: Any) -> None:
    layer.lora_A.float()
    layer.lora_B.float()


def no_casting(layer: Any) -> None:
    layer.cast_input_dtype_enabled = False


UNCOVERED: dict[str, tuple[Callable[[Any], None], str]] = {
    "hook": (hook_lora_a, "hooked"),
    "parametrization": (parametrize_lora_b, "wrapped"),
    "dropout": (replace_dropout, "Hardtanh"),
    "scaling": (tensor_scaling, "scaling is a Tensor"),
    "dtype": (other_dtype, "float32 adapters beside inputs of float64"),
}


@pytest.mark.parametrize("case", UNCOVERED)
def test_what_only_shows_in_a_call_runs_through_peft_and_says_so(case: str) -> None:
    change, reason = UNCOVERED[case]
    ours, theirs = layer_pair(DtypePair(FP64, FP64), "cpu")
    x = torch.randn(5, 40, dtype=FP64)
    for layer in (ours, theirs):
        change(layer)
    with pytest.warns(UserWarning, match=f"PEFT's own forward: .*{reason}"):
        got = ours(x)
    assert torch.equal(got, theirs(x))


def test_switched_off_casting_of_inputs_is_pefts() -> None:
    """There PEFT's own product fails; and where there is nothing to cast, nothing changes."""
    ours, theirs = layer_pair(DtypePair(torch.bfloat16, torch.float32), "cpu")
    x = torch.randn(5, 40, dtype=torch.bfloat16)
    for layer in (ours, theirs):
        no_casting(layer)
        with warnings.catch_warnings(), pytest.raises(RuntimeError, match="dtype"):
            warnings.simplefilter("ignore")
            layer(x)
    assert_close(ours.float()(x.float()), theirs.float()(x.float()))


def test_wrong_inputs_raise_what_peft_raises() -> None:
    ours, theirs = layer_pair(DtypePair(torch.float32, torch.float32), "cpu")
    for x in (torch.randn(5, 41), torch.randn(5, 40, dtype=FP64), torch.ones(5, 40, dtype=int)):
        for layer in (ours, theirs):
            with warnings.catch_warnings(), pytest.raises(RuntimeError):
                warnings.simplefilter("ignore")
                layer(x)


def test_an_adapter_of_an_uncovered_kind_added_later() -> None:
    """BD-LoRA on the layers of a model that runs on the ops: PEFT's forward while it is active."""
    blocks = lora.config.BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=1)
    ours, theirs = pair(dtype=FP64, target_modules=["q_proj"])
    for model in (ours, theirs):
        with_second_adapter(model, use_bdlora=blocks, target_modules=["q_proj"])
        model.double()
    assert_same_logits(ours, theirs)
    for model in (ours, theirs):
        model.set_adapter("second")
    with pytest.warns(UserWarning, match="BdLoraLinearVariant"):
        got = logits(ours)
    assert torch.equal(got, logits(theirs))
    report = lr.accelerate(ours)
    assert set(report.partly) == set(report.accelerated) and not report.left_alone
    assert "BdLoraLinearVariant" in str(report)
    ours.set_adapter("default")
    theirs.set_adapter("default")
    assert_same_logits(ours, theirs)
    ours.delete_adapter("default")  # now there is nothing that the ops could do
    report = lr.accelerate(ours)
    assert not report.accelerated and not layers_of(ours)
    assert set(report.left_alone.values()) == {"a variant of LoRA, BdLoraLinearVariant"}


class Mixed(nn.Module):
    """One module of each kind that PEFT's LoRA adapts."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 8)
        self.doubling = DoublingLinear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.conv(self.embedding(ids).mT).mT
        return self.doubling(self.linear(x + self.attention(x, x, x)[0]))


def test_report_names_every_layer_and_why() -> None:
    names = ["embedding", "conv", "attention", "linear", "doubling"]
    torch.manual_seed(0)
    theirs = peft.get_peft_model(Mixed(), peft.LoraConfig(r=2, target_modules=names))
    randomize(theirs)
    ours = copy.deepcopy(theirs)
    report = lr.accelerate(ours)
    path = "base_model.model."
    assert report.accelerated == (f"{path}linear", f"{path}doubling")
    assert dict(report.left_alone) == {
        f"{path}embedding": "an embedding is no linear module",
        f"{path}conv": "a convolution is no linear module",
        f"{path}attention": "nn.MultiheadAttention is no linear module",
        f"{path}attention.base_layer.out_proj": (
            "nn.MultiheadAttention reads its weight and never calls it"
        ),
    }
    ids = torch.randint(0, 11, (2, 5))
    assert_close(ours(ids), theirs(ids))
    text = str(report)
    assert "2 of 6 LoRA layers accelerated" in text
    assert all(reason in text for reason in report.left_alone.values())
    console = io.StringIO()
    rich.print(report, file=console)
    assert "2 of 6 LoRA layers accelerated" in console.getvalue()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"},
            "a variant of LoRA, ALoraLinearVariant",
        ),
    ],
    ids=["alora"],
)
def test_variants_are_left_alone(options: dict[str, Any], reason: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # lora_bias over linears without a bias
        ours, theirs = (peft_model(**options) for _ in range(2))
    report = lr.accelerate(ours)
    assert not report.accelerated and not layers_of(ours)
    assert set(report.left_alone.values()) == {reason}
    assert torch.equal(logits(ours), logits(theirs))


def test_target_parameters_and_a_forward_of_its_own() -> None:
    theirs = peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)),
        peft.LoraConfig(r=2, target_parameters=["0.weight"], target_modules=["1", "2"]),
    )
    randomize(theirs)
    ours = copy.deepcopy(theirs)
    hooked = ours.base_model.model[1]
    hooked.forward = hooked.forward  # as accelerate's add_hook_to_module does
    report = lr.accelerate(ours)
    assert report.accelerated == ("base_model.model.2",)
    assert list(report.left_alone.values()) == [
        "adapts one of a Linear, which has no experts interface of transformers 5",
        "a forward was put on the layer itself",
    ]
    x = torch.randn(3, 8)
    assert_close(ours(x), theirs(x))


def test_a_class_with_a_forward_of_its_own_is_left_alone() -> None:
    class Negated(lora.Linear):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return -super().forward(x, *args, **kwargs)

    class Renamed(lora.Linear):
        """As torchao's: only merging differs."""

    model = peft_model(target_modules=["q_proj", "v_proj"])
    for name, layer in model.named_modules():
        if isinstance(layer, lora.Linear):
            layer.__class__ = Negated if name.endswith("q_proj") else Renamed
    expected = logits(model)
    report = lr.accelerate(model)
    assert len(report.accelerated) == len(report.left_alone) == 2
    assert all("Negated has a forward of its own" in why for why in report.left_alone.values())
    assert all(isinstance(layer, Renamed) for layer in layers_of(model))
    assert_close(logits(model), expected)


# --------------------------------------------------------------------------- quantized bases


def bitsandbytes_linear(bits: int) -> tuple[nn.Module, dict[str, Any]]:
    bnb = pytest.importorskip("bitsandbytes")
    plain = nn.Linear(64, 64)
    kind = bnb.nn.Linear8bitLt if bits == 8 else bnb.nn.Linear4bit
    options = {"has_fp16_weights": False} if bits == 8 else {"compute_dtype": torch.bfloat16}
    linear = kind(64, 64, **options)
    linear.load_state_dict(plain.state_dict())
    return linear.to("cpu"), {f"is_loaded_in_{bits}bit": True}


def torchao_linear() -> tuple[nn.Module, dict[str, Any]]:
    torchao = pytest.importorskip("torchao.quantization")
    linear = nn.Linear(64, 64)
    torchao.quantize_(linear, torchao.Int8WeightOnlyConfig())
    return linear, {}


QUANTIZED: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "Linear8bitLt": lambda: bitsandbytes_linear(8),
    "Linear4bit": lambda: bitsandbytes_linear(4),
    "TorchaoLoraLinear": torchao_linear,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_bases(kind: str, dtype: torch.dtype) -> None:
    linear, flags = QUANTIZED[kind]()
    model = nn.Sequential(linear)
    for name, value in flags.items():
        setattr(model, name, value)
    theirs = peft.get_peft_model(
        model, peft.LoraConfig(r=3, target_modules=["0"], lora_dropout=0.0)
    ).eval()
    randomize(theirs)
    keep_unpacked(theirs, "test")  # as accelerate does
    layer = theirs.base_model.model[0]
    assert type(layer).__name__ == kind
    ours = copy.deepcopy(theirs)
    assert lr.accelerate(ours).accelerated == ("base_model.model.0",)
    x = torch.randn(2, 5, 64).to(dtype)
    dout = torch.randn(2, 5, 64).to(dtype)
    results = run_layer(ours.base_model.model[0], x, dout)
    for name, expected in run_layer(layer, x, dout).items():
        got = results[name]
        assert got.dtype == expected.dtype, name
        tolerance = 0.03 if dtype == torch.bfloat16 else 1e-4
        assert (got.double() - expected.double()).norm() <= tolerance * expected.double().norm()
    with torch.no_grad():  # PEFT writes into the output of bitsandbytes, autograd forbids that
        assert_close(*(m(x, adapter_names=["default", "__base__"]) for m in (ours, theirs)))


# --------------------------------------------------------------------------- surgery


def test_again_for_layers_that_came_later_and_undo() -> None:
    ours, theirs = pair(target_modules=["q_proj"])
    for model in (ours, theirs):
        with_second_adapter(model, target_modules=["o_proj", "q_proj"])
        model.set_adapter("second")
    assert len(layers_of(ours)) == 2
    assert_same_logits(ours, theirs)
    report = lr.accelerate(ours)
    assert len(report.accelerated) == len(layers_of(ours)) == 4
    again = lr.accelerate(ours)
    assert again.accelerated == report.accelerated
    assert_same_logits(ours, theirs)
    report.undo()
    assert not layers_of(ours)
    assert [type(m) for m in ours.modules()] == [type(m) for m in theirs.modules()]
    assert torch.equal(logits(ours), logits(theirs))
    report.undo()
    assert lr.decelerate(ours) is ours


def test_decelerate_refuses_layers_that_got_another_class() -> None:
    ours, _ = pair(target_modules=["q_proj"])
    first, second = layers_of(ours)
    second.__class__ = type("Wrapped", (type(second),), {})
    with pytest.raises(RuntimeError, match=r"decelerate: .*1\.self_attn\.q_proj .* Wrapped"):
        lr.decelerate(ours)
    assert isinstance(first, AcceleratedLoRA)


def test_a_shared_layer_is_one() -> None:
    block = nn.Linear(8, 8)
    model = peft.get_peft_model(
        nn.Sequential(block, block), peft.LoraConfig(r=2, target_modules=["0"])
    )
    randomize(model)
    x = torch.randn(3, 8)
    expected = model(x)
    assert len(lr.accelerate(model).accelerated) == 1
    assert_close(model(x), expected)


def test_a_model_without_peft_model_around_it() -> None:
    """As transformers' add_adapter and diffusers' load_lora_adapter leave one."""
    models = []
    for _ in range(2):
        torch.manual_seed(4)
        config = peft.LoraConfig(r=3, target_modules=["q_proj", "up_proj"])
        models.append(peft.inject_adapter_in_model(config, llama()))
        randomize(models[-1])
    assert len(lr.accelerate(models[0]).accelerated) == 4
    assert_same_logits(*models)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how: str) -> None:
    ours, theirs = pair(lora_dropout=0.1)
    if how == "deepcopy":
        copied = copy.deepcopy(ours)
    elif how == "pickle":
        copied = pickle.loads(pickle.dumps(ours))
    else:
        buffer = io.BytesIO()
        torch.save(ours, buffer)
        buffer.seek(0)
        copied = torch.load(buffer, weights_only=False)
    assert len(layers_of(copied)) == len(layers_of(ours)) == 14
    assert_same_logits(copied, theirs)
    with torch.no_grad():
        layers_of(copied)[0].lora_B["default"].weight.zero_()
    assert not torch.allclose(logits(copied), logits(ours))
    assert_same_logits(ours, theirs)
    assert not layers_of(lr.decelerate(copied)) and layers_of(ours)


def test_layers_are_still_pefts() -> None:
    ours, theirs = pair()
    layer = layers_of(ours)[0]
    assert isinstance(layer, lora.Linear) and isinstance(layer, lora.LoraLayer)
    assert repr(layer).startswith("lora.Linear(")
    assert [n for n, _ in ours.named_modules()] == [n for n, _ in theirs.named_modules()]


def test_adapt_and_adapter_bank_refuse_accelerated_models() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    model = peft.inject_adapter_in_model(config, TinyLM())
    lr.accelerate(model)
    with pytest.raises(ValueError, match="no PEFT adapter, got peft's AcceleratedLinear"):
        lr.adapt(model, lr.LoRAConfig(r=2))
    with pytest.raises(ValueError, match="carry no adapters, got a AcceleratedLinear"):
        lr.AdapterBank(model)


def test_wrong_arguments() -> None:
    with pytest.raises(TypeError, match=r"accelerate: model must be a torch\.nn\.Module, got str"):
        lr.accelerate("model")
    with pytest.raises(ValueError, match="must carry LoRA layers of PEFT, got a LlamaForCausalLM"):
        lr.accelerate(llama())
    with pytest.raises(ValueError, match="must carry LoRA layers"):
        lr.accelerate(peft.get_peft_model(llama(), peft.IA3Config(task_type="CAUSAL_LM")))


def test_without_peft_or_with_an_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft_model()
    with monkeypatch.context() as patch:
        patch.setattr(peft, "__version__", "0.17.1")
        with pytest.raises(ImportError, match=r"needs PEFT 0\.18 or newer, got 0\.17\.1"):
            lr.accelerate(model)
        patch.setattr(peft, "__version__", "0.18.0.dev0")
        assert lr.accelerate(model).accelerated
        patch.setitem(sys.modules, "peft.tuners.lora", None)
        with pytest.raises(ImportError, match=r"needs PEFT, `pip install 'lowrank-ext\[peft\]'`"):
            lr.accelerate(nn.Linear(2, 2))


# --------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("kind", ["linear", "other base and two adapters"])
def test_compiled_in_one_graph_for_any_number_of_rows(kind: str) -> None:
    others = kind != "linear"
    base = DoublingLinear(40, 24) if others else None
    layer, _ = layer_pair(DtypePair(FP64, FP64), "cpu", base, lora_dropout=0.2)
    if others:
        layer.update_layer("other", 6, lora_alpha=9, config=peft.LoraConfig(r=6))
        layer.double()
        layer.set_adapter(["default", "other"])
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 10, 17):
        x = torch.randn(rows, 40, dtype=FP64)
        results = []
        for run in (layer, compiled):
            torch.manual_seed(rows)
            y = run(x)
            grads = torch.autograd.grad(y.square().sum(), layer.lora_A["default"].weight)
            results.append((y, *grads))
        for eager, traced in zip(*results, strict=True):
            torch.testing.assert_close(eager, traced)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_compiled_model_follows_its_adapters() -> None:
    theirs = peft.get_peft_model(TinyLM(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with_second_adapter(theirs)
    ours = copy.deepcopy(theirs)
    lr.accelerate(ours)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    outputs = []
    for adapter in ("default", "second", "default"):
        ours.set_adapter(adapter)
        theirs.set_adapter(adapter)
        outputs.append(compiled(IDS))
        assert_close(outputs[-1], theirs(IDS))
    assert not torch.allclose(outputs[0], outputs[1])
