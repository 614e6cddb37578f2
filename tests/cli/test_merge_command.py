"""`lowrank-ext merge`: an ordinary model with the outputs of base and adapter."""

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("transformers")

from finetune_runs import check_error, invoke, small_run
from saved_adapters import IDS, load_plain, save_adapter
from transformers import AutoTokenizer

import lowrank_ext as lr
from lowrank_ext.cli import models
from lowrank_ext.nn.quantized import dequantized_weight

LINEAR = ["q_proj", "down_proj"]
LORA = {"r": 4, "target_modules": LINEAR}
MERGEABLE: dict[str, Any] = {
    "lora": lr.LoRAConfig(**LORA),
    "lora of all linears": lr.LoRAConfig(r=4),
    "rslora": lr.LoRAConfig(**LORA, rslora=True, alpha=3),
    "dora": lr.LoRAConfig(**LORA, dora=True),
    "pissa": lr.LoRAConfig(**LORA, init="pissa"),
    "lamda": lr.LaMDAConfig(**LORA),
    "lamda++": lr.LaMDAConfig(**LORA, rank_budget="rank"),
    "aflora": lr.AFLoRAConfig(**LORA),
    "reslora, block": lr.ResLoRAConfig(**LORA, shortcut="block"),
    "set-and-sequence": lr.BasisLoRAConfig(**LORA),
    "modules_to_save": lr.LoRAConfig(**LORA, modules_to_save=["norm"]),
    "tied modules_to_save": lr.LoRAConfig(**LORA, modules_to_save=["embed_tokens", "lm_head"]),
    "rows of tied embeddings": lr.LoRAConfig(**LORA, trainable_token_indices=[0, 30, 60]),
    "a tied head": lr.LoRAConfig(r=4, target_modules=["lm_head"]),
    "tied embeddings": lr.LoRAConfig(r=4, target_modules=["embed_tokens"]),
}
UNTIED = {"a tied head", "tied embeddings"}


def merge(adapter: Path, out: Path, *flags: str, **options: Any) -> Any:
    arguments = [a for name, value in options.items() for a in (f"--{name}", str(value))]
    return invoke("merge", str(adapter), "--out", str(out), *flags, *arguments)


@pytest.fixture
def adapter(tiny_model: Path, tmp_path: Path) -> Path:
    save_adapter(tiny_model, tmp_path / "adapter", MERGEABLE["lora"])
    return tmp_path / "adapter"


@pytest.mark.parametrize("kind", MERGEABLE)
def test_plain_transformers_computes_what_the_adapted_model_did(tiny_model, tmp_path, kind) -> None:
    expected = save_adapter(tiny_model, tmp_path / "adapter", MERGEABLE[kind])
    base = load_plain(tiny_model)
    assert not torch.allclose(base(IDS).logits, expected, atol=1e-3)
    result = merge(tmp_path / "adapter", tmp_path / "out")
    assert result.exit_code == 0, result.output
    model = load_plain(tmp_path / "out")
    assert type(model) is type(base)
    assert model.state_dict().keys() == base.state_dict().keys()
    assert model.config.tie_word_embeddings is (kind not in UNTIED)
    torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (
        tokenizer("a text").input_ids
        == AutoTokenizer.from_pretrained(tiny_model)("a text").input_ids
    )


def test_an_estimate_is_said(tiny_model, tmp_path) -> None:
    save_adapter(tiny_model, tmp_path / "adapter", lr.ResLoRAConfig(**LORA, shortcut="input"))
    result = merge(tmp_path / "adapter", tmp_path / "out")
    assert result.exit_code == 0, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning: the merge is an estimate: shortcut='input'")


@pytest.mark.parametrize("init", ["goat", "zero"])
def test_what_cannot_be_merged_is_said_and_nothing_is_written(tiny_model, tmp_path, init) -> None:
    config = lr.GOATConfig(r=4, num_experts=2, target_modules=LINEAR, init=init)
    save_adapter(tiny_model, tmp_path / "adapter", config)
    result = merge(tmp_path / "adapter", tmp_path / "out")
    check_error(result, "cannot merge", "which experts act depends on the input", "generate, chat")
    assert not (tmp_path / "out").exists()


