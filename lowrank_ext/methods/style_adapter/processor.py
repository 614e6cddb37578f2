"""TwoPathAttnProcessor: two-path attention as an attention processor of diffusers.

It needs no import of diffusers: an ``Attention`` module calls its processor with itself.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank_ext.methods.style_adapter.attention import StylePath, tiled, two_path_attention

__all__ = ["Style", "StyleState", "TwoPathAttnProcessor"]


class Style(NamedTuple):
    """A style in use: tokens [N, n, style_dim], and the rows of a batch that have it."""

    tokens: Tensor
    rows: Tensor | None = None  # factors of λ, [R] with N | R
    unconditional: bool = True  # whether the first half of the batch has it too

    def row_factors(self, batch: int) -> Tensor | None:
        """Factors of λ, [R] with R | batch; None where all are 1."""
        if self.unconditional:
            return self.rows
        if batch % 2:
            raise ValueError(
                "TwoPathAttnProcessor: the batch must have an unconditional and a conditional "
                f"half with unconditional=False, got {batch} rows"
            )
        rows = self.tokens.new_ones(1, dtype=torch.float32) if self.rows is None else self.rows
        conditional = tiled(rows, batch // 2, "half the batch")
        return torch.cat([torch.zeros_like(conditional), conditional])


class StyleState:
    """The present style of a UNet, shared by its processors."""

    def __init__(self) -> None:
        self.style: Style | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the model keeps the style, without its autograd graph.
        style = self.style
        return {"style": None if style is None else style._replace(tokens=style.tokens.detach())}


class TwoPathAttnProcessor(nn.Module):
    """The processor that ``add_style_path`` puts into each cross-attention of a diffusers UNet.

    Without a style, or with ``style_scale`` 0, it calls the processor that it replaced, so the
    output has the unmodified model's bits.

    Args:
        style_path: the trained path.
        state: holds the present style.
        base: the replaced processor, diffusers' AttnProcessor2_0, whose arithmetic the text path
            repeats.

    Attributes:
        style_scale: factor of λ in this layer, set by ``set_style_scale``.
    """

    def __init__(self, style_path: StylePath, state: StyleState, base: Any) -> None:
        super().__init__()
        self.style_path = style_path
        self.state = state
        self.base = base
        self.style_scale = 1.0

    # diffusers passes only arguments that are in this signature.
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        out: Tensor = super().__call__(
            attn, hidden_states, encoder_hidden_states, attention_mask, temb
        )
        return out

    def forward(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """hidden_states [B, S, query_dim] and text [B, T, text_dim] to [B, S, query_dim].

        Raises:
            ValueError: the style's rows do not divide the batch.
        """
        style, path = self.state.style, self.style_path
        if style is None or not path.acts(style.tokens, self.style_scale):
            out: Tensor = self.base(
                attn, hidden_states, encoder_hidden_states, attention_mask, temb
            )
            return out
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        batch, num_tokens = text.shape[:2]
        if attention_mask is not None:
            attention_mask = attn.prepare_attention_mask(attention_mask, num_tokens, batch)
            attention_mask = attention_mask.view(batch, attn.heads, -1, attention_mask.shape[-1])
        rows = style.row_factors(batch)
        out = two_path_attention(
            path,
            hidden_states,
            attn.to_q(hidden_states),
            attn.to_k(text),
            attn.to_v(text),
            attn.to_out[0],
            style.tokens,
            self.style_scale if rows is None else self.style_scale * rows,
            attention_mask,
        )
        out = attn.to_out[1](out)
        return out

    def extra_repr(self) -> str:
        return f"style_scale={self.style_scale:g}"
