"""Every option of LoRA beside PEFT's: a row for each, compared in all ways by lora_sides.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lora_sides import Case, check_start, check_values

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

_RANKS = {"layers.0.self_attn.q_proj": 2, "v_proj": 3}
_ALPHAS = {r".*\.1\..*proj": 5, "o_proj": 7}
_ONE_LAYER = r"model\.layers\.1\.self_attn\.[qvo]_proj"
# PEFT starts by an SVD in float32 and below; lr.peft_config refuses such a start.
_BY_SVD: Any = {"by_svd": True, "dtype": torch.float32, "ways": ("accelerated", "adapt")}


def row(ours: dict[str, Any], theirs: dict[str, Any] | None = None, **others: Any) -> Case:
    common = {"r": 4, "alpha": 6, "target_modules": ["q_proj", "v_proj", "o_proj"]}
    return Case({**common, **ours}, theirs or {}, **others)


CASES = {
    "plain": row({}),
    "rank 1": row({"r": 1}),
    "rank above the features": row({"r": 40}),
    "alpha none": row({"alpha": None}, {"lora_alpha": 4}),
    "alpha fractional": row({"alpha": 2.5}),
    "rslora": row({"rslora": True}),
    "rank_pattern": row({"rank_pattern": _RANKS}),
    "alpha_pattern": row({"alpha_pattern": _ALPHAS}),
    "patterns and rslora": row({"rank_pattern": _RANKS, "alpha_pattern": _ALPHAS, "rslora": True}),
    "targets: all-linear": row({"target_modules": "all-linear"}),
    "targets: a regular expression": row({"target_modules": _ONE_LAYER}),
    "targets: paths": row(
        {"target_modules": ["layers.1.self_attn.q_proj", "layers.0.mlp.up_proj"]}
    ),
    "exclude: names": row({"exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "exclude: a regular expression": row({"exclude_modules": r".*\.0\..*"}),
    "modules_to_save": row({"modules_to_save": ["lm_head", "embed_tokens"]}),
    "gaussian": row({"init": "gaussian"}),
    "pissa": row({"init": "pissa"}, **_BY_SVD),
    "pissa and rslora": row(
        {"init": "pissa", "rslora": True, "rank_pattern": {"v_proj": 3}}, **_BY_SVD
    ),
    "Conv1D": row({"target_modules": ["c_attn", "c_proj"]}, family="gpt2"),
    "Conv1D, all-linear": row({"target_modules": "all-linear"}, family="gpt2"),
    "float32": row({}, dtype=torch.float32),
    "bfloat16": row({}, dtype=torch.bfloat16),
    "float16": row({}, dtype=torch.float16),
    "adapters in bfloat16": row(
        {"adapter_dtype": "base"},
        dtype=torch.bfloat16,
        get={"autocast_adapter_dtype": False},
        ways=("accelerated", "adapt"),
    ),
}
by_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


@by_case
def test_start(case: Case, tmp_path: Path) -> None:
    check_start(case, tmp_path)


@by_case
def test_values_and_files(case: Case, tmp_path: Path) -> None:
    check_values(case, tmp_path)
