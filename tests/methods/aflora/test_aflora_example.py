"""examples/aflora.py runs and shows what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lowrank_ext as lr

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

EXAMPLE = Path(__file__).parents[3] / "examples" / "aflora.py"


def test_it_runs(tmp_path: Path) -> None:
    package = Path(lr.__file__).parents[1]  # the one that the other tests test
    settings = {"OMP_NUM_THREADS": "1", "COLUMNS": "120", "PYTHONPATH": str(package)}
    environment = {**os.environ, **settings}
    command = [sys.executable, str(EXAMPLE), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "aflora.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["aflora.png"]
    rows = {line.split()[0]: line for line in done.stdout.splitlines() if " > " in line}
    counts = {
        name: [int(n.replace(",", "")) for n in re.findall(r"[\d,]+ > [\d,]+", row)[0].split(" > ")]
        for name, row in rows.items()
    }
    assert counts["LoRA"][0] == counts["LoRA"][1]
    assert counts["AFLoRA"][0] > counts["LoRA"][0] > 10 * counts["AFLoRA"][1]
    share = re.search(r"AFLoRA trains ([\d.]+) % of LoRA's parameters", done.stdout)
    assert share and 0 < float(share[1]) < 100
