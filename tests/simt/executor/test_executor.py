"""The SIMT executor itself: every kind of fault is caught, every figure is exact."""

from types import ModuleType

import numpy as np
import pytest
import torch

Report = dict[str, object]

X_ROWS, X_COLS, X_STRIDE = 32, 64, 80  # floats; a gap of 16 between rows
Y_SIZE = 1024


def make_x(cols: int = X_COLS) -> np.ndarray:
    buffer = np.arange(X_ROWS * (cols + X_STRIDE - X_COLS), dtype=np.float32)
    return buffer.reshape(X_ROWS, -1)[:, :cols]


def run(
    simt: ModuleType,
    name: str,
    fixed: bool = False,
    x: np.ndarray | None = None,
    cols: int = X_COLS,
    y_size: int = Y_SIZE,
    **shape: int,
) -> tuple[np.ndarray, Report]:
    """y and the report of one launch."""
    x = make_x(cols) if x is None else x
    y = np.zeros(y_size, dtype=np.float32)
    simt.clear_reports()
    simt.run_planted(name, fixed=fixed, x=x, y=y, **{"shared_bytes": 8192, **shape})
    (report,) = simt.reports()
    return y, report


def tensor(report: Report, name: str) -> dict[str, int]:
    (found,) = (t for t in report["tensors"] if t["name"] == name)
    return found


BLOCK_0 = r"block \(0, 0, 0\) thread "
LINE = r"planted\.cu:\d+"

