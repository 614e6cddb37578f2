"""StyleEmbedder: from the features of reference images to a few style tokens."""

from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ext.checks import check_rank
from lowrank_ext.methods.style_adapter.attention import check_heads

__all__ = ["StyleEmbedder"]


class StyleEmbedder(nn.Module):
    """StyEmb of StyleAdapter (Wang et al., arXiv 2309.01770): learned queries attend to features.

        tokens = LN(blocks(LN([features; queries]))) at the queries' positions · proj

    The queries are appended to the features, all pass through pre-norm transformer blocks, and the
    outputs at the queries' positions are the style tokens. There are no position embeddings: the
    features are a set of any size, so those of several references may be concatenated.

    The paper's sizes could not be confirmed. The defaults are those of the style adapter of
    T2I-Adapter, by the same group: 38.6 M parameters, for CLIP ViT-L/14 and Stable Diffusion 1.5.

    Args:
        width: size of a feature.
        out_dim: size of a style token.
        num_tokens: number of queries, and so of style tokens of an image set.
        num_layers, num_heads: of the blocks, which have an MLP of 4 · width with GELU.
        dtype, device: of the weights.

    Attributes:
        queries: [num_tokens, width], from N(0, 1/width), drawn in fp32 on the CPU.
        proj: [width, out_dim], likewise.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong type.

    Examples:
        >>> embedder = StyleEmbedder()
        >>> tokens = embedder(lr.style.encode_style(clip_vision, images))  # [N, 8, 768]
    """

    def __init__(
        self,
        width: int = 1024,
        out_dim: int = 768,
        *,
        num_tokens: int = 8,
        num_layers: int = 3,
        num_heads: int = 8,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        owner = type(self).__name__
        self.options = {
            "width": width,
            "out_dim": out_dim,
            "num_tokens": num_tokens,
            "num_layers": num_layers,
            "num_heads": num_heads,
        }
        for name, value in self.options.items():
            check_rank(value, owner, name)
        check_heads(width, num_heads, owner, "width")
        super().__init__()
        factory: dict[str, Any] = {"dtype": dtype, "device": device}
        self.norm_in = nn.LayerNorm(width, **factory)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width,
                num_heads,
                4 * width,
                dropout=0.0,
                activation="gelu",
                batch_first=True,
                norm_first=True,
                **factory,
            )
            for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(width, **factory)
        self.queries = _normal(num_tokens, width, width, factory)
        self.proj = _normal(width, out_dim, width, factory)

    def forward(self, features: Tensor) -> Tensor:
        """features [N, L, width] to style tokens [N, num_tokens, out_dim], in the weights' dtype.

        Raises:
            ValueError: features have another shape.
        """
        num_tokens, width = self.queries.shape
        if features.dim() != 3 or features.shape[2] != width:
            raise ValueError(
                f"StyleEmbedder: features must be [N, L, width={width}], got {list(features.shape)}"
            )
        queries = self.queries.expand(features.shape[0], -1, -1)
        x = self.norm_in(torch.cat([features.to(queries.dtype), queries], dim=1))
        for block in self.blocks:
            x = block(x)
        return self.norm_out(x[:, -num_tokens:]) @ self.proj

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


def _normal(rows: int, columns: int, width: int, factory: dict[str, Any]) -> nn.Parameter:
    if torch.device(factory["device"] or "cpu").type == "meta":
        return nn.Parameter(torch.empty(rows, columns, **factory))
    start = torch.randn(rows, columns, device="cpu", dtype=torch.float32) * width**-0.5
    return nn.Parameter(start.to(**{k: v for k, v in factory.items() if v is not None}))
