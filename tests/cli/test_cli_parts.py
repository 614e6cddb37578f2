"""The parts of the command line tool that can be checked without a language model."""

import dataclasses
import io
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("typer")

from rich.console import Console

from lowrank_ext.cli import measure, models
from lowrank_ext.cli.data.blocks import (
    TokenBlocks,
    load_blocks,
    load_documents,
    split_documents,
    token_blocks,
)
from lowrank_ext.cli.display import BarDisplay, LineDisplay
from lowrank_ext.cli.errors import UserError
from lowrank_ext.cli.files import new_directory, replace_directory, write_bytes
from lowrank_ext.cli.interrupts import StopRequest
from lowrank_ext.cli.report import (
    Result,
    human_count,
    loss_range,
    read_result,
    results_table,
    smoothed,
    write_result,
)
from lowrank_ext.cli.settings import Settings, parse_methods
from lowrank_ext.cli.targets import parse_targets
from lowrank_ext.cli.training.progress import Progress
from lowrank_ext.methods.set_and_sequence.command_line import shuffled_windows

# ---------------------------------------------------------------------------------------- data


class ByteTokenizer:
    """One token per byte; 256 ends a text."""

    eos_token_id = 256

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def test_blocks_join_documents_and_drop_the_rest() -> None:
    blocks, rest = token_blocks(["abc", "de"], ByteTokenizer(), 3)
    assert blocks.tolist() == [[97, 98, 99], [256, 100, 101]] and rest == 1
    blocks, rest = token_blocks(["a"], ByteTokenizer(), 3)
    assert blocks.shape == (0, 3) and rest == 2


@pytest.mark.parametrize(
    ("files", "seq_len", "words"),
    [
        (1, 7, "1 document, 6 tokens left out at the ends of both parts for want of a whole row"),
        (1, 3, "1 document, 1 token left out at the ends of both parts for want of a whole row"),
        (
            2,
            16,
            "2 documents, 20 tokens left out at the ends of both parts for want of a whole row",
        ),
        (2, 2, "2 documents"),
    ],
)
def test_tokens_that_fill_no_block_are_counted(
    files: int, seq_len: int, words: str, tmp_path: Path
) -> None:
    """The parts have 181 and 21 tokens of each file."""
    names = tuple(str(tmp_path / f"{n}.txt") for n in range(files))
    for name in names:
        Path(name).write_text("0123456789" * 20)
    found = load_blocks(names, "text", ByteTokenizer(), seq_len)
    assert found.description == f"{', '.join(names)}: {words}"


def test_split_holds_whole_documents_out_whatever_their_order() -> None:
    documents = [f"{n} " * 50 for n in range(40)]
    train, held_out = split_documents(documents)
    assert sorted(train + held_out) == sorted(documents)
    assert 0.1 <= sum(map(len, held_out)) / sum(map(len, documents)) < 0.15
    assert split_documents(documents[::-1]) == (train, held_out)


def test_split_of_few_documents_holds_their_tails_out() -> None:
    train, held_out = split_documents(["a" * 90 + "b" * 10, "c" * 10])
    assert train == ["a" * 90, "c" * 9]
    assert held_out == ["b" * 10, "c"]