# name, launch, message
FAULTS = [
    (
        "past_the_end",
        {"threads": 64},
        r"read of 4 bytes is outside every tensor and shared memory: 4 bytes past the end of "
        rf"x\[row 0\] \(256 bytes\); {BLOCK_0}\(63, 0, 0\), {LINE}",
    ),
    ("before_the_start", {}, r".*: [48] bytes before the start of x\[row 0\] \(256 bytes\)"),
    (
        "row_gap",
        {},
        r"read of 4 bytes is outside .*: 4 bytes past the end of x\[row \d+\] \(256 bytes\)",
    ),
    (
        "vector_into_row_gap",
        {"cols": 62},
        r"read of 16 bytes is outside .*: 8 bytes past the end of x\[row 0\] \(248 bytes\)",
    ),
    ("write_to_input", {}, rf"write of 4 bytes to read-only x; {BLOCK_0}\(\d+, 0, 0\), {LINE}"),
    ("misaligned_load", {}, r"misaligned read of 16 bytes: the address is 4 past a multiple"),
    (
        "misaligned_pointer",
        {"threads": 1},
        r"misaligned read of 16 bytes: the address is 4 past a multiple",
    ),
    (
        "past_dynamic_shared",
        {"shared_bytes": 128},
        r"write of 4 bytes is outside .*: 4 bytes past the end of dynamic shared memory "
        r"\(128 bytes\)",
    ),
    ("overflowing_index", {}, r"signed integer overflow in \* at .*planted\.cu:\d+; "),
    ("stack_overflow", {}, r"stack overflow; block \(0, 0, 0\) thread "),
    ("missing_syncthreads", {"threads": 64}, r"race on static shared memory: "),
    (
        "write_after_read",
        {"threads": 64},
        rf"race on static shared memory: (read|write) by thread \(\d+, 0, 0\), {LINE}, and "
        rf"(read|write) by {BLOCK_0}\(\d+, 0, 0\), {LINE}, with no barrier between them",
    ),
    ("missing_syncwarp", {}, r"race on byte \d+ of dynamic shared memory: "),
    ("shuffle_is_no_barrier", {}, r"race on byte \d+ of dynamic shared memory: write by"),
    ("syncwarp_across_warps", {"threads": 64}, r"race on byte \d+ of|read of uninitialized"),
    ("partial_syncwarp", {}, r"race on byte \d+ of|read of uninitialized"),
    (
        "race_between_blocks",
        {"blocks": 2},
        rf"race on y\[row 0, byte 0\]: write by another block's thread \(0, 0, 0\), {LINE}, and "
        r"write by block \(\d, 0, 0\) thread \(0, 0, 0\)",
    ),
    ("read_of_another_block", {"blocks": 2, "threads": 1}, r"race on y\[row 0, byte [04]\]: "),
    (
        "uninitialized_shared",
        {},
        rf"read of uninitialized .*: byte 20 of dynamic shared memory; {BLOCK_0}\(5, 0, 0\)",
    ),
    (
        "left_by_another_block",
        {"blocks": 4},
        "read of uninitialized .*: static shared",
    ),
    ("plain_beside_atomic", {}, r"race on y\[row 0, byte 0\]: "),
    (
        "early_copy_read",
        {"threads": 8},
        r"early read of a cp\.async copy: byte \d+ of dynamic shared memory is still being copied "
        rf"for thread \(\d, 0, 0\), {LINE}, which has not waited for it; block",
    ),
    (
        "write_under_copy",
        {"threads": 8},
        r"write to the destination of a cp\.async copy: byte \d+ of dynamic shared memory",
    ),
    (
        "copy_without_barrier",
        {"threads": 8},
        r"race on byte \d+ of dynamic|early read of a cp\.async copy|read of uninitialized",
    ),
    (
        "copy_never_waited_for",
        {"threads": 8},
        rf"cp\.async never waited for before the thread's end; {BLOCK_0}\(\d, 0, 0\), {LINE}",
    ),
    ("copy_never_committed", {"threads": 8}, r"early read of a cp\.async copy"),
    (
        "divergent_barrier",
        {},
        r"divergent barrier: lanes 0x0000ffff of warp 0 of block \(0, 0, 0\) wait in __syncthreads "
        rf"at {LINE}, its other lanes have exited",
    ),
    (
        "barrier_against_shuffle",
        {},
        rf"divergent barrier in block \(0, 0, 0\), threads wait: 16 in __syncthreads at {LINE}, "
        rf"the first thread \(0, 0, 0\); 16 in shfl_sync at {LINE}, the first thread \(16, 0, 0\); "
        r"0 have exited",
    ),
    (
        "lanes_miss_a_shuffle",
        {},
        rf"deadlock in block \(0, 0, 0\), threads wait: 16 in shfl_sync at {LINE}, the first "
        r"thread \(0, 0, 0\); 16 have exited",
    ),
    (
        "different_collectives",
        {},
        r"lanes of a warp meet in different places: (shfl|ballot)_sync of lanes 0xffffffff at "
        rf"{LINE}, and (shfl|ballot)_sync of lanes 0xffffffff at {LINE}",
    ),
    ("warp_leaves_early", {"threads": 64}, r"divergent barrier: lanes 0xffff0000 of warp 0"),
]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("name", "shape", "message"), FAULTS, ids=[name for name, *_ in FAULTS])
def test_planted_fault_is_caught_and_its_repair_passes(
    simt: ModuleType, name: str, shape: dict[str, int], message: str, seed: int
) -> None:
    simt.set_options(schedule_seed=seed)
    with pytest.raises(RuntimeError, match=rf"^{name}: ({message})"):
        run(simt, name, **shape)
    assert simt.reports() == []
    run(simt, name, fixed=True, **shape)


def test_copy_past_the_end(simt: ModuleType) -> None:
    x = make_x(30)
    with pytest.raises(RuntimeError, match=r"16 bytes is outside .*: 8 bytes past the end of x"):
        run(simt, "copy_past_the_end", x=x, threads=8)
    y, report = run(simt, "copy_past_the_end", fixed=True, x=x, threads=8)
    np.testing.assert_array_equal(y[:32], [*x[0], 0, 0])
    assert tensor(report, "x")["bytes_read"] == 30 * 4


def test_what_a_kernel_throws_comes_out(simt: ModuleType) -> None:
    with pytest.raises(ValueError, match="thrown by a kernel"):
        run(simt, "throws")
    run(simt, "throws", fixed=True)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"threads": 1025}, "a block must have 1 to 1024 threads, got 1025"),
        ({"threads": 0}, "a block must have 1 to 1024 threads, got 0"),
        ({"blocks": 0}, r"a grid must have 1 to 2\^32 - 1 blocks, got 0"),
        (
            {"shared_bytes": 232449},
            "dynamic shared memory must be at most 232448 bytes, got 232449",
        ),
    ],
)
def test_wrong_launch(simt: ModuleType, shape: dict[str, int], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"throws: {message}"):
        run(simt, "throws", fixed=True, **shape)


