"""--quantize: bases in NF4 and int8, loaded, trained over, measured, resumed; what is refused."""

import copy
import importlib.util
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("typer")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

from byte_llama import save_as_gguf, save_byte_llama
from finetune_runs import check_error, invoke, report, resume, rows, small_run, stop_at
from safetensors import safe_open
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

import lowrank_ext as lr
from lowrank_ext.cli import finetune, quantization
from lowrank_ext.cli.errors import UserError
from lowrank_ext.cli.log import log_file
from lowrank_ext.cli.measure import saved_bytes
from lowrank_ext.cli.methods import entry
from lowrank_ext.cli.models import CPU, find_model, load_model
from lowrank_ext.cli.quantization import num_elements, num_quantized, weight_bytes
from lowrank_ext.cli.settings import method_names
from lowrank_ext.nn.quantized import dequantized_weight

pytestmark = pytest.mark.usefixtures("quick_runs")
by_kind = pytest.mark.parametrize("kind", ["nf4", "int8"])
IDS = torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(5))
LINEARS = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)  # elements, of the tiny Llama
HEAD = 257 * 64


@pytest.fixture
def tiny_model(quantizable_model: Path) -> Path:
    return quantizable_model


def loaded(path: Path, kind: str | None, dtype: torch.dtype = torch.float32) -> Any:
    return load_model(find_model(str(path)), dtype, CPU, kind).model.requires_grad_(False)


def dense_weights(model: nn.Module) -> dict[str, Tensor]:
    found = {path: dequantized_weight(module) for path, module in model.named_modules()}
    return {path: weight for path, weight in found.items() if weight is not None}


def made_dense(model: nn.Module, like: nn.Module) -> Any:
    """``like``, the model before quantization, with the values that ``model`` computes with."""
    dense = copy.deepcopy(like)
    with torch.no_grad():
        for path, weight in dense_weights(model).items():
            dense.get_submodule(path).weight.copy_(weight)  # type: ignore[operator]
    return dense


def loss_of(model: Any) -> tuple[Tensor, Tensor]:
    """The loss, and the embeddings that it depends on."""
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    return model(inputs_embeds=embeddings, labels=IDS).loss, embeddings


def gradient(model: Any) -> Tensor:
    loss, embeddings = loss_of(model)
    (found,) = torch.autograd.grad(loss, [embeddings])
    return found


# --------------------------------------------------------------------------------- the model


@by_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_model_is_one_with_rounded_linears(tiny_model, kind, dtype) -> None:
    """Output and gradient are those of dense weights with its values, in either mode; embeddings,
    head and norms are as they were."""
    model, source = loaded(tiny_model, kind, dtype), loaded(tiny_model, None, dtype)
    dense, weights = made_dense(model, source), dense_weights(model)
    assert len(weights) == 2 * 7 and num_quantized(model) == LINEARS
    for path, weight in weights.items():
        error = weight.float() - source.get_submodule(path).weight.float()
        assert 0 < error.norm() < (0.2 if kind == "nf4" else 0.02) * weight.float().norm()
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, source.lm_head.weight)
    tolerance = 1e-5 if dtype is torch.float32 else 0.02
    for mode in (False, True):
        found, expected = gradient(model.train(mode)), gradient(dense)
        assert (found - expected).norm() <= tolerance * expected.norm()
        torch.testing.assert_close(
            model(IDS).logits, dense(IDS).logits, rtol=tolerance, atol=tolerance
        )


def test_nf4_is_what_qlora_uses(tiny_model) -> None:
    weight = loaded(tiny_model, "nf4", torch.bfloat16).model.layers[0].mlp.up_proj.weight
    state = weight.quant_state
    assert (state.quant_type, state.nested, state.blocksize) == ("nf4", True, 64)
    assert state.dtype is torch.bfloat16


