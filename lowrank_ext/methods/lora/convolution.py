"""LoRAConv: LoRA of a convolution, LoRALinear's equation on patches."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ext import ops
from lowrank_ext.config import AdapterConfig
from lowrank_ext.methods.lora.module import LoRALinear
from lowrank_ext.nn.base_layer import CONVOLUTION, convolved, kernel_shape
from lowrank_ext.nn.biases import sum_of_biases
from lowrank_ext.nn.up_product import add_up_product

# Settings of a convolution that are arguments of its class.
_SETTINGS = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    "padding_mode",
)
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by dimensions


class LoRAConv(LoRALinear):
    """LoRA of nn.Conv1d, Conv2d or Conv3d: y = conv(x; W) + bias + scaling · lora_b conv(drop(x);
    lora_a).

    On patches of K = in_channels · (product of the kernel's sizes) elements this is LoRALinear's
    equation: W.flatten(1) is [N, K]; lora_a [r, K] is a kernel with the stride, padding, dilation
    and padding_mode of the base, lora_b [N, r] one of size 1. Files hold both as PEFT does, as
    kernels [r, in_channels, …] and [N, r, 1, …].

    A kernel of size 1 with stride 1 and no padding is one op on x's rows, channels last, whose
    dropout mask is drawn again in backward. For others torch computes h = conv(drop(x); lora_a),
    with its own dropout, and an op the rest. The output has the base's memory format.

    Inits as of LoRALinear, with W.flatten(1) for W; PEFT's numbers from the same
    ``torch.manual_seed``. PEFT's own branch ignores dilation and padding_mode: it is another one
    there (``differs_in_peft``).

    Raises:
        ValueError: the base has groups: its weight keeps channels apart that the branch would mix.

    Examples:
        >>> layer = LoRAConv.from_linear(nn.Conv2d(16, 32, 3, padding=1), r=8)
    """

    family = CONVOLUTION
    bases = "nn.Conv1d, Conv2d or Conv3d"

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: str

    @classmethod
    def check_base(cls, base: Any, config: AdapterConfig) -> None:
        cls.check_without_dora(config)
        if base.groups != 1:
            raise ValueError(
                f"{cls.__name__}: groups must be 1, got {base.groups}; put convolutions with "
                "groups into exclude_modules"
            )

    def _make_base(
        self, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        raise TypeError(f"{type(self).__name__}: base must be a convolution, got none")

    def _take_base(self, base: Any) -> None:
        super()._take_base(base)
        for name in (*_SETTINGS, "_reversed_padding_repeated_twice"):
            setattr(self, name, getattr(base, name))
        single = math.prod(self.kernel_size) == 1
        same = self.padding == "same" and not single
        pads = same or (isinstance(self.padding, tuple) and any(self.padding))
        self._on_rows = single and math.prod(self.stride) == 1 and not pads
        dilated = not single and math.prod(self.dilation) != 1
        if dilated or (pads and self.padding_mode != "zeros"):
            self.differs_in_peft = "ignores dilation and padding_mode in the branch of convolutions"

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def in_layout(self, matrix: Tensor) -> Tensor:
        return matrix.unflatten(1, kernel_shape(self))

    def _plain_base(self) -> nn.Module:
        settings: dict[str, Any] = {name: getattr(self, name) for name in _SETTINGS}
        settings |= {"bias": self.bias is not None, "device": "meta"}
        made = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(self.kernel_size) - 1](**settings)
        made.register_parameter("weight", self.weight)
        made.register_parameter("bias", self.bias)
        return made

    def base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.base_layer is not None:
            return super().base_output(x, *args, **kwargs)
        assert self.weight is not None
        return convolved(self, x, self.weight, self.bias)

    def _with_branch(
        self,
        x: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        options: dict[str, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        channels = -1 - len(self.kernel_size)  # from the end: x may be without a batch
        branch_bias = self.branch_bias()
        if self._on_rows and self.weight is not None:
            rows, weight = x.movedim(channels, -1), self.as_matrix(self.weight)
            bias = sum_of_biases(self.bias, branch_bias, weight.dtype)
            y = ops.lowrank_linear(rows, weight, bias, lora_a, lora_b, **options)
            return _in_format(y.movedim(-1, channels), x, self.weight)
        base_out = self.base_output(x, *args, **kwargs)
        base_rows = base_out.movedim(channels, -1)
        if self._on_rows:
            y = ops.lowrank_add(base_rows, x.movedim(channels, -1), lora_a, lora_b, **options)
        else:
            dropped = F.dropout(x, options.get("dropout_p", 0.0))
            h = convolved(self, dropped, self.in_layout(lora_a).to(x.dtype), None)
            h = h.movedim(channels, -1)
            y = add_up_product(base_rows, h, lora_b, options["scaling"])
        if branch_bias is not None:
            y = y + branch_bias.to(y.dtype)
        return _in_format(y.movedim(-1, channels), base_out)


def _in_format(y: Tensor, *like: Tensor) -> Tensor:
    """y with channels last where one of ``like`` has them so, as torch's convolutions, else
    contiguous."""
    last = _CHANNELS_LAST.get(y.dim(), torch.contiguous_format)
    has_last = (not t.is_contiguous() and t.is_contiguous(memory_format=last) for t in like)
    return y.contiguous(memory_format=last if any(has_last) else torch.contiguous_format)
