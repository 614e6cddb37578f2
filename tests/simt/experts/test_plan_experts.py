"""experts/plan_experts.h: which form moe_lowrank_add takes, by sizes alone."""

import pytest
from devices import has_simt

if not has_simt():
    pytest.skip("the SIMT executor is not built, run `make simt`", allow_module_level=True)
from kernel_calls import _simt

OWN = {"drops": True, "shared_dropout": False}
SHARED = {"drops": True}

# (experts, rank, k): grouped?
FORMS = [
    ((8, 2, 2), {}, False),
    ((8, 2, 2), SHARED, False),
    ((8, 2, 2), OWN, True),  # two masks in place of eight
    ((2, 16, 2), OWN, False),  # every expert is chosen
    ((4, 16, 4), {}, False),
    ((8, 16, 2), {}, False),
    ((16, 32, 2), {}, True),
    ((16, 32, 2), OWN, True),
    ((64, 64, 8), {}, True),
    ((64, 8, 8), {}, False),  # a read of x for each choice costs more than all columns
    ((8, 16, 2), {"element_bytes": 4}, True),  # without tensor cores
    ((1, 4, 1), {}, False),
]


@pytest.mark.parametrize(("sizes", "options", "grouped"), FORMS, ids=str)
def test_form(sizes, options, grouped):
    assert _simt.host.plan_experts(*sizes, **options)[0] == grouped


@pytest.mark.parametrize("options", [{}, SHARED, OWN, {"element_bytes": 4}], ids=str)
def test_larger_experts_stay_grouped(options):
    """Beyond some rank the grouped form is taken, and at no larger one the dense form."""
    forms = [_simt.host.plan_experts(8, rank, 2, **options)[0] for rank in range(1, 300)]
    assert forms[-1] and forms == sorted(forms)


def test_dout_is_read_once_where_all_ranks_are_few():
    assert _simt.host.plan_experts(8, 2, 2, **OWN) == (True, True)
    assert _simt.host.plan_experts(16, 32, 2, **OWN) == (True, False)


def test_a_plan_can_be_fixed_for_tests():
    """And does not outlive its test: conftest resets the settings."""
    _simt.host.fix_expert_plan(grouped=True)
    _simt.host.reset()
    assert _simt.host.plan_experts(8, 2, 2) == (False, True)
