"""Rows, columns and depths beyond 16 and 32 bits, at which no test can afford a whole matrix."""

import pytest
import torch
from kernel_calls import _simt, lowrank_down, lowrank_down_backward_lora_a

LARGE = [0, 1, 7, 2**15, 2**16 + 3, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**40 + 5]
MASK32 = 0xFFFFFFFF


@pytest.mark.parametrize("row_stride", [0, 1, 3, 4096, 2**20])
@pytest.mark.parametrize("row", LARGE)
@pytest.mark.parametrize("col", [0, 5, 2**31 + 1])
def test_place_in_a_matrix(row: int, col: int, row_stride: int) -> None:
    """A stride of 0 repeats one row."""
    if row * row_stride + col >= 2**62:
        pytest.skip("no memory is that large")
    assert _simt.matrix_offset(row, col, row_stride=row_stride) == row * row_stride + col


def philox4x32_7(counter: list[int], key: list[int]) -> list[int]:
    """Salmon et al., SC'11, in Python's integers."""
    for _ in range(7):
        first, second = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            second >> 32 ^ counter[1] ^ key[0],
            second & MASK32,
            first >> 32 ^ counter[3] ^ key[1],
            first & MASK32,
        ]
        key = [key[0] + 0x9E3779B9 & MASK32, key[1] + 0xBB67AE85 & MASK32]
    return counter


@pytest.mark.parametrize("element_bytes", [2, 4, 8, 0], ids=["2", "4", "8", "dropped_bits"])
@pytest.mark.parametrize("row", LARGE)
@pytest.mark.parametrize("first_col", [0, 8, 2**16, 2**31, 2**34 + 16])
def test_mask_of_any_place(element_bytes: int, row: int, first_col: int) -> None:
    """The counter has all 64 bits of the row, and the call's number of the column."""
    seed, expert, threshold = 0x1234_5678_9ABC_DEF0, 3, 30000
    counter = [first_col // 8, row & MASK32, row >> 32, expert]
    words = philox4x32_7(counter, [seed & MASK32, seed >> 32])
    expected = [word >> shift & 0xFFFF >= threshold for word in words for shift in (0, 16)]
    options = {"threshold": threshold, "seed": seed, "row": row, "first_col": first_col}
    assert _simt.kept(element_bytes, **options, expert=expert) == expected


def test_depth_beyond_16_bits() -> None:
    """Of a sum along the columns, and of one along the rows; entries at both ends count."""
    depth = 40_000  # the last of 16 splits begins above 2^15
    thin, large = torch.zeros(2, depth, dtype=torch.bfloat16), torch.zeros(3, depth).bfloat16()
    places = torch.tensor([0, 2**15 - 1, 2**15, 2**15 + 1, depth - 2, depth - 1])
    thin[:, places] = torch.arange(1.0, 7.0).bfloat16()
    large[:, places] = torch.tensor([[1.0], [-2.0], [3.0]]).bfloat16().expand(3, 6)
    expected = large.double() @ thin.double().mT
    h = lowrank_down("bf16", large, thin, num_sms=16)
    assert torch.equal(h.double(), expected)
    dh, x = thin.mT.contiguous(), large.mT.contiguous()
    dlora_a = lowrank_down_backward_lora_a("bf16", dh, x, num_sms=16)
    assert torch.equal(dlora_a.double(), expected.mT)
