"""Any shape, rank, layout and combination of arguments, chosen by hypothesis, on both ops."""

import pytest
import torch
from devices import DtypePair
from lowrank_cases import (
    FP32,
    FP64,
    LAYOUTS,
    MIXED,
    OPS,
    SUBSETS,
    Layout,
    assert_exact,
    make_dout,
    make_tensors,
    seed_tensor,
)

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st

LAID_OUT = {
    "lowrank_linear": ("x", "weight", "lora_a", "dout"),
    "lowrank_add": ("x", "base_out", "lora_b", "dout"),
}


@pytest.mark.simt
@pytest.mark.parametrize("op", OPS)
@settings(deadline=None, derandomize=True, max_examples=80)
@given(
    lead=st.lists(st.integers(0, 6), max_size=3).map(tuple),
    num_in=st.integers(0, 70),
    num_out=st.integers(0, 70),
    rank=st.integers(1, 20),
    dtypes=st.sampled_from([FP64, FP32, MIXED]),
    optional=st.sampled_from(SUBSETS),
    layouts=st.lists(st.sampled_from([None, *LAYOUTS]), min_size=4, max_size=4),
    dropout_p=st.sampled_from([0.0, 0.5, 1.0]),
    bias=st.booleans(),
)
def test_any_shape_and_layout(
    device: str,
    op: str,
    lead: tuple[int, ...],
    num_in: int,
    num_out: int,
    rank: int,
    dtypes: DtypePair,
    optional: tuple[str, ...],
    layouts: list[Layout | None],
    dropout_p: float,
    bias: bool,
) -> None:
    torch.manual_seed(0)
    sizes = (lead, num_in, num_out, rank, dtypes, device)
    tensors = make_tensors(op, *sizes, bias=bias, optional=optional, integers=True)
    tensors["dout"] = make_dout(tensors, integers=True)
    for name, layout in zip(LAID_OUT[op], layouts, strict=True):
        if layout is not None:
            tensors[name] = layout(tensors[name])
    dout = tensors.pop("dout")
    assert_exact(op, tensors, dout, scaling=0.5, dropout_p=dropout_p, seed=seed_tensor(9, device))
