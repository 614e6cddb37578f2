"""StyleAdapter on a diffusers UNet: installing it, choosing styles, training, saving."""

import copy
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("diffusers")

from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

import lowrank_ext as lr
from lowrank_ext.methods.style_adapter import StyleEmbedder, StylePathConfig, TwoPathAttnProcessor

BATCH, WORDS, TOKENS, TEXT_DIM = 4, 6, 3, 12
SITES = 4  # cross-attentions of tiny_unet
OPTIONS = [{}, {"share_query": False, "share_out": False}, {"lam": "global"}]


def tiny_unet(**options) -> UNet2DConditionModel:
    torch.manual_seed(11)
    sizes = {
        "layers_per_block": 1,
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": TEXT_DIM,
        "attention_head_dim": 2,
    }
    return UNet2DConditionModel(
        sample_size=4,
        **{**sizes, **options},
    ).eval()


def styled_unet(**options) -> UNet2DConditionModel:
    unet = tiny_unet()
    lr.style.add_style_path(unet, StylePathConfig(**{"lam_init": 0.7, **options}))
    with torch.no_grad():
        for processor in processors(unet).values():
            for linear in processor.style_path.children():
                linear.weight.add_(torch.randn_like(linear.weight) / 3)
    return unet


def processors(unet: nn.Module) -> dict[str, TwoPathAttnProcessor]:
    return {n: m for n, m in unet.named_modules() if isinstance(m, TwoPathAttnProcessor)}


def embedder() -> StyleEmbedder:
    return StyleEmbedder(8, TEXT_DIM, num_tokens=TOKENS, num_layers=1, num_heads=2)


SHAPES = ((BATCH, 4, 4, 4), (BATCH, WORDS, TEXT_DIM), (2, TOKENS, TEXT_DIM))
GENERATOR = torch.Generator().manual_seed(6)
X, TEXT, STYLE = (torch.randn(shape, generator=GENERATOR) for shape in SHAPES)


def run(unet: nn.Module, step: int = 5, **options) -> Tensor:
    like = next(unet.parameters())
    return unet(X.to(like), torch.tensor(step), TEXT.to(like), **options).sample


# ------------------------------------------------------------------------------ adding and removing


def test_nothing_but_the_style_path_trains() -> None:
    unet = tiny_unet()
    before = dict(unet.named_parameters())
    expected = run(unet)
    table = lr.style.add_style_path(unet)
    assert torch.equal(run(unet), expected)
    found = processors(unet)
    assert len(found) == SITES and all(".attn2." in path for path in found)
    for name, parameter in unet.named_parameters():
        assert parameter.requires_grad == (name not in before) == ("style_path" in name)
    console = Console(width=120, record=True)
    console.print(table)
    text = console.export_text()
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    assert f"{trained:,} of " in text and "8 → 8" in text and "16 → 16" in text
    assert trained == sum(p.numel() for m in found.values() for p in m.parameters())
    for processor in found.values():
        assert not processor.training and isinstance(processor.base, AttnProcessor2_0)


def test_removing_it_restores_the_model() -> None:
    unet = tiny_unet()
    expected, keys, kinds = run(unet), list(unet.state_dict()), names(unet)
    lr.style.add_style_path(unet)
    assert names(unet) != kinds
    lr.style.set_style(unet, STYLE)
    lr.style.remove_style_path(unet)
    assert torch.equal(run(unet), expected)
    assert list(unet.state_dict()) == keys and names(unet) == kinds
    lr.style.add_style_path(unet)
    assert torch.equal(run(unet), expected), "a new path has no style yet"


def names(unet: nn.Module) -> dict[str, str]:
    return {path: type(p).__name__ for path, p in unet.attn_processors.items()}


