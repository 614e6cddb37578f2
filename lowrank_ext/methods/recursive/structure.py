"""Finds the parts of a decoder-only model: its list of like layers, and what lies beside them.

By structure, not by name: the list is the nn.ModuleList that has as many entries as the config says
layers, so that Llama, Qwen, Gemma, Mistral, GPT-NeoX and others need no table.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lowrank_ext.wrappers import named_modules, submodule, unwrapped


@dataclass(frozen=True)
class Decoder:
    """The parts of a decoder-only model.

    Attributes:
        model: the whole model.
        backbone: the module that calls the layers.
        list_name: the name of the list in the backbone ("layers").
        path: of the list in the model ("model.layers").
        layers: the list.
    """

    model: nn.Module
    backbone: nn.Module
    list_name: str
    path: str
    layers: nn.ModuleList

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.layers)


def find_decoder(model: nn.Module, caller: str) -> Decoder:
    """The list of layers and the module that holds it.

    Raises:
        TypeError: the model is no decoder-only PreTrainedModel with a head.
        ValueError: it has no list of layers, or several of one length.
    """
    inner: Any = unwrapped(model)
    config: Any = getattr(inner, "config", None)
    if config is None or not hasattr(inner, "get_output_embeddings"):
        raise TypeError(
            f"{caller}: model must be a transformers model, got a {type(inner).__name__}"
        )
    text_config = config.get_text_config(decoder=True)
    # A masked model has a head too, but generates nothing.
    is_decoder = not getattr(config, "is_encoder_decoder", False) and inner.can_generate()
    if not is_decoder or inner.get_output_embeddings() is None:
        raise TypeError(
            f"{caller}: model must be a decoder with a language modelling head "
            f"(AutoModelForCausalLM), got a {type(inner).__name__}"
        )
    num_layers = getattr(text_config, "num_hidden_layers", None)
    found = [
        (path, module)
        for path, module in named_modules(inner)
        if isinstance(module, nn.ModuleList) and len(module) == num_layers and _holds_layers(module)
    ]
    if len(found) != 1:
        got = "none" if not found else ", ".join(path for path, _ in found)
        raise ValueError(
            f"{caller}: {type(inner).__name__} must have one list of its {num_layers} layers, "
            f"got {got}"
        )
    path, layers = found[0]
    assert isinstance(layers, nn.ModuleList)
    parent, _, name = path.rpartition(".")
    if not parent:
        raise ValueError(
            f"{caller}: {type(inner).__name__} must have a backbone that calls its layers, got "
            f"them in {path} of the model itself"
        )
    return Decoder(inner, submodule(inner, parent), name, path, layers)


def _holds_layers(layers: nn.ModuleList) -> bool:
    """Whether the entries are blocks, not single layers such as norms or linears."""
    return all(len(list(unwrapped(layer).children())) > 1 for layer in layers)


def check_like_layers(decoder: Decoder, num_loops: int, init: str, caller: str) -> None:
    """Raise unless ``num_loops`` divides the number of layers, and layers that are to share a
    position, or to give it its weights, have parameters of the same names, shapes, dtypes and
    devices.

    Raises:
        ValueError: with what differs.
    """
    num_layers = decoder.num_layers
    if num_layers % num_loops:
        divisors = [n for n in range(1, num_layers + 1) if num_layers % n == 0]
        raise ValueError(
            f"{caller}: num_loops must divide the {num_layers} layers of "
            f"{type(decoder.model).__name__}, got {num_loops}; possible: "
            f"{', '.join(map(str, divisors))}"
        )
    length = num_layers // num_loops
    kinds = [_tensor_kinds(layer) for layer in decoder.layers]
    pairs = [(index % length, index) for index in range(num_layers)]
    if init != "average":
        pairs += [(k, chosen_layer(init, k, length, num_layers)) for k in range(length)]
    for position, index in pairs:
        difference = _difference(kinds[position], kinds[index])
        first, layer = decoder.layers[position], decoder.layers[index]
        if type(layer) is not type(first):
            difference = f"{type(first).__name__} and {type(layer).__name__}"
        if difference:
            raise ValueError(
                f"{caller}: layers {position} and {index} must be alike to share weights with "
                f"num_loops={num_loops} and init={init!r}, got {difference}"
            )


def chosen_layer(init: str, position: int, length: int, num_layers: int) -> int:
    """Index of the layer whose weights the position gets, with "stepwise" or "lower"."""
    if init == "lower" or length == 1:
        return position
    return round(position * (num_layers - 1) / (length - 1))


def _tensor_kinds(layer: nn.Module) -> dict[str, str]:
    """Shape, dtype and device of each parameter, in words."""
    return {
        name: f"{list(p.shape)} {str(p.dtype).removeprefix('torch.')} on {p.device}"
        for name, p in layer.named_parameters()
    }


def _difference(expected: dict[str, str], own: dict[str, str]) -> str:
    """The first parameter that is not the same, in words; empty where there is none."""
    for name in [*expected, *own]:
        if own.get(name) != expected.get(name):
            return f"{name} of {expected.get(name, 'none')} and {own.get(name, 'none')}"
    return ""


def slots_of(layer: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Owner and attribute of each parameter of ``layer``, by its name in the layer. A parameter
    that several modules of the layer share has several names."""
    slots = {}
    for path, module in layer.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                slots[f"{path}.{name}".lstrip(".")] = (module, name)
    return slots


def parameters_of(layer: nn.Module) -> dict[str, Tensor]:
    """The parameters of ``layer``, under every name they have."""
    found: dict[str, Tensor] = {}
    for key, (module, name) in slots_of(layer).items():
        parameter = module._parameters[name]
        assert parameter is not None
        found[key] = parameter
    return found
