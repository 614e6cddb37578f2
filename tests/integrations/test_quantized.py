"""4-bit and 8-bit bases: adapters train, save, load, switch off and merge into dense weights."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

import bitsandbytes as bnb
import peft
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GgufConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import lowrank_ext as lr
from lowrank_ext.nn.quantized import dequantized_weight, keep_unpacked

CONFIGS = {
    "lora": lr.LoRAConfig(r=4),
    "lamda": lr.LaMDAConfig(r=4, init="lora"),
    "aflora": lr.AFLoRAConfig(r=4),
    "goat": lr.GOATConfig(r=4, num_experts=4, top_k=2, init="zero"),
    "reslora": lr.ResLoRAConfig(r=4, shortcut="block"),
    "basis": lr.BasisLoRAConfig(r=4, coef_dropout=0.0),
}
OWN = [name for name in CONFIGS if name != "lora"]
BF16: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.bfloat16}
BNB: dict[str, dict[str, Any]] = {
    "nf4": {**BF16, "bnb_4bit_quant_type": "nf4"},
    "fp4": {**BF16, "bnb_4bit_quant_type": "fp4"},
    "double": {**BF16, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*trains without:UserWarning",
    "ignore:.*checkpointing.*:FutureWarning",
    "ignore:.*MatMul8bitLt.*:UserWarning",
    "ignore:.*can only be estimated.*:UserWarning",
)
by_name = pytest.mark.parametrize("name", CONFIGS)
by_own = pytest.mark.parametrize("name", OWN)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,  # above the block size of 4-bit weights
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=1,
        eos_token_id=2,
    )
    path = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    return path


@pytest.fixture(params=[*BNB, "torchao"])
def make(request: pytest.FixtureRequest, saved: Path) -> Callable[[], Any]:
    def base() -> Any:
        options: dict[str, Any] = {"dtype": torch.bfloat16}
        if request.param in BNB:
            quantization = BitsAndBytesConfig(**BNB[request.param])
            options |= {"quantization_config": quantization, "device_map": "cpu"}
        model = AutoModelForCausalLM.from_pretrained(saved, **options).eval()
        if request.param == "torchao":
            quantize_(model.model.layers, Int8WeightOnlyConfig())
        return model

    return base


def ids() -> Tensor:
    return torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    out: Tensor = model.eval()(ids()).logits
    return out.float()


def trained(model: Any) -> Any:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(3):
        model(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def unpacked(model: Any) -> Any:
    """A base that computes as one with adapters: by the kernel that has gradients."""
    keep_unpacked(model, "test")
    return model


def is_near(actual: Tensor, expected: Tensor, base: Tensor) -> None:
    """Closer than a tenth of what the adapter does: bf16, and 8-bit activations of the base."""
    assert (actual - expected).norm() < 0.1 * (expected - base).norm()


@by_name
def test_adapt(name: str, make: Callable[[], Any], tmp_path: Path) -> None:
    base = logits(unpacked(make()))
    model = trained(lr.adapt(make(), CONFIGS[name]))
    expected = logits(model)
    with lr.disable_adapter(model):
        assert torch.equal(logits(model), base)
    lr.save_adapter(model, tmp_path)
    assert torch.equal(logits(lr.load_adapter(make(), tmp_path)), expected)
    if name == "goat":
        with pytest.raises(TypeError, match="the branch must be one matrix"):
            lr.unload(model, merge=True)
        return
    with pytest.raises(TypeError, match=r"lr\.unload\(model, merge=True\)"):
        lr.merge(model)
    assert torch.equal(logits(model), expected)
    dense = lr.unload(model, merge=True)
    kinds = {type(m) for m in dense.modules() if isinstance(m, nn.Linear)}
    assert kinds == {nn.Linear} and type(dense.model.layers[0].mlp.up_proj.weight) is nn.Parameter
    is_near(logits(dense), expected, base)
    dense.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    assert torch.equal(logits(again), logits(dense))


@by_own
def test_by_peft(name: str, make: Callable[[], Any], tmp_path: Path) -> None:
    base = logits(unpacked(make()))
    config = lr.peft_config(CONFIGS[name], task_type="CAUSAL_LM")
    model = trained(peft.get_peft_model(make(), config))
    expected = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(logits(again), expected)
    if name == "goat":
        return
    with pytest.raises(TypeError, match="merge_and_unload"):
        model.merge_adapter()
    dense = model.merge_and_unload()
    assert {type(m) for m in dense.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    is_near(logits(dense), expected, base)


@pytest.mark.parametrize("way", ["peft_config", "adapt"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@by_name
def test_trainer(name: str, kind: str, way: str, saved: Path, tmp_path: Path) -> None:
    """transformers trains quantized models where it sees that they carry adapters."""

    def model() -> Any:
        base = AutoModelForCausalLM.from_pretrained(
            saved,
            dtype=torch.bfloat16,
            quantization_config=BitsAndBytesConfig(**BNB[kind]),
            device_map="cpu",
        )
        torch.manual_seed(3)
        if way == "adapt":
            return lr.adapt(base, CONFIGS[name])
        base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        return peft.get_peft_model(base, lr.peft_config(CONFIGS[name], task_type="CAUSAL_LM"))

    def trainer(of: Any) -> Trainer:
        options: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-2}
        quiet: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "use_cpu": True}
        rows = [{"input_ids": row, "labels": row} for row in ids().repeat(4, 1)]
        arguments = TrainingArguments(str(tmp_path), **options, **quiet)
        return lr.AdapterTrainer(of, arguments, train_dataset=rows)

    whole = model()
    trainer(whole).train()
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "checkpoint-2" / "model.safetensors").exists()
    resumed = model()
    trainer(resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(resumed), logits(whole))


@pytest.mark.parametrize("config", [lr.LaMDAConfig(r=4), lr.GOATConfig(r=4, num_experts=4)])
def test_svd_starts_need_a_dense_weight(config: Any, make: Callable[[], Any]) -> None:
    for adapted in (lr.adapt, lambda m, c: peft.get_peft_model(m, lr.peft_config(c))):
        model = make()
        before = logits(model)
        with pytest.raises(ValueError, match="init must be one without an SVD"):
            adapted(model, config)
        assert torch.equal(logits(model), before)


def test_a_hooked_base_is_not_taken_for_its_weight(make: Callable[[], Any]) -> None:
    model = make()
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    model = trained(lr.adapt(model, lr.LoRAConfig(r=4)))
    with pytest.raises(TypeError, match="floating-point weight"):
        lr.unload(model, merge=True)


TARGETS = ["q_proj", "v_proj"]  # the other linears are quantized, and stay as they are


@pytest.mark.parametrize("targets", ["all-linear", TARGETS], ids=["all", "some"])
@pytest.mark.parametrize("name", ["lora", "aflora", "reslora", "accelerated", "by peft"])
def test_gradients_after_an_evaluation(name: str, targets: Any, make: Callable[[], Any]) -> None:
    """bitsandbytes repacks 4-bit weights in evaluation on a CPU, for a kernel without gradients."""

    def adapted(base: Any) -> Any:
        if name == "accelerated":
            model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=targets))
            lr.accelerate(model)
            return model
        config = CONFIGS["lamda" if name == "by peft" else name]
        config = dataclasses.replace(config, target_modules=targets)
        if name == "by peft":
            return peft.get_peft_model(base, lr.peft_config(config))
        return lr.adapt(base, config)

    def gradients(evaluate_first: bool) -> list[Tensor]:
        base = make()
        if evaluate_first:
            logits(base)
        torch.manual_seed(3)
        model = adapted(base)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.02 * torch.randn_like(parameter))
        if evaluate_first:
            logits(model)
        model.train()(input_ids=ids(), labels=ids()).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]

    found, expected = gradients(True), gradients(False)
    assert len(found) == len(expected) > 0
    # 8-bit bases quantize their inputs in evaluation only; packing rounds 4-bit scales.
    for own, wanted in zip(found, expected, strict=True):
        assert (own - wanted).norm() <= 0.1 * wanted.norm() + 1e-6


def test_the_base_survives_evaluations(make: Callable[[], Any]) -> None:
    """Evaluation, training, evaluation: the base is what it was, and so is its dense weight."""
    base = make()
    weight = dequantized_weight(base.model.layers[0].mlp.up_proj)
    expected = logits(unpacked(make()))
    before = logits(base)  # packs
    packed = dequantized_weight(base.model.layers[0].mlp.up_proj)
    assert weight is not None and packed is not None
    torch.testing.assert_close(packed.float(), weight.float(), rtol=2e-2, atol=1e-3)
    model = lr.adapt(base, CONFIGS["lora"])
    for _ in range(2):
        trained(model)
        with lr.disable_adapter(model):
            again = logits(model)
        for reference in (before, expected):
            assert (again - reference).norm() < 0.03 * expected.norm()


def test_dora_is_pefts(
    make: Callable[[], Any], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Ours, and PEFT's on the ops, beside PEFT's own over the same quantized base; PEFT's own
    forward of DoRA does not run over 8-bit weights of bitsandbytes on a CPU."""
    names = ["q_proj", "down_proj"]
    theirs = peft.get_peft_model(make(), peft.LoraConfig(r=4, use_dora=True, target_modules=names))
    report = lr.accelerate(theirs)
    assert len(report.accelerated) == 4 and not report.left_alone
    trained(theirs).save_pretrained(tmp_path)
    expected = logits(theirs)
    assert (expected - logits(make())).abs().max() > 0.1
    ours = lr.load_adapter(make(), tmp_path)
    torch.testing.assert_close(logits(ours), expected, rtol=0, atol=0.01)
    if "int8" not in request.node.name:
        torch.testing.assert_close(logits(lr.decelerate(theirs)), expected, rtol=0, atol=0.06)
    lr.save_adapter(ours, tmp_path / "again")
    again = trained(lr.load_adapter(make(), tmp_path / "again"))
    after = logits(again)
    dense = lr.unload(again, merge=True)
    torch.testing.assert_close(logits(dense), after, rtol=0, atol=0.06)


