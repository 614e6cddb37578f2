"""LoRAEmbedding: LoRA of an embedding, LoRALinear's equation on one-hot rows."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ext.config import AdapterConfig
from lowrank_ext.methods.lora.module import LoRALinear
from lowrank_ext.nn.autocast import without_autocast
from lowrank_ext.nn.base_layer import EMBEDDING, looks_up_its_ids
from lowrank_ext.nn.fixed_size import FixedVocabulary
from lowrank_ext.nn.up_product import add_up_product


class LoRAEmbedding(FixedVocabulary, LoRALinear):
    """LoRA of an embedding: y = W[ids] + scaling · lora_a[:, ids]ᵀ lora_bᵀ.

    The base's weight is [K, N], K = num_embeddings and N = embedding_dim; lora_a [r, K] and lora_b
    [N, r] are PEFT's ``lora_embedding_A`` and ``lora_embedding_B``. r-wide rows of lora_a are
    looked up and multiplied by lora_b. As in PEFT there is no dropout, padding_idx and
    scale_grad_by_freq of the base hold for the lookup in lora_a too, and an ``embed_scale`` of the
    base (Gemma's scaled embedding) scales the branch. The gradient of lora_a is dense over a sparse
    base, too. Autocast leaves the branch, as it leaves an embedding, in the dtype of the base.

    Inits: ``kaiming`` and ``gaussian`` both start with lora_a zero and lora_b normal, PEFT's
    numbers after the same ``torch.manual_seed``; ``pissa`` as in LoRALinear, of Wᵀ.

    Raises:
        ValueError: the base has a max_norm, for which each lookup rewrites the weight, an
            ``embed_scale`` of more than one number, or a call that looks up other rows than those
            of its ids, as learned positions with an offset.

    Examples:
        >>> layer = LoRAEmbedding.from_linear(nn.Embedding(1000, 64), r=8)
    """

    family = EMBEDDING
    bases = "nn.Embedding"

    padding_idx: int | None
    scale_grad_by_freq: bool
    sparse: bool

    @classmethod
    def check_base(cls, base: nn.Module, config: AdapterConfig) -> None:
        cls.check_without_dora(config)
        if "lora_bias" in config.adapter_shapes(1, 1, 1):
            raise ValueError(f"{cls.__name__}: lora_bias must be False over an embedding, got True")
        if getattr(base, "max_norm", None) is not None:
            raise ValueError(
                f"{cls.__name__}: max_norm must be None, by which each lookup rewrites the frozen "
                f"weight, got {base.max_norm}"
            )
        scale = getattr(base, "embed_scale", 1.0)
        if isinstance(scale, Tensor) and scale.numel() != 1:
            raise ValueError(
                f"{cls.__name__}: embed_scale must be one number, got {list(scale.shape)}"
            )
        if not looks_up_its_ids(base):
            raise ValueError(
                f"{cls.__name__}: base must return the rows of its weight at the ids of the call, "
                f"times an embed_scale, got a {type(base).__name__} that does not"
            )

    def _make_base(
        self, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        shape = self.in_features, self.out_features
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype), False)
        self.register_parameter("bias", None)
        self.base_layer = None
        self._borrows = False
        self.input_name = "input"
        self.padding_idx, self.scale_grad_by_freq, self.sparse = None, False, False

    def _take_base(self, base: Any) -> None:
        super()._take_base(base)
        self.padding_idx = base.padding_idx
        self.scale_grad_by_freq, self.sparse = base.scale_grad_by_freq, base.sparse

    def _init_base(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        nn.init.normal_(weight)
        if self.padding_idx is not None:
            with torch.no_grad():
                weight[self.padding_idx].zero_()

    def _init_adapter(self) -> None:
        if self.init == "pissa":
            super()._init_adapter()
            return
        # PEFT draws both factors, then lora_b anew.
        torch.empty(self.r, self.in_features, device="cpu").normal_()
        torch.empty(self.out_features, self.r, device="cpu").normal_()
        self.lora_a.zero_()
        self.lora_b.copy_(torch.empty(self.out_features, self.r, device="cpu").normal_())

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.t()

    def in_layout(self, matrix: Tensor) -> Tensor:
        return matrix.t()

    def _plain_base(self) -> nn.Module:
        plain = nn.Embedding(
            self.in_features,
            self.out_features,
            self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
            device="meta",
        )
        plain.register_parameter("weight", self.weight)
        return plain

    def base_output(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.base_layer is not None:
            return super().base_output(x, *args, **kwargs)
        assert self.weight is not None
        return self._rows(x, self.weight)

    def _rows(self, ids: Tensor, table: Tensor) -> Tensor:
        """Rows of a table [K, …], with the base's settings for its gradient."""
        return F.embedding(ids, table, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)

    def _with_branch(
        self,
        x: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        options: dict[str, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        y = self.base_output(x, *args, **kwargs)
        h = self._rows(x, lora_a.t())
        scale = getattr(self.base_layer, "embed_scale", None)
        if scale is not None:
            h = h * (scale.to(h.dtype) if isinstance(scale, Tensor) else scale)
        with without_autocast(y.device):
            return add_up_product(y, h, lora_b, options["scaling"])