def test_the_sizes_of_stable_diffusion() -> None:
    """2 · 768 · ΣC weights and a λ per layer; own queries and outputs add 2 ΣC²."""
    with torch.device("meta"):
        unet = tiny_unet(
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            down_block_types=(*3 * ("CrossAttnDownBlock2D",), "DownBlock2D"),
            up_block_types=("UpBlock2D", *3 * ("CrossAttnUpBlock2D",)),
            cross_attention_dim=768,
            attention_head_dim=8,
            norm_num_groups=32,
        )
    own = StylePathConfig(share_query=False, share_out=False)
    for config, expected in ((StylePathConfig(), 19_169_280), (own, 19_169_280 + 24_780_800)):
        table = lr.style.add_style_path(unet, config)
        assert table.row_count == 3
        assert sum(p.numel() for p in unet.parameters() if p.requires_grad) == expected + 16
        lr.style.remove_style_path(unet)


def test_global_lambda_is_one_parameter() -> None:
    unet = styled_unet(lam="global")
    assert len({id(p.style_path.lam) for p in processors(unet).values()}) == 1
    per_layer = sum(p.numel() for p in styled_unet().parameters() if p.requires_grad)
    assert sum(p.numel() for p in unet.parameters() if p.requires_grad) == per_layer - SITES + 1
    for change in (lambda u: u.bfloat16(), lambda u: u.float(), copy.deepcopy):
        unet = change(unet)
        lams = {id(p.style_path.lam): p.style_path.lam for p in processors(unet).values()}
        assert len(lams) == 1 and next(iter(lams.values())).dtype == torch.float32
    with lr.style.set_style(unet, STYLE):
        run(unet).square().sum().backward()
    assert next(iter(processors(unet).values())).style_path.lam.grad != 0


# ------------------------------------------------------------------------------------ using a style


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_style_and_no_scale_are_the_unmodified_unet(
    device: str, dtype: torch.dtype, options: dict
) -> None:
    plain, unet = tiny_unet().to(device, dtype), styled_unet(**options).to(device, dtype)
    expected = run(plain)
    lr.style.set_style(unet, STYLE.to(device, dtype))
    styled = run(unet)
    assert styled.dtype == dtype and not torch.allclose(styled, expected, atol=1e-3)
    lr.style.set_style_scale(unet, 0.0)
    assert torch.equal(run(unet), expected)
    lr.style.set_style_scale(unet, 1)
    assert torch.equal(run(unet), styled)
    lr.style.set_style(unet, STYLE[:, :0].to(device, dtype))
    assert torch.equal(run(unet), expected)
    lr.style.set_style(unet, None)
    assert torch.equal(run(unet), expected)


def test_lambda_zero_is_the_unmodified_unet() -> None:
    plain, unet = tiny_unet(), styled_unet(lam_init=0.0)
    with lr.style.set_style(unet, STYLE):
        assert torch.equal(run(unet), run(plain))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_layer_is_two_path_attention(options: dict) -> None:
    """One attention of the UNet against TwoPathCrossAttention with the same weights."""
    unet = styled_unet(**options).double()
    attn = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    config = StylePathConfig(**options)
    layer = lr.style.TwoPathCrossAttention(16, TEXT_DIM, num_heads=2, config=config).double()
    state = {key.removeprefix("processor."): t for key, t in attn.state_dict().items()}
    layer.load_state_dict({key.replace("to_out.0.", "to_out."): t for key, t in state.items()})
    x, text = torch.randn(BATCH, 5, 16).double(), TEXT.double()
    mask = torch.zeros(BATCH, 1, WORDS).double()
    mask[1, :, 3:] = -1e4
    expected = layer(x, text, STYLE.double(), text_mask=mask[:, None])
    with lr.style.set_style(unet, STYLE.double()):
        torch.testing.assert_close(attn(x, text, mask), expected)


