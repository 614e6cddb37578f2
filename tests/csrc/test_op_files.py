"""From Python to a kernel each hop of an op is a file of the op's name, on CPU and GPU alike."""

from pathlib import Path

import pytest
from devices import OP_NAMES

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"


@pytest.mark.parametrize("op", OP_NAMES)
def test_hops_of_an_op(op: str) -> None:
    assert (ROOT / "lowrank_ext" / "ops" / f"{op}.py").is_file()
    schemas, body = (CSRC / "library.cpp").read_text(), (CSRC / "ops" / f"{op}.h").read_text()
    [cuda] = (CSRC / "cuda").glob(f"*/{op}.cpp")
    backends = {"cpu": (CSRC / "cpu" / f"{op}.cpp").read_text(), "cuda": cuda.read_text()}
    for name in (op, f"{op}_backward"):
        assert f'"{name}(' in schemas
        assert f" {name}(" in body
        for backend, text in backends.items():
            assert f"unpacked<{name}<{name}_{backend}>>" in text, backend
