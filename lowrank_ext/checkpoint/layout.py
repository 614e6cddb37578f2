"""The tensor file of all methods: names of its tensors.

With P for ``base_model.model.<path>`` the tensor file holds

    P.lora_A.weight [r, K]    P.lora_B.weight [N, r]    of every adapted module
    P.<kind>                                            further tensors of a method, see
                                                        ``file_format`` of its ``Method``
    P.<name in the module's state dict>                 every module of modules_to_save

Of stacked weights P has the path that PEFT's wrappers have. They are nested, one for each adapted
weight of a module, in the order of its parameters from the inside: ``experts.base_layer`` stands
for ``experts.gate_up_proj`` where ``experts.down_proj``, with ``experts``, is adapted, too.
"""

from collections.abc import Mapping

from torch import Tensor, nn

from lowrank_ext import registry
from lowrank_ext.adapter_files import AdapterFiles
from lowrank_ext.adapter_format import Adapters
from lowrank_ext.checkpoint.peft_kinds import is_of_training
from lowrank_ext.files.tensor_file import quoted_name
from lowrank_ext.nn.experts import StackedLinear
from lowrank_ext.wrappers import named_modules, without_private_names

PREFIX = "base_model.model."
LORA_A, LORA_B = "lora_A.weight", "lora_B.weight"


def kind_in(name: str) -> str | None:
    """The kind, of any method, at the end of ``name``, a key without its prefix."""
    kinds = (method.file_format.kind_in(name) for method in registry.METHODS.values())
    return next((kind for kind in kinds if kind is not None), None)


def split_keys(files: AdapterFiles, model: nn.Module) -> tuple[Adapters, dict[str, Tensor]]:
    """Adapter tensors by module path and kind, the remaining ones by name.

    The names of wrappers, which tools leave in keys when a model or parts of it were wrapped, are
    dropped.

    Raises:
        ValueError: a key lacks the prefix, two keys name one tensor, or there is no adapter tensor.
    """
    present = {path for path, _ in named_modules(model)}
    adapters: Adapters = {}
    others: dict[str, Tensor] = {}
    for key, tensor in files.tensors.items():
        if is_of_training(key, files.config):
            continue
        if not key.startswith(PREFIX):
            raise bad_key(files, key, f"must start with {PREFIX}")
        name = key.removeprefix(PREFIX)
        kind = kind_in(name)
        path = name.rpartition(".")[0] if kind is None else name.removesuffix(f".{kind}")
        if path not in present:
            name, path = without_private_names(name), without_private_names(path)
        names = others if kind is None else adapters.setdefault(path, {})
        own = name if kind is None else kind
        if own in names:
            raise bad_key(files, key, f"names the same tensor as another key, {PREFIX}{name}")
        names[own] = tensor
    if not adapters:
        raise ValueError(
            f"{files.caller}: {files.weights_path} must hold adapter tensors, got none"
        )
    return adapters, others


def path_in_file(path: str, stacked: Mapping[str, StackedLinear]) -> str:
    """The path that a file has for the module or the stacked weight at ``path``.

    Args:
        stacked: all stacked weights with an adapter, by path.
    """
    if path not in stacked:
        return path
    experts = stacked[path].experts
    adapted = {weight.name for weight in stacked.values() if weight.experts is experts}
    order = [name for name in experts._parameters if name in adapted]
    outside = len(order) - 1 - order.index(stacked[path].name)
    return path.rpartition(".")[0] + outside * ".base_layer"


def bad_key(files: AdapterFiles, key: str, problem: str) -> ValueError:
    """A ValueError that names the tensor file and the key in it."""
    return ValueError(f"{files.caller}: {files.weights_path}: {quoted_name(key)} {problem}")


def whole(number: float) -> int | float:
    """An int where the number is one, as PEFT writes it."""
    return int(number) if number == int(number) else number