def test_masked_text() -> None:
    """encoder_attention_mask holds for the text alone, as in the unmodified UNet."""
    plain, unet = tiny_unet(), styled_unet(lam_init=0.0)
    mask = torch.tensor([1, 1, 1, 1, 0, 0]).expand(BATCH, -1)
    expected = run(plain, encoder_attention_mask=mask)
    assert not torch.equal(expected, run(plain))
    with lr.style.set_style(unet, STYLE):
        assert torch.equal(run(unet, encoder_attention_mask=mask), expected)


@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)
def test_rows(options: dict) -> None:
    unet = styled_unet(**options)
    plain = run(unet)
    with lr.style.set_style(unet, STYLE):  # rows 0, 2 and rows 1, 3, as the halves of guidance
        styled = run(unet)
    with lr.style.set_style(unet, [STYLE[0], None, STYLE[0], STYLE[1]]):
        mixed = run(unet)
    assert torch.equal(mixed[1], plain[1])
    assert torch.equal(mixed[[0, 2, 3]], styled[[0, 2, 3]])
    with lr.style.set_style(unet, STYLE, rows=[0.0, 1.0, 1.0, 0.0]):
        mixed = run(unet)
    assert torch.equal(mixed[[0, 3]], plain[[0, 3]]) and torch.equal(mixed[[1, 2]], styled[[1, 2]])
    with lr.style.set_style(unet, [STYLE[0], None], rows=[1.0, 1.0, 0.5, 1.0]):
        mixed = run(unet)
    assert torch.equal(mixed[[1, 3]], plain[[1, 3]]) and torch.equal(mixed[0], styled[0])
    lr.style.set_style_scale(unet, 0.5)
    with lr.style.set_style(unet, STYLE):
        assert torch.equal(mixed[2], run(unet)[2])


def test_the_unconditional_half() -> None:
    unet = styled_unet()
    plain = run(unet)
    for style in (STYLE, STYLE[:1]):
        with lr.style.set_style(unet, style):
            both = run(unet)
        with lr.style.set_style(unet, style, unconditional=False):
            found = run(unet)
            with pytest.raises(ValueError, match=r"a conditional half .* got 3"):
                unet(X[:3], torch.tensor(5), TEXT[:3])
        assert torch.equal(found[:2], plain[:2]) and torch.equal(found[2:], both[2:])
    with lr.style.set_style(unet, STYLE, rows=[0.0, 1.0], unconditional=False):
        found = run(unet)
    assert torch.equal(found[:3], plain[:3]) and not torch.equal(found[3], plain[3])


def test_blocks_nest_and_end() -> None:
    unet = styled_unet()
    plain = run(unet)
    with lr.style.set_style(unet, STYLE):
        outer = run(unet)
        with pytest.raises(KeyError), lr.style.set_style(unet, STYLE + 1):
            assert not torch.equal(run(unet), outer)
            raise KeyError
        assert torch.equal(run(unet), outer)
        with lr.style.set_style(unet, None):
            assert torch.equal(run(unet), plain)
    assert torch.equal(run(unet), plain)


def test_scales_by_block() -> None:
    unet = styled_unet()
    lr.style.set_style(unet, STYLE)
    up = "up_blocks.1.attentions.1.transformer_blocks.0.attn2"
    lr.style.set_style_scale(unet, {"up_blocks": 0.5, up: 2.0, "mid_block": -1})
    scales = {
        path.removesuffix(".processor"): p.style_scale for path, p in processors(unet).items()
    }
    assert scales == {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2": 0.0,
        "mid_block.attentions.0.transformer_blocks.0.attn2": -1.0,
        "up_blocks.1.attentions.0.transformer_blocks.0.attn2": 0.5,
        up: 2.0,
    }
    for bad, error, message in (
        ({"up_block": 1.0}, ValueError, "got 'up_block'; did you mean 'up_blocks'"),
        ({"up_blocks.0": 1.0}, ValueError, "must name modules with a style path in them, got"),
        ({"mid_block": "1"}, TypeError, r"scale\['mid_block'\] must be a number, got '1'"),
        (float("inf"), ValueError, "scale must be finite, got inf"),
        (None, TypeError, "scale must be a number, got None"),
    ):
        with pytest.raises(error, match=f"set_style_scale: .*{message}"):
            lr.style.set_style_scale(unet, bad)
        now = {p.removesuffix(".processor"): m.style_scale for p, m in processors(unet).items()}
        assert now == scales