def test_a_bias_without_a_place_in_the_plain_model_is_no_merge(tiny_model, tmp_path) -> None:
    save_adapter(tiny_model, tmp_path / "adapter", lr.LoRAConfig(**LORA, lora_bias=True))
    result = merge(tmp_path / "adapter", tmp_path / "out")
    check_error(
        result, "cannot merge", "must have a bias, to which lora_bias", "keep the adapter unmerged"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_weights_are_merged_in_fp32_and_rounded_once(tiny_model, tmp_path, dtype) -> None:
    save_adapter(tiny_model, tmp_path / "adapter", MERGEABLE["lamda"])
    for name in ("fp32", dtype):
        assert merge(tmp_path / "adapter", tmp_path / name, dtype=name).exit_code == 0
    exact = load_plain(tmp_path / "fp32").state_dict()
    rounded = load_plain(tmp_path / dtype, dtype="auto").state_dict()
    for name, value in rounded.items():
        assert torch.equal(
            value, exact[name].to({"bf16": torch.bfloat16}.get(dtype, torch.float16))
        )


def test_default_dtype_is_that_of_the_base(tiny_model, tmp_path, adapter) -> None:
    model = load_plain(tiny_model).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "base")
    assert merge(adapter, tmp_path / "out", model=tmp_path / "base").exit_code == 0
    assert load_plain(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_generation_config_template_and_shards(tiny_model, tmp_path, adapter) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(base)
    generation = {"temperature": 0.6, "do_sample": False, "eos_token_id": [0, 256]}
    (base / "generation_config.json").write_text(json.dumps(generation))
    result = merge(adapter, tmp_path / "out", model=base, **{"max-shard-size": "100KB"})
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template
    written = load_plain(tmp_path / "out").generation_config
    assert (written.temperature, written.eos_token_id) == (0.6, [0, 256])


# ---------------------------------------------------------------------------- adapters and bases


def test_runs_of_finetune_name_their_base(run, tiny_model, text_file, tmp_path) -> None:
    compared = small_run(model=tiny_model, text=text_file, out=tmp_path / "runs", steps=1)
    assert invoke("finetune", *compared, "--compare", "frozen,lora,lamda").exit_code == 0
    assert run(steps=1, out=tmp_path / "run").exit_code == 0
    for source in ("runs/lora", "runs/lamda/adapter", "run", "run/adapter"):
        result = merge(tmp_path / source, tmp_path / "out")
        assert result.exit_code == 0, result.output
        expected = lr.load_adapter(
            load_plain(tiny_model), _files(tmp_path / source), trainable=False
        )
        got = load_plain(tmp_path / "out")(IDS).logits
        torch.testing.assert_close(got, expected(IDS).logits, atol=1e-5, rtol=1e-5)
    check_error(merge(tmp_path / "runs", tmp_path / "out"), "runs/lamda, ", "runs/lora")


def _files(path: Path) -> Path:
    return path if path.name == "adapter" else path / "adapter"


def test_the_model_of_the_run_is_used_and_that_of_the_option_wins(
    tiny_model, tmp_path, adapter
) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(tmp_path / "gone")})
    )
    check_error(merge(adapter, tmp_path / "out"), "gone' is not there; give it by --model")
    assert merge(adapter, tmp_path / "out", model=tiny_model).exit_code == 0
    run = tmp_path / "run.yaml"
    run.write_text(f"model: {tiny_model}\nmethod: lora\nbeta: 0.1\n")
    assert merge(adapter, tmp_path / "out").exit_code == 0
    run.write_text(f"model: {tmp_path}/gone too\nmethod: lora\n")
    check_error(merge(adapter, tmp_path / "out"), "gone too' is not there")
    run.write_text("model: [1, 2]\n")
    check_error(merge(adapter, tmp_path / "out"), "run.yaml: line 1: model must be a text or null")
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": None})
    )
    run.unlink()
    check_error(merge(adapter, tmp_path / "out"), "names no base model; give it by --model")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--dtype", "bf61"], "--dtype must be one of base, bf16, fp16, fp32, got 'bf61'"),
        (["--max-shard-size", "5"], "--max-shard-size must be a size as 5GB or 500MB, got '5'"),
        (["--device", "cuda:x"], "--device must be auto, cpu"),
        (["--dequantize"], "--dequantize is for a quantized base"),
        (["--threads", "0"], "--threads must be at least 1"),
    ],
)
def test_wrong_options(tmp_path, adapter, flags, words) -> None:
    check_error(merge(adapter, tmp_path / "out", *flags), words)
    assert not (tmp_path / "out").exists()


def test_what_is_no_adapter(tiny_model, tmp_path) -> None:
    check_error(merge(tmp_path / "none", tmp_path / "out"), "none: no such directory")
    check_error(merge(tiny_model, tmp_path / "out"), "is a whole model, which needs no merge")
    (tmp_path / "empty").mkdir()
    check_error(merge(tmp_path / "empty", tmp_path / "out"), "must hold an adapter")