@by_kind
def test_sizes_count_the_weights_that_are_meant(tiny_model, kind) -> None:
    model, dense = loaded(tiny_model, kind), loaded(tiny_model, None)
    total = sum(parameter.numel() for parameter in dense.parameters())
    assert sum(num_elements(parameter) for parameter in model.parameters()) == total
    assert weight_bytes(dense) == 4 * total
    shapes = [weight.shape for weight in dense_weights(model).values()]
    if kind == "nf4":  # two to a byte; a byte of scale for 64, and a float for 256 of these
        codes = 4 * (16 + 256)
        expected = sum(n * k // 2 + n * k // 64 + 4 * -(-n * k // 2**14) + codes for n, k in shapes)
    else:  # a float of scale and a byte of offset for each row
        expected = sum(n * k + 5 * n for n, k in shapes)
    assert weight_bytes(model) == 4 * (total - LINEARS) + expected


@by_kind
def test_backward_keeps_no_dense_weight(tiny_model, kind) -> None:
    model, dense = loaded(tiny_model, kind), loaded(tiny_model, None)
    bytes_of = [saved_bytes(each, lambda: loss_of(each)[0]) for each in (model, dense)]  # noqa: B023
    assert bytes_of[0] == bytes_of[1]


@by_kind
def test_a_copy_that_shares_the_weights_computes_the_same(tiny_model, kind) -> None:
    """As each method of a comparison gets one, over the frozen model."""
    model = loaded(tiny_model, kind).train()
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    expected = gradient(model)
    other = lr.adapt(copy.deepcopy(model, shared), lr.LoRAConfig(r=2))
    assert torch.equal(gradient(other), expected)
    own = {id(parameter) for parameter in other.parameters()}
    assert {id(parameter) for parameter in model.parameters()} <= own
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    other.eval()(IDS)
    assert not torch.equal(gradient(other), expected)
    assert torch.equal(gradient(model), expected)


@by_kind
def test_ddp_over_a_quantized_base(tiny_model, kind) -> None:
    model = lr.adapt(loaded(tiny_model, kind).train(), lr.LoRAConfig(r=2))
    expected = gradient(model)
    quantization.keep_from_ddp(model)
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
        torch.autograd.backward(parallel(inputs_embeds=embeddings, labels=IDS).loss)
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(embeddings.grad, expected)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@by_kind
def test_gguf_is_quantized_as_the_directory_is(tiny_model, tmp_path, kind) -> None:
    pytest.importorskip("gguf")
    save_as_gguf(tiny_model, tmp_path / "tiny.gguf")
    found, expected = (loaded(path, kind) for path in (tmp_path / "tiny.gguf", tiny_model))
    assert found.lm_head.weight is found.get_input_embeddings().weight
    before, after = dense_weights(expected), dense_weights(found)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[path], after[path]) for path in before)
    torch.testing.assert_close(found(IDS).logits, expected(IDS).logits)