def test_no_record(simt: ModuleType) -> None:
    """Without the record races pass and nothing is counted; bounds and barriers still hold."""
    simt.set_options(record=False)
    _, report = run(simt, "write_after_read", threads=64)
    assert report["bytes_read"] == report["shared_requests"] == 0
    y, _ = run(simt, "early_copy_read", threads=8)
    assert np.isnan(y[:8]).all()  # the poison under a copy
    for name in ("past_the_end", "write_to_input", "misaligned_load", "divergent_barrier"):
        with pytest.raises(RuntimeError, match=f"^{name}: "):
            run(simt, name, threads=64)


# ---- figures ------------------------------------------------------------------------------------


def test_bank_conflicts_of_a_column(simt: ModuleType) -> None:
    _, report = run(simt, "column_of_tile")
    assert report["shared_requests"] == 2
    assert report["shared_wavefronts"] == 2 * 32
    assert report["shared_conflicts"] == 2 * 31
    _, report = run(simt, "column_of_tile", fixed=True)
    assert (report["shared_requests"], report["shared_wavefronts"]) == (2, 2)
    assert report["shared_conflicts"] == 0


def test_bank_conflicts_of_vectors(simt: ModuleType) -> None:
    """Two accesses of 16 bytes in phases of 8 lanes, one of 8 bytes in phases of 16."""
    y, report = run(simt, "vector_rows", fixed=True)
    assert (y[:32] == 6).all()
    assert report["shared_requests"] == 3
    # 8 bytes of each 16: the 16 lanes of a phase meet each bank in use twice.
    assert report["shared_wavefronts"] == 4 + 4 + 2 * 2
    assert report["shared_conflicts"] == 2
    _, report = run(simt, "vector_rows")
    assert report["shared_wavefronts"] == 4 * 8 + 4 * 8 + 2 * 16
    assert report["shared_conflicts"] == 4 * 7 + 4 * 7 + 2 * 15


def test_bank_conflicts_of_matrix_rows(simt: ModuleType) -> None:
    """Four stores of 4 bytes a lane, 16 bytes apart, then ldmatrix in phases of 8 rows."""
    y, report = run(simt, "matrix_rows", fixed=True)
    np.testing.assert_array_equal(y[:32], np.arange(31, -1, -1))
    assert report["shared_requests"] == 4 + 1
    assert report["shared_conflicts"] == 4 * 3
    _, report = run(simt, "matrix_rows")
    assert report["shared_conflicts"] == 4 * 31 + 4 * 7


def test_sectors_of_reads(simt: ModuleType) -> None:
    x = np.zeros(1024 + 8, dtype=np.float32)
    first = -x.ctypes.data // 4 % 8  # elements to the next multiple of 32 bytes
    x = x[first : first + 1024].reshape(1, 1024)
    _, report = run(simt, "strided_read", fixed=True, x=x)
    read = tensor(report, "x")
    assert (read["read_requests"], read["sectors_read"], read["bytes_read"]) == (1, 4, 128)
    _, report = run(simt, "strided_read", x=x)
    read = tensor(report, "x")
    assert (read["read_requests"], read["sectors_read"], read["bytes_read"]) == (1, 32, 128)
    assert read["unique_bytes_read"] == 128
    _, report = run(simt, "straddling_read", x=x)
    assert tensor(report, "x")["sectors_read"] == 5
    _, report = run(simt, "straddling_read", fixed=True, x=x)
    assert tensor(report, "x")["sectors_read"] == 4


def test_bytes_read_again(simt: ModuleType) -> None:
    _, report = run(simt, "repeated_read")
    read = tensor(report, "x")
    assert read["bytes_read"] == 4 * 32 * 4
    assert (read["unique_bytes_read"], read["read_requests"], read["sectors_read"]) == (4, 4, 4)


