"""A recursive model: the source model's class with what loops need, set by subclassing on the fly.

As FSDP2 and torch's parametrizations do: ``Recursive<Class>`` derives from the model's own class,
so ``isinstance`` and all its methods hold.
"""

import copy
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from torch import Tensor, nn

from lowrank_ext.files import sync_directory, write_file
from lowrank_ext.methods.recursive.config import RecursiveConfig
from lowrank_ext.methods.recursive.structure import Decoder, find_decoder, slots_of
from lowrank_ext.methods.recursive.tied_gradients import TiedSlot, aliases_of
from lowrank_ext.wrappers import unwrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel
else:
    PreTrainedModel = object  # transformers is not imported here

PREFIX = "Recursive"
TYPE_PREFIX = "recursive_"
CONFIG_KEY = "recursive"  # in config.json


class RecursiveModel(PreTrainedModel):  # type: ignore[misc]  # untyped base
    """What a converted model has beside its own class. Made by ``lowrank_ext.recursive.convert``.

    Attributes:
        recursive_config: its RecursiveConfig.
    """

    recursive_config: RecursiveConfig

    own_class: ClassVar[type[nn.Module]]

    def save_pretrained(
        self, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """transformers' own, with each tied tensor once; ``lowrank_ext.recursive.load`` reads it.

        The files are written beside the old ones and renamed, config.json last. It names the model
        type "recursive_…", so that a program that knows no loops refuses the directory instead of
        filling layers with random numbers.
        """
        target = Path(save_directory)
        # One file, unless asked for otherwise: its rename replaces all weights at once.
        options = {"max_shard_size": "1000000GB", "save_original_format": False, **kwargs}
        if options.get("push_to_hub"):
            options.setdefault("repo_id", target.name)
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as temporary:
            super().save_pretrained(temporary, is_main_process, *args, **options)
            if is_main_process:
                _name_recursive(Path(temporary) / "config.json")
                _move_into(Path(temporary), target)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError(f"{cls.__name__}.from_pretrained: use lowrank_ext.recursive.load")


class RecursiveBackbone(nn.Module):
    """What the module that calls the layers has beside its own class: aliases of tied weights."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with aliases_of(vars(self)["_tied_slots"]):
            return super().forward(*args, **kwargs)


def _name_recursive(path: Path) -> None:
    config = json.loads(path.read_bytes())
    config["model_type"] = TYPE_PREFIX + config["model_type"].removeprefix(TYPE_PREFIX)
    write_file(path, json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")


def _move_into(source: Path, target: Path) -> None:
    """Rename all files of ``source`` into ``target``, config.json last, and remove older weights
    that are not among them."""
    names = sorted(os.listdir(source), key=lambda name: name == "config.json")
    for name in names:
        (source / name).replace(target / name)
    for path in target.glob("model*.safetensors*"):
        if path.name not in names and path.is_file():
            path.unlink()
    sync_directory(target)


def recursive_class(own: type[nn.Module], mixin: type) -> type[nn.Module]:
    """``Recursive<own>``, one class for each pair."""
    key = (own, mixin)
    if key not in _CLASSES:
        _CLASSES[key] = type(
            f"{PREFIX}{own.__name__}", (mixin, own), {"__module__": __name__, "own_class": own}
        )
    return _CLASSES[key]


_CLASSES: dict[tuple[type[nn.Module], type], type[nn.Module]] = {}


def __getattr__(name: str) -> type[nn.Module]:
    # Pickle looks classes up by name, also in a process that has not converted a model.
    for made in _CLASSES.values():
        if made.__name__ == name:
            return made
    transformers = sys.modules.get("transformers")
    own = getattr(transformers, name.removeprefix(PREFIX), None)
    if name.startswith(PREFIX) and isinstance(own, type) and issubclass(own, nn.Module):
        has_head = hasattr(own, "generate")
        return recursive_class(own, RecursiveModel if has_head else RecursiveBackbone)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def make_recursive(decoder: Decoder, config: RecursiveConfig) -> None:
    """Set the classes, and tell transformers which tensors are tied."""
    model: Any = decoder.model
    backbone: Any = decoder.backbone
    length = decoder.num_layers // config.num_loops
    by_layer = [slots_of(layer) for layer in decoder.layers]
    slots, duplicates = [], {}
    for position in range(length):
        for name, (module, attribute) in by_layer[position].items():
            others = [by_layer[index].get(name) for index in range(position, len(by_layer), length)]
            own = module._parameters[attribute]
            if any(other is None or other[0]._parameters[attribute] is not own for other in others):
                continue  # an adapter of one loop
            slots.append(TiedSlot(tuple(other[0] for other in others if other), attribute))
            for index in range(position + length, len(by_layer), length):
                first = f"{decoder.path}.{position}.{name}"
                duplicates[f"{decoder.path}.{index}.{name}"] = first
    vars(backbone)["_tied_slots"] = tuple(slots) if config.num_loops > 1 else ()
    backbone.__class__ = recursive_class(type(backbone), RecursiveBackbone)
    model.__class__ = recursive_class(type(model), RecursiveModel)
    _forget_quantized_source(model)
    model.recursive_config = config
    setattr(model.config, CONFIG_KEY, config.to_dict())
    model._tied_weights_keys = {**(model._tied_weights_keys or {}), **duplicates}
    model.all_tied_weights_keys = {**model.all_tied_weights_keys, **duplicates}


def _forget_quantized_source(model: Any) -> None:
    """A model read from a quantized file (GGUF) into ordinary weights counts as an ordinary one from
    here on: transformers would refuse to save it."""
    if getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer = None
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config


def is_recursive(model: nn.Module) -> bool:
    """Whether ``lowrank_ext.recursive.convert`` made the model."""
    return isinstance(unwrapped(model), RecursiveModel)


class Loops:
    """The layers of a recursive model by loop and position.

    Attributes:
        num_loops: B.
        length: K, the number of stored layers.
    """

    def __init__(self, model: nn.Module, caller: str) -> None:
        inner: Any = unwrapped(model)
        if not is_recursive(inner):
            raise TypeError(
                f"{caller}: model must be recursive (lowrank_ext.recursive.convert), got a "
                f"{type(inner).__name__}"
            )
        self.decoder = find_decoder(inner, caller)
        self.config: RecursiveConfig = inner.recursive_config
        self.num_loops = self.config.num_loops
        self.length = self.decoder.num_layers // self.num_loops

    def layers(self, loop: int) -> list[nn.Module]:
        """The layers of a loop, by position."""
        return list(self.decoder.layers[loop * self.length : (loop + 1) * self.length])

    def last_layers(self) -> list[nn.Module]:
        """The layer after which each loop ends."""
        return [self.layers(loop)[-1] for loop in range(self.num_loops)]


def with_layers(decoder: Decoder, layers: Sequence[nn.Module]) -> nn.Module:
    """A model that runs ``layers`` between embedding and norm, with everything else the model's own
    modules. The model is not changed."""
    root = _shallow_copy(decoder.model)
    owner = root
    parts = decoder.path.split(".")
    for name in parts[:-1]:
        child = owner._modules[name]
        assert child is not None
        inner = _shallow_copy(child)
        owner._modules[name] = inner
        owner = inner
    owner._modules[parts[-1]] = nn.ModuleList(layers)
    return root


def _shallow_copy(module: nn.Module) -> nn.Module:
    """A module of its own with the same children, parameters and attributes."""
    made: nn.Module = module.__class__.__new__(module.__class__)
    made.__dict__.update(vars(module))
    # accelerate puts one there that is bound to the module itself: the copy would run as that.
    made.__dict__.pop("forward", None)
    made._modules = copy.copy(module._modules)
    return made


class PassThrough(nn.Module):
    """A layer that returns what it was given, whatever the model calls it with."""

    def __init__(self, hidden_states: Tensor) -> None:
        super().__init__()
        self.hidden_states = hidden_states

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.hidden_states
