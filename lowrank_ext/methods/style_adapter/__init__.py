"""StyleAdapter (Wang et al., arXiv 2309.01770): a trained style path beside a frozen text path.

    features = encode_style(clip_vision, images)      reference images, without their content
    tokens = StyleEmbedder(features)                  a few style tokens; trains
    out = text attention + λ · style attention        TwoPathCrossAttention; the style half trains

``add_style_path`` installs the style path on a diffusers UNet. Only that needs diffusers.
"""

from lowrank_ext.methods.style_adapter.attention import StylePath, TwoPathCrossAttention
from lowrank_ext.methods.style_adapter.config import StylePathConfig
from lowrank_ext.methods.style_adapter.embedder import StyleEmbedder
from lowrank_ext.methods.style_adapter.encode import encode_style
from lowrank_ext.methods.style_adapter.files import load_style, save_style
from lowrank_ext.methods.style_adapter.install import (
    StyleBlock,
    add_style_path,
    remove_style_path,
    set_style,
    set_style_scale,
    style_summary,
)
from lowrank_ext.methods.style_adapter.processor import TwoPathAttnProcessor

__all__ = [
    "StyleBlock",
    "StyleEmbedder",
    "StylePath",
    "StylePathConfig",
    "TwoPathAttnProcessor",
    "TwoPathCrossAttention",
    "add_style_path",
    "encode_style",
    "load_style",
    "remove_style_path",
    "save_style",
    "set_style",
    "set_style_scale",
    "style_summary",
]
