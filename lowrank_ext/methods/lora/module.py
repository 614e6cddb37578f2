"""LoRALinear: both projections train; with init="pissa" from the principal part of the weight."""

from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ext.config import AdapterConfig
from lowrank_ext.methods.lora.config import LoRAConfig
from lowrank_ext.nn.base_layer import computes_its_weight, offload_device
from lowrank_ext.nn.dora import column_factor, dora_output
from lowrank_ext.nn.init import draw_lora_a, top_singular_triples
from lowrank_ext.nn.low_rank_linear import LowRankLinear
from lowrank_ext.nn.quantized import dequantized_weight, is_quantized


class LoRALinear(LowRankLinear):
    """LoRA (Hu et al., arXiv 2106.09685): y = x Wᵀ + bias + scaling · (drop(x) lora_aᵀ) lora_bᵀ.

    With lora_bias=True scaling · lora_bias is added, which the op takes as a part of the base's
    bias. With dora=True (DoRA, Liu et al., arXiv 2402.09353, equation 5), s being the scaling,

        y = magnitude / ‖W + s lora_b lora_a‖ ⊙ (x Wᵀ + s (x lora_aᵀ) lora_bᵀ) + bias

    with the norm of each row, taken as a constant; magnitude [N] starts as the norms of W. With
    dropout: ``lowrank_ext/nn/dora.py``.

    Inits; random numbers are drawn in fp32 on the CPU, so they depend on neither device nor dtype:

    - ``kaiming``: lora_a uniform in ±1/sqrt(K), lora_b zero; after the same ``torch.manual_seed``
      these are PEFT's numbers.
    - ``gaussian``: lora_a normal with standard deviation 1/r, lora_b zero; likewise.
    - ``pissa`` (arXiv 2404.02948): with W = U diag(sig) Vᵀ, lora_a = sqrt(sig_r / s) V_rᵀ and
      lora_b = U_r sqrt(sig_r / s), s being the scaling, both rounded to the base's dtype; the base
      weight becomes W - s lora_b lora_a. The buffers ``lora_a_init`` and ``lora_b_init`` rebuild W.
      The ops round factors to the base's dtype, so base and branch together keep W: PEFT, which
      multiplies in fp32, subtracts unrounded factors (``reset_as_peft``).
    """

    config_class = LoRAConfig
    svd_inits = ("pissa",)
    residual_inits = ("pissa",)
    residual_starts = ("lora_a_init", "lora_b_init")

    lora_a_init: Tensor
    lora_b_init: Tensor
    lora_bias: nn.Parameter | None  # [N], with lora_bias=True
    magnitude: nn.Parameter | None  # [N], with dora=True

    def _make_adapter(self, dtype: torch.dtype, device: torch.device) -> None:
        super()._make_adapter(dtype, device)
        config = self.config
        assert isinstance(config, LoRAConfig)
        has_bias = config.lora_bias
        empty = torch.zeros(self.out_features, dtype=dtype, device=device) if has_bias else None
        self.register_parameter("lora_bias", None if empty is None else nn.Parameter(empty))
        magnitude = torch.zeros(self.out_features, dtype=dtype, device=device)
        self.register_parameter("magnitude", nn.Parameter(magnitude) if config.dora else None)
        if self.init == "pissa":
            self.register_buffer("lora_a_init", torch.zeros_like(self.lora_a))
            self.register_buffer("lora_b_init", torch.zeros_like(self.lora_b))

    def _init_adapter(self) -> None:
        if self.magnitude is not None:  # the norms of the columns; the residual is not taken yet
            weight = self._whole_weight()
            wide = torch.promote_types(weight.dtype, torch.float32)
            self.magnitude.copy_(torch.linalg.vector_norm(weight, dim=1, dtype=wide))
        if self.init == "pissa":
            self._init_pissa(self.base_weight().dtype)
            return
        self.lora_a.copy_(draw_lora_a(self, gaussian=self.init == "gaussian"))
        self.lora_b.zero_()
        if self.lora_bias is not None:
            self.lora_bias.zero_()

    @classmethod
    def check_base(cls, base: nn.Module, config: AdapterConfig) -> None:
        super().check_base(base, config)
        assert isinstance(config, LoRAConfig)
        if not config.dora:
            return
        if offload_device(base) is not None:
            raise ValueError(
                f"{cls.__name__}: dora must be False where the weight, whose norms it needs, is "
                "offloaded, got True"
            )
        if not (is_quantized(base) or computes_its_weight(base)):
            raise ValueError(
                f"{cls.__name__}: dora must be False over a {type(base).__name__} that is not "
                "x weightᵀ + bias, got True"
            )

    @classmethod
    def check_without_dora(cls, config: AdapterConfig) -> None:
        """Raise ValueError for a config with ``dora``, which only linear modules can have."""
        assert isinstance(config, LoRAConfig)
        if config.dora:
            raise ValueError(
                f"{cls.__name__}: dora must be False over any but linear modules, got True; name "
                "linear modules in target_modules, or use PEFT"
            )

    def unmerged_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        magnitude = self.tensor("magnitude")
        if magnitude is None:
            return super().unmerged_output(x, *args, **kwargs)
        weight, bias = (None, None) if args or kwargs else self.fusible_base()
        base_out = self.base_output(x, *args, **kwargs) if weight is None else None
        whole = self._whole_weight() if weight is None else weight
        return dora_output(
            x,
            whole,
            self.base_bias if weight is None else bias,
            self.lora_a,
            self.lora_b,
            column_factor(magnitude, whole, self.lora_a, self.lora_b, self.scaling),
            scaling=self.scaling,
            dropout_p=self.dropout if self.training else 0.0,
            base_out=base_out,
        )

    @property
    def kind(self) -> str:
        return super().kind if self.magnitude is None else "DoRA"

    def with_delta(self, weight: Tensor) -> Tensor:
        whole = super().with_delta(weight)
        if self.magnitude is None:
            return whole
        matrix, factors = self.as_matrix(weight), (self.lora_a, self.lora_b)
        factor = column_factor(self.magnitude, matrix, *factors, self.scaling)
        return self.in_layout(factor.unsqueeze(1) * self.as_matrix(whole))

    def _whole_weight(self) -> Tensor:
        """The base's weight [N, K], a quantized one as a dense tensor."""
        base = self.base_layer
        if base is not None and is_quantized(base):
            dense = dequantized_weight(base)
            assert dense is not None
            return dense
        return self.base_weight()

    def branch_bias(self) -> Tensor | None:
        bias: Tensor | None = self.tensor("lora_bias")
        if bias is None:
            return None
        return self.scaling * bias.to(torch.promote_types(bias.dtype, torch.float32))

    @torch.no_grad()
    def reset_as_peft(self) -> None:
        """As ``reset_adapter`` with init="pissa", but from unrounded factors, as PEFT: for files
        whose adapter PEFT trained over its own residual."""
        self.unmerge()
        self.restore_base()
        self._init_pissa(torch.float32)
        self.take_residual()

    def _init_pissa(self, dtype: torch.dtype) -> None:
        u, sig, v_t = top_singular_triples(self.base_weight(), self.r)
        root = (sig / self.scaling).sqrt()
        # Rounded as by the ops, so that the residual lacks exactly what the branch computes.
        self.lora_a_init.copy_((root.unsqueeze(1) * v_t).to(dtype))
        self.lora_b_init.copy_((u * root).to(dtype))
        self.begin_at_start()

    def begin_at_start(self) -> None:
        self.lora_a.copy_(self.lora_a_init)
        self.lora_b.copy_(self.lora_b_init)

    def start_branch(self) -> dict[str, Any]:
        start = {"lora_a": self.lora_a_init, "lora_b": self.lora_b_init}
        return {**start, "scaling": self.start_scaling}
