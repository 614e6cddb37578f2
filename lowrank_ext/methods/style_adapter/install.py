"""Style paths on a diffusers UNet: adding and removing them, setting a style and its strength."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lowrank_ext.checks import check_finite, check_flag, did_you_mean
from lowrank_ext.methods.style_adapter.attention import style_path_for
from lowrank_ext.methods.style_adapter.config import StylePathConfig
from lowrank_ext.methods.style_adapter.processor import Style, StyleState, TwoPathAttnProcessor
from lowrank_ext.summary import trainable_parameters
from lowrank_ext.wrappers import named_modules, submodule

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "StyleBlock",
    "add_style_path",
    "find_unet",
    "install",
    "make_processors",
    "remove_style_path",
    "set_style",
    "set_style_scale",
    "style_processors",
    "style_summary",
]


def add_style_path(unet: nn.Module, config: StylePathConfig | None = None) -> "Table":
    """Give every cross-attention of a diffusers UNet a trainable style path; the rest is frozen.

    Until ``set_style`` sets a style, the model's output is unchanged, bit for bit.

    Args:
        unet: a UNet2DConditionModel, or another model with diffusers' ``attn_processors``, whose
            cross-attentions use AttnProcessor2_0, diffusers' default. It may be inside a wrapper,
            such as torch.compile's.
        config: options; None stands for ``StylePathConfig()``.

    Returns:
        The table of ``style_summary``.

    Raises:
        ImportError: diffusers is not installed.
        TypeError: unet neither is nor contains such a model, or config is of another type.
        ValueError: it has a style path already, no cross-attention, or an unsupported one. Nothing
            has changed then.

    Examples:
        >>> lr.style.add_style_path(unet)
        >>> with lr.style.set_style(unet, embedder(features)):  # [N, n, 768]
        ...     noise = unet(noisy, timestep, text).sample
    """
    config = StylePathConfig() if config is None else config
    if not isinstance(config, StylePathConfig):
        raise TypeError(
            f"add_style_path: config must be a StylePathConfig, got {type(config).__name__}"
        )
    model = find_unet(unet, "add_style_path")
    install(model, make_processors(model, config, "add_style_path"), config)
    return style_summary(model)


def remove_style_path(unet: nn.Module) -> None:
    """Put the original processors back. The model's weights stay frozen.

    Raises:
        ValueError: the model has no style path.
    """
    model = find_unet(unet, "remove_style_path")
    for path, processor in style_processors(model, "remove_style_path").items():
        attention = submodule(model, path)
        # set_processor would warn that trained weights are lost.
        del attention._modules["processor"]
        attention.processor = processor.base
    del model.style_path_config


class StyleBlock:
    """Result of ``set_style``: as a context manager it restores the earlier style at its end."""

    def __init__(self, state: StyleState, style: Style | None) -> None:
        self._state, self._earlier = state, state.style
        state.style = style

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exception: object) -> None:
        self._state.style = self._earlier


def set_style(
    unet: nn.Module,
    style: Tensor | Sequence[Tensor | None] | None,
    *,
    rows: Tensor | Sequence[float] | None = None,
    unconditional: bool = True,
) -> StyleBlock:
    """Set the style of all following forwards; None for no style.

    Args:
        unet: a model with a style path.
        style: tokens [N, n, style_dim], as a StyleEmbedder makes them, for batches of N rows or of
            a multiple: row b has style b mod N, so with classifier-free guidance both halves have
            it. Or a sequence with one entry for each of N rows, [n, style_dim], or None for a row
            without style. Tokens that need a gradient keep their graph until another style is set;
            with activation checkpointing, run backward before that.
        rows: factors of λ for N rows, or for a multiple of them; 0 gives a row without style.
        unconditional: False gives the first half of every batch no style: the unconditional half,
            in the order of diffusers' pipelines.

    Returns:
        A context manager for ``with set_style(...):``, which restores the earlier style at its end.

    Raises:
        TypeError, ValueError: an argument does not fit; the style is as before.
    """
    check_flag(unconditional, "set_style", "unconditional")
    processor = next(iter(style_processors(find_unet(unet, "set_style"), "set_style").values()))
    if style is None:
        return StyleBlock(processor.state, None)
    tokens, plain = (style, None) if isinstance(style, Tensor) else _stacked(style)
    style_dim = processor.style_path.style_dim
    if tokens.dim() != 3 or tokens.shape[2] != style_dim or not tokens.is_floating_point():
        raise ValueError(
            f"set_style: style must be floating [N, n, style_dim={style_dim}], got "
            f"{str(tokens.dtype).removeprefix('torch.')} {list(tokens.shape)}"
        )
    if tokens.is_inference():
        with torch.inference_mode(False):  # inference tensors have no version
            tokens = tokens.clone()
    factors = _row_factors(rows, plain, len(tokens))
    factors = None if factors is None else factors.to(tokens.device)
    return StyleBlock(processor.state, Style(tokens, factors, unconditional))


def _stacked(styles: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """[N, n, style_dim] with zeros for rows without style, and factors [N], 0 for these rows and
    1 for others, or None without such rows."""
    for tokens in styles:
        if tokens is not None and (not isinstance(tokens, Tensor) or tokens.dim() != 2):
            got = list(tokens.shape) if isinstance(tokens, Tensor) else repr(tokens)
            raise ValueError(
                f"set_style: each row's style must be [n, style_dim] or None, got {got}"
            )
    given = [tokens for tokens in styles if tokens is not None]
    if not given:
        raise ValueError(
            "set_style: style must have a row that is not None; for none at all use None"
        )
    if len({tokens.shape for tokens in given}) > 1:
        raise ValueError(
            "set_style: all rows must have as many style tokens, got "
            f"{[list(tokens.shape) for tokens in given]}"
        )
    stacked = torch.stack([torch.zeros_like(given[0]) if t is None else t for t in styles])
    plain = torch.tensor([0.0 if tokens is None else 1.0 for tokens in styles])
    return stacked, None if len(given) == len(styles) else plain


def _row_factors(
    rows: Tensor | Sequence[float] | None, plain: Tensor | None, num_rows: int
) -> Tensor | None:
    if rows is None:
        return plain
    factors = torch.as_tensor(rows, dtype=torch.float32).detach()
    if factors.dim() != 1 or num_rows == 0 or len(factors) == 0 or len(factors) % num_rows:
        raise ValueError(
            f"set_style: rows must be [R], R a multiple of the style's {num_rows} rows, got "
            f"{list(factors.shape)}"
        )
    if plain is None:
        return factors
    return factors * plain.to(factors.device).repeat(len(factors) // num_rows)


def set_style_scale(unet: nn.Module, scale: float | Mapping[str, float]) -> None:
    """Set the factor of λ: 1 is as trained; with 0 the style path is not computed.

    Args:
        unet: a model with a style path.
        scale: one number for all layers; or numbers by module path, ``"up_blocks"``,
            ``"down_blocks.1"`` or the whole path of an attention; the longest match applies. Layers
            without a match get 0, as in diffusers' set_ip_adapter_scale.

    Raises:
        TypeError: a factor is no number.
        ValueError: a factor is not finite, or a key names no layer. Nothing has changed then.
    """
    model = find_unet(unet, "set_style_scale")
    processors = style_processors(model, "set_style_scale")
    by_path = dict(scale) if isinstance(scale, Mapping) else {"": scale}
    for key, value in by_path.items():
        check_finite(value, "set_style_scale", f"scale[{key!r}]" if key else "scale")
        if not any(_inside(path, key) for path in processors):
            known = {part for path in processors for part in _prefixes(path)}
            raise ValueError(
                "set_style_scale: scale must name modules with a style path in them, got "
                f"{key!r}{did_you_mean(key, sorted(known))}"
            )
    for path, processor in processors.items():
        keys = [key for key in by_path if _inside(path, key)]
        processor.style_scale = float(by_path[max(keys, key=len)]) if keys else 0.0


def _inside(path: str, key: str) -> bool:
    return not key or path == key or path.startswith(f"{key}.")


def _prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def style_summary(unet: nn.Module) -> "Table":
    """A rich table of the style paths: a row for each kind of layer.

    Raises:
        ValueError: the model has no style path.
    """
    model = find_unet(unet, "style_summary")
    kinds: dict[tuple[int, int, int, int], list[TwoPathAttnProcessor]] = {}
    for processor in style_processors(model, "style_summary").values():
        path = processor.style_path
        sizes = (path.query_dim, path.inner_dim, path.num_heads, path.style_dim)
        kinds.setdefault(sizes, []).append(processor)
    numbers = trainable_parameters(model)
    from rich.filesize import decimal
    from rich.table import Table  # here, so that import lowrank_ext stays fast

    table = Table(
        title=f"{numbers.trainable:,} of {numbers.total:,} parameters train "
        f"({numbers.percent:.3g} %)"
    )
    table.add_column("cross-attention")
    for heading in ("count", "heads", "style token", "λ", "scale", "trainable", "size"):
        table.add_column(heading, justify="right")
    counted: set[nn.Parameter] = set()  # a global λ counts once
    for (query_dim, inner_dim, num_heads, style_dim), processors in kinds.items():
        own = {p for processor in processors for p in processor.parameters()} - counted
        counted |= own
        lams = [processor.style_path.lam.detach() for processor in processors]
        table.add_row(
            f"{query_dim} → {inner_dim}",
            str(len(processors)),
            str(num_heads),
            str(style_dim),
            _span([float(lam) for lam in lams if not lam.is_meta]),
            _span([processor.style_scale for processor in processors]),
            f"{sum(p.numel() for p in own if p.requires_grad):,}",
            decimal(sum(p.numel() * p.element_size() for p in own)),
        )
    return table


def _span(values: Sequence[float]) -> str:
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{low:.4g}" if low == high else f"{low:.4g} … {high:.4g}"


# ------------------------------------------------------------------ shared with files.py


def find_unet(model: nn.Module, caller: str) -> Any:
    """The diffusers model that ``model`` is or contains."""
    if isinstance(model, nn.Module):
        for module in model.modules():
            if isinstance(getattr(type(module), "attn_processors", None), property):
                return module
    raise TypeError(
        f"{caller}: unet must be a diffusers model with attn_processors, such as "
        f"UNet2DConditionModel, got {type(model).__name__}"
    )


def style_processors(model: nn.Module, caller: str) -> dict[str, TwoPathAttnProcessor]:
    """The model's style processors by path of their attention module, in the model's order."""
    found = {
        path.removesuffix(".processor"): module
        for path, module in named_modules(model)
        if isinstance(module, TwoPathAttnProcessor)
    }
    if not found:
        raise ValueError(f"{caller}: unet must have a style path; call add_style_path first")
    return found


def make_processors(
    model: nn.Module, config: StylePathConfig, caller: str
) -> dict[str, TwoPathAttnProcessor]:
    """New processors for all cross-attentions of ``model``, which is not changed."""
    try:
        from diffusers.models.attention_processor import Attention, AttnProcessor2_0
    except ImportError as error:
        raise ImportError(
            f"{caller}: diffusers must be installed: pip install 'lowrank-ext[style]'"
        ) from error
    if any(isinstance(module, TwoPathAttnProcessor) for module in model.modules()):
        raise ValueError(
            f"{caller}: unet must not have a style path yet; call remove_style_path first"
        )
    sites = {
        path: module
        for path, module in named_modules(model)
        if isinstance(module, Attention) and module.is_cross_attention
    }
    if not sites:
        raise ValueError(
            f"{caller}: unet must have cross-attention, got a {type(model).__name__} without"
        )
    state = StyleState()
    made: dict[str, TwoPathAttnProcessor] = {}
    for path, attn in sites.items():
        owner = f"{caller}: {path}"
        if type(attn.processor) is not AttnProcessor2_0:
            raise ValueError(
                f"{owner}: the processor must be AttnProcessor2_0, diffusers' default, got "
                f"{type(attn.processor).__name__}"
            )
        _check_supported(attn, owner)
        style_path = style_path_for(
            config, attn.heads, attn.to_q, attn.to_k, attn.to_v, attn.to_out[0], owner
        )
        made[path] = TwoPathAttnProcessor(style_path, state, attn.processor)
    if config.lam == "global":
        shared = next(iter(made.values())).style_path.lam
        for processor in made.values():
            processor.style_path.lam = shared
    return made


def _check_supported(attn: Any, owner: str) -> None:
    """Raise where AttnProcessor2_0 would do more for ``attn`` than the text path repeats."""
    unusual = {
        "spatial_norm": attn.spatial_norm is not None,
        "group_norm": attn.group_norm is not None,
        "norm_cross": attn.norm_cross is not None,
        "qk_norm": attn.norm_q is not None or attn.norm_k is not None,
        "kv_heads": attn.inner_kv_dim != attn.inner_dim,
        "residual_connection": attn.residual_connection,
        "rescale_output_factor": attn.rescale_output_factor != 1,
    }
    if used := [name for name, is_used in unusual.items() if is_used]:
        raise ValueError(f"{owner}: the attention must have no {' or '.join(used)}")


def install(
    model: Any, processors: Mapping[str, TwoPathAttnProcessor], config: StylePathConfig
) -> None:
    """Freeze ``model`` and put ``processors`` into its attentions."""
    model.requires_grad_(False)
    for path, processor in processors.items():
        attention = submodule(model, path)
        del attention.processor  # a plain attribute blocks a submodule of its name
        attention.processor = processor.train(model.training)
    model.style_path_config = config
