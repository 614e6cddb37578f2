"""A recursive model: the source model's class with what loops need, set by subclassing on the fly.

As FSDP2 and torch's parametrizations do: the new class derives from the model's own, so
``isinstance`` and all its methods hold. It has that class's name too, by which transformers knows
what a model's outputs and labels are.
"""

import copy
import json
import os
import tempfile
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from torch import Tensor, nn

from lowrank_ext.files import sync_directory, write_file
from lowrank_ext.merging import forget_quantization
from lowrank_ext.methods.recursive.config import RecursiveConfig
from lowrank_ext.methods.recursive.structure import Decoder, find_decoder, slots_of
from lowrank_ext.methods.recursive.tied_gradients import TiedSlot, aliases_of
from lowrank_ext.wrappers import canonical_name, unwrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel
else:
    PreTrainedModel = object  # transformers is not imported here

PREFIX = "Recursive"
TYPE_PREFIX = "recursive_"
CONFIG_KEY = "recursive"  # in config.json
CONFIG_NAME = "config.json"


class RecursiveModel(PreTrainedModel):  # type: ignore[misc]  # untyped base
    """What a converted model has beside its own class. Made by ``lowrank_ext.recursive.convert``.

    Attributes:
        recursive_config: its RecursiveConfig.
    """

    recursive_config: RecursiveConfig

    own_class: ClassVar[type[nn.Module]]

    def save_pretrained(
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """transformers' own, with each tied tensor once; ``lowrank_ext.recursive.load`` reads it.

        The files are written beside the old ones and renamed. The old config.json goes first and
        the new one comes last: a directory that has one holds files of one save. It names the model
        type "recursive_…", so that a program that knows no loops refuses the directory instead of
        filling layers with random numbers.

        Raises:
            ValueError: an option is given that ``load`` could not follow: push_to_hub, variant or
                distributed_checkpoint.
        """
        for name in ("push_to_hub", "variant", "distributed_checkpoint"):
            if kwargs.get(name):
                raise ValueError(
                    f"save_pretrained: {name} must not be given for a recursive model, got "
                    f"{kwargs[name]!r}"
                )
        state = self.state_dict() if state_dict is None else state_dict
        # Layers may be compiled, or wrapped for activation checkpoints.
        state = {canonical_name(self, name): tensor for name, tensor in state.items()}
        target = Path(save_directory)
        # One file, unless asked for otherwise.
        options = {"max_shard_size": "1000000GB", "save_original_format": False, **kwargs}
        target.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as temporary:
            super().save_pretrained(temporary, is_main_process, state, **options)
            if is_main_process:
                _name_recursive(Path(temporary) / CONFIG_NAME)
                _move_into(Path(temporary), target)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise TypeError("from_pretrained: a recursive model is read by lowrank_ext.recursive.load")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduced(self, super().__reduce_ex__(protocol), RecursiveModel)


class RecursiveBackbone(nn.Module):
    """What the module that calls the layers has beside its own class: aliases of tied weights."""

    own_class: ClassVar[type[nn.Module]]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _reduced(self, super().__reduce_ex__(protocol), RecursiveBackbone)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with aliases_of(vars(self)["_tied_slots"]):
            return super().forward(*args, **kwargs)


def _name_recursive(path: Path) -> None:
    config = json.loads(path.read_bytes())
    config["architectures"] = [PREFIX + name for name in config["architectures"]]
    config["model_type"] = TYPE_PREFIX + config["model_type"]
    write_file(path, json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")


def _move_into(source: Path, target: Path) -> None:
    """Rename all files of ``source`` into ``target`` and remove older weights. config.json is not
    there meanwhile."""
    (target / CONFIG_NAME).unlink(missing_ok=True)
    names = sorted(os.listdir(source), key=lambda name: name == CONFIG_NAME)
    for path in target.glob("model*.safetensors*"):
        if path.name not in names and path.is_file():
            path.unlink()
    for name in names:
        if name == CONFIG_NAME:
            sync_directory(target)
        (source / name).replace(target / name)
    sync_directory(target)


@cache
def recursive_class(own: Any, mixin: Any) -> Any:
    """``own`` with ``mixin`` before it, under the name of ``own``; one class for each pair."""
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "own_class": own}
    return type(own.__name__, (mixin, own), names)


def _reduced(module: Any, reduced: Any, mixin: type) -> Any:
    """What pickle and copy get: the class is made again, for its name is that of another one."""
    return _new, (module.own_class, mixin), *reduced[2:]


def _new(own: Any, mixin: Any) -> nn.Module:
    made = recursive_class(own, mixin)
    return made.__new__(made)


def make_recursive(
    decoder: Decoder, config: RecursiveConfig, tied_names: Sequence[Iterable[str]]
) -> None:
    """Set the classes, and tell transformers which tensors are tied: in each layer those of the
    names of its position."""
    model: Any = decoder.model
    length = len(tied_names)
    slots, duplicates = [], {}
    for position, names in enumerate(tied_names):
        sharing = range(position, decoder.num_layers, length)
        owners = [slots_of(decoder.layers[index]) for index in sharing]
        for name in names:
            modules = tuple(owner[name][0] for owner in owners)
            slots.append(TiedSlot(modules, owners[0][name][1]))
            for index in sharing[1:]:
                first = f"{decoder.path}.{position}.{name}"
                duplicates[f"{decoder.path}.{index}.{name}"] = first
    vars(decoder.backbone)["_tied_slots"] = tuple(slots) if config.num_loops > 1 else ()
    for module, mixin in ((decoder.backbone, RecursiveBackbone), (model, RecursiveModel)):
        own: Any = type(module)  # hashable, which mypy does not see
        module.__class__ = recursive_class(own, mixin)
    forget_quantization(model)  # of a source in ordinary weights, which was read from GGUF
    model.recursive_config = config
    setattr(model.config, CONFIG_KEY, config.to_dict())
    model._tied_weights_keys = {**(model._tied_weights_keys or {}), **duplicates}
    model.all_tied_weights_keys = {**model.all_tied_weights_keys, **duplicates}


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
        inner = _shallow_copy(unwrapped(child))
        if isinstance(inner, RecursiveBackbone):
            vars(inner)["_tied_slots"] = ()  # of layers that it does not run
        owner._modules[name] = inner
        owner = inner
    owner._modules[parts[-1]] = nn.ModuleList(layers)
    return root


def _shallow_copy(module: nn.Module) -> nn.Module:
    """A module of its own with the same children, parameters and attributes."""
    made: nn.Module = module.__class__.__new__(module.__class__)
    made.__dict__.update(vars(module))
    # accelerate's forward and that of module.compile() are bound to the module itself: the copy
    # would run as that.
    for name in ("forward", "_compiled_call_impl"):
        made.__dict__.pop(name, None)
    made._modules = copy.copy(module._modules)
    return made


class PassThrough(nn.Module):
    """A layer that returns what it was given, whatever the model calls it with."""

    def __init__(self, hidden_states: Tensor) -> None:
        super().__init__()
        self.hidden_states = hidden_states

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.hidden_states
