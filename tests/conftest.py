"""Fixtures shared by all tests: devices, dtypes, the seed and the thread count."""

import gc
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._dynamo
from devices import (
    DTYPE_PAIRS,
    DTYPES,
    OP_NAMES,
    SIMT,
    DtypePair,
    dtype_id,
    has_simt,
    simt_module,
    simt_ops,
)

import lowrank_ext  # noqa: F401 - registers the ops

pytest.register_assert_rewrite("lowrank_cases", "finetune_runs")


def device_params(marker: pytest.Mark | None) -> list[Any]:
    no_simt = pytest.mark.skipif(
        not has_simt(), reason="the SIMT executor is not built, run `make simt`"
    )
    on_simt = [pytest.param(SIMT, marks=no_simt)] if marker else []
    if marker and marker.kwargs.get("only"):
        return on_simt
    return ["cpu", *on_simt, *(["cuda"] if torch.cuda.is_available() else [])]


def pytest_report_header() -> list[str]:
    """Cases on a device that is not there are not made: skipping thousands of them takes time."""
    there = {"cpu": True, SIMT: has_simt(), "cuda": torch.cuda.is_available()}
    devices = ", ".join(name if is_there else f"no {name}" for name, is_there in there.items())
    kernels = torch.ops.lowrank_ext.cpu_features()
    return [f"devices: {devices}", f"CPU kernels: {kernels}"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "simt(every=1, only=False): run on the executor too (or only), of the test's cases "
        "every n-th one; an n that divides no parameter's number of values leaves out no value",
    )
    config.addinivalue_line(
        "markers", "long: takes many seconds; begins early, so that no worker ends alone with it"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        params = device_params(metafunc.definition.get_closest_marker("simt"))
        metafunc.parametrize("device", params, indirect=True, scope="session")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Iterator[None]:
    seen: Counter[str] = Counter()
    left_out = []
    for item in items:
        if runs_on_simt(item):
            test = item.nodeid.partition("[")[0]
            every = item.get_closest_marker("simt").kwargs.get("every", 1)
            if seen[test] % every:
                left_out.append(item)
            seen[test] += 1
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        gone = set(left_out)
        items[:] = [item for item in items if item not in gone]
    yield
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def pytest_collection_finish() -> None:
    """Thousands of tests are a million objects, which every collection of garbage would walk."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)


def runs_on_simt(item: pytest.Item) -> bool:
    callspec = getattr(item, "callspec", None)
    return callspec is not None and callspec.params.get("device") == SIMT


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Where the tensors are. Those of the executor are on the CPU."""
    return "cpu" if request.param == SIMT else request.param


@pytest.fixture
def kernels(request: pytest.FixtureRequest) -> str:
    """Whose kernels the test runs: "cpu", SIMT or "cuda"."""
    return request.node.callspec.params["device"]


@pytest.fixture(autouse=True)
def ops_on_simt(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a test on the executor torch.ops.lowrank_ext has the executor's ops."""
    if runs_on_simt(request.node):
        library = simt_ops()
        for name in OP_NAMES:
            for op in (name, f"{name}_backward"):
                monkeypatch.setattr(torch.ops.lowrank_ext, op, getattr(library, op))


@pytest.fixture(scope="session")
def simt() -> ModuleType:
    """The same, where a test cannot do without it."""
    if not has_simt():
        pytest.skip("the SIMT executor is not built, run `make simt`")
    return simt_module()


@pytest.fixture(autouse=True)
def simt_settings() -> Iterator[None]:
    """What a test sets ends with it: the next one may count bytes, or launches of a default GPU."""
    yield
    if "_simt" in sys.modules:
        simt_module().set_options()
        simt_module().host.reset()


@pytest.fixture(scope="session", params=DTYPES, ids=dtype_id)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="session", params=DTYPE_PAIRS, ids=dtype_id)
def dtypes(request: pytest.FixtureRequest) -> DtypePair:
    return request.param


@pytest.fixture
def one_rank_group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    if not torch.distributed.is_available() or torch.distributed.is_initialized():
        pytest.skip("needs torch.distributed with no group of its own yet")
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """Code that earlier tests compiled too often would not be compiled any more."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture(scope="session", autouse=True)
def shared_cores() -> None:
    """Parallel workers divide the cores between them instead of each taking all."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // workers))
