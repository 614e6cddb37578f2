"""encode_style: features of reference images that carry their style rather than their content."""

from typing import Any

import torch
from torch import Tensor, nn

from lowrank_ext.checks import check_flag, check_rank

__all__ = ["encode_style"]


@torch.no_grad()
def encode_style(
    vision_model: nn.Module,
    images: Tensor,
    *,
    shuffle: bool = True,
    drop_cls: bool = True,
    references: int = 1,
    seed: int | None = None,
) -> Tensor:
    """Features [N, references · L, width] of N sets of reference images, by a frozen CLIP ViT.

        e_i = p_i + pos_π(i),    features = ViT(e),    i = 1 … L patches

    StyleAdapter (Wang et al., arXiv 2309.01770) keeps a reference's content out of its style by
    three measures: position embeddings are shuffled among the patches; the class embedding, which
    aggregates the content, is left out together with its position; and the features of several
    references are concatenated.

    Args:
        vision_model: transformers' CLIPVisionModel or CLIPVisionModelWithProjection. It does not
            train: no graph is recorded.
        images: pixel values [N · references, channels, size, size], prepared as the model's
            processor does. The references of a set are consecutive.
        shuffle: draw a permutation π for each image; False: every patch keeps its own position.
        drop_cls: leave the class embedding out; with False features have L + 1 rows per image, the
            first for the class embedding, whose position is not shuffled.
        references: images in a set.
        seed: of the permutations; None draws from torch's generator of the CPU. The same seed gives
            the same permutations on every device.

    Returns:
        The last hidden states in the model's dtype, without the final LayerNorm, which CLIP applies
        to the class embedding alone.

    Raises:
        TypeError: vision_model lacks CLIP's parts, or an option is of the wrong type.
        ValueError: images do not fit the model or ``references``.

    Examples:
        >>> images = processor(images=pictures, return_tensors="pt").pixel_values  # 2 for each of N
        >>> features = encode_style(clip_vision, images, references=2)  # [N, 512, 1024]
    """
    check_flag(shuffle, "encode_style", "shuffle")
    check_flag(drop_cls, "encode_style", "drop_cls")
    check_rank(references, "encode_style", "references")
    vision = _vision_transformer(vision_model)
    embeddings = vision.embeddings
    _check_images(images, embeddings, references)

    weight = embeddings.patch_embedding.weight
    patches = embeddings.patch_embedding(images.to(weight.dtype)).flatten(2).transpose(1, 2)
    positions = embeddings.position_embedding.weight  # [1 + L, width], the class's first
    order = torch.arange(patches.shape[1]).expand(len(images), -1)
    if shuffle:
        order = _permutations(len(images), patches.shape[1], seed)
    tokens = patches + positions[1:][order.to(positions.device)]
    if not drop_cls:
        cls = (embeddings.class_embedding + positions[0]).expand(len(images), 1, -1)
        tokens = torch.cat([cls, tokens], dim=1)
    features: Tensor = vision.encoder(inputs_embeds=vision.pre_layrnorm(tokens)).last_hidden_state
    return features.reshape(-1, references * features.shape[1], features.shape[2])


def _permutations(count: int, length: int, seed: int | None) -> Tensor:
    """int64 [count, length], a permutation in each row."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(length, generator=generator) for _ in range(count)])


def _vision_transformer(model: nn.Module) -> Any:
    """The module with the embeddings and the encoder, of transformers' classes for CLIP."""
    inner = getattr(model, "vision_model", model)
    parts = ("embeddings", "pre_layrnorm", "encoder")
    if not all(isinstance(getattr(inner, part, None), nn.Module) for part in parts):
        raise TypeError(
            "encode_style: vision_model must be transformers' CLIPVisionModel or "
            f"CLIPVisionModelWithProjection, got {type(model).__name__}"
        )
    return inner


def _check_images(images: Tensor, embeddings: Any, references: int) -> None:
    size, channels = embeddings.image_size, embeddings.patch_embedding.in_channels
    if images.dim() != 4 or images.shape[1:] != (channels, size, size):
        raise ValueError(
            f"encode_style: images must be [N · references, {channels}, {size}, {size}], got "
            f"{list(images.shape)}"
        )
    if len(images) == 0 or len(images) % references:
        raise ValueError(
            f"encode_style: images must be a multiple of references={references} in number, got "
            f"{len(images)}"
        )
