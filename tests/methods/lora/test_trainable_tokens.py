"""trainable_token_indices: rows of embeddings that train beside LoRA, as in PEFT."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from module_cases import TinyLM
from peft_models import VOCABULARY, gpt2, llama, token_ids
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

pytest.importorskip("peft")

import peft

import lowrank_ext as lr
from lowrank_ext.adapt import token_rows_of
from lowrank_ext.methods.lora.config import LoRAConfig
from lowrank_ext.nn import TiedTokenRows, TokenRows

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENS = (60, 0, 7)  # 60 is in no input
NAMES = ["q_proj", "v_proj"]


def t5() -> nn.Module:
    torch.manual_seed(7)
    sizes = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 4, "d_ff": 24}
    config = T5Config(**sizes, num_layers=1, num_heads=4, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


def logits(model: nn.Module) -> Tensor:
    ids = token_ids()
    if getattr(model.config, "is_encoder_decoder", False):
        return model(input_ids=ids, decoder_input_ids=ids[:, :4]).logits
    return model(input_ids=ids).logits


def config(**options: Any) -> LoRAConfig:
    options = {"r": 2, "alpha": 4, "target_modules": NAMES, **options}
    return LoRAConfig(**{"trainable_token_indices": list(TOKENS), **options})


def in_peft(model: nn.Module, **options: Any) -> nn.Module:
    options = {"r": 2, "lora_alpha": 4, "target_modules": NAMES, **options}
    options = {"trainable_token_indices": list(TOKENS), **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(**options)).eval()


@torch.no_grad()
def randomize(model: nn.Module) -> nn.Module:
    """Values of order one in all that trains."""
    torch.manual_seed(11)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model


def saved(model: nn.Module, path: Path) -> Path:
    """PEFT's files of a model with rows of order one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        randomize(model).save_pretrained(path)
    return path


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "untied": (llama, NAMES),
    "tied": (lambda: llama(tied=True), NAMES),
    "bfloat16": (lambda: llama(torch.bfloat16, tied=True), NAMES),
    "float64": (lambda: llama(torch.float64, tied=True), NAMES),
    "Conv1D": (gpt2, ["c_attn"]),
    "T5": (t5, ["q", "v"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_starts_as_the_base(name: str) -> None:
    make, names = MODELS[name]
    before = logits(make().requires_grad_(False))  # T5's bits depend on that
    model = lr.adapt(make(), config(target_modules=names))
    assert torch.equal(logits(model), before)
    (rows,) = token_rows_of(model).values()
    assert rows.rows.requires_grad and not rows.weight.requires_grad
    assert torch.equal(rows.rows.to(rows.weight.dtype), rows.weight[list(TOKENS)])


@pytest.mark.parametrize("name", MODELS)
def test_files_of_peft(name: str, tmp_path: Path) -> None:
    make, names = MODELS[name]
    reference = in_peft(make(), target_modules=names)
    model = lr.load_adapter(make(), saved(reference, tmp_path)).eval()
    expected = logits(reference)
    assert not torch.allclose(expected, logits(make()), atol=1e-3)
    tolerance = 16 * torch.finfo(expected.dtype).eps
    scale = expected.abs().max()
    torch.testing.assert_close(
        logits(model) / scale, expected / scale, rtol=0, atol=tolerance, check_dtype=True
    )
    lr.save_adapter(model, tmp_path / "again")
    first, second = load_file(tmp_path / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", MODELS)
def test_files_for_peft(name: str, tmp_path: Path) -> None:
    make, names = MODELS[name]
    model = randomize(lr.adapt(make(), config(target_modules=names))).eval()
    lr.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["trainable_token_indices"] == list(TOKENS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    expected = logits(reference)
    scale = expected.abs().max()
    tolerance = 16 * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(logits(model) / scale, expected / scale, rtol=0, atol=tolerance)
    again = lr.load_adapter(lr.adapt(make(), config(target_modules=names)), tmp_path).eval()
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("name", ["untied", "tied", "float64", "T5"])
def test_gradients_are_pefts(name: str, tmp_path: Path) -> None:
    make, names = MODELS[name]
    reference = in_peft(make(), target_modules=names)
    model = lr.load_adapter(make(), saved(reference, tmp_path))
    for each in (model, reference):
        logits(each.eval()).square().mean().backward()
    (rows,) = token_rows_of(model).values()
    (delta,) = (p for n, p in reference.named_parameters() if "tokens_delta" in n)
    torch.testing.assert_close(rows.rows.grad, delta.grad, rtol=1e-4, atol=1e-6)
    assert rows.rows.grad.abs().sum() > 0 and rows.weight.grad is None


@pytest.mark.parametrize("name", MODELS)
def test_merges_disables_and_unloads(name: str) -> None:
    make, names = MODELS[name]
    before = logits(make().requires_grad_(False))  # T5's bits depend on that
    model = randomize(lr.adapt(make(), config(target_modules=names))).eval()
    values, after = {n: p.clone() for n, p in model.named_parameters()}, logits(model)
    with lr.disable_adapter(model):
        assert torch.equal(logits(model), before)
    lr.merge(model)
    tolerance = 100 * torch.finfo(after.dtype).eps * after.abs().max().item()
    torch.testing.assert_close(logits(model), after, rtol=0, atol=tolerance)
    with lr.disable_adapter(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    lr.unmerge(model)
    assert all(torch.equal(p, values[n]) for n, p in model.named_parameters())
    assert torch.equal(logits(model), after)
    dropped = lr.unload(copy.deepcopy(model), merge=False)
    assert torch.equal(logits(dropped), before)
    plain = lr.unload(copy.deepcopy(model), merge=True)
    torch.testing.assert_close(logits(plain), after, rtol=0, atol=tolerance)
    assert [type(m) for m in plain.modules()] == [type(m) for m in make().modules()]
    assert plain.state_dict().keys() == make().state_dict().keys()


def test_what_trains_and_is_shown() -> None:
    model = lr.adapt(llama(tied=True), config())
    assert type(model.model.embed_tokens) is TokenRows and type(model.lm_head) is TiedTokenRows
    assert model.lm_head.weight is model.model.embed_tokens.weight
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert trained == {"model.embed_tokens.rows"}
    table = lr.summary(model)
    kinds = [str(cell) for cell in table.columns[1].cells]
    (index,) = (i for i, kind in enumerate(kinds) if kind == "3 token rows")
    row = [str(list(column.cells)[index]) for column in table.columns]
    assert row[0] == "embed_tokens" and row[3] == "67 → 32" and row[6] == "96"


def test_only_the_rows_change_in_training() -> None:
    model = lr.adapt(llama(tied=True), config())
    weight = model.lm_head.weight.clone()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.1)
    rows = model.model.embed_tokens.rows.detach().clone()
    logits(model).square().mean().backward()
    optimizer.step()
    assert torch.equal(model.lm_head.weight, weight)
    assert (model.model.embed_tokens.rows != rows).any(-1).all()


MAPPINGS: dict[str, dict[str, list[int]]] = {
    "the same tokens": {"embed_tokens": [3, 1], "lm_head": [3, 1]},
    "other tokens": {"embed_tokens": [3, 1], "lm_head": [5]},
    "the head": {"lm_head": [5, 2]},
    "whole paths": {"model.embed_tokens": [4]},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", MAPPINGS)
def test_mappings(case: str, tied: bool, tmp_path: Path) -> None:
    mapping = MAPPINGS[case]
    reference = in_peft(llama(tied=tied), trainable_token_indices=mapping)
    model = lr.load_adapter(llama(tied=tied), saved(reference, tmp_path)).eval()
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-5, atol=1e-5)
    lr.save_adapter(model, tmp_path / "again")
    back = peft.PeftModel.from_pretrained(llama(tied=tied), tmp_path / "again").eval()
    torch.testing.assert_close(logits(model), logits(back), rtol=1e-5, atol=1e-5)
    adapted = lr.adapt(llama(tied=tied), config(trainable_token_indices=mapping))
    adapted = lr.load_adapter(adapted, tmp_path / "again").eval()
    assert torch.equal(logits(adapted), logits(model))


def test_rows_of_other_tokens_are_not_merged_into_one_weight() -> None:
    """Each module would see the other's rows: PEFT merges them all the same."""
    mapping = MAPPINGS["other tokens"]
    model = lr.adapt(llama(tied=True), config(trainable_token_indices=mapping))
    weight = model.lm_head.weight.clone()
    with pytest.raises(ValueError, match=r"weight of model\.embed_tokens must be its own, .* tied"):
        lr.merge(model)
    assert torch.equal(model.lm_head.weight, weight)
    lr.merge(lr.adapt(llama(), config(trainable_token_indices=mapping)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_extended_vocabulary(tied: bool, tmp_path: Path) -> None:
    """PEFT then saves the embeddings beside the rows, and the rows of a tied head again."""

    def extended(seed: int) -> nn.Module:
        model = llama(tied=tied)
        torch.manual_seed(seed)
        model.resize_token_embeddings(VOCABULARY + 5, mean_resizing=False)
        return model

    llama(tied=tied).save_pretrained(tmp_path / "base")
    base = extended(1)
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    reference = in_peft(base, trainable_token_indices=[VOCABULARY + 1, 3])
    saved(reference, tmp_path / "theirs")
    assert any("base_layer.weight" in key for key in load_file(tmp_path / "theirs" / WEIGHTS))
    model = lr.load_adapter(extended(2), tmp_path / "theirs").eval()
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-5, atol=1e-5)
    lr.save_adapter(model, tmp_path / "ours")
    again = lr.load_adapter(extended(3), tmp_path / "ours").eval()
    assert torch.equal(logits(again), logits(model))


def test_a_tie_that_the_models_config_does_not_tell(tmp_path: Path) -> None:
    """PEFT leaves such a head alone."""
    mapping = {"embed": [3, 1]}
    options = config(target_modules=["q_proj"], trainable_token_indices=mapping)
    model = randomize(lr.adapt(TinyLM(tied=True), options)).eval()
    assert type(model.lm_head) is TiedTokenRows
    ids = torch.tensor([[3, 2, 1]])
    with pytest.warns(UserWarning, match="PEFT leaves alone what is tied without tie_word_emb"):
        lr.save_adapter(model, tmp_path)
    base = TinyLM(tied=True)
    base.load_state_dict(lr.unload(copy.deepcopy(model), merge=False).state_dict())
    with pytest.warns(UserWarning, match="PEFT leaves alone .* here lm_head"):
        lr.load_adapter(base, tmp_path)
    torch.testing.assert_close(base.eval()(ids), model(ids))


def test_beside_pissa(tmp_path: Path) -> None:
    model = randomize(lr.adapt(llama(tied=True), config(init="pissa"))).eval()
    lr.save_adapter(model, tmp_path)
    reference = peft.PeftModel.from_pretrained(llama(tied=True), tmp_path).eval()
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"must be an ordinary LoRA .* trained rows of emb"):
        lr.export_lora(model, tmp_path / "exported")


def test_becomes_pefts_config() -> None:
    made = lr.peft_config(config(trainable_token_indices={"embed_tokens": (4, 2)}))
    assert made.trainable_token_indices == {"embed_tokens": [4, 2]}
    model = peft.get_peft_model(llama(), made)
    assert any("token_adapter" in name for name, _ in model.named_modules())
    assert lr.peft_config(LoRAConfig()).trainable_token_indices is None


class Scaled(nn.Embedding):
    """As of Gemma 3."""

    embed_scale = 2.5

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


EMBEDDINGS: dict[str, Callable[[], nn.Embedding]] = {
    "plain": lambda: nn.Embedding(9, 4),
    "padding": lambda: nn.Embedding(9, 4, padding_idx=2),
    "other padding": lambda: nn.Embedding(9, 4, padding_idx=3),
    "by frequency": lambda: nn.Embedding(9, 4, scale_grad_by_freq=True),
    "scaled": lambda: Scaled(9, 4),
}


@pytest.mark.parametrize("ids", [[[2, 5, 2], [0, 8, 5]], [], 5], ids=["rows", "none", "one"])
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_the_module_beside_pefts(name: str, ids: Any) -> None:
    base = EMBEDDINGS[name]()
    x = torch.tensor(ids, dtype=torch.int64)
    tokens = peft.TrainableTokensConfig(token_indices=[5, 2, 7], target_modules=["0"])
    reference = peft.get_peft_model(nn.Sequential(copy.deepcopy(base)), tokens)
    (delta,) = (p for p in reference.parameters() if p.requires_grad)
    module = TokenRows(base, [5, 2, 7])
    with torch.no_grad():
        delta.copy_(torch.randn_like(delta))
        module.rows.copy_(delta)
    y, expected = module(x), reference(x)
    assert torch.equal(y, expected)
    assert torch.equal(module(x.int()), expected)
    dy = torch.randn_like(y)
    (ours,), (theirs,) = (
        torch.autograd.grad(y, [module.rows], dy),
        torch.autograd.grad(expected, [delta], dy),
    )
    torch.testing.assert_close(ours, theirs)


def test_a_head_keeps_its_bias() -> None:
    """PEFT leaves it out."""
    head = nn.Linear(4, 9)
    module = TokenRows(head, [8, 1])
    assert module.differs_in_peft == "leaves out the bias of a head"
    x = torch.randn(3, 4)
    torch.testing.assert_close(module(x), head(x))
    with torch.no_grad():
        module.rows.normal_()
    y = module(x)
    module.merge()
    torch.testing.assert_close(module.eval()(x), y)
    torch.testing.assert_close(head(x), y)


@pytest.mark.parametrize("changed", [[], [1], [0, 1, 2]])
def test_rows_like_the_bases_have_gradients_of_their_own(changed: list[int]) -> None:
    base = nn.Linear(5, 70, dtype=torch.float64)
    module = TokenRows(base, TOKENS)
    with torch.no_grad():
        module.rows[changed] += 0.5
    x, dy = (torch.randn(3, n, dtype=torch.float64) for n in (5, 70))
    inputs = x.requires_grad_(), module.rows
    weight = base.weight.detach().index_copy(0, module.token_ids, module.rows)
    expected = x @ weight.T + base.bias
    torch.testing.assert_close(module(x), expected, rtol=1e-14, atol=1e-14)
    found = torch.autograd.grad(module(x), inputs, dy)
    reference = torch.autograd.grad(expected, inputs, dy)
    torch.testing.assert_close(found, reference, rtol=1e-13, atol=1e-13)


def test_state_dicts() -> None:
    base = nn.Embedding(9, 4)
    module = TokenRows(base, [5, 2])
    with torch.no_grad():
        module.rows.normal_()
    state = module.state_dict()
    assert state.keys() == {"weight", "rows", "token_ids"}
    other = TokenRows(nn.Embedding(9, 4), [5, 2])
    other.load_state_dict(state)
    x = torch.tensor([5, 1])
    assert torch.equal(other(x), module(x))
    with pytest.raises(RuntimeError, match=r"token_ids must be \[5, 3\], got \[5, 2\]"):
        TokenRows(nn.Embedding(9, 4), [5, 3]).load_state_dict(state)
    module.merge()
    assert module.state_dict().keys() == {"weight"}
    plain = nn.Embedding(9, 4)
    plain.load_state_dict(module.state_dict())
    assert torch.equal(plain(x), y := other(x)) and y.requires_grad
    with pytest.raises(RuntimeError, match="is merged: call unmerge"):
        module.load_state_dict(state)


def test_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = llama(tied=True)
    lr.adapt(model, config())
    source = randomize(lr.adapt(llama(tied=True), config())).eval()
    model.to_empty(device="cpu").load_state_dict(source.state_dict(), strict=False)
    own, other = model.model.embed_tokens, source.model.embed_tokens
    assert torch.equal(own.rows, other.rows) and torch.equal(own.token_ids, other.token_ids)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_compiles_as_one_graph(tied: bool) -> None:
    embedding, head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
    owner = TokenRows(embedding, [5, 2])
    if tied:
        head.weight = embedding.weight
        head = TiedTokenRows(head, owner)
    model, ids = randomize(nn.Sequential(owner, head)), torch.tensor([[5, 0, 2], [8, 2, 2]])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids), model(ids))
    gradients = []
    for each in (compiled, model):
        gradients += torch.autograd.grad(each(ids).square().sum(), [owner.rows])
    torch.testing.assert_close(*gradients)


def test_a_merged_module_does_not_train() -> None:
    module = TokenRows(nn.Embedding(9, 4), [5]).train()
    module.merge()
    with pytest.raises(RuntimeError, match=r"TokenRows\.forward: the adapter must be unmerged to"):
        module(torch.tensor([5])).sum().backward()


def test_a_merge_that_would_not_be_finite() -> None:
    module = TokenRows(nn.Embedding(9, 4, dtype=torch.float16), [5], torch.float32)
    weight = module.weight.clone()
    with torch.no_grad():
        module.rows.fill_(1e6)
    with pytest.raises(ValueError, match=r"TokenRows\.merge: the merged weight must be finite in"):
        module.merge()
    assert torch.equal(module.weight, weight) and not module.merged


ARGUMENTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "a number": ({"trainable_token_indices": 3}, TypeError, "must be a sequence of tokens, got 3"),
    "a string": ({"trainable_token_indices": "a"}, TypeError, "must be a sequence of tokens, got"),
    "a float": ({"trainable_token_indices": [1.0]}, TypeError, r"must be an int, got 1\.0"),
    "negative": ({"trainable_token_indices": [-1]}, ValueError, "must be at least 0, got -1"),
    "twice": ({"trainable_token_indices": [4, 3, 4]}, ValueError, "each token once, got 4 again"),
    "no name": ({"trainable_token_indices": {"": [1]}}, TypeError, "must have names as keys"),
    "no token": ({"trainable_token_indices": {"a": []}}, ValueError, "at least one token, got n"),
}


@pytest.mark.parametrize("case", ARGUMENTS)
def test_arguments(case: str) -> None:
    options, error, message = ARGUMENTS[case]
    with pytest.raises(error, match=rf"^LoRAConfig: trainable_token_indices.*{message}"):
        LoRAConfig(**options)


def test_configs() -> None:
    own = config(trainable_token_indices={"embed": (4, 2)})
    assert LoRAConfig.from_dict(json.loads(json.dumps(own.to_dict()))) == own
    assert LoRAConfig(trainable_token_indices=[]).trainable_token_indices is None
    with pytest.raises(TypeError, match="LaMDAConfig: trainable_token_indices is no option here"):
        lr.LaMDAConfig(trainable_token_indices=[1])
    with pytest.raises(ValueError, match="trainable_token_indices must be None for a single mod"):
        lr.nn.LoRALinear.from_linear(nn.Linear(4, 4), r=2, trainable_token_indices=[1])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no row": ({"trainable_token_indices": [3, 67]}, r"must be below 67, .*\.embed_tokens, got 67"),
    "no module": ({"trainable_token_indices": {"embed": [1]}}, "got 'embed', which matches none"),
    "no embedding": (
        {"trainable_token_indices": {"norm": [1]}},
        "norm: TokenRows: base must be an embedding or a head .* got LlamaRMSNorm",
    ),
    "adapted": (
        {"target_modules": ["embed_tokens"]},
        r"neither adapted nor in modules_to_save, got model\.embed_tokens",
    ),
    "saved": (
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        r"neither adapted nor in modules_to_save, got model\.embed_tokens",
    ),
    "adapted head": ({"target_modules": ["lm_head"]}, "modules_to_save, got lm_head"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_touched(case: str) -> None:
    options, message = REFUSED[case]
    model = llama(tied=True)
    before, modules = logits(model), list(model.modules())
    with pytest.raises(ValueError, match=f"^adapt: .*{message}"):
        lr.adapt(model, config(**options))
    assert list(model.modules()) == modules and torch.equal(logits(model), before)
    assert all(p.requires_grad for p in model.parameters())


def test_an_embedding_that_renormalizes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"TokenRows: max_norm must be None, .* got 1\.0"):
        TokenRows(nn.Embedding(9, 4, max_norm=1.0), [1])


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor], str], None], dict[str, Any], str]] = {
    "missing": (lambda t, key: t.pop(key), {}, "trainable_tokens_delta.* is missing"),
    "shape": (
        lambda t, key: t.update({key: t[key][:2].clone()}),
        {},
        r"must be \[3, 32\], got \[2, 32\]",
    ),
    "dtype": (lambda t, key: t.update({key: t[key].int()}), {}, "must be floating-point"),
    "unknown": (
        lambda t, key: None,
        {"trainable_token_indices": None},
        "belongs to no module of trainable_token_indices in the config",
    ),
    "a tie": (
        lambda t, key: t.update({key.replace("model.embed_tokens", "lm_head"): t[key] + 1}),
        {},
        "lm_head.* must equal .*embed_tokens.*, to which the model ties it",
    ),
    "type": (
        lambda t, key: None,
        {"trainable_token_indices": "all"},
        "trainable_token_indices must be a list or an object, got 'all'",
    ),
    "tokens": (
        lambda t, key: None,
        {"trainable_token_indices": [0, 1, 99]},
        "trainable_token_indices must be below 67",
    ),
    "values": (
        lambda t, key: None,
        {"trainable_token_indices": ["a", "b", "c"]},
        "trainable_token_indices must be an int, got 'a'",
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_files_are_refused(case: str, tmp_path: Path) -> None:
    change, fields, message = DAMAGES[case]
    lr.save_adapter(lr.adapt(llama(tied=True), config()), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    (key,) = (key for key in tensors if "token_adapter" in key)
    change(tensors, key)
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    stored = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps(stored | fields))
    model = llama(tied=True)
    modules = list(model.modules())
    with pytest.raises(ValueError, match=f"load_adapter: .*{message}"):
        lr.load_adapter(model, tmp_path)
    assert list(model.modules()) == modules


def test_a_model_of_other_tokens_and_a_bank_refuse_the_file(tmp_path: Path) -> None:
    lr.save_adapter(lr.adapt(llama(), config()), tmp_path)
    model = lr.adapt(llama(), config(trainable_token_indices=[1, 2, 3]))
    with pytest.raises(ValueError, match=r"must be \{.*\(1, 2, 3\)\} as in the model, got .*60"):
        lr.load_adapter(model, tmp_path)
    model = lr.adapt(llama(), config())
    lr.merge(model)
    with pytest.raises(ValueError, match="must not be merged"):
        lr.load_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="must be a LoRA at inference, got one with trained r"):
        lr.AdapterBank(llama()).load("a", tmp_path)