# ------------------------------------------------------- rows that are no whole blocks of 4 bits


def in_4bit(*widths: int, kind: str = "nf4", double: bool = True) -> nn.Sequential:
    """Linears from each width to the next one, in blocks of 64."""
    torch.manual_seed(5)
    layers = []
    for k, n in itertools.pairwise(widths):
        layer = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=torch.float32)
        layer.weight = bnb.nn.Params4bit(
            torch.randn(n, k), quant_type=kind, compress_statistics=double, requires_grad=False
        )
        layers.append(layer.to("cpu"))
    return nn.Sequential(*layers)


def by_hand(layer: Any) -> Tensor:
    """The weight by the definition: of two codes a byte, the first in its upper half."""
    state, packed = layer.weight.quant_state, layer.weight.data.flatten()
    scales = state.absmax
    if state.nested:
        scales = bnb.functional.dequantize_blockwise(scales, state.state2) + state.offset
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[: state.shape.numel()].long()
    blocks = scales.repeat_interleave(state.blocksize)[: codes.numel()]
    return (state.code[codes] * blocks).reshape(state.shape)


ADAPTERS: dict[str, Callable[[Any], Any]] = {
    "adapt": lambda model: lr.adapt(model, lr.LoRAConfig(r=4, target_modules=["0"])),
    "AdapterBank": lambda model: lr.AdapterBank(model),
    "LaMDA": lambda model: peft.get_peft_model(
        model, lr.peft_config(lr.LaMDAConfig(r=4, init="lora", target_modules=["0"]))
    ),
    "peft_config": lambda model: peft.get_peft_model(
        model, lr.peft_config(lr.LoRAConfig(r=4, target_modules=["1"]))
    ),
}


