"""The tensor file of all methods: names of its tensors, and the gathering of sharded ones.

With P for ``base_model.model.<path>`` the tensor file holds

    P.lora_A.weight [r, K]    P.lora_B.weight [N, r]    of every adapted module
    P.<kind>                                            further tensors of a method, see
                                                        ``file_format`` of its ``Method``
    P.<name in the module's state dict>                 every module of modules_to_save
"""

from torch import Tensor, nn

from lowrank_ext import registry
from lowrank_ext.adapter_files import AdapterFiles
from lowrank_ext.adapter_format import Adapters

PREFIX = "base_model.model."
LORA_A, LORA_B = "lora_A.weight", "lora_B.weight"


def kind_in(name: str) -> str | None:
    """The kind, of any method, at the end of ``name``, a key without its prefix."""
    kinds = (method.file_format.kind_in(name) for method in registry.METHODS.values())
    return next((kind for kind in kinds if kind is not None), None)


def split_keys(files: AdapterFiles) -> tuple[Adapters, dict[str, Tensor]]:
    """Adapter tensors by module path and kind, the remaining ones by name.

    Raises:
        ValueError: a key lacks the prefix, or there is no adapter tensor.
    """
    adapters: Adapters = {}
    others: dict[str, Tensor] = {}
    for key, tensor in files.tensors.items():
        if not key.startswith(PREFIX):
            raise bad_key(files, key, f"must start with {PREFIX}")
        name = key.removeprefix(PREFIX)
        kind = kind_in(name)
        if kind is None:
            others[name] = tensor
        else:
            adapters.setdefault(name.removesuffix(f".{kind}"), {})[kind] = tensor
    if not adapters:
        raise ValueError(
            f"{files.caller}: {files.weights_path} must hold adapter tensors, got none"
        )
    return adapters, others


def bad_key(files: AdapterFiles, key: str, problem: str) -> ValueError:
    """A ValueError that names the tensor file and the key in it."""
    return ValueError(f"{files.caller}: {files.weights_path}: {key} {problem}")


def whole(number: float) -> int | float:
    """An int where the number is one, as PEFT writes it."""
    return int(number) if number == int(number) else number


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and DDP's wrappers."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model
