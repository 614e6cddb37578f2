"""StyleEmbedder, and encode_style on transformers' CLIP: references without their content."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("transformers")

from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

from lowrank_ext.methods.style_adapter import StyleEmbedder, encode_style

SIZE, PATCH, WIDTH = 12, 4, 16
PATCHES = (SIZE // PATCH) ** 2


def clip(cls: type[nn.Module] = CLIPVisionModel, **options) -> nn.Module:
    torch.manual_seed(5)
    sizes = {"image_size": SIZE, "patch_size": PATCH, "hidden_size": WIDTH}
    config = CLIPVisionConfig(
        **{**sizes, **options},
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=8,
    )
    return cls(config).eval()


def images(count: int = 4, size: int = SIZE) -> Tensor:
    return torch.randn(count, 3, size, size)


def permuted_patches(pictures: Tensor, order: Tensor) -> Tensor:
    """Patch i of each picture is its former patch order[i]."""
    side = SIZE // PATCH
    grid = (
        pictures.unflatten(3, (side, PATCH)).unflatten(2, (side, PATCH)).permute(0, 2, 4, 1, 3, 5)
    )
    grid = grid.flatten(1, 2)[:, order].unflatten(1, (side, side))
    return grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


# ------------------------------------------------------------------------------------ encode_style


@pytest.mark.parametrize("cls", [CLIPVisionModel, CLIPVisionModelWithProjection])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_either_measure_it_is_the_model(
    device: str, cls: type[nn.Module], dtype: torch.dtype
) -> None:
    model, pictures = clip(cls).to(device, dtype), images().to(device)
    expected = model(pictures.to(dtype)).last_hidden_state
    features = encode_style(model, pictures, shuffle=False, drop_cls=False)
    assert torch.equal(features, expected) and features.shape == (4, 1 + PATCHES, WIDTH)


def test_the_class_embedding_is_gone() -> None:
    """Its token, its position and all that it gave to the patches."""
    model, pictures = clip(), images()
    features = encode_style(model, pictures, shuffle=False)
    assert features.shape == (4, PATCHES, WIDTH)
    with_cls = encode_style(model, pictures, shuffle=False, drop_cls=False)
    assert not torch.allclose(features, with_cls[:, 1:])
    with torch.no_grad():
        model.embeddings.class_embedding.fill_(torch.nan)
        model.embeddings.position_embedding.weight[0].fill_(torch.nan)
    assert torch.equal(encode_style(model, pictures, shuffle=False), features)


def test_vit_l_has_256_tokens() -> None:
    model = clip(image_size=224, patch_size=14)
    picture = images(1, 224)
    assert encode_style(model, picture).shape == (1, 256, WIDTH)
    assert encode_style(model, picture, drop_cls=False).shape == (1, 257, WIDTH)
    assert encode_style(model, picture.expand(3, -1, -1, -1), references=3).shape[1] == 768


def test_shuffled_positions_are_shuffled_patches() -> None:
    """e_i = p_i + pos_π(i): as if patch i stood at place π(i), tokens in another order."""
    model, picture = clip().double(), images(1).double()
    features = encode_style(model, picture, seed=7)
    order = torch.randperm(PATCHES, generator=torch.Generator().manual_seed(7))
    moved = permuted_patches(picture, order.argsort())
    plain = encode_style(model, moved, shuffle=False)
    torch.testing.assert_close(features, plain[:, order])
    assert not torch.allclose(features, encode_style(model, picture, shuffle=False))


def test_the_classs_own_position_stays() -> None:
    model, picture = clip().double(), images(1).double()
    features = encode_style(model, picture, seed=7, drop_cls=False)
    order = torch.randperm(PATCHES, generator=torch.Generator().manual_seed(7))
    plain = model(permuted_patches(picture, order.argsort())).last_hidden_state
    torch.testing.assert_close(features[:, 0], plain[:, 0])
    torch.testing.assert_close(features[:, 1:], plain[:, 1:][:, order])


def test_seeds() -> None:
    model, pictures = clip(), images(1).expand(2, -1, -1, -1)
    first = encode_style(model, pictures, seed=1)
    state = torch.get_rng_state()
    assert torch.equal(encode_style(model, pictures, seed=1), first)
    assert torch.equal(torch.get_rng_state(), state), "a seed leaves torch's generator alone"
    assert not torch.equal(encode_style(model, pictures, seed=2), first)
    assert not torch.equal(first[0], first[1]), "each image has a permutation of its own"
    torch.manual_seed(3)
    drawn = encode_style(model, pictures)
    assert not torch.equal(encode_style(model, pictures), drawn)
    torch.manual_seed(3)
    assert torch.equal(encode_style(model, pictures), drawn)


@pytest.mark.parametrize("drop_cls", [True, False])
def test_references_stand_one_after_the_other(drop_cls: bool) -> None:
    model, pictures = clip(), images(6)
    single = encode_style(model, pictures, seed=4, drop_cls=drop_cls)
    length = PATCHES + (not drop_cls)
    for references in (2, 3, 6):
        sets = encode_style(model, pictures, seed=4, drop_cls=drop_cls, references=references)
        assert sets.shape == (6 // references, references * length, WIDTH)
        assert torch.equal(sets.reshape(6, length, WIDTH), single)


def test_the_model_is_left_alone() -> None:
    model = clip()
    before = copy.deepcopy(model.state_dict())
    features = encode_style(model, images().requires_grad_(), seed=1)
    assert not features.requires_grad and features.grad_fn is None
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_wrong_calls() -> None:
    model = clip()
    for pictures, options, error, message in (
        (images(), {"shuffle": 1}, TypeError, "shuffle must be a bool, got 1"),
        (images(), {"drop_cls": None}, TypeError, "drop_cls must be a bool, got None"),
        (images(), {"references": 0}, ValueError, "references must be at least 1, got 0"),
        (images()[:0], {}, ValueError, "a multiple of references=1 in number, got 0"),
        (images(), {"references": 3}, ValueError, "a multiple of references=3 in number, got 4"),
        (
            images(2, 8),
            {},
            ValueError,
            r"images must be \[N · references, 3, 12, 12\], got \[2, 3, 8",
        ),
        (images()[:, :1], {}, ValueError, r"got \[4, 1, 12, 12\]"),
        (images()[0], {}, ValueError, r"got \[3, 12, 12\]"),
    ):
        with pytest.raises(error, match=f"encode_style: .*{message}"):
            encode_style(model, pictures, **options)
    with pytest.raises(TypeError, match=r"encode_style: vision_model must be .*, got Linear"):
        encode_style(nn.Linear(2, 2), images())


# ------------------------------------------------------------------------------------ StyleEmbedder


def embedder(**options) -> StyleEmbedder:
    sizes = {"width": 16, "out_dim": 10, "num_tokens": 3, "num_layers": 2, "num_heads": 2}
    return StyleEmbedder(**{**sizes, **options})


def test_the_related_codes_size() -> None:
    """Width 1024, three blocks, eight tokens, projection to 768."""
    module = StyleEmbedder(device="meta")
    assert sum(p.numel() for p in module.parameters()) == 38_587_392
    assert module(torch.empty(2, 257, 1024, device="meta")).shape == (2, 8, 768)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_embedder_shapes(device: str, dtype: torch.dtype, rows: int) -> None:
    module = embedder(dtype=dtype, device=device)
    for length in (1, 4, 33):
        tokens = module(torch.randn(rows, length, 16, device=device))
        assert tokens.shape == (rows, 3, 10) and tokens.dtype == dtype
        assert torch.isfinite(tokens).all()


def test_features_are_a_set() -> None:
    """So that it does not matter in which order patches or references stand."""
    module = embedder(dtype=torch.float64)
    features = torch.randn(2, 9, 16, dtype=torch.float64)
    tokens = module(features)
    torch.testing.assert_close(module(features[:, torch.randperm(9)]), tokens)
    assert not torch.allclose(module(features[:, :8]), tokens)
    assert not torch.allclose(tokens[:, 0], tokens[:, 1])


def test_embedder_trains_and_repeats() -> None:
    torch.manual_seed(3)
    module = embedder()
    torch.manual_seed(3)
    other = embedder()
    features = torch.randn(2, 9, 16)
    assert torch.equal(module(features), other(features))
    module(features).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    checkpointed = checkpoint(other, features.requires_grad_(), use_reentrant=False)
    checkpointed.square().sum().backward()
    assert torch.equal(other.queries.grad, module.queries.grad)


def test_compiled_embedder() -> None:
    module = embedder(num_layers=1)
    compiled = torch.compile(module, fullgraph=True, backend="eager", dynamic=True)
    for length in (9, 4):
        features = torch.randn(2, length, 16)
        torch.testing.assert_close(compiled(features), module(features))


def test_wrong_embedders() -> None:
    with pytest.raises(ValueError, match=r"StyleEmbedder: width must be a multiple of num_heads=3"):
        embedder(num_heads=3)
    with pytest.raises(ValueError, match="StyleEmbedder: num_tokens must be at least 1, got 0"):
        embedder(num_tokens=0)
    for shape in ((9, 16), (2, 9, 15)):
        with pytest.raises(ValueError, match=r"StyleEmbedder: features must be \[N, L, width=16\]"):
            embedder()(torch.zeros(shape))
