"""Every option of LoRA beside PEFT's, made in all ways."""

from pathlib import Path

import pytest
from lora_cases import CASES
from lora_sides import Case, check_start, check_values

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
by_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


@by_case
def test_start(case: Case, tmp_path: Path) -> None:
    check_start(case, tmp_path)


@by_case
def test_values_and_files(case: Case, tmp_path: Path) -> None:
    check_values(case, tmp_path)