def test_keys_and_values_serve_all_timesteps_and_both_halves() -> None:
    unet = styled_unet()
    calls = []
    for processor in processors(unet).values():
        processor.style_path.to_k_style.register_forward_hook(lambda *args: calls.append(args[2]))
    with torch.no_grad(), lr.style.set_style(unet, STYLE):
        first = [run(unet, step) for step in range(3)]
        assert len(calls) == SITES and calls[0].shape == (2, TOKENS, 8)
        with lr.style.set_style(unet, -STYLE):
            assert not torch.equal(run(unet, 0), first[0])
        assert len(calls) == 2 * SITES
        assert torch.equal(run(unet, 0), first[0])
        STYLE.add_(0)  # in place, if by nothing
        assert torch.equal(run(unet, 1), first[1]) and len(calls) == 4 * SITES


def test_a_style_made_in_inference_mode() -> None:
    unet = styled_unet()
    with torch.inference_mode():
        style = STYLE + 0
        lr.style.set_style(unet, style)
        expected = run(unet)
    found = run(unet)
    found.square().sum().backward()
    torch.testing.assert_close(found, expected)
    style = STYLE.clone()
    lr.style.set_style(unet, style)
    with torch.inference_mode():
        torch.testing.assert_close(run(unet), expected)


# ----------------------------------------------------------------------------------------- training


def losses(unet: nn.Module, embed: nn.Module, steps: int = 20) -> list[float]:
    torch.manual_seed(2)
    features, target = torch.randn(2, 5, 8), torch.randn(BATCH, 4, 4, 4)
    trained = [p for m in (unet, embed) for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.1)
    found = []
    for _ in range(steps):
        lr.style.set_style(unet, embed(features))
        loss = (run(unet) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    lr.style.set_style(unet, None)
    return found


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_training(options: dict) -> None:
    unet, embed = styled_unet(**options), embedder()
    before = {name: t.clone() for name, t in unet.state_dict().items()}
    plain = run(unet)
    found = losses(unet, embed)
    assert found[-1] < 0.95 * found[0]
    for name, tensor in unet.state_dict().items():
        assert torch.equal(tensor, before[name]) == ("style_path" not in name), name
    assert torch.equal(run(unet), plain), "without a style it is still the base"
    assert found == losses_of_another_run(options), "two runs give the same bits"


def losses_of_another_run(options: dict) -> list[float]:
    unet = styled_unet(**options)
    return losses(unet, embedder())


def gradients(unet: nn.Module, embed: nn.Module, features: Tensor) -> dict[str, Tensor]:
    unet.zero_grad()
    embed.zero_grad()
    with lr.style.set_style(unet, embed(features)):
        run(unet).square().mean().backward()
    named = [*unet.named_parameters(), *embed.named_parameters()]
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def test_gradient_checkpointing() -> None:
    unet, embed = styled_unet().train(), embedder()
    features = torch.randn(2, 5, 8)
    expected = gradients(unet, embed, features)
    unet.enable_gradient_checkpointing()
    found = gradients(unet, embed, features)
    assert found.keys() == expected.keys() and "queries" in found
    for name, gradient in found.items():
        assert torch.equal(gradient, expected[name]), name


def test_reentrant_checkpointing_with_tokens_that_are_leaves() -> None:
    """As when the embedder is not trained, or is trained from the tokens' gradients."""
    unet = styled_unet().train()
    found = []
    for checkpointed in (False, True):
        unet.zero_grad()
        if checkpointed:
            unet.enable_gradient_checkpointing(
                lambda module, *args: checkpoint(module, *args, use_reentrant=True)
            )
        tokens = STYLE.clone().requires_grad_()
        x = X.clone().requires_grad_()
        with lr.style.set_style(unet, tokens):
            unet(x, torch.tensor(5), TEXT).sample.square().mean().backward()
        grads = [p.grad.clone() for p in unet.parameters() if p.requires_grad]
        found.append([tokens.grad, x.grad, *grads])
    for direct, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, direct)


