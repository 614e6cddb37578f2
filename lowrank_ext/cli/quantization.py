"""--quantize: base models whose linears are in 4 bits (NF4, by bitsandbytes) or 8 (by torchao).

Embeddings and head keep the run's dtype, as the libraries' defaults have it.
"""

import math
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lowrank_ext.cli.errors import UserError
from lowrank_ext.merging import forget_quantization
from lowrank_ext.nn.quantized import is_quantized, keep_unpacked
from lowrank_ext.registry import method_for

if TYPE_CHECKING:
    from lowrank_ext.cli.settings import Settings

QUANTIZATIONS = ("nf4", "int8")
NOT_QUANTIZED = "none"
_PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao"}


def check_quantization(settings: "Settings") -> None:
    """Raises UserError for a method that --quantize does not suit, and where a package that it
    needs is not installed."""
    if settings.quantize is not None:
        check_methods(settings, f"--quantize {settings.quantize}")
        require_packages(settings.quantize)


def check_methods(settings: "Settings", what: str) -> None:
    """Raises UserError, which begins with ``what``, for a method that needs dense weights."""
    if "full" in settings.methods:
        raise UserError(f"{what}: full trains the base's weights, and quantized ones cannot train")
    for name, recipe in settings.adapter_recipes().items():
        config = recipe.config(settings.config_fields(recipe.name), settings)
        if config.init in method_for(config, "finetune").module_class.svd_inits:
            raise UserError(
                f"{what}: {name} starts from an SVD of the base's weights (init {config.init}), "
                "which must be dense for it; choose another --init or method"
            )


def require_packages(quantize: str) -> None:
    """Raises UserError unless what --quantize needs is installed."""
    for package in (_PACKAGES[quantize], "accelerate"):
        if find_spec(package) is None:
            raise UserError(
                f"--quantize {quantize} needs the package {package}: "
                "pip install 'lowrank-ext[quantized]'"
            )


def load_quantized(
    location: str,
    quantize: str,
    dtype: torch.dtype,
    device: torch.device,
    more: Mapping[str, Any],
    **options: Any,
) -> Any:
    """The causal language model at ``location``, its linears quantized while it is read, so that
    it is never dense as a whole; one from a .gguf file, which transformers reads in one piece, is
    made dense on the CPU and then quantized.

    Args:
        more: arguments of the model's own from_pretrained, as attn_implementation.
        options: those that its config is read with too.

    Raises:
        UserError: a package is not installed; the model is quantized already; it has nothing to
            quantize.
    """
    require_packages(quantize)
    from transformers import AutoConfig, AutoModelForCausalLM

    how = {
        "dtype": dtype,
        "quantization_config": _configuration(quantize, dtype),
        "device_map": {"": _with_index(device)},
        **more,
    }
    if options.get("gguf_file"):
        dense = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32, **options)
        forget_quantization(dense)
        dense.to(dtype)
        model = type(dense).from_pretrained(
            None, config=dense.config, state_dict=dense.state_dict(), **how
        )
        model.generation_config = dense.generation_config
    else:
        config = AutoConfig.from_pretrained(location, **options)
        if hasattr(config, "quantization_config"):
            raise UserError(f"--quantize {quantize}: {location} is quantized already; leave it out")
        model = AutoModelForCausalLM.from_pretrained(location, **how, **options)
    if not num_quantized(model):
        raise UserError(
            f"--quantize {quantize}: {_PACKAGES[quantize]} has found no linear in {location} that "
            "it quantizes"
        )
    return model


def _configuration(quantize: str, dtype: torch.dtype) -> Any:
    """QLoRA's choices for 4 bits; 8 bits with a scale for each row."""
    if quantize == "nf4":
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    # Its other default changes settings of torch.compile and of products in fp32, for all models.
    return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False))


def _with_index(device: torch.device) -> str:
    """accelerate takes `cuda` for another device than the `cuda:0` on which it trains."""
    name = str(device)
    return f"cuda:{torch.cuda.current_device()}" if name == "cuda" else name


def make_trainable(model: nn.Module) -> None:
    """Has the quantized linears of a model, ours or the model's own, keep no dense weight for
    backward and compute gradients in every mode. Raises ValueError for one whose values the library
    gets wrong."""
    keep_unpacked(model, "the base")
    for module in model.modules():
        if type(module) is nn.Linear and _has_row_scales(module):
            module.__class__ = Int8Linear


def keep_from_ddp(model: nn.Module) -> None:
    """Has DDP leave torchao's weights alone: it would send the first process's to the others, which
    these do not support. Each process has quantized the same file."""
    parameters: Any = model.named_parameters()
    names = [name for name, each in parameters if is_traceable_wrapper_subclass(each)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def _has_row_scales(module: nn.Module) -> bool:
    """Whether the weight is torchao's int8, a scale for each row and nothing else."""
    weight: Any = module._parameters.get("weight")
    if type(weight).__name__ != "Int8Tensor" or weight.scale.shape != (weight.shape[0], 1):
        return False
    symmetric = weight.zero_point is None or not weight.zero_point.any()
    return symmetric and weight.act_pre_scale is None and weight.act_quant_kwargs is None


class Int8Linear(nn.Linear):
    """A linear with torchao's int8 weight [N, K]: x [..., K] → [..., N] in x's dtype.

    The values are torchao's. torchao's own keeps the dense weight of each layer for backward, more
    than the model would have without quantization; this one makes it dense again.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.weight
        y: Tensor = _Int8Product.apply(x, weight.qdata, weight.scale)
        return y if self.bias is None else y + self.bias


class _Int8Product(torch.autograd.Function):
    """x [..., K], int8 weight [N, K], scale [N, 1] of its rows → x weightᵀ scaleᵀ, [..., N]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return x @ weight.t().to(x.dtype) * scale.to(x.dtype).flatten()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        weight, scale = ctx.saved_tensors
        return dout * scale.to(dout.dtype).flatten() @ weight.to(dout.dtype), None, None


def num_elements(parameter: Tensor) -> int:
    """Elements of the weight that a parameter stands for: bitsandbytes packs two into a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def num_quantized(model: nn.Module) -> int:
    """Elements of the quantized weights."""
    weights: list[Any] = [module.weight for module in model.modules() if is_quantized(module)]
    return sum(num_elements(weight) for weight in weights)


def stored_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that hold a tensor's values: of a wrapper, as torchao's weights and
    DTensor are, those inside; of a weight of bitsandbytes also its scales."""
    wrapper: Any = tensor
    if is_traceable_wrapper_subclass(wrapper):
        for name in wrapper.__tensor_flatten__()[0]:
            inner = getattr(wrapper, name)
            if isinstance(inner, Tensor):  # a DTensor names its device mesh too
                yield from stored_tensors(inner)
        return
    yield tensor
    state = getattr(tensor, "quant_state", None)
    while state is not None:  # the scales of the scales are another state
        yield from (state.absmax, state.code)
        state = state.state2


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, each storage once."""
    tensors = [each for parameter in model.parameters() for each in stored_tensors(parameter)]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors}
    return sum(storage.nbytes() for storage in storages.values())
