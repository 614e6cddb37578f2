"""save_pretrained and load: tied tensors once, the same bits back, one save whatever ends it."""

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import decoder, tokens
from safetensors import safe_open
from snapshots import bits, snapshot
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

pytest.importorskip("transformers")

import transformers

import lowrank_ext as lr
from lowrank_ext.methods.recursive import RecursiveConfig, convert, load, unshare


def recursive(rank: Any = 3, num_loops: int = 2, **options: Any) -> Any:
    return convert(decoder(**options), RecursiveConfig(num_loops=num_loops, rank=rank))


def state(model: Any) -> dict[str, tuple[torch.dtype, bytes]]:
    return {name: (t.dtype, bits(t)) for name, t in model.state_dict().items()}


def stored(path: Path) -> dict[str, int]:
    """Elements of every tensor in the files, by name."""
    found = {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names = list(opened.keys())
            assert not found.keys() & set(names)
            found.update({name: opened.get_tensor(name).numel() for name in names})
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied head", "tied head"])
@pytest.mark.parametrize("shards", [None, "5KB"])
def test_reload(dtype: torch.dtype, tied: bool, shards: str | None, tmp_path: Path) -> None:
    model = recursive(tie_word_embeddings=tied)
    for parameter in model.parameters():  # not the rotary frequencies, which are in no file
        parameter.data = parameter.data.to(dtype)
    options = {} if shards is None else {"max_shard_size": shards}
    model.save_pretrained(tmp_path, **options)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (shards is not None)
    assert stored(tmp_path) == {name: p.numel() for name, p in model.named_parameters()}
    again = load(tmp_path)
    assert state(again) == state(model) and not again.training
    assert type(again) is type(model) and again.recursive_config == model.recursive_config
    layers = again.model.layers
    assert layers[1].mlp.up_proj.weight is layers[3].mlp.up_proj.weight
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    again.save_pretrained(tmp_path / "again")
    assert state(load(tmp_path / "again")) == state(model)


@pytest.mark.parametrize(
    "config",
    [
        RecursiveConfig(num_loops=4, rank={"q_proj": 2, r"mlp\.(up|down)_proj": 100}, init="lower"),
        RecursiveConfig(num_loops=1, rank=2),
        RecursiveConfig(num_loops=2, targets=["k_proj"], rank=2, lora_init="zero", init="stepwise"),
    ],
    ids=str,
)
def test_every_option_comes_back(config: RecursiveConfig, tmp_path: Path) -> None:
    model = convert(decoder("Gemma3"), config)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.recursive_config == config
    assert state(again) == state(model) and repr(again) == repr(model)
    assert state(unshare(again)) == state(unshare(model))


def test_wrapped_layers_are_saved_under_the_names_of_layers(tmp_path: Path) -> None:
    model = recursive()
    expected = state(model)
    for index in (0, 2):
        model.model.layers[index] = checkpoint_wrapper(model.model.layers[index])
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    for name in ("whole", "given"):
        assert state(load(tmp_path / name)) == expected


def test_dtypes(tmp_path: Path) -> None:
    """Each tensor in its own, or all in one."""
    model = recursive().bfloat16()
    for layer in model.model.layers:
        layer.input_layernorm.float()
    model.save_pretrained(tmp_path)
    assert state(load(tmp_path)) == state(model)
    wide = load(tmp_path, dtype=torch.float64)
    assert {p.dtype for p in wide.parameters()} == {torch.float64}
    assert torch.equal(wide.model.norm.weight, model.model.norm.weight.double())
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.lora_b[1, 1] = 1e6
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"layers.3.mlp.up_proj.lora_b must be finite in torch.fl"):
        load(tmp_path, dtype=torch.float16)


def test_generation_options_come_back(tmp_path: Path) -> None:
    model = recursive()
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path)
    assert load(tmp_path).generate(tokens()).shape[1] == tokens().shape[1] + 3
    (tmp_path / "generation_config.json").write_text('{"max_new_tokens": {"a": 1}, "top_k": -5}')
    with pytest.raises(ValueError, match=r"load: .*generation_config.json must hold generation"):
        load(tmp_path)


