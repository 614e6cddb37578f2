"""examples/set_and_sequence.py: that it runs, writes its files, and measures what it says."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from example_scripts import load_example
from typer.testing import CliRunner

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_example("set_and_sequence")


def test_it_runs(example: ModuleType, tmp_path: Path) -> None:
    result = CliRunner().invoke(example.app, ["--quick", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "motion scale 0 samples the clips of stage 1, bit for bit: True" in result.output
    for name in ("frames", "loss"):
        picture = tmp_path / f"set_and_sequence_{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert f"set_and_sequence_{name}.png" in result.output
    lora = tmp_path / "set_and_sequence_lora" / "pytorch_lora_weights.safetensors"
    assert lora.is_file()
    assert not list(tmp_path.glob(".*"))


def test_look_and_motion_are_told_apart(example: ModuleType) -> None:
    """Frames out of order have the clip's look and not its motion; a still one moves least."""
    clip = example.target_clip()
    assert clip.shape == (3, example.FRAMES, example.SIZE, example.SIZE)
    assert clip.min() >= -1 and clip.max() <= 1
    assert example.errors(clip.unsqueeze(0), clip) == (0.0, 0.0)
    look, motion = example.errors(clip.flip(1).unsqueeze(0), clip)
    assert look == 0.0 and motion > 0.01
    noise = torch.randn(2, *clip.shape)
    look, motion = example.errors(noise, clip)
    assert 0.5 < look <= motion


def test_the_base_model_does_not_know_the_path(example: ModuleType) -> None:
    """The clips that it is made from run straight; the concept's center turns."""
    frames = example.FRAMES

    def center(clip: torch.Tensor) -> torch.Tensor:
        cover = (clip + 1).abs().sum(0)  # [F, H, W]
        axis = torch.arange(example.SIZE).float()
        y, x = (cover.sum(dim) @ axis / cover.sum((1, 2)) for dim in (2, 1))
        return torch.stack([y, x], dim=1)

    motion = torch.tensor([0.2, -0.3, 0.6, 0.5])
    steps = center(example.target_clip()).diff(dim=0)
    turned = torch.cosine_similarity(steps[0], steps[-1], dim=0)
    assert turned < 0.5
    straight = example.drifting_clip(torch.tensor(False), torch.ones(3), motion, frames)
    moves = center(straight).diff(dim=0)
    assert (torch.cosine_similarity(moves[:-1], moves[1:], dim=1) > 0.9).all()