def test_requests_of_ever_fewer_lanes(simt: ModuleType) -> None:
    x = make_x(1024)
    for threads in (32, 64, 41):  # 41: the last warp has 9 lanes
        _, report = run(simt, "ragged_loop", x=x, threads=threads)
        lanes = [min(32, threads - first) for first in range(0, threads, 32)]
        read = tensor(report, "x")
        assert read["read_requests"] == sum(lanes)
        assert read["bytes_read"] == 4 * sum(n * (n + 1) // 2 for n in lanes)


def test_known_kernel_and_its_report(simt: ModuleType) -> None:
    x = make_x()
    y, report = run(simt, "block_sum", x=x, blocks=X_ROWS, threads=X_COLS)
    np.testing.assert_array_equal(y[:X_ROWS], x.sum(axis=1))
    assert report["kernel"] == "block_sum"
    assert (report["grid"], report["block"]) == ((X_ROWS, 1, 1), (X_COLS, 1, 1))
    assert report["shared_bytes"] == 8192
    assert report["barriers_per_block"] == 1
    assert report["shuffles"] == X_ROWS * 2 * 5
    assert report["bytes_read"] == report["unique_bytes_read"] == x.size * 4
    assert report["bytes_written"] == X_ROWS * 4
    assert report["read_requests"] == X_ROWS * 2
    assert report["write_requests"] == report["sectors_written"] == X_ROWS
    assert report["shared_conflicts"] == report["atomics"] == report["mma"] == 0
    sectors = report["sectors_read"] + report["sectors_written"]
    assert report["sectors_per_request"] == sectors / (X_ROWS * 3)


def test_warp_functions(simt: ModuleType) -> None:
    y, report = run(simt, "warp_functions", y_size=8 * 32)
    lane = np.arange(32)
    expected = [
        lane // 8 * 8 + 5,
        np.where(lane % 16 >= 3, lane - 3, lane),
        np.where(lane % 16 + 3 < 16, lane + 3, lane),
        np.where((lane ^ 9) // 8 <= lane // 8, lane ^ 9, lane),
        np.full(32, np.float32(0x01010101)),
        np.zeros(32),
        np.where(lane // 8 % 2, 0xFF00FF00, 0x00FF00FF),
        lane < 16,
    ]
    np.testing.assert_array_equal(y.reshape(8, 32), np.array(expected))
    assert report["shuffles"] == 4


def test_conversions_are_those_of_torch(simt: ModuleType) -> None:
    """All halves of a float's bits at all rounding positions, subnormals, infinities, NaN."""
    upper = np.arange(0, 1 << 16, 7, dtype=np.uint32) << 16
    lower = np.array([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    x = (upper[:, None] | lower).reshape(1, -1).view(np.float32)
    y, _ = run(simt, "conversions", x=x, y_size=2 * x.size, threads=256)
    for result, dtype in zip(y.reshape(2, -1), (torch.bfloat16, torch.float16), strict=True):
        expected = torch.from_numpy(x[0]).to(dtype).float().numpy()
        np.testing.assert_array_equal(result, expected)
        assert np.isnan(result).sum() == np.isnan(x).sum()


# ---- schedule -----------------------------------------------------------------------------------


def test_schedule_follows_the_seed(simt: ModuleType) -> None:
    def order(seed: int) -> tuple[float, ...]:
        simt.set_options(schedule_seed=seed)
        y, report = run(simt, "tickets", blocks=4, threads=64)
        assert sorted(y[1:257]) == list(range(256))
        assert report["atomics"] == 256
        return tuple(y[1:257])

    orders = [order(seed) for seed in range(8)]
    assert len(set(orders)) == 8
    assert orders == [order(seed) for seed in range(8)]


def test_race_gives_what_the_schedule_gives(simt: ModuleType) -> None:
    winners = set()
    for seed in range(16):
        simt.set_options(schedule_seed=seed, record=False)
        winners.add(run(simt, "last_block_wins", blocks=4)[0][0])
    assert winners == {0, 1, 2, 3}