def test_damaged_adapters_are_errors(tmp_path, adapter) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    check_error(merge(adapter, tmp_path / "out"), f"cannot load {adapter}")
    (adapter / "adapter_config.json").write_text("{")
    check_error(merge(adapter, tmp_path / "out"), "adapter_config.json")


# --------------------------------------------------------------------------------------- files


def test_only_its_own_results_are_replaced(tmp_path, adapter) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert merge(adapter, out).exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert merge(adapter, out).exit_code == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "README.md").write_text("mine")
    check_error(merge(adapter, out), "must be new, empty or written by this command", "README.md")
    assert (out / "README.md").read_text() == "mine"
    check_error(merge(adapter, adapter), "holds the input")
    check_error(merge(adapter, tmp_path), "holds the input")


def test_a_merged_model_is_no_place_for_a_merge_over_it(tmp_path, adapter) -> None:
    assert merge(adapter, tmp_path / "out").exit_code == 0
    result = merge(adapter, tmp_path / "out", model=tmp_path / "out")
    check_error(result, "it holds the input")


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch, adapter) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30, 2**30, 2**20))
    check_error(merge(adapter, tmp_path / "out"), "no disk space", "1 MiB are free")
    assert not (tmp_path / "out").exists()


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch, adapter) -> None:
    from lowrank_ext.cli import merge as command

    assert merge(adapter, tmp_path / "out").exit_code == 0
    before = sorted(path.name for path in tmp_path.iterdir())

    def fail(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "save_whole_model", fail)
    check_error(merge(adapter, tmp_path / "out"), "cannot write", "No space left on device")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    load_plain(tmp_path / "out")


# ----------------------------------------------------------------------------- quantized and GGUF


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_base_is_merged_once_it_may_become_dense(
    quantizable_model, tmp_path, kind
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = {"nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
    quantization = BitsAndBytesConfig(**options.get(kind, {"load_in_8bit": True}))
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(
        quantizable_model, quantization_config=quantization
    )
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(quantizable_model).save_pretrained(base)
    expected = save_adapter(base, tmp_path / "adapter", MERGEABLE["lora"])
    check_error(merge(tmp_path / "adapter", tmp_path / "out"), "is quantized", "--dequantize")
    result = merge(tmp_path / "adapter", tmp_path / "out", "--dequantize")
    assert result.exit_code == 0, result.output
    merged = load_plain(tmp_path / "out")
    assert not any(type(m).__module__.startswith(bitsandbytes.__name__) for m in merged.modules())
    torch.testing.assert_close(merged(IDS).logits, expected, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_run_over_a_quantized_base_is_merged_into_it_or_into_the_base_before(
    quantizable_model, text_file, tmp_path, quantize
) -> None:
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("torchao")
    run, source = tmp_path / "run", models.find_model(str(quantizable_model))
    options = small_run(
        model=quantizable_model, text=text_file, out=run, steps=4, quantize=quantize
    )
    assert invoke("finetune", *options).exit_code == 0
    check_error(merge(run, tmp_path / "out"), f"the base is in {quantize}", "give --dequantize")
    check_error(merge(run, tmp_path / "out", quantize="nf5"), "--quantize must be one of none, nf4")
    quantized = models.load_model(source, torch.float32, quantize=quantize).model
    for flags, base, apart in (
        (["--dequantize"], quantized, 1e-2),
        (["--quantize", "none"], load_plain(quantizable_model), 1e-5),
    ):
        result = merge(run, tmp_path / "out", *flags, dtype="fp32")
        assert result.exit_code == 0, result.output
        adapted = lr.load_adapter(base, run / "adapter", trainable=False)
        got = load_plain(tmp_path / "out")(IDS).logits
        torch.testing.assert_close(got, adapted(IDS).logits, atol=apart, rtol=apart)
    exact = models.load_model(source, torch.float32, quantize=quantize).model
    assert merge(run, tmp_path / "dense", "--dequantize", dtype="fp32").exit_code == 0
    module = lr.load_adapter(exact, run / "adapter").model.layers[0].mlp.up_proj
    weight = dequantized_weight(module.base_layer) + module.delta_weight().detach()
    written = load_plain(tmp_path / "dense").model.layers[0].mlp.up_proj.weight
    torch.testing.assert_close(written, weight, atol=1e-6, rtol=1e-6)
