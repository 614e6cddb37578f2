"""roofline_depthwise: its sizes are Gemma 2B's, its rows predictions of every candidate."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import roofline_depthwise

    monkeypatch.setattr(roofline_depthwise, "PROMPT", 4)
    monkeypatch.setattr(roofline_depthwise, "NEW", (4, 12))
    yield roofline_depthwise
    for name in ("roofline_depthwise", "timing"):
        sys.modules.pop(name, None)


def test_sizes_of_gemma_2b(bench) -> None:
    vanilla, folded = bench.sizes_of(1, 0), bench.sizes_of(2, 64)
    assert vanilla.block_parameters + vanilla.head_parameters == 2_506_096_640  # without 37 norms
    assert folded.block_parameters * 2 == vanilla.block_parameters
    assert folded.adapter_parameters == 9 * 64 * (2 * 4096 + 2 * 2304 + 3 * 18432)
    assert vanilla.cache_values == 18 * 512


def test_without_exits_a_recursion_is_the_vanilla_model(bench) -> None:
    requests = bench.make_requests(8, deep_share=1.0)
    rows = {row["candidate"]: row for row in bench.rows_of("A100", 4, requests)}
    assert rows["vanilla, static"]["over_static"] == 1
    assert rows["vanilla, continuous"]["over_continuous"] == 1
    assert rows["vanilla, continuous"]["over_static"] > 1
    # Twice half of the block, by reading its weights twice; prompts and heads are the same.
    assert rows["share-first, r = 0"]["over_continuous"] == pytest.approx(1, rel=0.1)
    assert rows["share-first, r = 0"]["mean_loops"] == 2


def test_exits_pay_and_adapters_cost(bench, monkeypatch, capsys, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    argv = ["bench", "--slots", "4", "--deep-share", "0", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", argv)
    bench.main()
    assert "PREDICTION" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert written["prediction"] is True
    assert len(written["rows"]) == len(bench.DEVICES) * len(list(bench.candidates()))
    for device in bench.DEVICES:
        speed = {
            row["candidate"]: row["tokens_per_second"]
            for row in written["rows"]
            if row["device"] == device
        }
        shared = [speed[f"share-first, r = {rank}"] for rank in bench.PAPER]
        assert shared[0] > speed["vanilla, continuous"]
        assert shared == sorted(shared, reverse=True)
        # Of four rows: bound by memory, so that rows of a backfill cost nothing.
        assert speed["share-first, r = 0"] == pytest.approx(speed["backfill, r = 0"], rel=0.01)
