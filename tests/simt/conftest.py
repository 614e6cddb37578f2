"""What the executor's tests share beside tests/conftest.py."""

from collections.abc import Iterator
from types import ModuleType

import pytest


@pytest.fixture(autouse=True)
def default_options(simt: ModuleType) -> Iterator[None]:
    """What a test sets (schedule_seed, record) ends with it: the next one may count bytes."""
    yield
    simt.set_options()