@pytest.mark.parametrize("way", ADAPTERS)
def test_rows_of_which_bitsandbytes_computes_wrong_values_are_refused(way: str) -> None:
    """Also where the adapter goes onto another module: the model's output is wrong."""
    model = in_4bit(64, 96, 64)
    model[0].weight.requires_grad_(False)
    before = list(map(type, model.modules()))
    with pytest.raises(ValueError, match=rf"{way}.*: in_features .* 64, or none of 16, .* got 96"):
        ADAPTERS[way](model)
    assert list(map(type, model.modules())) == before and not hasattr(model, "lowrank_config")
    assert all(
        layer.support_avx512bf16_for_cpu == bnb.functional.has_avx512bf16() for layer in model
    )


def test_accelerate_and_load_refuse_them_too(tmp_path: Path) -> None:
    theirs = peft.get_peft_model(in_4bit(64, 96, 64), peft.LoraConfig(r=4, target_modules=["0"]))
    layers = list(map(type, theirs.modules()))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"^accelerate: base_model\.model\.1: in_features .* got 96"
    ):
        lr.accelerate(theirs)
    assert list(map(type, theirs.modules())) == layers
    model = in_4bit(64, 96, 64)
    with pytest.raises(ValueError, match=r"^load_adapter: 1: in_features .* got 96"):
        lr.load_adapter(model, tmp_path)
    assert {type(layer) for layer in model} == {bnb.nn.Linear4bit}


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_all_other_rows_have_the_values_of_their_codes(kind: str, double: bool) -> None:
    """Widths that are not refused are right, in both modes."""
    refused = set()
    for width in (2, 8, 16, 48, 64, 72, 80, 100, 120, 128, 160, 192, 200, 344):
        model = in_4bit(width, 40, kind=kind, double=double)
        x = torch.randn(3, width)
        expected = x @ by_hand(model[0]).T
        try:
            lr.adapt(model, lr.LoRAConfig(r=1, target_modules=["0"]))
        except ValueError:
            refused.add(width)
            continue
        for training in (True, False):
            torch.testing.assert_close(model.train(training)(x), expected, rtol=1e-4, atol=1e-4)
    assert refused == {16, 48, 80, 160}