def test_every_epoch_is_another_permutation() -> None:
    rows = torch.arange(7).unsqueeze(1)
    corpus = TokenBlocks(train=rows, held_out=rows, description="")
    # 7 steps of 3 rows: three epochs, batches that span two of them included.
    order = torch.cat([corpus.train_batch(step, 3, seed=5).flatten() for step in range(7)]).tolist()
    epochs = [order[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert corpus.train_batch(0, 3, seed=6).flatten().tolist() != order[:3]


def test_windows_are_shuffled_within_their_rows() -> None:
    tokens = torch.arange(2 * 11).view(2, 11)
    shuffled = shuffled_windows(tokens, 3, torch.Generator().manual_seed(1))
    assert torch.equal(shuffled[:, 9:], tokens[:, 9:])  # what is no whole window
    for row, mixed in zip(tokens[:, :9], shuffled[:, :9], strict=True):
        assert sorted(mixed.view(3, 3).tolist()) == row.view(3, 3).tolist()
    assert not torch.equal(shuffled, tokens)
    assert not torch.equal(shuffled[0] + 11, shuffled[1])  # rows have orders of their own
    again = shuffled_windows(tokens, 3, torch.Generator().manual_seed(1))
    assert torch.equal(again, shuffled)
    assert torch.equal(shuffled_windows(tokens, 12, torch.Generator()), tokens)


def test_held_out_batches_are_whole_unless_there_is_less_than_one() -> None:
    rows = torch.arange(7).unsqueeze(1)
    corpus = TokenBlocks(train=rows, held_out=rows, description="")
    assert [len(batch) for batch in corpus.held_out_batches(3, most=9)] == [3, 3]
    assert [len(batch) for batch in corpus.held_out_batches(3, most=1)] == [3]
    assert [len(batch) for batch in corpus.held_out_batches(9, most=1)] == [7]


def test_digest_tells_texts_apart() -> None:
    rows = torch.arange(6).view(3, 2)
    digests = {TokenBlocks(rows + n, rows, "").digest() for n in range(3)}
    assert len(digests) == 3
    assert TokenBlocks(rows.clone(), rows.clone(), "other").digest() in digests


def test_documents_of_jsonl_and_txt(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n\n{"text": "four"}\n')
    paths = (str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl"))
    assert load_documents(paths, "text") == ["one\ntwo", "three", "four"]
    assert len(load_documents((), "text")) > 50  # the default text


# ------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", "all-linear"),
        ("q_proj", ["q_proj"]),
        ("q_proj, layers.0.v_proj,", ["q_proj", "layers.0.v_proj"]),
        (r".*\.[qv]_proj", r".*\.[qv]_proj"),
        ("(a|b),c", "(a|b),c"),
    ],
)
def test_targets(targets: str, expected: str | list[str]) -> None:
    assert parse_targets(targets) == expected


def test_methods() -> None:
    assert parse_methods(None, None) == (("lora",), False)
    assert parse_methods("lamda", None) == (("lamda",), False)
    assert parse_methods(None, "lora, full") == (("lora", "full"), True)
    with pytest.raises(UserError, match="not both"):
        parse_methods("lora", "lora")


def test_scaling_and_learning_rate(settings_of: Callable[..., Settings]) -> None:
    own = settings_of("--rank", "8")
    assert own.scaling() == 1.0
    assert settings_of("--rank", "8", "--alpha", "16").scaling() == 2.0
    assert settings_of("--lr", "0.5").learning_rate("full") == 0.5
    assert own.learning_rate("lora") == own.learning_rate("peft-lora") > 0


def test_dropout_is_the_methods_own_unless_it_is_given(
    settings_of: Callable[..., Settings],
) -> None:
    """LaMDA's branch starts as a part of the weight, on which dropout would fall."""

    def of(dropout: float | None, *methods: str) -> Settings:
        given = () if dropout is None else ("--dropout", str(dropout))
        return settings_of("--compare", ",".join(methods), *given)

    own = of(None, "frozen", "peft-lora", "lora", "lamda")
    assert [own.dropout_of(name) for name in own.methods[1:]] == [0.05, 0.05, 0.0]
    assert own.dropout_text() == "0.05 (lamda 0)"
    given = of(0.2, "lora", "lamda")
    assert (given.dropout_of("lamda"), given.dropout_text()) == (0.2, "0.2")
    assert of(None, "lamda").dropout_text() == of(None, "frozen").dropout_text() == "0"


@pytest.mark.parametrize(
    ("features", "dtype"),
    [
        ("avx2 f16c", torch.float32),
        ("avx512f", torch.float32),
        ("avx2 avx512f avx512_bf16", torch.bfloat16),
        ("amx_bf16 avx2", torch.bfloat16),
    ],
)
def test_auto_dtype_is_bf16_where_the_cpu_is_fast(monkeypatch, features, dtype) -> None:
    fake_ops = SimpleNamespace(lowrank_ext=SimpleNamespace(cpu_features=lambda: features))
    monkeypatch.setattr(models, "torch", SimpleNamespace(ops=fake_ops, **{
        name: getattr(torch, name) for name in ("bfloat16", "float32")
    }))  # fmt: skip
    assert models.resolve_dtype("auto") is dtype
    assert models.resolve_dtype("fp16") is torch.float16


def test_adapter_dtype() -> None:
    assert models.resolve_adapter_dtype("base", torch.float16) is torch.float16
    assert models.resolve_adapter_dtype("fp32", torch.bfloat16) is torch.float32
    with pytest.raises(UserError, match="got fp32"):
        models.resolve_adapter_dtype("bf16", torch.float32)


# ------------------------------------------------------------------------------------- measuring


def test_saved_bytes_counts_storages_once_and_no_parameters() -> None:
    weight = nn.Parameter(torch.randn(8, 8))
    model = nn.Module()
    model.weight = weight
    x = torch.randn(4, 8, requires_grad=True)

    def loss_of() -> torch.Tensor:
        y = (x @ weight).exp()  # saves x, weight, and its own output
        return (y[:2] * y[2:]).sum()  # saves two views of y: the same storage

    expected = x.nbytes + 4 * 8 * 4
    assert measure.saved_bytes(model, loss_of) == expected
    assert x.grad is None and weight.grad is None


def test_saved_bytes_leaves_the_random_generator_alone() -> None:
    x = torch.randn(1000, requires_grad=True)
    state = torch.get_rng_state()
    saved = measure.saved_bytes(nn.Module(), lambda: nn.functional.dropout(x, 0.5).sum())
    assert saved > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_interleaved_timing_takes_turns_and_stops_when_asked() -> None:
    calls: list[str] = []

    def make(name: str) -> Any:
        def loss_of() -> torch.Tensor:
            calls.append(name)
            return torch.ones(1, requires_grad=True).sum()

        return loss_of

    timing = measure.interleaved_timing(make("m"), make("f"), rounds=3, stop=lambda: False)
    assert calls == ["m", "f"] * 4  # one round of warm-up
    assert timing.milliseconds > 0 and timing.frozen_milliseconds > 0 and timing.ratio > 0
    calls.clear()
    measure.interleaved_timing(make("m"), make("f"), rounds=3, stop=lambda: True)
    assert calls == ["m", "f"] * 2


@pytest.mark.parametrize(
    ("durations", "expected"),
    [  # two of the warm-up, then pairs with these ratios
        pytest.param([9, 9, 2, 1, 8, 2, 3, 1], measure.Timing(3e3, 1e3, 3.0), id="2, 4, 3"),
        pytest.param([9, 9, 1, 5, 8, 2, 3, 1], measure.Timing(3e3, 2e3, 1.5), id="0.2, 4, 3"),
    ],
)
def test_ratio_is_the_quotient_of_the_times_beside_it(
    monkeypatch: pytest.MonkeyPatch, durations: list[float], expected: measure.Timing
) -> None:
    left = iter(durations)
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def loss_of() -> torch.Tensor:
        now[0] += next(left)
        return torch.ones(1, requires_grad=True).sum()

    assert measure.interleaved_timing(loss_of, loss_of, rounds=3, stop=lambda: False) == expected


@pytest.mark.parametrize("kernel", [True, False])
def test_peak_memory_sees_what_was_freed_again(monkeypatch, tmp_path, kernel: bool) -> None:
    if not kernel:
        monkeypatch.setattr(measure, "_CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    elif not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system has no resettable high-water mark")
    size = 64 * 2**20
    with measure.PeakMemory() as before:
        pass
    with measure.PeakMemory() as peak:
        block = torch.ones(size, dtype=torch.uint8)
        if not kernel:
            time.sleep(0.1)  # at least one sample
        del block
    assert peak.num_bytes >= before.num_bytes + 0.9 * size
    assert (peak.source == "VmHWM") is kernel


# --------------------------------------------------------------------------------- files, signals


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(UserError, match=r"cannot write .*file: No space left"):
            write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_new_directory_replaces_the_old_one_only_when_whole(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    with new_directory(target) as temporary:
        (temporary / "a").write_text("1")
    with pytest.raises(ZeroDivisionError), new_directory(target) as temporary:
        (temporary / "b").write_text("2")
        raise ZeroDivisionError
    assert os.listdir(target) == ["a"]
    with new_directory(target) as temporary:
        (temporary / "c").write_text("3")
    assert os.listdir(target) == ["c"]
    assert os.listdir(tmp_path) == ["adapter"]
    (tmp_path / "new").mkdir()
    replace_directory(tmp_path / "new", target)
    assert os.listdir(target) == []


def test_first_signal_asks_second_interrupts_and_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested and stop.exit_code == 143
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


# --------------------------------------------------------------------------------------- display


def progress_at(step: int) -> Progress:
    return Progress(step=step, losses=[2.5] * step, tokens=[100] * step, step_seconds=[0.5] * step)


def test_bar_shows_step_loss_speed_and_time_left() -> None:
    console = Console(force_terminal=True, width=120, record=True, file=io.StringIO())
    with BarDisplay(console, "lora", steps=4) as display:
        for step in (1, 2):
            display.update(progress_at(step))
    text = console.export_text()
    for words in ("lora", "2/4", "loss 2.5000", "200 tokens/s", ":"):
        assert words in text


def test_lines_are_seldom_but_include_the_first_and_the_last(capsys) -> None:
    console = Console(width=120)
    with LineDisplay(console, "lora", steps=50) as display:
        display.phase("evaluating")
        for step in range(1, 51):
            display.update(progress_at(step))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "lora  evaluating",
        "lora  step 1/50  loss 2.5000  200 tokens/s  24 s left",
        "lora  step 50/50  loss 2.5000  200 tokens/s  0 s left",
    ]


def test_numbers_for_people() -> None:
    counts = [human_count(n) for n in (7, 1500, 4_884_480, 135_000_000, 2 * 10**9)]
    assert counts == ["7", "1.5 k", "4.88 M", "135 M", "2 G"]
    assert smoothed([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    rising = smoothed([0.0, 1.0, 1.0, 1.0])
    assert rising == sorted(rising) and 0 == rising[0] < rising[-1] < 1


@pytest.mark.parametrize("width", [80, 120])
def test_table_shows_every_number_in_full(width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(results_table([some_result()], "model [bold]with brackets[/bold]"))
    text = console.export_text()
    assert "…" not in text
    assert "model [bold]with brackets[/bold]" in text
    expected = ("peft-lora", "2.54 M", "53.8 k", "1,864.7", "2.700", "14,174", "12,844", "1.76")
    assert "/7,298" in text, "the frozen model's time in the same rounds"
    for number in (*expected, "113.7", "12.8953", "2.5303"):
        assert number in text


def test_table_breaks_long_names_at_their_hyphens() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    result = dataclasses.replace(some_result(), method="peft-lora-accelerated")
    console.print(results_table([result], "title"))
    lines = [line.split() for line in console.export_text().splitlines()]
    start = next(i for i, line in enumerate(lines) if line and line[0] == "peft-lora-")
    assert lines[start][-1] == "2.5303" and lines[start + 1][0] == "accelerated"


def some_result() -> Result:
    return Result(
        method="peft-lora",
        learning_rate=1e-3,
        trainable_at_start=2_540_000,
        trainable_at_end=53_760,
        saved_bytes_at_start=10**9,
        saved_bytes_at_end=round(1864.7 * 2**20),
        frozen_saved_bytes=round(1864.7 * 2**20 / 2.7),
        peak_bytes=14_174 * 2**20,
        peak_source="VmHWM",
        forward_backward_ms=12_844.0,
        frozen_forward_backward_ms=7_297.7,
        forward_backward_ratio=1.76,
        optimizer_ms=113.7,
        tokens_per_second=300.0,
        skipped_steps=0,
        rows_per_step=4,
        held_out=[(0, 12.8953), (10, 2.5303)],
        losses=[3.0, 2.0],
        ended_early=False,
        saved_step=10,
        expert_load_at_start=None,
        expert_load_at_end=None,
        saved_to="out/adapter",
    )


def test_plot_range_leaves_wild_first_steps_out() -> None:
    wild = dataclasses.replace(
        some_result(), held_out=[(0, 3.0), (9, 2.0)], losses=[90.0, *[2.5] * 99]
    )
    low, high = loss_range([wild])
    assert (low, high) == pytest.approx((1.9, 3.1), abs=1e-2)
    still = dataclasses.replace(some_result(), held_out=[(0, 3.0)], losses=[])
    low, high = loss_range([still])
    assert low < 3.0 < high


def test_result_survives_its_file_and_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_result(path, some_result())
    assert read_result(path) == some_result()
    values = json.loads(path.read_text())
    del values["losses"]
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="not from this version"):
        read_result(path)
