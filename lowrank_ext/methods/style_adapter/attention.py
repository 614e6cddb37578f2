"""Two-path cross-attention: a frozen path to the text and a trained one to the style.

    out = (softmax(q K_tᵀ / √d) V_t + λ softmax(q_s K_sᵀ / √d) V_s) to_outᵀ + bias

With two softmaxes style tokens do not compete with the prompt for attention, as they would in a
common one. (StyleAdapter, Wang et al., arXiv 2309.01770.)
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_ext.checks import check_choice, check_finite, check_rank
from lowrank_ext.methods.style_adapter.config import StylePathConfig
from lowrank_ext.nn.autocast import autocast_dtype
from lowrank_ext.nn.base_layer import adapter_dtype_for, dense_weight, is_conv1d, linear_features

__all__ = ["StylePath", "TwoPathCrossAttention", "attend", "two_path_attention"]


def attend(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, mask: Tensor | None = None
) -> Tensor:
    """softmax(q kᵀ / √d) v for each head: q [B, S, C], k and v [B, T, C], to [B, S, C].

    mask is what scaled_dot_product_attention takes, broadcastable to [B, num_heads, S, T].
    """
    q, k, v = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class _KeysValues(NamedTuple):
    """K_s and V_s of one style, and the tensors from which they were computed."""

    # Detached: they keep no graph, but keep their memory, so its address identifies them.
    sources: tuple[Tensor, ...]
    versions: tuple[int, ...]
    autocast: torch.dtype | None
    key: Tensor
    value: Tensor


class StylePath(nn.Module):
    """The trained path of one attention layer.

        K_s = f_s to_k_styleᵀ,    V_s = f_s to_v_styleᵀ,    q_s = q  (or x to_q_styleᵀ)
        style = softmax(q_s K_sᵀ / √d) (λ scale V_s)

    λ multiplies the values, in float32. That equals multiplying the output, but saves no activation
    for dλ.

    K_s and V_s do not depend on the timestep. Where no gradient is needed they are computed once
    and cached until the style or a weight changes, also in place (by an optimizer or
    load_state_dict; a write through ``.data`` is detected only if it replaces the memory). Under
    torch.compile, whose graph cannot detect such changes, they are computed at each call.

    Args:
        query_dim: features of x.
        inner_dim: C, features of queries, keys and values; a multiple of num_heads.
        style_dim: features of a style token.
        num_heads: of the attention layer.
        share_query, share_out, lam_init: as in ``StylePathConfig``.
        init: ``"random"`` or ``"zero"``, as there.
        dtype, device: of the weights.

    Attributes:
        to_k_style: [C, style_dim], as all four an nn.Linear without bias.
        to_v_style: [C, style_dim].
        to_q_style: [C, query_dim], None where shared.
        to_out_style: [query_dim, C], None where shared.
        lam: λ, a Parameter without dimensions, at least float32 whatever dtype the model is cast
            to.
    """

    to_q_style: nn.Linear | None
    to_out_style: nn.Linear | None
    lam: nn.Parameter

    def __init__(
        self,
        query_dim: int,
        inner_dim: int,
        style_dim: int,
        num_heads: int,
        *,
        share_query: bool = True,
        share_out: bool = True,
        lam_init: float = 1.0,
        init: str = "random",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        owner = type(self).__name__
        sizes = {
            "query_dim": query_dim,
            "inner_dim": inner_dim,
            "style_dim": style_dim,
            "num_heads": num_heads,
        }
        for name, size in sizes.items():
            check_rank(size, owner, name)
        check_heads(inner_dim, num_heads, owner, "inner_dim")
        check_finite(lam_init, owner, "lam_init")
        check_choice(init, ("random", "zero"), owner, "init")
        super().__init__()
        self.query_dim, self.inner_dim, self.style_dim = query_dim, inner_dim, style_dim
        self.num_heads = num_heads

        def linear(num_in: int, num_out: int) -> nn.Linear:
            return nn.Linear(num_in, num_out, bias=False, dtype=dtype, device=device)

        self.to_k_style = linear(style_dim, inner_dim)
        self.to_v_style = linear(style_dim, inner_dim)
        self.to_q_style = None if share_query else linear(query_dim, inner_dim)
        self.to_out_style = None if share_out else linear(inner_dim, query_dim)
        wide = torch.promote_types(self.to_k_style.weight.dtype, torch.float32)
        self.lam = nn.Parameter(torch.full((), lam_init, dtype=wide, device=device))
        for projection in self.children():
            assert isinstance(projection, nn.Linear)
            # Drawn in fp32 on the CPU, so that a seed gives the same start for all devices, dtypes.
            bound = 1 / math.sqrt(projection.in_features)
            start = torch.empty(projection.weight.shape, device="cpu").uniform_(-bound, bound)
            with torch.no_grad():
                projection.weight.copy_(start)
        if init == "zero":
            nn.init.zeros_(self.to_v_style.weight)
        self._kept: _KeysValues | None = None

    def acts(self, tokens: Tensor | None, scale: float | Tensor = 1.0) -> bool:
        """Whether the style path adds to the output: there are tokens, and scale is not 0.0."""
        if tokens is None or tokens.shape[1] == 0:
            return False
        return isinstance(scale, Tensor) or scale != 0

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """K_s and V_s, both [N, n, C], of style tokens [N, n, style_dim]."""
        sources = (tokens, self.to_k_style.weight, self.to_v_style.weight)
        if not _can_be_kept(sources):
            return self._project(tokens)
        autocast = autocast_dtype(tokens.device)
        kept = self._kept
        if kept is None or kept.autocast != autocast or not _same(kept, sources):
            # A call in inference mode must not cache tensors that training cannot use.
            with torch.inference_mode(False), torch.no_grad():
                key, value = self._project(tokens)
                detached = tuple(t.detach() for t in sources)
            versions = tuple(t._version for t in sources)
            kept = self._kept = _KeysValues(detached, versions, autocast, key, value)
        return kept.key, kept.value

    def _project(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return _linear(self.to_k_style, tokens), _linear(self.to_v_style, tokens)

    def forward(
        self,
        hidden_states: Tensor,
        query: Tensor,
        tokens: Tensor,
        scale: float | Tensor = 1.0,
    ) -> Tensor:
        """λ · scale · style attention [B, S, C], in query's dtype, before any output projection.

        Args:
            hidden_states: x [B, S, query_dim]; read only if the style path has its own queries.
            query: the text path's queries [B, S, C].
            tokens: [N, n, style_dim]. N divides B, and row b has style b mod N: with N prompts, and
                their unconditional halves before them, both halves have the prompt's style.
            scale: a number, or [R] with a number for each row, where R divides B and N divides R.

        Raises:
            ValueError: rows do not fit.
        """
        batch = query.shape[0]
        key, value = self.keys_values(tokens)
        factor = self.lam * scale
        if isinstance(scale, Tensor) and scale.dim() > 0:
            value = tiled(value, scale.shape[0], "the scale")
            factor = factor[:, None, None]
        wide = torch.promote_types(value.dtype, factor.dtype)
        value = (factor * value.to(wide)).to(query.dtype)
        if self.to_q_style is not None:
            query = _linear(self.to_q_style, hidden_states).to(query.dtype)
        key = tiled(key.to(query.dtype), batch, "the batch")
        return attend(query, key, tiled(value, batch, "the batch"), self.num_heads)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_kept": None}  # the cache is for this module's weights

    def _apply(self, fn: Any, recurse: bool = True) -> "StylePath":
        lam = self.lam.detach()
        super()._apply(fn, recurse)
        self._kept = None
        wide = torch.promote_types(self.lam.dtype, torch.float32)
        if self.lam.dtype != wide:  # .half() must not change λ
            self.lam.data = lam.to(self.lam.device, wide)
        return self

    def extra_repr(self) -> str:
        return f"style_dim={self.style_dim}, num_heads={self.num_heads}"


def tiled(tensor: Tensor, rows: int, what: str) -> Tensor:
    """[N, …] repeated to [rows, …]: row b is row b mod N."""
    have = tensor.shape[0]
    if have == rows:
        return tensor
    if have == 1:
        return tensor.expand(rows, *tensor.shape[1:])
    if have == 0 or rows % have:
        raise ValueError(
            "StylePath: the style must have 1 row or a number of rows that divides "
            f"{what}, {rows}, got {have}"
        )
    return tensor.repeat(rows // have, *(1,) * (tensor.dim() - 1))


def two_path_attention(
    path: StylePath,
    hidden_states: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    to_out: nn.Module,
    tokens: Tensor,
    scale: float | Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Both paths and the output projection, [B, S, query_dim], from the text path's q, k and v.

    With a shared projection the two outputs are added before it. A sum of two bf16 or fp16 tensors
    is taken in fp32 and rounded once.
    """
    text = attend(query, key, value, path.num_heads, mask)
    style = path(hidden_states, query, tokens, scale)
    if path.to_out_style is None:
        summed: Tensor = to_out(text + style)
        return summed
    out: Tensor = to_out(text)
    return (out + _linear(path.to_out_style, style)).to(out.dtype)


