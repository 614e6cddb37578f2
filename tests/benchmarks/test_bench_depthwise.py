"""bench_depthwise on a tiny model: every candidate serves all requests, every figure is there."""

import sys
from pathlib import Path

import pytest
import torch
from decoders import decoder

import lowrank_ext as lr

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench_depthwise

    def tiny(num_loops: int, rank: int, dtype: torch.dtype) -> torch.nn.Module:
        model = decoder(max_position_embeddings=256).to(dtype)
        config = lr.recursive.RecursiveConfig(num_loops=num_loops, rank=rank)
        return lr.recursive.convert(model, config)

    monkeypatch.setattr(bench_depthwise, "recursive_model", tiny)
    monkeypatch.setattr(bench_depthwise, "PROMPT", (2, 6))
    monkeypatch.setattr(bench_depthwise, "NEW", (2, 6))
    yield bench_depthwise
    for name in ("bench_depthwise", "command", "timing"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_case(bench, rank: int) -> None:
    case = bench.Case(2, rank, 3, 5, 0.3, "float32")
    rows = bench.run_case(case, budget=0.0)
    assert len(rows) == 3 + 2 * len(bench.SKIPPED)
    for row in rows:
        assert row["tokens_per_second"] > 0
        assert 1 <= row["mean_loops"] <= 2
        assert len(bench.cells(row)) == len(bench.COLUMNS)
        assert (row["predicted_over_measured"] is None) == row["candidate"].startswith("confidence")
        assert ("mixed_pass" in row) == (rank > 0)
    by_name = {row["candidate"]: row for row in rows}
    assert by_name["static"]["over_static"] == by_name["continuous"]["over_continuous"] == 1
    assert by_name["static"]["mean_loops"] == by_name["depth-wise"]["mean_loops"] == 2
    assert by_name["forced exits, copy"]["mean_loops"] < 2


def test_a_pure_recursion_is_a_case(bench) -> None:
    from command import parse_case

    assert parse_case(bench.Case, "2,0,8,64,0.3,bfloat16").rank == 0
    with pytest.raises(Exception, match="sizes must be positive"):
        parse_case(bench.Case, "2,64,0,64,0.3,bfloat16")