def test_torchaos_other_weights_stay_torchaos(tiny_model) -> None:
    """Int8Linear is for a scale a row; what else torchao does with its inputs is not its."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = loaded(tiny_model, None)
    quantize_(model.model.layers, Int8DynamicActivationInt8WeightConfig())
    expected = model(IDS).logits
    quantization.make_trainable(model)
    assert torch.equal(model(IDS).logits, expected)
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.Linear)}
    assert kinds == {nn.Linear}


def test_int8_linear_is_torchaos_and_has_a_bias(tiny_model) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        stock = nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 8, bias=False)).to(dtype)
        quantize_(stock.requires_grad_(False), Int8WeightOnlyConfig(set_inductor_config=False))
        own = copy.deepcopy(stock)
        quantization.make_trainable(own)
        assert {type(each) for each in own} == {quantization.Int8Linear}
        x = torch.randn(2, 5, 24, dtype=dtype, requires_grad=True)
        results = [(y, *torch.autograd.grad(y.sin().sum(), [x])) for y in (stock(x), own(x))]
        for theirs, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert own(x[:0]).shape == (0, 5, 8)


# ---------------------------------------------------------------------------------- whole runs


@by_kind
def test_methods_train_over_one_quantized_base(run, tmp_path, tiny_model, kind) -> None:
    """Losses are PEFT's; the adapter goes onto the same base again, by this library and by PEFT,
    and onto the model before quantization."""
    peft = pytest.importorskip("peft")
    result = run(compare="frozen,peft-lora,lora", quantize=kind, dropout=0, lr=0.01)
    assert result.exit_code == 0, result.output
    out, found = tmp_path / "out", rows(tmp_path / "out")
    assert found["lora"]["losses"] == pytest.approx(found["peft-lora"]["losses"], rel=1e-4)
    assert len({round(row["held_out_before"], 5) for row in found.values()}) == 1
    assert found["lora"]["held_out_after"] < found["frozen"]["held_out_after"] - 0.01
    model = report(out)["model"]
    assert (model["quantize"], model["parameters"]) == (kind, LINEARS + HEAD + 5 * 64)
    assert model["quantized_parameters"] == LINEARS
    assert model["weight_bytes"] == weight_bytes(loaded(tiny_model, kind))
    assert f"fp32, linears {kind}, adapters fp32" in " ".join(result.stdout.split())

    again = lr.load_adapter(loaded(tiny_model, kind), out / "lora" / "adapter").eval()
    theirs = peft.PeftModel.from_pretrained(loaded(tiny_model, kind), out / "lora" / "adapter")
    torch.testing.assert_close(theirs.eval()(IDS).logits, again(IDS).logits, rtol=0, atol=1e-4)
    dense, base = loaded(tiny_model, None).eval(), loaded(tiny_model, None).eval()
    onto_dense = lr.load_adapter(dense, out / "lora" / "adapter")(IDS).logits
    change = (onto_dense - base(IDS).logits).norm()
    assert (onto_dense - again(IDS).logits).norm() < 0.5 * change


@pytest.mark.parametrize("method", ["peft-lora", "lora"])
def test_adapters_have_the_dtype_that_is_asked_for(run, tmp_path, method) -> None:
    """PEFT's stay in fp32 over 4-bit weights, which have no dtype of their own."""
    result = run(method=method, quantize="nf4", dtype="bf16", adapter_dtype="base", steps=1)
    assert result.exit_code == 0, result.output
    with safe_open(tmp_path / "out" / "adapter" / "adapter_model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 == {torch.bfloat16}


@pytest.mark.parametrize(
    ("kind", "method"), [("nf4", "peft-lora"), ("nf4", "lora"), ("int8", "lora")]
)
def test_a_stopped_run_continues_to_the_same_numbers(
    run, tmp_path, monkeypatch, kind, method
) -> None:
    options = {"method": method, "quantize": kind, "steps": 4}
    assert run(out=tmp_path / "whole", **options).exit_code == 0
    with monkeypatch.context() as patch:
        stop_at(patch, step=2)
        assert run(**options).exit_code == 130
    assert resume(tmp_path / "out").exit_code == 0
    whole, continued = (rows(tmp_path / name)[method] for name in ("whole", "out"))
    for name in ("losses", "held_out", "saved_bytes_at_end"):
        assert continued[name] == whole[name]


@by_kind
def test_what_uses_an_adapter_has_the_base_of_its_run(
    run, tmp_path, tiny_model, text_file, kind
) -> None:
    first = tmp_path / "first"
    assert run(out=first, quantize=kind, steps=4, lr=0.01, eval_batches=999).exit_code == 0
    (trained,) = report(first)["methods"]

    measured = invoke("evaluate", str(first), "--limit", "2")
    assert measured.exit_code == 0, measured.output
    assert f"base: {tiny_model}, fp32, linears {kind}\n" in measured.stdout

    def continued(**options: Any) -> tuple[str, dict[str, Any], float]:
        given = {"adapter": first, "rank": None, "steps": 1, "eval_batches": 999, **options}
        result = run(out=tmp_path / "out", **given)
        assert result.exit_code == 0, result.output
        found = report(tmp_path / "out")
        return result.stdout, found["model"], found["methods"][0]["held_out_before"]

    shown, model, before = continued()
    assert f"--quantize {kind}, as in the run of --adapter" in shown
    assert model["quantize"] == kind and model["quantized_parameters"] == LINEARS
    assert before == pytest.approx(trained["held_out_after"], rel=1e-5)
    assert f"\nquantize: {kind}\n" in (tmp_path / "out" / "run.yaml").read_text()
    shown, model, before = continued(quantize="none")
    assert "as in the run" not in shown
    assert model["quantize"] is None and model["quantized_parameters"] == 0
    assert before != pytest.approx(trained["held_out_after"], rel=1e-5)
    again = ("--config", str(tmp_path / "out" / "run.yaml"), "--out", str(tmp_path / "again"))
    assert invoke("finetune", *again).exit_code == 0
    assert report(tmp_path / "again")["model"]["quantize"] is None


def test_a_run_over_gguf(run, tmp_path, tiny_model) -> None:
    pytest.importorskip("gguf")
    save_as_gguf(tiny_model, tmp_path / "tiny.gguf")
    result = run(model=tmp_path / "tiny.gguf", quantize="nf4", steps=2)
    assert result.exit_code == 0, result.output
    assert report(tmp_path / "out")["model"]["quantized_parameters"] == LINEARS


def test_what_libraries_log_at_import_stays_off_the_terminal(
    tmp_path, tiny_model, text_file
) -> None:
    """A process of its own: PEFT imports bitsandbytes, the option torchao."""
    paths = {"model": tiny_model, "text": text_file, "out": tmp_path / "out"}
    arguments = small_run(**paths, compare="peft-lora,lora", quantize="int8", steps=1)
    command = [sys.executable, "-m", "lowrank_ext.cli.main", "finetune", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "Failed to load" not in done.stdout
    assert "lora: finished" in (tmp_path / "out" / "finetune.log").read_text()


def test_imports_are_heard_in_the_log_file_alone(tmp_path, capsys) -> None:
    """The loggers that the libraries use; they propagate to one that prints."""
    log = tmp_path / "run.log"
    with log_file(log, resumed=False):
        for name in ("bitsandbytes.backends.cpu.ops", "torchao", "torch.utils._pytree"):
            logging.getLogger(name).warning("of %s", name)
    logging.getLogger("torchao").warning("later")
    first, *lines = log.read_text().splitlines()
    assert first.endswith(" a new run")
    assert [line.partition(" of ")[2] for line in lines] == [
        *("bitsandbytes.backends.cpu.ops", "torchao", "torch.utils._pytree")
    ]
    assert capsys.readouterr().err == ""


# ------------------------------------------------------------------------------------- refused


@by_kind
@pytest.mark.parametrize("method", [name for name in method_names() if name != "frozen"])
def test_a_method_runs_over_a_quantized_base_or_is_refused_before_it_is_loaded(
    monkeypatch, tmp_path, tiny_model, text_file, kind, method
) -> None:
    """Refused are those alone that cannot be set up."""
    paths = {"model": tiny_model, "text": text_file, "out": tmp_path / "out"}
    arguments = ["finetune", *small_run(**paths, method=method)]
    settings: list[Any] = []
    monkeypatch.setattr(finetune, "run", lambda found, *_: settings.append(found))
    assert invoke(*arguments).exit_code == 0
    result, model = invoke(*arguments, "--quantize", kind), loaded(tiny_model, kind)
    if result.exit_code == 0:
        adapted = entry(method).build(model, settings[0]).train()
        assert gradient(adapted).isfinite().all()
    else:
        check_error(result, f"--quantize {kind}: {method} ")
        if method != "full":  # torchao's weights take requires_grad, and get no gradient
            with pytest.raises(UserError, match=f"cannot set up {re.escape(method)}"):
                entry(method).build(model, settings[0])


@by_kind
@pytest.mark.parametrize(
    ("method", "init"),
    [("peft-lora", "pissa"), ("lora", "pissa"), ("lamda", "svd_zero_core")],
)
def test_a_start_that_needs_dense_weights(run, tmp_path, kind, method, init) -> None:
    check_error(run("--init", init, quantize=kind, method=method), method, f"(init {init})")
    assert not (tmp_path / "out").exists()


@by_kind
@pytest.mark.parametrize("method", ["peft-lora", "lora"])
def test_modules_that_train_whole_are_dense_ones(run, tmp_path, kind, method) -> None:
    options = {"method": method, "quantize": kind, "steps": 2, "targets": "q_proj"}
    check_error(
        run(modules_to_save="up_proj", **options),
        "--modules-to-save: model.layers.0.mlp.up_proj is quantized",
    )
    result = run(modules_to_save="input_layernorm", **options)
    assert result.exit_code == 0, result.output
    row = rows(tmp_path / "out")[method]
    assert row["trainable_at_start"] == 2 * (4 * (64 + 64) + 64)


@pytest.mark.filterwarnings("ignore:.*no bias trains:UserWarning")  # this model has none
def test_biases_may_train_over_a_quantized_base(run) -> None:
    assert run(quantize="nf4", bias="all", steps=1).exit_code == 0


@pytest.mark.parametrize("package", ["bitsandbytes", "torchao", "accelerate"])
def test_a_package_that_is_not_there(monkeypatch, run, tmp_path, package) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        quantization, "find_spec", lambda name: None if name == package else real(name)
    )
    kind = "int8" if package == "torchao" else "nf4"
    words = f"--quantize {kind} needs the package {package}: pip install 'lowrank-ext[quantized]'"
    check_error(run(quantize=kind), words)
    assert not (tmp_path / "out").exists()


def save_quantized(path: Path, source: Path) -> None:
    loaded(source, "nf4").save_pretrained(path)
    AutoTokenizer.from_pretrained(source).save_pretrained(path)


def test_a_model_that_is_quantized_already(run, tmp_path, tiny_model) -> None:
    """It is trained as it is, without --quantize, by the methods that leave the base as it is."""
    base = tmp_path / "base"
    save_quantized(base, tiny_model)
    check_error(run(model=base, quantize="int8"), "--quantize int8", "base is quantized already")
    check_error(run(model=base, method="lamda"), "base is quantized: lamda starts from an SVD")
    assert run(model=base, steps=2).exit_code == 0
    model = report(tmp_path / "out")["model"]
    assert (model["quantize"], model["quantized_parameters"]) == (None, LINEARS)


def test_linears_that_are_not_torchs(tmp_path) -> None:
    """Conv1D of GPT-2, which bitsandbytes takes and torchao leaves dense."""
    sizes = {"n_embd": 64, "n_head": 2, "n_layer": 1, "n_positions": 32, "vocab_size": 256}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path)
    base = loaded_only(tmp_path, "nf4")
    assert num_quantized(base) == 12 * 64 * 64
    with pytest.raises(UserError, match="--quantize int8: torchao has found no linear in"):
        loaded_only(tmp_path, "int8")


def loaded_only(path: Path, kind: str) -> Any:
    """A model without a tokenizer."""
    return quantization.load_quantized(str(path), kind, torch.float32, CPU, {})


def test_rows_that_bitsandbytes_gets_wrong_on_a_cpu(tmp_path) -> None:
    """Its kernel for AVX-512 does; int8 takes any."""
    save_byte_llama(tmp_path, context=32, intermediate_size=96)
    with pytest.raises(UserError, match=r"down_proj: in_features must .* of 64, .* got 96; use 8"):
        loaded(tmp_path, "nf4")
    assert num_quantized(loaded(tmp_path, "int8")) == LINEARS - 2 * 3 * 32 * 64