class TwoPathCrossAttention(nn.Module):
    """A cross-attention layer whose text path is frozen and whose style path trains.

        q = x to_qᵀ,    K_t = f_t to_kᵀ,    V_t = f_t to_vᵀ
        out = (softmax(q K_tᵀ / √d) V_t + λ softmax(q_s K_sᵀ / √d) V_s) to_outᵀ + bias

    (StyleAdapter, Wang et al., arXiv 2309.01770, in which λ is learned.) For a diffusers UNet use
    ``lr.style.add_style_path``; this is a stand-alone layer.

    Args:
        query_dim: features of x.
        context_dim: features of a text token.
        num_heads, head_dim: C = num_heads · head_dim; head_dim None stands for
            query_dim / num_heads.
        config: the style path's options, ``StylePathConfig``.

    Attributes:
        to_q, to_k, to_v, to_out: the frozen nn.Linear of the text path.
        style_path: the ``StylePath``.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong type.

    Examples:
        >>> layer = TwoPathCrossAttention(320)
        >>> y = layer(x, text, style)  # [B, S, 320], [B, 77, 768], [1 or B, n, 768]
    """

    def __init__(
        self,
        query_dim: int,
        context_dim: int = 768,
        *,
        num_heads: int = 8,
        head_dim: int | None = None,
        config: StylePathConfig | None = None,
    ) -> None:
        owner = type(self).__name__
        config = StylePathConfig() if config is None else config
        for name, size in (
            ("query_dim", query_dim),
            ("context_dim", context_dim),
            ("num_heads", num_heads),
        ):
            check_rank(size, owner, name)
        if head_dim is None:
            check_heads(query_dim, num_heads, owner, "query_dim")
            head_dim = query_dim // num_heads
        check_rank(head_dim, owner, "head_dim")
        super().__init__()
        inner_dim = num_heads * head_dim
        self.to_q = nn.Linear(query_dim, inner_dim, bias=False)
        self.to_k = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_v = nn.Linear(context_dim, inner_dim, bias=False)
        self.to_out = nn.Linear(inner_dim, query_dim)
        self.requires_grad_(False)
        self.style_path = style_path_for(
            config, num_heads, self.to_q, self.to_k, self.to_v, self.to_out, owner
        )

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        style: Tensor | None = None,
        *,
        scale: float | Tensor = 1.0,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """x [B, S, query_dim] and text [B, T, context_dim] to [B, S, query_dim].

        Args:
            style: tokens [N, n, style_dim], N = 1 or a divisor of B. With None, without tokens
                (n = 0) or with scale 0.0 the output is that of the text path alone.
            scale: factor of λ: a number, or one for each row, [B].
            text_mask: bool or additive, broadcastable to [B, num_heads, S, T].

        Raises:
            ValueError: rows do not fit.
        """
        query, key, value = self.to_q(x), self.to_k(text), self.to_v(text)
        if style is None or not self.style_path.acts(style, scale):
            out: Tensor = self.to_out(attend(query, key, value, self.num_heads, text_mask))
            return out
        return two_path_attention(
            self.style_path, x, query, key, value, self.to_out, style, scale, text_mask
        )

    @property
    def num_heads(self) -> int:
        return self.style_path.num_heads


