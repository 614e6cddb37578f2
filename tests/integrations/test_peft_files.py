"""RF-29, RF-44, RF-45, RF-46: what files that PEFT wrote mean; those refused say what to do."""

import dataclasses
import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import gpt2, llama, randomize, token_ids
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

pytest.importorskip("peft")

import peft
from peft.tuners.tuners_utils import check_target_module_exists

import lowrank_ext as lr
from lowrank_ext.checkpoint.peft_config import _KNOWN, _OTHER_PEFT_TYPES
from lowrank_ext.checkpoint.peft_kinds import FIELDS, REFUSED
from lowrank_ext.checkpoint.selection import selects
from lowrank_ext.registry import METHODS

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
P = "base_model.model."
NAMES = ["q_proj", "v_proj"]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=token_ids()).logits


def assert_close(a: Tensor, b: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def peft_file(path: Path, base: nn.Module | None = None, **options: Any) -> nn.Module:
    """A model with PEFT's adapter, saved at ``path`` with PEFT's defaults."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": NAMES, **options}
    model = peft.get_peft_model(llama() if base is None else base, peft.LoraConfig(**options))
    randomize(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of saving embeddings
        model.save_pretrained(path)
    return model.eval()


def edit_config(path: Path, **changes: Any) -> None:
    fields = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps(fields | changes))


def paths_of(model: nn.Module) -> set[str]:
    return {path for path, m in model.named_modules() if isinstance(m, lr.nn.LoRALinear)}


def untouched(
    model: nn.Module,
    call: Callable[[], object],
    match: str,
    error: type[Exception] = ValueError,
) -> None:
    """``call`` raises ``error`` and leaves modules, values and flags as they were."""
    modules = dict(model.named_modules())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    values = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(error, match=match):
        call()
    assert dict(model.named_modules()) == modules
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert all(torch.equal(t, values[name]) for name, t in model.state_dict().items())
    assert not hasattr(model, "lowrank_config")


# ----------------------------------------------------------------------------- embeddings (RF-29)


def extended(seed: int, tied: bool = False) -> nn.Module:
    model = llama(tied=tied)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(72, mean_resizing=False)
    return model


@pytest.mark.parametrize("targets", [NAMES, [*NAMES, "lm_head"]], ids=["layers", "head"])
@pytest.mark.parametrize("tied", [False, True])
def test_an_extended_vocabulary(tied: bool, targets: list[str], tmp_path: Path) -> None:
    """peft#2898: the new rows of the embeddings are in the file and nowhere else."""
    reference = peft.get_peft_model(extended(1, tied), peft.LoraConfig(r=4, target_modules=targets))
    randomize(reference)
    reference.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    keys = {key for key in load_file(tmp_path / "theirs" / WEIGHTS) if "lora_" not in key}
    assert keys

    model = extended(2, tied)
    with pytest.warns(UserWarning, match="which replaces the model's other values"):
        lr.load_adapter(model, tmp_path / "theirs")
    loaded = peft.PeftModel.from_pretrained(extended(2, tied), tmp_path / "theirs")
    assert_close(logits(model), logits(loaded))
    assert not model.get_input_embeddings().weight.requires_grad
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied

    lr.save_adapter(model, tmp_path / "ours")  # nothing is lost on the way
    if not tied:  # a merged head is saved without the branch, which the file holds, too
        lr.save_adapter(lr.merge(model), tmp_path / "merged")
        expected = (tmp_path / "ours" / WEIGHTS).read_bytes()
        assert (tmp_path / "merged" / WEIGHTS).read_bytes() == expected
        lr.unmerge(model)
    again = {key for key in load_file(tmp_path / "ours" / WEIGHTS) if "lora_" not in key}
    assert again <= keys and again
    third = peft.PeftModel.from_pretrained(extended(3, tied), tmp_path / "ours")
    if len(targets) == 2 or tied:
        assert_close(logits(third), logits(model))

    untouched(
        base := llama(tied=tied),
        lambda: lr.load_adapter(base, tmp_path / "theirs"),
        r"must be \[67, 32\] as in the model, got \[72, 32\]; .*resize_token_embeddings\(72\)",
    )
    bank = lr.AdapterBank(other := extended(4, tied))
    untouched(other, lambda: bank.load("a", tmp_path / "theirs"), "the model's own embeddings")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapted_head_saved_with_defaults(
    tied: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    """RF-45: the file holds lm_head.base_layer.weight, which is the base's own."""
    reference = peft_file(tmp_path, llama(dtype, tied=tied), target_modules=[*NAMES, "lm_head"])
    assert f"{P}lm_head.base_layer.weight" in load_file(tmp_path / WEIGHTS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = lr.load_adapter(llama(dtype, tied=tied), tmp_path)
    assert_close(logits(model), logits(reference), 2e-5 if dtype == torch.float32 else 6e-2)
    lr.save_adapter(model, tmp_path / "ours")
    assert f"{P}lm_head.base_layer.weight" not in load_file(tmp_path / "ours" / WEIGHTS)
    bank = lr.AdapterBank(llama(dtype, tied=tied))
    bank.load("a", tmp_path)

    # a file of bfloat16 over the float32 base it was rounded from changes nothing
    if dtype == torch.bfloat16:
        base = llama(tied=tied)
        before = base.lm_head.weight.clone()
        lr.load_adapter(base, tmp_path)
        assert torch.equal(base.lm_head.weight, before)


def test_a_warning_that_is_an_error_leaves_the_model_alone(tmp_path: Path) -> None:
    reference = peft.get_peft_model(extended(1), peft.LoraConfig(r=4, target_modules=NAMES))
    reference.save_pretrained(tmp_path / "embeddings", save_embedding_layers=True)
    peft_file(tmp_path / "narrowed")
    edit_config(tmp_path / "narrowed", target_modules=["q_proj"])
    bases = {"embeddings": extended(2), "narrowed": llama()}
    for name, base in bases.items():
        call = functools.partial(lr.load_adapter, base, tmp_path / name)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            untouched(base, call, "as by PEFT", UserWarning)


def test_tied_embeddings_that_differ_in_the_file(tmp_path: Path) -> None:
    reference = peft.get_peft_model(
        extended(1, tied=True), peft.LoraConfig(r=4, target_modules=NAMES)
    )
    reference.save_pretrained(tmp_path, save_embedding_layers=True)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors[f"{P}model.embed_tokens.weight"] = torch.zeros(72, 32)
    tensors[f"{P}lm_head.weight"] = torch.ones(72, 32)
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    base = extended(2, tied=True)
    untouched(base, lambda: lr.load_adapter(base, tmp_path), "to which the model ties it")


def test_a_residual_head_is_not_replaced(tmp_path: Path) -> None:
    reference = peft.get_peft_model(
        llama(),
        peft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights="pissa"),
    )
    reference.save_pretrained(tmp_path)
    base = llama()
    untouched(base, lambda: lr.load_adapter(base, tmp_path), "save_embedding_layers=False")
    reference.save_pretrained(tmp_path, save_embedding_layers=False)
    assert_close(logits(lr.load_adapter(base, tmp_path)), logits(reference))


# -------------------------------------------------------------------- a config narrowed afterwards


NARROWED: dict[str, dict[str, Any]] = {
    "names": {"target_modules": ["q_proj"]},
    "one_path": {"target_modules": ["model.layers.1.self_attn.v_proj"]},
    "regex": {"target_modules": r".*\.0\..*[qv]_proj"},
    "exclude": {"exclude_modules": ["v_proj"]},
    "exclude_regex": {"exclude_modules": r".*\.1\..*"},
    "layers": {"layers_to_transform": [1]},
    "one_layer": {"layers_to_transform": 0, "layers_pattern": "layers"},
    "several_patterns": {"layers_to_transform": [1], "layers_pattern": ["h", "layers"]},
    "patterns": {"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 7}},
}


def test_warnings_show_names_of_directories_as_text(tmp_path: Path) -> None:
    where = tmp_path / "a\x1b]0;title\x07"
    where.mkdir()
    peft_file(where)
    edit_config(where, target_modules=["q_proj"])
    with pytest.warns(UserWarning, match=r"a\\x1b\]0;title\\x07.*does not select") as said:
        lr.load_adapter(llama(), where)
    assert all(str(each.message).isprintable() for each in said)


@pytest.mark.parametrize("case", NARROWED)
def test_the_config_decides(case: str, tmp_path: Path) -> None:
    """RF-45: tensors of modules that the config does not select are left out, and said so."""
    peft_file(tmp_path)
    edit_config(tmp_path, **NARROWED[case])
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path)
    with pytest.warns(UserWarning, match="load_adapter: .*does not select .* left out, as by PEFT"):
        model = lr.load_adapter(llama(), tmp_path)
    theirs = {name for name, m in loaded.named_modules() if isinstance(m, peft.tuners.lora.Linear)}
    assert {P + path for path in paths_of(model)} == theirs
    assert_close(logits(model), logits(loaded))
    with pytest.warns(UserWarning, match="AdapterBank.load: .*does not select"):
        lr.AdapterBank(base := llama()).load("a", tmp_path)
    adapted = {p for p, m in base.named_modules() if isinstance(m, lr.nn.MultiLoRALinear)}
    assert adapted == paths_of(model)


@pytest.mark.parametrize("pattern", [None, [], "block", "layers", ["h", "(layers|block)"], "model"])
@pytest.mark.parametrize("layers", [1, [0], [0, 1], [], None])
def test_layers_are_counted_as_by_peft(layers: Any, pattern: Any) -> None:
    """Paths with several numbers (T5, experts), numbers at the start, and none."""
    options = {"layers_to_transform": layers, "layers_pattern": pattern, "target_modules": ["q"]}
    config = peft.LoraConfig(target_modules=["q"])
    vars(config).update(options)  # PEFT refuses some of them only here
    for path in (
        "decoder.block.1.layer.0.SelfAttention.q",
        "encoder.block.0.layer.1.q",
        "model.layers.1.experts.0.q",
        "layers.1.q",
        "model.1.0.q",
        "model.h.10.q",
        "1.q",
        "q",
    ):
        expected = bool(check_target_module_exists(config, path))
        assert selects(options, path) == expected, path


def test_a_config_that_selects_nothing_of_the_file(tmp_path: Path) -> None:
    peft_file(tmp_path)
    edit_config(tmp_path, target_modules=["o_proj"])
    base = llama()
    untouched(base, lambda: lr.load_adapter(base, tmp_path), "which selects none of")
    edit_config(tmp_path, target_modules=NAMES, layers_to_transform=[0], layers_pattern=["(a+)+"])
    untouched(base, lambda: lr.load_adapter(base, tmp_path), "layers_pattern")


def test_fewer_layers_than_the_model(tmp_path: Path) -> None:
    """RF-23: an adapter of a shallower model is not accepted silently."""
    peft_file(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    shallow = {key: t for key, t in tensors.items() if ".layers.0." in key}
    save_file(shallow, tmp_path / WEIGHTS, {"format": "pt"})
    for load in (lr.load_adapter, lambda model, path: lr.AdapterBank(model).load("a", path)):
        with pytest.warns(
            UserWarning, match=r"selects model\.layers\.1\.self_attn\.q_proj, .*v_proj, for which"
        ):
            load(llama(), tmp_path)


@pytest.mark.parametrize(
    "targets", [NAMES, "all-linear", r".*\.1\..*_proj", ["layers.0.mlp.up_proj"]]
)
def test_whole_files_load_without_a_warning(targets: Any, tmp_path: Path) -> None:
    peft_file(tmp_path / "theirs", target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = lr.load_adapter(llama(), tmp_path / "theirs")
        lr.save_adapter(model, tmp_path / "ours")
        assert paths_of(lr.load_adapter(llama(), tmp_path / "ours")) == paths_of(model)


# --------------------------------------------------------------------------------- PiSSA (RF-44)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [llama, gpt2])
def test_unconverted_pissa(
    make: Callable[..., nn.Module], dtype: torch.dtype, tmp_path: Path
) -> None:
    """The residual is PEFT's, bit for bit but for ties of rounding; so are the logits."""
    names = ["q_proj", "down_proj"] if make is llama else ["c_attn", "c_fc"]
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=names,
        init_lora_weights="pissa",
        fan_in_fan_out=make is gpt2,
    )
    reference = peft.get_peft_model(make(dtype), config)
    randomize(reference, 0.05)
    reference.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make(dtype), tmp_path)
    model = lr.load_adapter(make(dtype), tmp_path)
    eps = torch.finfo(dtype).eps
    for path in paths_of(model):
        module = model.get_submodule(path)
        theirs = loaded.get_submodule(P + path).base_layer.weight
        differs = module.weight != theirs
        assert differs.float().mean() < 0.002 or dtype == torch.float32, path
        assert_close(module.weight.float(), theirs.float(), max(eps, 1e-6))
        assert module.lora_a.dtype == torch.float32
    noise = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}[dtype]
    assert_close(logits(model).float(), logits(loaded).float(), noise)

    # saved again it is a plain LoRA of the original base, here and there
    lr.save_adapter(model, tmp_path / "ours")
    again = lr.load_adapter(make(dtype), tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_our_own_start_keeps_w_closest(dtype: torch.dtype) -> None:
    """Rounded factors are subtracted: what base and branch compute together is W to a rounding of
    the residual; with PEFT's residual the ops, which round factors, would be further off."""
    linear = llama(dtype).model.layers[0].mlp.down_proj
    weight = linear.weight.detach().double()

    def error(module: lr.nn.LoRALinear) -> float:
        a, b = (t.to(dtype).double() for t in (module.lora_a, module.lora_b))
        return (module.weight.double() + module.scaling * b @ a - weight).abs().max().item()

    ours = lr.nn.LoRALinear.from_linear(linear, r=4, alpha=8, init="pissa")
    own_error = error(ours)
    ours.reset_as_peft()
    assert own_error < 0.7 * error(ours)


# ------------------------------------------------------------------------ refused, and what to do


OTHERS: dict[str, Callable[[], Any]] = {
    "LOHA": lambda: peft.LoHaConfig(r=2, target_modules=NAMES),
    "LOKR": lambda: peft.LoKrConfig(r=2, target_modules=NAMES),
    "ADALORA": lambda: peft.AdaLoraConfig(init_r=2, total_step=9, target_modules=NAMES),
    "IA3": lambda: peft.IA3Config(target_modules=NAMES, feedforward_modules=[]),
    "VERA": lambda: peft.VeraConfig(r=2, target_modules=["q_proj"]),
    "OFT": lambda: peft.OFTConfig(r=4, oft_block_size=0, target_modules=NAMES),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=NAMES),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "LN_TUNING": lambda: peft.LNTuningConfig(target_modules=["norm"]),
}


@pytest.mark.parametrize("peft_type", OTHERS)
def test_files_of_other_methods_name_their_method(peft_type: str, tmp_path: Path) -> None:
    """RF-46: the method comes first, not a tensor that is unknown."""
    model = peft.get_peft_model(llama(), OTHERS[peft_type]())
    model.save_pretrained(tmp_path)
    base = llama()
    match = rf"peft_type must be one of 'LORA', .* got '{peft_type}'; load it by peft\.PeftModel"
    untouched(base, lambda: lr.load_adapter(base, tmp_path), f"load_adapter: .*{match}")
    bank = lr.AdapterBank(base)
    untouched(base, lambda: bank.load("a", tmp_path), rf"AdapterBank\.load: .*{match}")


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.embed = nn.Embedding(7, 3)
        self.linear = nn.Linear(3, 3)
        self.experts = nn.Module()
        self.experts.register_parameter("weight", nn.Parameter(torch.zeros(2, 3, 3)))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "parameters": (
        {"target_modules": ["linear"], "target_parameters": ["experts.weight"]},
        "got experts.weight, one of a Module, which has no experts interface|"
        "must be a LoRA of linear modules, got target_parameters",
    ),
    "alpha": ({"lora_alpha": -4}, "alpha must be positive"),
    "no_alpha": ({"lora_alpha": 0}, "alpha must be positive"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_is_not_computed_is_refused(case: str, tmp_path: Path) -> None:
    options, message = UNSUPPORTED[case]
    model = peft.get_peft_model(
        Convolutional(), peft.LoraConfig(**{"r": 2, "target_modules": ["linear"], **options})
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path, save_embedding_layers=False)
    base = Convolutional()
    untouched(base, lambda: lr.load_adapter(base, tmp_path), message)
    bank = lr.AdapterBank(base)
    untouched(base, lambda: bank.load("a", tmp_path), message)


@pytest.mark.parametrize("name", ["embed", "conv"])
def test_a_bank_refuses_modules_that_are_not_linear(name: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["linear", name])
    peft.get_peft_model(Convolutional(), config).save_pretrained(tmp_path)
    bank = lr.AdapterBank(Convolutional())
    kind = type(bank.model.get_submodule(name)).__name__
    message = rf"{name}\.lora_.* must belong to a linear module, the model has {kind} at {name}"
    untouched(bank.model, lambda: bank.load("a", tmp_path), message)


PLAIN_AT_INFERENCE: dict[str, dict[str, Any]] = {
    "mica": {"init_lora_weights": "mica"},
    "velora": {"velora_config": peft.tuners.lora.config.VeloraConfig(num_groups=4)},
    "monteclora": {"monteclora_config": peft.tuners.lora.config.MontecloraConfig()},
}


@pytest.mark.parametrize("case", PLAIN_AT_INFERENCE)
def test_files_that_are_a_plain_lora_at_inference(case: str, tmp_path: Path) -> None:
    """RF-46: options of training, which change no output; the logits are PEFT's, and it is said."""
    options = PLAIN_AT_INFERENCE[case]
    reference = peft_file(tmp_path, **options)
    with pytest.warns(UserWarning, match=r"plain LoRA that it is at inference; it trains on with"):
        model = lr.load_adapter(llama(), tmp_path)
    assert_close(logits(model), logits(reference))
    loaded = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert_close(logits(model), logits(loaded))
    lr.save_adapter(model, tmp_path / "again")
    again = lr.load_adapter(llama(), tmp_path / "again")
    assert_close(logits(again), logits(reference))


REFUSED_KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "kasa": (
        {"kasa_config": {"beta": 0.1}},
        "kasa_config=.* is not supported, it may change base weights .*merge_and_unload",
    ),
    "alora": (
        {"alora_invocation_tokens": [1]},
        r"alora_invocation_tokens=\[1\] is not supported, its branch depends on the tokens",
    ),
    "replication": ({"layer_replication": [[0, 1]]}, "layer_replication=.*layers several times"),
    "bdlora": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora=.* factors are blocks, .*merge there"),
    "qalora": ({"use_qalora": True}, "use_qalora=True is not supported, its factors are blocks"),
    "tied": (
        {"ensure_weight_tying": True},
        "ensure_weight_tying=True is not supported, the adapters of tied modules are one",
    ),
    "arrow": ({"arrow_config": {"top_k": 2}}, "arrow_config=.* or on other adapters; .*GOATConfig"),
    **{
        init: (
            {"init_lora_weights": init},
            f"init_lora_weights='{init}' is not supported, it may change base weights",
        )
        for init in ("olora", "corda", "lora_ga", "loftq", "pissa_niter_4")
    },
}


@pytest.mark.parametrize("case", REFUSED_KINDS)
def test_kinds_that_are_refused(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED_KINDS[case]
    peft_file(tmp_path)
    edit_config(tmp_path, **changes)
    base = llama()
    untouched(base, lambda: lr.load_adapter(base, tmp_path), message)
    bank = lr.AdapterBank(base)
    untouched(base, lambda: bank.load("a", tmp_path), message)


def test_at_most_five_kinds_are_refused() -> None:
    """Every field of PEFT's LoraConfig is read, means nothing here, or is of one of these kinds."""
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    read = {*METHODS["LORA"].file_format.peft_fields, *_KNOWN}
    assert fields <= read | FIELDS
    assert not FIELDS & set(METHODS["LORA"].file_format.peft_fields)
    assert len(REFUSED) <= 5
    assert all(kind.because and kind.way_out and kind.fields for kind in REFUSED)


def test_options_of_lora_in_files_of_other_methods(tmp_path: Path) -> None:
    lr.save_adapter(lr.adapt(llama(), lr.LaMDAConfig(r=2, target_modules=NAMES)), tmp_path)
    base = llama()
    for name, value in (("use_dora", True), ("velora_config", {"num_groups": 2})):
        edit_config(tmp_path, **{name: value})
        message = f"{name}=.* is not supported for LAMDA, it is an option of LoRA"
        untouched(base, lambda: lr.load_adapter(base, tmp_path), message)
        edit_config(tmp_path, **{name: None})


def test_fields_of_a_newer_version(tmp_path: Path) -> None:
    """RF-29: off or a mere number: loads. On: refused, with two ways out."""
    reference = peft_file(tmp_path)
    edit_config(tmp_path, new_number=3, new_flag=False, new_list=[], new_name="x")
    assert_close(logits(lr.load_adapter(llama(), tmp_path)), logits(reference))
    edit_config(tmp_path, use_new=True)
    base = llama()
    untouched(
        base,
        lambda: lr.load_adapter(base, tmp_path),
        "use_new=True is not known to this version; remove the field .* else load it by peft",
    )


def test_module_names_from_before_a_rename(tmp_path: Path) -> None:
    """RF-29: transformers#38627; the way out that is named works."""
    reference = peft_file(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    old = {key.replace("model.layers", "language_model.layers"): t for key, t in tensors.items()}
    save_file(old, tmp_path / WEIGHTS, {"format": "pt"})
    base = llama()
    untouched(
        base,
        lambda: lr.load_adapter(base, tmp_path),
        r"did you mean 'model\.layers\.[^?]*\?; .*give PeftModel.from_pretrained a key_mapping",
    )
    mapping = {r"^base_model\.language_model": "base_model.model", "^language_model": "model"}
    renamed = peft.PeftModel.from_pretrained(llama(), tmp_path, key_mapping=mapping)
    renamed.save_pretrained(tmp_path / "again")
    assert_close(logits(lr.load_adapter(base, tmp_path / "again")), logits(reference))


def test_every_method_of_peft_is_told_from_an_unknown_name() -> None:
    ours = set(METHODS)  # lr.register_with_peft adds them to the enum
    assert {kind.value for kind in peft.PeftType} - ours <= set(_OTHER_PEFT_TYPES)