def test_autocast(device: str) -> None:
    unet, style = styled_unet().to(device), STYLE.to(device)
    with lr.style.set_style(unet, style), torch.autocast(device, torch.bfloat16):
        found = run(unet)
        found.float().square().mean().backward()
    with lr.style.set_style(unet, style):
        torch.testing.assert_close(found.float(), run(unet).float(), rtol=0.1, atol=0.1)
    lam = next(iter(processors(unet).values())).style_path.lam
    assert lam.grad.dtype == torch.float32 and lam.grad != 0


def test_compiled_block() -> None:
    """A transformer block with the processor in it, in one graph, for changing batches."""
    unet = styled_unet()
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    compiled = torch.compile(block, fullgraph=True, backend="eager", dynamic=True)
    for batch in (4, 2):
        x, text = torch.randn(batch, 5, 16), torch.randn(batch, WORDS, TEXT_DIM)
        for style in (STYLE, STYLE + 1):
            with lr.style.set_style(unet, style):
                found = compiled(x, encoder_hidden_states=text)
                torch.testing.assert_close(found, block(x, encoder_hidden_states=text))
    lam = processors(block)["attn2.processor"].style_path.lam
    with lr.style.set_style(unet, STYLE):
        (found,) = torch.autograd.grad(compiled(x, encoder_hidden_states=text).sum(), lam)
        (expected,) = torch.autograd.grad(block(x, encoder_hidden_states=text).sum(), lam)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied: Callable[[nn.Module], nn.Module]) -> None:
    """Go on in the same style, without its graph, and then in one of their own."""
    unet, embed = styled_unet(), embedder()
    lr.style.set_style(unet, embed(torch.randn(2, 5, 8)))
    expected = run(unet)
    other = copied(unet)
    assert torch.equal(run(other), expected)
    lr.style.set_style(other, None)
    assert torch.equal(run(unet), expected) and not torch.equal(run(other), expected)


# ----------------------------------------------------------------------------- saving, loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_save_and_load(tmp_path: Path, options: dict, dtype: torch.dtype) -> None:
    unet, embed = styled_unet(**options).to(dtype), embedder().to(dtype)
    losses(unet, embed, steps=2)
    features = torch.randn(2, 5, 8)
    lr.style.save_style(unet, tmp_path, embed)
    with lr.style.set_style(unet, embed(features)):
        expected = run(unet)
    fresh, wrapped = tiny_unet().to(dtype), styled_unet(**options).to(dtype)
    for other in (fresh, torch.nn.ModuleList([wrapped])):
        loaded = lr.style.load_style(other, tmp_path)
        assert loaded is not None and loaded.options == embed.options
        for key, tensor in embed.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], tensor)
    for other in (fresh, wrapped):
        with lr.style.set_style(other, loaded(features)):
            found = run(other)
        tolerance = 0 if other is wrapped or dtype == torch.float32 else 0.02
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert [n for n, p in fresh.named_parameters() if p.requires_grad] == [
        n for n, p in unet.named_parameters() if p.requires_grad
    ]
    other_path = tmp_path / "again"
    lr.style.save_style(wrapped, other_path, loaded)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (other_path / name).read_bytes() == (tmp_path / name).read_bytes()