def style_path_for(
    config: StylePathConfig,
    num_heads: int,
    to_q: nn.Module,
    to_k: nn.Module,
    to_v: nn.Module,
    to_out: nn.Module,
    owner: str,
) -> StylePath:
    """A style path with the options of ``config`` for the given projections of a text path.

    Raises:
        ValueError: the text path's weights do not fit the options.
    """
    text_dim, inner_dim = _features(to_k, owner, "to_k")
    query_dim, _ = _features(to_q, owner, "to_q")
    style_dim = text_dim if config.style_dim is None else config.style_dim
    if config.init == "text" and style_dim != text_dim:
        raise ValueError(
            f"{owner}: style_dim must be that of a text token, {text_dim}, with init='text', got "
            f"{style_dim}; use init='random' or 'zero'"
        )
    base = dense_weight(to_k)
    path = StylePath(
        query_dim,
        inner_dim,
        style_dim,
        num_heads,
        share_query=config.share_query,
        share_out=config.share_out,
        lam_init=config.lam_init,
        init="zero" if config.init == "zero" else "random",
        dtype=adapter_dtype_for(None if base is None else base.dtype, config.adapter_dtype, owner),
        device=next(iter([*to_k.parameters(), *to_k.buffers()]), torch.empty(0)).device,
    )
    if config.init == "text":
        _copy_weight(to_k, path.to_k_style, owner, "init must be 'random' or 'zero'")
        _copy_weight(to_v, path.to_v_style, owner, "init must be 'random' or 'zero'")
    if path.to_q_style is not None:
        _copy_weight(to_q, path.to_q_style, owner, "share_query must be True")
    if path.to_out_style is not None:
        _copy_weight(to_out, path.to_out_style, owner, "share_out must be True")
    return path


