"""What docs/coming_from_peft.md says of one method or field, beside PEFT: a check for each."""

import io
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
from families import base, logits, loss
from lora_sides import randomize
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.utils import hub

import lowrank_ext as lr
from lowrank_ext.nn import LoRALinear

FAMILY = "llama"
_FILES = ("adapter_config.json", "adapter_model.safetensors")


class Pair:
    """One trained LoRA as PEFT's model and as a model of adapt."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        self.options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **options}
        self.theirs.save_pretrained(self.file)

    @property
    def file(self) -> Path:
        return self.folder / "adapter"

    @cached_property
    def theirs(self) -> Any:
        model = peft.get_peft_model(base(FAMILY), peft.LoraConfig(**self.options))
        randomize(model)
        return model

    @cached_property
    def ours(self) -> Any:
        return lr.load_adapter(base(FAMILY), self.file)

    def check(self, ours: nn.Module | None = None, theirs: nn.Module | None = None) -> None:
        """The logits of both are equal."""
        close(out(ours or self.ours), out(theirs or self.theirs))


def out(model: nn.Module) -> Tensor:
    return logits(model, FAMILY)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def differs(a: Tensor, b: Tensor) -> bool:
    return (a - b).abs().max().item() > 1e-3


CHECKS: dict[str, Callable[[Pair], None]] = {}


def check_of(*names: str) -> Callable[[Callable[[Pair], None]], Callable[[Pair], None]]:
    def add(check: Callable[[Pair], None]) -> Callable[[Pair], None]:
        CHECKS.update(dict.fromkeys(names, check))
        return check

    return add


# ---- files


@check_of("save_pretrained")
def saves_the_same_files(pair: Pair) -> None:
    pair.ours.save_pretrained(pair.folder / "ours")
    lr.save_adapter(pair.ours, pair.folder / "again")
    for folder in ("ours", "again"):
        names = {path.name for path in (pair.folder / folder).iterdir()}
        assert names == set(_FILES)
        found, expected = (load_file(f / _FILES[1]) for f in (pair.folder / folder, pair.file))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@check_of("push_to_hub")
def uploads_the_adapter(pair: Pair) -> None:
    def uploaded(model: Any) -> set[str]:
        seen: set[str] = set()

        def upload(self: Any, folder: str, *args: Any, **options: Any) -> None:
            seen.update(path.name for path in Path(folder).iterdir())

        with (
            mock.patch.object(hub, "hf_api"),
            mock.patch.object(hub, "create_and_tag_model_card"),
            mock.patch.object(hub.PushToHubMixin, "_upload_modified_files", upload),
        ):
            model.push_to_hub("someone/adapter")
        return seen

    theirs = uploaded(pair.theirs)
    assert set(_FILES) <= theirs and uploaded(pair.ours) == theirs - {"README.md"}


@check_of("from_pretrained", "load_adapter")
def reads_the_file(pair: Pair) -> None:
    again = PeftModel.from_pretrained(base(FAMILY), pair.file)
    pair.check(lr.load_adapter(base(FAMILY), pair.file), again)
    model = lr.adapt(base(FAMILY), pair.ours.lowrank_config)  # and into a model that carries one
    assert differs(out(model), out(again))
    pair.check(lr.load_adapter(model, pair.file), again)


@check_of("inference_mode")
def loads_frozen(pair: Pair) -> None:
    theirs = PeftModel.from_pretrained(base(FAMILY), pair.file)
    assert theirs.peft_config["default"].inference_mode
    ours = lr.load_adapter(base(FAMILY), pair.file, trainable=False)
    for model in (theirs, ours):
        assert not any(parameter.requires_grad for parameter in model.parameters())
    pair.check(ours, theirs)


@check_of("inject_adapter")
def adapts_the_same_modules(pair: Pair) -> None:
    theirs = peft.inject_adapter_in_model(peft.LoraConfig(**pair.options), base(FAMILY))
    config = lr.LoRAConfig(r=4, alpha=6, target_modules=["q_proj", "v_proj"])
    ours = lr.adapt(base(FAMILY), config)
    expected = {
        path for path, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.Linear)
    }
    assert {path for path, m in ours.named_modules() if isinstance(m, LoRALinear)} == expected


# ---- running


@check_of("generate")
def generates(pair: Pair) -> None:
    prompt = torch.arange(3, 9)[None]
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    ours, theirs = (m.eval().generate(prompt, **options) for m in (pair.ours, pair.theirs))
    assert torch.equal(ours, theirs)


@check_of("disable_adapter")
def disables(pair: Pair) -> None:
    with lr.disable_adapter(pair.ours), pair.theirs.disable_adapter():
        assert torch.equal(out(pair.ours), out(pair.theirs))
        assert torch.equal(out(pair.ours), out(base(FAMILY)))
    pair.check()
    assert differs(out(pair.ours), out(base(FAMILY)))


@check_of("disable_adapter_layers", "enable_adapter_layers")
def disables_until_enabled(pair: Pair) -> None:
    pair.ours.disable_adapters()
    pair.theirs.disable_adapter_layers()
    assert torch.equal(out(pair.ours), out(pair.theirs))
    assert torch.equal(out(pair.ours), out(base(FAMILY)))
    pair.ours.enable_adapters()
    pair.theirs.enable_adapter_layers()
    pair.check()
    assert differs(out(pair.ours), out(base(FAMILY)))


@check_of("prepare_model_for_gradient_checkpointing")
def checkpoints(pair: Pair) -> None:
    def gradients(model: Any) -> list[Tensor]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        loss(model.train(), FAMILY).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    theirs = PeftModel.from_pretrained(base(FAMILY), pair.file, is_trainable=True)
    theirs.prepare_model_for_gradient_checkpointing(theirs.get_base_model())
    lr.prepare_for_checkpointing(pair.ours)
    for ours, expected in zip(gradients(pair.ours), gradients(theirs), strict=True):
        close(ours, expected)


@check_of("lora_dropout")
def drops_out(pair: Pair) -> None:
    """The branch's mean and spread in training are PEFT's; the masks are others."""
    pair = Pair(pair.folder, lora_dropout=0.4)
    x = torch.randn(1, 16, generator=torch.Generator().manual_seed(4)).expand(4000, 16)

    def branch(layer: nn.Module) -> Tensor:
        with torch.no_grad():
            return layer.train()(x) - base(FAMILY).model.layers[0].self_attn.q_proj(x)

    ours = branch(pair.ours.model.layers[0].self_attn.q_proj)
    theirs = branch(pair.theirs.get_base_model().model.layers[0].self_attn.q_proj)
    assert theirs.std(0).min() > 1e-2 and not torch.equal(ours, theirs)
    spread = theirs.std(0)
    assert ((ours.mean(0) - theirs.mean(0)).abs() < 0.1 * spread).all()
    assert ((ours.std(0) - spread).abs() < 0.1 * spread).all()


# ---- merging


@check_of("merge_adapter", "unmerge_adapter")
def merges_and_unmerges(pair: Pair) -> None:
    before = pair.ours.model.layers[0].self_attn.q_proj.weight.clone()
    lr.merge(pair.ours)
    pair.theirs.merge_adapter()
    theirs = pair.theirs.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight
    close(pair.ours.model.layers[0].self_attn.q_proj.weight, theirs)
    assert differs(theirs, before)
    pair.check()
    lr.unmerge(pair.ours)
    pair.theirs.unmerge_adapter()
    assert torch.equal(pair.ours.model.layers[0].self_attn.q_proj.weight, before)
    pair.check()


@check_of("merge_and_unload")
def keeps_the_merged(pair: Pair) -> None:
    ours, theirs = lr.unload(pair.ours, merge=True), pair.theirs.merge_and_unload()
    assert type(ours) is type(theirs) and ours.state_dict().keys() == theirs.state_dict().keys()
    pair.check(ours, theirs)
    assert differs(out(ours), out(base(FAMILY)))


@check_of("unload")
def gives_the_base(pair: Pair) -> None:
    ours, theirs = lr.unload(pair.ours, merge=False), pair.theirs.unload()
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert torch.equal(out(ours), out(theirs)) and torch.equal(out(ours), out(base(FAMILY)))


@check_of("add_weighted_adapter")
def combines(pair: Pair) -> None:
    pair.theirs.load_adapter(pair.file, "first")
    pair.theirs.add_adapter("second", peft.LoraConfig(**pair.options))
    pair.theirs.set_adapter("second")
    randomize(pair.theirs)
    pair.theirs.save_pretrained(pair.folder, selected_adapters=["second"])
    weights = {"first": 0.7, "second": -0.4}
    pair.theirs.add_weighted_adapter(
        list(weights), list(weights.values()), "mix", combination_type="cat"
    )
    pair.theirs.set_adapter("mix")
    model = base(FAMILY)
    bank = lr.AdapterBank(model)
    bank.load("first", pair.file)
    bank.load("second", pair.folder / "second")
    bank.combine("mix", weights)
    bank.set_default("mix")
    pair.check(model)
    assert differs(out(model), out(base(FAMILY)))


# ---- what a model says of itself


@check_of("get_nb_trainable_parameters", "print_trainable_parameters")
def counts_parameters(pair: Pair) -> None:
    theirs = peft.get_peft_model(base(FAMILY), peft.LoraConfig(**pair.options))
    counted = lr.trainable_parameters(pair.ours)
    assert (counted.trainable, counted.total) == theirs.get_nb_trainable_parameters()
    said = io.StringIO()
    with redirect_stdout(said):
        theirs.print_trainable_parameters()
    assert f"trainable params: {counted.trainable:,}" in said.getvalue()
    assert f"trainable%: {counted.percent:.4f}" in said.getvalue()


@check_of("get_layer_status", "get_model_status")
def summarizes(pair: Pair) -> None:
    theirs = peft.get_peft_model(base(FAMILY), peft.LoraConfig(**pair.options))
    status, table = theirs.get_model_status(), lr.summary(pair.ours)
    cells = {str(column.header): list(column.cells) for column in table.columns}
    assert sum(map(int, cells["count"])) == status.num_adapter_layers
    assert len(theirs.get_layer_status()) == status.num_adapter_layers
    assert f"{status.trainable_params:,} of {status.total_params:,}" in str(table.title)


@check_of("active_adapters")
def has_one_active_adapter(pair: Pair) -> None:
    assert pair.ours.active_adapters() == pair.theirs.active_adapters == ["default"]


@check_of("peft_config", "active_peft_config")
def keeps_its_config(pair: Pair) -> None:
    theirs, ours = pair.theirs.peft_config["default"], pair.ours.lowrank_config
    assert theirs is pair.theirs.active_peft_config
    assert (ours.r, ours.alpha, ours.rslora) == (theirs.r, theirs.lora_alpha, theirs.use_rslora)
    assert set(ours.target_modules) == set(theirs.target_modules)


@check_of("modules_to_save")
def names_what_it_saves_whole(pair: Pair) -> None:
    pair = Pair(pair.folder, modules_to_save=["lm_head"])
    pair.check()
    assert set(pair.ours.lowrank_config.modules_to_save) == pair.theirs.modules_to_save


@check_of("base_model_torch_dtype", "get_model_config")
def knows_dtype_and_config(pair: Pair) -> None:
    assert pair.ours.dtype == pair.theirs.base_model_torch_dtype == torch.float32
    expected = pair.theirs.base_model.get_model_config(pair.theirs.get_base_model())
    assert pair.ours.config.to_dict() == expected
