"""routing/order_slots.cuh: slots stably sorted by expert or adapter."""

import pytest
import torch
from kernel_calls import _simt, order_slots, reports_of, traffic_of
from torch import Tensor

THREE = ["count_slots", "scan_slot_counts", "scatter_slots"]


def keys_of(ids: Tensor, num_groups: int) -> Tensor:
    other = torch.where(ids == -1, num_groups, num_groups + 1)
    return torch.where((ids >= 0) & (ids < num_groups), ids, other)


def assert_ordered(got: dict[str, Tensor], keys: Tensor, num_keys: int) -> None:
    sorted_slots = torch.sort(keys, stable=True).indices
    assert torch.equal(got["sorted_slots"], sorted_slots)
    counts = torch.bincount(keys, minlength=num_keys)
    assert torch.equal(got["offsets"], torch.cat([torch.zeros(1).long(), counts.cumsum(0)]))
    if "positions" in got:
        assert torch.equal(got["positions"][sorted_slots], torch.arange(keys.numel()))


@pytest.mark.parametrize("num_groups", [1, 3, 8, 257])
@pytest.mark.parametrize("num_slots", [0, 1, 31, 32, 33, 129, 1000])
def test_sizes(num_slots: int, num_groups: int) -> None:
    ids = torch.randint(num_groups, (num_slots,))
    assert_ordered(order_slots(ids, num_groups), ids, num_groups)


@pytest.mark.parametrize("num_slots", [0, 7, 300, 17000])
def test_extra_groups(num_slots: int) -> None:
    """Id -1 has its own group; all other invalid ids share one."""
    ids = torch.randint(-3, 7, (num_slots,))
    ids[: num_slots // 7] = torch.tensor(2**40)
    got = order_slots(ids, 5, extra_groups=True)
    assert_ordered(got, keys_of(ids, 5), 7)


@pytest.mark.parametrize("num_sms", [1, 4, 9])
@pytest.mark.parametrize(("num_slots", "num_groups"), [(16500, 4), (700, 3000), (0, 13000)])
def test_many_blocks(num_slots: int, num_groups: int, num_sms: int) -> None:
    ids = torch.randint(num_groups, (num_slots,))
    results = {}
    reports = reports_of(lambda: results.update(order_slots(ids, num_groups, num_sms=num_sms)))
    assert [report["kernel"] for report in reports] == THREE
    assert_ordered(results, ids, num_groups)


def test_all_slots_in_one_group() -> None:
    for ids in (torch.zeros(500).long(), torch.full((500,), 9)):
        assert_ordered(order_slots(ids, 10), ids, 10)


def test_any_schedule_gives_the_same_order() -> None:
    ids = torch.randint(6, (900,))
    for seed in range(3):
        _simt.set_options(schedule_seed=seed)
        assert_ordered(order_slots(ids, 6), ids, 6)


def test_positions_may_be_left_out() -> None:
    for num_slots in (100, 16500):
        ids = torch.randint(4, (num_slots,))
        assert_ordered(order_slots(ids, 4, need_positions=False), ids, 4)


def test_a_wrong_id_writes_nothing_outside() -> None:
    """Which group it ends in is not said."""
    ids = torch.tensor([0, -5, 3, 2**40, 1, 4])
    got = order_slots(ids, 4)
    assert torch.equal(got["sorted_slots"].sort().values, torch.arange(6))
    assert got["offsets"][-1] == 6


def test_launches_and_traffic() -> None:
    ids = torch.randint(8, (4096,))
    [report] = reports_of(lambda: order_slots(ids, 8))
    assert report["kernel"] == "order_slots"
    assert traffic_of(report, "ids")["bytes_read"] == 2 * ids.nbytes  # once to count
    for name in ("sorted_slots", "positions"):
        assert traffic_of(report, name)["bytes_written"] == ids.nbytes
    assert traffic_of(report, "ids")["sectors_read"] == 2 * ids.nbytes / 32
    assert report["atomics"] == 0
