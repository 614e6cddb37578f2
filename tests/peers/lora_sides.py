"""A LoRA in four ways, and what is compared of them: start values, logits, gradients, files.

Values and gradients are compared as adapter files, whose keys are the same in all ways: what a
model trains is found without naming it.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from families import FAMILIES, base, logits, loss
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

import lowrank_ext as lr
from lowrank_ext.ops._registration import HALF_DTYPES
from lowrank_ext.option_names import _RENAMED

_OUR_NAMES = {ours: theirs for theirs, ours in _RENAMED.items()}
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-5, torch.bfloat16: 4e-2, torch.float16: 1e-2}


_COMMON = {"r": 4, "alpha": 6, "target_modules": ["q_proj", "v_proj", "o_proj"]}


class Case(NamedTuple):
    """Options of a LoRA.

    Attributes:
        own: fields of LoRAConfig beside the common ones; PEFT gets the same by its own names.
        theirs: fields of LoraConfig that differ from that.
        family: which of FAMILIES.
        dtype: of the base.
        get: further arguments of get_peft_model.
        by_svd: the start is one of several that the SVD allows, so that bits are not compared; the
            file of save_adapter holds it beside what was trained, at twice the rank.
        evaluates: compare in evaluation mode: in training the masks are others from one seed.
        ways: those that know the options.
    """

    own: Mapping[str, Any]
    theirs: Mapping[str, Any] = {}
    family: str = "llama"
    dtype: torch.dtype = torch.float64
    get: Mapping[str, Any] = {}
    by_svd: bool = False
    evaluates: bool = False
    ways: tuple[str, ...] = ("accelerated", "peft_config", "adapt")

    def base(self) -> Any:
        return base(self.family).to(self.dtype)

    @property
    def ours(self) -> dict[str, Any]:
        return {**_COMMON, **self.own}

    def our_config(self) -> lr.LoRAConfig:
        return lr.LoRAConfig(**self.ours)

    def their_config(self) -> peft.LoraConfig:
        fields = {
            _OUR_NAMES.get(name, name): list(value) if isinstance(value, tuple) else value
            for name, value in self.ours.items()
        }
        for name in ("adapter_dtype", *self.theirs):
            fields.pop(name, None)
        return peft.LoraConfig(task_type=self.task_type, **fields, **self.theirs)

    @property
    def task_type(self) -> str | None:
        return FAMILIES[self.family].task_type

    def close(self, actual: Tensor, expected: Tensor) -> None:
        """To the rounding of the base's dtype, in relation to the largest number."""
        tolerance = _TOLERANCE[self.dtype]
        limit = tolerance * max(1e-3, expected.abs().max().item())
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=limit)


def fresh(case: Case, way: str) -> Any:
    """The model with its start values, from one seed."""
    torch.manual_seed(3)
    if way == "adapt":
        return lr.adapt(case.base(), case.our_config())
    if way == "peft_config":
        config = lr.peft_config(case.our_config(), task_type=case.task_type)
        return peft.get_peft_model(case.base(), config, **case.get)
    model = peft.get_peft_model(case.base(), case.their_config(), **case.get)
    if way == "accelerated":
        lr.accelerate(model)
    return model


def loaded(case: Case, way: str, path: Path) -> Any:
    """The model that the files give, its adapters trainable."""
    if way == "adapt":
        return lr.load_adapter(case.base(), path)
    if way == "peft_config":
        model = fresh(case, way)
        model.load_adapter(path, "default", is_trainable=True)
        return model
    model = PeftModel.from_pretrained(case.base(), path, is_trainable=True, **case.get)
    if way == "accelerated":
        lr.accelerate(model)
    return model


def saved(model: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of the model's adapter file, but an adapted embedding's own, which PEFT adds."""
    if isinstance(model, PeftModel):
        model.save_pretrained(path)
    else:
        lr.save_adapter(model, path)
    tensors = load_file(path / "adapter_model.safetensors")
    return {key: t for key, t in tensors.items() if not key.endswith(".base_layer.weight")}


@torch.no_grad()
def randomize(model: nn.Module) -> None:
    """Values as after training."""
    generator = torch.Generator().manual_seed(11)
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.2 * noise.to(parameter.dtype))


def gradients(model: Any, case: Case, path: Path) -> dict[str, Tensor]:
    """The gradients of the batch's loss, by the keys of adapter files."""
    loss(model.train(not case.evaluates), case.family).backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, f"{name} has no gradient"
                parameter.copy_(parameter.grad)
    return saved(model, path)


def check_start(case: Case, tmp_path: Path) -> None:
    """Every way starts at PEFT's values, bit for bit, and at its logits.

    PEFT rounds them to the dtype of a half-precision base, and keeps the rounded ones as float32.
    """
    reference = fresh(case, "peft")
    values, out = saved(reference, tmp_path / "peft"), logits(reference, case.family)
    for way in case.ways:
        model = fresh(case, way)
        case.close(logits(model, case.family), out)
        own = saved(model, tmp_path / way)
        if not case.by_svd:
            assert own.keys() == values.keys(), way
            rounds = case.dtype in HALF_DTYPES and way == "adapt"
            own = {key: t.to(case.dtype).to(t.dtype) if rounds else t for key, t in own.items()}
            assert all(torch.equal(own[key], values[key]) for key in values), way


def check_values(case: Case, tmp_path: Path) -> None:
    """Over the same values every way has PEFT's logits and gradients; its files load in PEFT."""
    reference = fresh(case, "peft")
    start = logits(reference, case.family)
    randomize(reference)
    trained = saved(reference, tmp_path / "peft")
    out = logits(reference, case.family)
    assert (out - start).abs().max() > 1e-2, "the values must matter"
    grads = gradients(reference, case, tmp_path / "gradients")
    assert any(grad.abs().max() > 1e-4 for grad in grads.values())
    for way in case.ways:
        model = loaded(case, way, tmp_path / "peft")
        case.close(logits(model, case.family), out)
        own = saved(model, tmp_path / way)
        if not case.by_svd:
            assert own.keys() == trained.keys(), way
            assert all(torch.equal(own[key], trained[key]) for key in trained), way
        with warnings.catch_warnings():
            # Missing and unexpected keys, unknown fields.
            warnings.filterwarnings("error", message=".*(keys|keyword).*", category=UserWarning)
            again = PeftModel.from_pretrained(case.base(), tmp_path / way, **case.get)
        case.close(logits(again, case.family), out)
        for key, grad in gradients(model, case, tmp_path / f"{way}-gradients").items():
            shape = grads[key].shape
            if case.by_svd:  # beside the start's factors
                grad = grad[tuple(map(slice, shape))]
            assert grad.shape == shape, (way, key)
            case.close(grad, grads[key])