def test_other_programs_refuse_the_directory(tmp_path: Path) -> None:
    recursive().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["RecursiveLlamaForCausalLM"]
    with pytest.raises(ValueError, match="recursive_llama"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    model = recursive()
    with pytest.raises(TypeError, match=r"read by lowrank_ext.recursive.load"):
        type(model).from_pretrained(tmp_path)
    unshare(model).save_pretrained(tmp_path / "plain")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert state(plain) == state(unshare(model))


@pytest.mark.parametrize(
    "options",
    [dict(push_to_hub=True), dict(variant="fp16"), dict(distributed_checkpoint=True)],
    ids=str,
)
def test_options_that_load_could_not_follow(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=f"save_pretrained: {next(iter(options))} must not be given"
    ):
        recursive().save_pretrained(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


ONE: dict[str, Any] = {}
SHARDS: dict[str, Any] = dict(max_shard_size="9KB")


class Dies:
    """Ends the process, as it were, before a call of the number ``left``."""

    def __init__(self, patch: pytest.MonkeyPatch, left: int) -> None:
        self.left = left
        for name in ("replace", "unlink"):
            patch.setattr(Path, name, self.counted(getattr(Path, name)))

    def counted(self, call: Any) -> Any:
        def act(*args: Any, **kwargs: Any) -> Any:
            if not self.left:
                raise KeyboardInterrupt
            self.left -= 1
            return call(*args, **kwargs)

        return act


@pytest.mark.parametrize("old", [ONE, SHARDS], ids=["one", "shards"])
@pytest.mark.parametrize("new", [ONE, SHARDS], ids=["one", "shards"])
def test_a_save_over_another_is_one_of_both_whatever_ends_it(
    old: dict[str, Any], new: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies before each rename and each removal: then nothing can be loaded, or all of
    one save. Both models have the same names and shapes, so that nothing else would notice."""
    models = [recursive(num_hidden_layers=2, rms_norm_eps=eps) for eps in (1e-6, 0.5)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(2)
    logits = [model(tokens()).logits for model in models]
    outcomes: list[int | None] = []
    ended = False
    while not ended:
        path = tmp_path / str(len(outcomes))
        models[0].save_pretrained(path, **old)
        with monkeypatch.context() as patch:
            Dies(patch, len(outcomes))
            try:
                models[1].save_pretrained(path, **new)
                ended = True
            except KeyboardInterrupt:
                pass
        try:
            loaded = load(path)(tokens()).logits
        except FileNotFoundError as error:
            assert "config.json" in str(error)
            outcomes.append(None)
        else:
            outcomes.append(next(i for i in range(2) if torch.equal(loaded, logits[i])))
    assert outcomes[0] == 0 and outcomes[-1] == 1 and set(outcomes) == {0, None, 1}
    assert not list(path.glob(".saving*"))
    assert stored(path).keys() == {name for name, _ in models[1].named_parameters()}


def test_other_files_of_the_directory_stay(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    recursive().save_pretrained(tmp_path)
    recursive().save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").exists() and (tmp_path / "notes").exists()
    assert sorted(os.listdir(tmp_path)) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "notes",
        "tokenizer.json",
    ]


def test_a_failing_save_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = recursive()
    model.save_pretrained(tmp_path)
    before = snapshot(tmp_path)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", full)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(tmp_path)
    assert snapshot(tmp_path) == before


WHERE = r"load: .*config\.json"
DAMAGED: dict[str, tuple[dict[str, Any], str]] = {
    "no recursion": (
        {"recursive": None},
        f"{WHERE} must describe a recursive model, got no 'recursive'",
    ),
    "unknown option": (
        {"recursive": {"num_loops": 2, "ranks": 3}},
        "'ranks' is not a field; did you mean 'rank'",
    ),
    "no loops": ({"recursive": {"rank": 3}}, f"{WHERE}: recursive: .*num_loops must be given"),
    "too many loops": (
        {"recursive": {"num_loops": 3, "rank": 3}},
        "num_loops must divide the 4 layers",
    ),
    "other loops": (
        {"recursive": {"num_loops": 1, "rank": 3}},
        "must hold the tensor model.layers.2",
    ),
    "other rank": (
        {"recursive": {"num_loops": 2, "rank": 4}},
        r"lora_a must be \[4, 24\], got \[3, 24\]",
    ),
    "no adapters": (
        {"recursive": {"num_loops": 2, "rank": 0}},
        "must hold tensors of the model only",
    ),
    "a name that is none": (
        {"recursive": {"num_loops": 2, "rank": {"nothing": 3}}},
        "rank must name linears",
    ),
    "slow pattern": (
        {"recursive": {"num_loops": 2, "rank": {"(a+)+b": 3}}},
        f"{WHERE}: recursive: rank",
    ),
    "slow target": (
        {"recursive": {"num_loops": 2, "rank": 3, "targets": "(a+)+b"}},
        f"{WHERE}: recursive: targets",
    ),
    "class": (
        {"architectures": ["RecursiveNothing"]},
        f"{WHERE}: architectures must name one model",
    ),
    "plain class": (
        {"architectures": ["LlamaForCausalLM"]},
        f"{WHERE}: architectures must name one model",
    ),
    "no class": (
        {"architectures": ["RecursiveTrainer"]},
        f"{WHERE}: architectures must name one model",
    ),
    "other model": (
        {"architectures": ["RecursiveMistralForCausalLM"]},
        f"{WHERE}: model_type must be 'recursive_mistral' for MistralForCausalLM",
    ),
    "no head": (
        {"architectures": ["RecursiveLlamaModel"]},
        f"{WHERE} must describe a LlamaModel: load: model must be a decoder with a",
    ),
    "layers": (
        {"num_hidden_layers": 10**9},
        f"{WHERE} must have a number of layers that the 77 stored",
    ),
    "no layers": ({"num_hidden_layers": 0}, f"{WHERE} must have a number of layers"),
    "vocabulary": (
        {"vocab_size": 10**12},
        r"lm_head.weight must be \[1000000000000, 16\], got",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_config_that_does_not_fit(case: str, tmp_path: Path) -> None:
    """Before memory is taken for a model. The kinds of damage: tests/files/test_every_loader.py."""
    changes, message = DAMAGED[case]
    recursive().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lm_head.weight": "../model-00001-of-00003.safetensors"},
            "must hold names of files, got",
        ),
        ({"lm_head.weight": 3}, "must hold names of files, got 3"),
        ({"lm_head.weight": "nothing.safetensors"}, r"nothing\.safetensors"),
        (None, "weight_map must hold names of files, got None"),
    ],
    ids=str,
)
def test_an_index_that_does_not_fit(
    changes: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    recursive().save_pretrained(tmp_path, max_shard_size="5KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] = changes and {**index["weight_map"], **changes}
    path.write_text(json.dumps(index))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load(tmp_path)


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    recursive().save_pretrained(tmp_path, max_shard_size="5KB")
    first = min(tmp_path.glob("model-*.safetensors"))
    (tmp_path / "more.safetensors").write_bytes(first.read_bytes())
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = "more.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"more.safetensors must hold tensors of its own, got '"):
        load(tmp_path)


def test_tensors_of_other_kinds(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    recursive().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["lm_head.weight"].to(torch.int8)}, path)
    with pytest.raises(
        ValueError, match=r"lm_head.weight must have a dtype of the kind of torch.float32"
    ):
        load(tmp_path)


def test_a_directory_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        recursive().save_pretrained(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="nothing"):
        load(tmp_path / "nothing")


def test_saving_changes_no_model(tmp_path: Path) -> None:
    model = recursive()
    model.save_pretrained(tmp_path)  # sets architectures and dtype, as transformers does
    before = snapshot(model), copy.deepcopy(model.config.to_dict())
    model.save_pretrained(tmp_path)
    assert (snapshot(model), model.config.to_dict()) == before
    assert lr.recursive.is_recursive(model)


@pytest.mark.parametrize("r", [2, 4])
def test_adapters_over_the_loops_are_saved_as_adapters(r: int, tmp_path: Path) -> None:
    """Both have tensors of one name: of equal shapes with r = 4, where a mix-up would not raise."""
    model = recursive(rank=4)
    adapted = lr.adapt(copy.deepcopy(model), lr.LoRAConfig(r=r))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    other = lr.adapt(copy.deepcopy(model), lr.LoRAConfig(r=r))
    other.load_state_dict(adapted.state_dict())
    assert torch.equal(other(tokens()).logits, adapted(tokens()).logits)
    adapted.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        lr.recursive.load(tmp_path)
    loaded = lr.load_adapter(copy.deepcopy(model), tmp_path)
    assert torch.equal(loaded(tokens()).logits, adapted(tokens()).logits)
