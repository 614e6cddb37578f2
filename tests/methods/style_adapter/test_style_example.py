"""examples/style_adapter.py: that it runs, and that its numbers say what they are taken for."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from example_scripts import load_example
from typer.testing import CliRunner

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

import lowrank_ext as lr


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_example("style_adapter")


def test_it_runs(tmp_path: Path, example: ModuleType) -> None:
    run = CliRunner().invoke(example.app, ["--quick", "--out", str(tmp_path)])
    assert run.exit_code == 0, run.output
    assert "style of the reference" in run.output and "of 20" in run.output
    assert (tmp_path / "style_adapter.png").read_bytes().startswith(b"\x89PNG")
    painter = example.new_painter()
    embedder = lr.style.load_style(painter.unet, tmp_path / "style_adapter")
    assert embedder is not None and embedder.options["num_tokens"] == 4


def test_the_measures(example: ModuleType) -> None:
    """The drawings asked for are right, those of another style or shape are not."""
    styles = example.held_out_styles()
    num_styles, num_shapes = len(styles.ink), len(example.SHAPES)
    rows = torch.arange(num_styles).repeat(num_shapes)
    shapes = torch.arange(num_shapes).repeat_interleave(num_styles)
    drawn = example.draw(shapes, styles.pick(rows)).unflatten(0, (num_shapes, num_styles))
    for found in example.measure(drawn, styles):
        assert found.right == 0 and found.wrong > 0.05
        assert found.nearest_is_right == found.pictures == num_shapes * num_styles
    by_style, by_shape = example.measure(drawn.roll(1, dims=1), styles)
    assert by_style.nearest_is_right == 0 and by_style.right > by_style.wrong / 2
    by_style, by_shape = example.measure(drawn.roll(1, dims=0), styles)
    assert by_shape.nearest_is_right == 0 and by_style.nearest_is_right > 0


def test_references_show_other_shapes(example: ModuleType) -> None:
    shapes = torch.arange(len(example.SHAPES)).repeat(5)
    styles = example.random_styles(len(shapes))
    assert len(styles.ink) == len(shapes)
    pairs = example.references_for(shapes, styles).unflatten(0, (len(shapes), 2))
    for shape, pair, ink, paper, texture in zip(shapes, pairs, *styles, strict=True):
        own = example.Styles(*(value[None] for value in (ink, paper, texture)))
        drawn = [example.draw(torch.tensor([i]), own)[0] for i in range(len(example.SHAPES))]
        shown = [i for image in pair for i, other in enumerate(drawn) if torch.equal(image, other)]
        assert len(set(shown)) == 2 and int(shape) not in shown