# ----------------------------------------------------------------------------- read dense from GGUF


@pytest.mark.parametrize("merge", [True, False])
def test_a_model_read_dense_from_gguf_is_saved_after_unload(
    saved: Path, tmp_path: Path, merge: bool
) -> None:
    """transformers keeps the quantizer on it and refuses to save it."""
    model = as_read_from_gguf(LlamaForCausalLM.from_pretrained(saved))
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path)

    plain = lr.unload(lr.adapt(model, lr.LoRAConfig(r=4)), merge=merge)
    plain.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(again.config, "quantization_config")
    ours, theirs = plain.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("place", ["parameter", "buffer"])
def test_a_model_packed_as_gguf_stays_quantized(saved: Path, place: str) -> None:
    model = as_read_from_gguf(LlamaForCausalLM.from_pretrained(saved))
    block = torch.zeros(4, dtype=torch.uint8)
    if place == "buffer":
        model.lm_head.register_buffer("packed", block)
    else:
        model.lm_head.packed = nn.Parameter(block, requires_grad=False)
    assert lr.unload(lr.adapt(model, lr.LoRAConfig(r=4))).hf_quantizer is not None


def as_read_from_gguf(model: LlamaForCausalLM) -> LlamaForCausalLM:
    gguf = pytest.importorskip("transformers.quantizers.quantizer_gguf")
    model.config.quantization_config = GgufConfig("model.gguf")
    model.hf_quantizer = gguf.GgufHfQuantizer(model.config.quantization_config)
    return model
