"""bench_depthwise on a tiny model: every candidate serves all requests, every figure is there."""

import sys
from pathlib import Path

import pytest
import torch
from decoders import VOCABULARY, decoder

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
    stream = torch.randint(0, VOCABULARY, (400,))
    words = bench_depthwise.Text(stream.view(-1, 10), stream.tolist())
    monkeypatch.setattr(bench_depthwise, "text", lambda: words)
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


def test_a_trained_model_has_an_oracle(bench, tmp_path: Path, monkeypatch) -> None:
    model = bench.recursive_model(2, 2, torch.float32)
    model.save_pretrained(tmp_path)
    case = bench.Case(2, 2, 3, 5, 0.3, "bfloat16")
    requests = bench.make_requests(case)
    trained = bench.trained_model(tmp_path)
    tables = bench.oracle_exits(case, trained, requests)
    assert [len(table) for table in tables] == requests.new_tokens
    rows = bench.run_case(case, 0.0, tmp_path)
    assert len(rows) == 3 + 3 * len(bench.SKIPPED)
    oracle = next(row for row in rows if row["candidate"] == "oracle, backfill")
    assert oracle["predicted_over_measured"] > 0
    assert 1 <= oracle["mean_loops"] <= 2

    monkeypatch.setattr(sys, "argv", ["bench", "--model", str(tmp_path), "--json", "rows.json"])
    options = bench.parsed()
    assert {case[:2] for case in bench.cases_of(options)} == {(2, 2)}
    other = ["bench", "--model", str(tmp_path), "--case", "2,4,8,64,0.3,bfloat16"]
    monkeypatch.setattr(sys, "argv", other)
    with pytest.raises(SystemExit, match="--model has num_loops=2 and rank=2"):
        bench.cases_of(bench.parsed())


def test_passes_alone(bench, monkeypatch, capsys) -> None:
    monkeypatch.setattr(bench, "PASS_ROWS", (1, 3))
    monkeypatch.setattr(sys, "argv", ["bench", "--passes", "--seconds", "0"])
    bench.main()
    table = [line.split() for line in capsys.readouterr().out.splitlines() if "/2 " in line]
    assert [row[3] for row in table] == ["1", "3"]
    for row in table:
        time, flops, bytes_read = map(float, row[4:])
        assert time > 0 and 1 < flops < bytes_read


def test_a_pure_recursion_is_a_case(bench) -> None:
    from command import parse_case

    assert parse_case(bench.Case, "2,0,8,64,0.3,bfloat16").rank == 0
    with pytest.raises(Exception, match="sizes must be positive"):
        parse_case(bench.Case, "2,64,0,64,0.3,bfloat16")
