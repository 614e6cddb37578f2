"""examples/recursive.py runs, shows what it says, and goes on from its file."""

import json
from pathlib import Path

import pytest
from example_scripts import load_example

pytest.importorskip("matplotlib")


def test_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example = load_example("recursive")
    example.main(out=tmp_path, steps=2, full=False, prompts=None, quick=True)
    first = json.loads((tmp_path / "recursive.json").read_text())
    assert (tmp_path / "recursive.png").read_bytes().startswith(b"\x89PNG")
    made = ["recursive", "recursive.json", "recursive.png"]
    assert sorted(path.name for path in tmp_path.iterdir()) == made
    models = {path.name for path in (tmp_path / "recursive").iterdir()}
    assert models == {"pure", "relaxed", "exits-pure", "exits-relaxed"}
    full_rank = [value for name, value in first.items() if name.endswith("rank full")]
    assert full_rank == pytest.approx([first["source"]] * 3, abs=1e-4)
    assert first["uptrained, pure, KL"][0] != first["uptrained, pure, KL"][1]
    assert set(first["calibrated"]["loss"]) == {"backfill", "copy", "share-first"}
    assert "loops each" in capsys.readouterr().out
    del first["exits, relaxed, 0.3"]
    (tmp_path / "recursive.json").write_text(json.dumps({**first, "source": 1.0}))
    example.main(out=tmp_path, steps=2, full=False, prompts=None, quick=True)
    again = json.loads((tmp_path / "recursive.json").read_text())
    assert again["source"] == 1.0, "a figure that the file has is not measured again"
    assert "exits, relaxed, 0.3" in again