def test_the_file_holds_the_style_path_alone(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    unet = styled_unet(lam="global")
    lr.style.save_style(unet, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    sites = [path.removesuffix(".processor") for path in processors(unet)]
    expected = {f"unet.{p}.to_{kind}_style.weight" for p in sites for kind in "kv"} | {"unet.lam"}
    assert set(tensors) == expected
    assert lr.style.load_style(tiny_unet(), tmp_path) is None


def edited(directory: Path, **changes: object) -> Path:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return directory


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    lr.style.save_style(styled_unet(), tmp_path / "style", embedder())

    def fresh() -> Path:
        target = tmp_path / "edited"
        target.mkdir(exist_ok=True)
        for file in (tmp_path / "style").iterdir():
            (target / file.name).write_bytes(file.read_bytes())
        return target

    for changes, message in (
        ({"peft_type": "LORA"}, "peft_type must be 'STYLE_ADAPTER', got 'LORA'"),
        ({"share_query": False}, "to_q_style.weight is missing"),
        ({"lam": "global"}, "unet.lam is missing"),
        ({"embedder": None}, "embedder.* belongs to no"),
        ({"embedder": 3}, "embedder must be an object, got 3"),
        ({"embedder": {"depth": 3}}, "embedder: .*depth"),
        ({"embedder": {**embedder().options, "num_tokens": 4}}, r"queries must be \[4, 8\], got"),
        ({"lam_init": "much"}, "lam_init must be a number"),
        ({"other": 1}, "'other' is not a field"),
    ):
        unet = tiny_unet()
        with pytest.raises(ValueError, match=f"load_style: .*{message}"):
            lr.style.load_style(unet, edited(fresh(), **changes))
        assert not processors(unet) and all(p.requires_grad for p in unet.parameters())
    other = styled_unet(share_out=False)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="share_out must be False as in the model, got True"):
        lr.style.load_style(other, tmp_path / "style")
    small = tiny_unet(cross_attention_dim=10)
    with pytest.raises(ValueError, match=r"to_k_style.weight must be \[8, 10\], got \[8, 12\]"):
        lr.style.load_style(small, tmp_path / "style")
    assert all(torch.equal(t, before[key]) for key, t in other.state_dict().items())
    with pytest.raises(FileNotFoundError, match=r"load_style: .*adapter_config.json does not exi"):
        lr.style.load_style(small, tmp_path)
    with pytest.raises(ValueError, match=r"load_adapter: .*config.json: peft_type must be one of"):
        lr.load_adapter(nn.Sequential(nn.Linear(2, 2)), tmp_path / "style")


# ----------------------------------------------------------------------------- wrong arguments


def test_models_that_cannot_have_one() -> None:
    with pytest.raises(TypeError, match=r"add_style_path: unet must be a diffusers model .*Linear"):
        lr.style.add_style_path(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="config must be a StylePathConfig, got dict"):
        lr.style.add_style_path(tiny_unet(), {"lam_init": 1.0})
    with pytest.raises(ValueError, match="must not have a style path yet"):
        lr.style.add_style_path(styled_unet())
    no_text = UNet2DModel(
        sample_size=4,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    with pytest.raises((TypeError, ValueError), match="add_style_path: unet must"):
        lr.style.add_style_path(no_text)
    other = tiny_unet()
    other.set_attn_processor(AttnProcessor())
    simple = tiny_unet(
        down_block_types=("SimpleCrossAttnDownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        up_block_types=("UpBlock2D", "SimpleCrossAttnUpBlock2D"),
    )
    grouped, scaled = tiny_unet(), tiny_unet()
    attn = scaled.mid_block.attentions[0].transformer_blocks[0].attn2
    attn.rescale_output_factor = 2.0
    for unet, config, message in (
        (other, None, "must be AttnProcessor2_0, diffusers' default, got AttnProcessor"),
        (simple, None, "got AttnAddedKVProcessor2_0"),
        (scaled, None, "mid_block.* must have no rescale_output_factor"),
        (
            grouped,
            StylePathConfig(style_dim=5),
            "style_dim must be that of a text token, 12, .*got 5",
        ),
        (
            grouped,
            StylePathConfig(adapter_dtype="float16"),
            "adapter_dtype must be 'base', 'float32'",
        ),
    ):
        before = dict(unet.attn_processors)
        with pytest.raises(ValueError, match=f"add_style_path: .*{message}"):
            lr.style.add_style_path(unet, config)
        assert unet.attn_processors == before and all(p.requires_grad for p in unet.parameters())


def test_wrong_styles() -> None:
    unet = styled_unet()
    lr.style.set_style(unet, STYLE)
    expected = run(unet)
    for style, options, error, message in (
        (
            STYLE[0],
            {},
            ValueError,
            r"style must be floating \[N, n, style_dim=12\], got .*\[3, 12\]",
        ),
        (STYLE[..., :5], {}, ValueError, r"got float32 \[2, 3, 5\]"),
        (STYLE.long(), {}, ValueError, r"got int64 \[2, 3, 12\]"),
        ([None, None], {}, ValueError, "style must have a row that is not None"),
        ([STYLE[0], 1], {}, ValueError, r"must be \[n, style_dim\] or None, got 1"),
        ([STYLE, None], {}, ValueError, r"or None, got \[2, 3, 12\]"),
        (
            [STYLE[0], STYLE[0, :2]],
            {},
            ValueError,
            r"as many style tokens, got \[\[3, 12\], \[2, 12",
        ),
        (
            STYLE,
            {"rows": [1.0, 0.0, 1.0]},
            ValueError,
            r"rows must be \[R\], R a multiple of .* 2 rows",
        ),
        (STYLE, {"rows": 1.0}, ValueError, r"rows must be \[R\]"),
        (STYLE, {"unconditional": 0}, TypeError, "unconditional must be a bool, got 0"),
    ):
        with pytest.raises(error, match=f"set_style: .*{message}"):
            lr.style.set_style(unet, style, **options)
        assert torch.equal(run(unet), expected)
    lr.style.set_style(unet, torch.cat([STYLE, STYLE[:1]]))
    with pytest.raises(ValueError, match="a number of rows that divides the batch, 4, got 3"):
        run(unet)


def test_models_without_a_style_path(tmp_path: Path) -> None:
    unet = tiny_unet()
    for name, call in {
        "set_style": lambda: lr.style.set_style(unet, STYLE),
        "set_style_scale": lambda: lr.style.set_style_scale(unet, 1.0),
        "style_summary": lambda: lr.style.style_summary(unet),
        "remove_style_path": lambda: lr.style.remove_style_path(unet),
        "save_style": lambda: lr.style.save_style(unet, tmp_path),
    }.items():
        with pytest.raises(
            ValueError, match=f"{name}: unet must have a style path; call add_style"
        ):
            call()
    with pytest.raises(TypeError, match="save_style: embedder must be a StyleEmbedder, got Linear"):
        lr.style.save_style(styled_unet(), tmp_path, nn.Linear(2, 2))
    assert not list(tmp_path.iterdir())


def test_the_other_verbs_refuse_it() -> None:
    """There is no low-rank branch to merge, to unload or to save by lr.save_adapter."""
    unet = styled_unet()
    for verb in (lr.merge, lr.unload, lr.summary):
        with pytest.raises(ValueError, match="model must"):
            verb(unet)


WITHOUT_DIFFUSERS = """
import sys
sys.modules["diffusers"] = None  # as if it were not installed
import torch, lowrank_ext as lr
lr.style.TwoPathCrossAttention(8, 4, num_heads=2)(torch.ones(1, 2, 8), torch.ones(1, 3, 4))

class Model(torch.nn.Module):
    attn_processors = property(lambda self: {})

try:
    lr.style.add_style_path(Model())
except ImportError as error:
    print(error)
print("transformers" in sys.modules)
"""


def test_without_diffusers() -> None:
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_DIFFUSERS], capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines() == [
        "add_style_path: diffusers must be installed: pip install 'lowrank-ext[style]'",
        "False",
    ]