def check_heads(features: int, num_heads: int, owner: str, name: str) -> None:
    if features % num_heads:
        raise ValueError(
            f"{owner}: {name} must be a multiple of num_heads={num_heads}, got {features}"
        )


def _features(projection: nn.Module, owner: str, name: str) -> tuple[int, int]:
    features = linear_features(projection)
    if features is None:
        raise ValueError(
            f"{owner}: {name} must be a linear module, got a {type(projection).__name__}"
        )
    return features


@torch.no_grad()
def _copy_weight(source: nn.Module, target: nn.Linear, owner: str, cure: str) -> None:
    weight = dense_weight(source)
    if weight is None:
        raise ValueError(
            f"{owner}: {cure} where a projection of the text path has no dense weight to start "
            f"from, got a {type(source).__name__}"
        )
    target.weight.copy_(weight.t() if is_conv1d(source) else weight)


def _linear(projection: nn.Linear, x: Tensor) -> Tensor:
    out: Tensor = projection(x.to(projection.weight.dtype))
    return out


def _can_be_kept(sources: tuple[Tensor, ...]) -> bool:
    """Whether K_s and V_s of ``sources`` need no graph, and changes of these can be detected."""
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in sources):
        return False
    # Inference tensors have no version; meta and fake ones have no address.
    return not any(
        t.is_inference() or t.is_meta or type(t) not in (Tensor, nn.Parameter) for t in sources
    )


def _same(kept: _KeysValues, sources: tuple[Tensor, ...]) -> bool:
    return all(
        old.device == new.device and old.is_set_to(new) and version == new._version
        for old, new, version in zip(kept.sources, sources, kept.versions, strict=True)
    )
