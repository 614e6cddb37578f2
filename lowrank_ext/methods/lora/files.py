"""LoRA's files: PEFT's own, and PiSSA as a plain LoRA of twice the rank, which any PEFT reads.

With init="pissa" the file holds A = [A; A_init] and B = [B, -B_init] over the original base. The
tensor file's metadata lets ``LoRAFormat.unpack`` split it again.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lowrank_ext.adapter_files import AdapterFiles
from lowrank_ext.adapter_format import AdapterFormat, Adapters, StoredConfig, rounded
from lowrank_ext.checkpoint.layout import PREFIX, bad_key, whole
from lowrank_ext.checkpoint.peft_kinds import INITS
from lowrank_ext.checks import check_alpha, check_rank
from lowrank_ext.config import AdapterConfig, plain
from lowrank_ext.files import parse_json_object, quoted
from lowrank_ext.methods.lora.config import LoRAConfig
from lowrank_ext.methods.lora.module import LoRALinear
from lowrank_ext.nn.low_rank_linear import LowRankLinear
from lowrank_ext.sharding import gathered

LORA_A_INIT, LORA_B_INIT = "lora_A_init.weight", "lora_B_init.weight"
_PISSA_KEY = "lowrank_ext_pissa"  # metadata: r, lora_alpha and the patterns before doubling


class LoRAFormat(AdapterFormat):
    """PEFT's format; only in memory are PiSSA's initial factors separate tensors."""

    peft_fields = (
        *("bias", "lora_bias", "use_dora"),
        *("target_parameters", "trainable_token_indices"),
    )

    def __init__(self) -> None:
        super().__init__(
            {
                "lora_a_init": LORA_A_INIT,
                "lora_b_init": LORA_B_INIT,
                "lora_bias": "lora_B.bias",
                "magnitude": "lora_magnitude_vector",
            }
        )

    def tensors(self, module: LowRankLinear, config: AdapterConfig) -> dict[str, Tensor]:
        if config.init != "pissa":
            return super().tensors(module, config)
        lora_a, lora_b = _with_start(module)  # of one scaling: a file has no other
        doubled = self.stored(module, {"lora_a": lora_a, "lora_b": lora_b})
        return {**super().tensors(module, config), **doubled}

    def lora_factors(self, module: LowRankLinear) -> tuple[Tensor, Tensor]:
        if not module.residual_taken:
            return super().lora_factors(module)
        lora_a, lora_b = _with_start(module)
        if module.scaling == module.start_scaling:
            return lora_a, lora_b
        start = torch.ones(2 * module.r, dtype=torch.float64, device=lora_b.device)
        start[module.r :] = module.start_scaling / module.scaling
        return lora_a, rounded(lora_b.double() * start, lora_b)

    def fields(
        self, config: AdapterConfig, numbers: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, str]]:
        assert isinstance(config, LoRAConfig)
        own: dict[str, Any] = {
            "bias": config.bias,
            "lora_bias": config.lora_bias,
            "init_lora_weights": "gaussian" if config.init == "gaussian" else True,
            "use_dora": config.dora,
            "trainable_token_indices": plain(config.trainable_token_indices),
        }
        if config.init != "pissa":
            return own, {}
        metadata = {_PISSA_KEY: json.dumps(numbers, sort_keys=True)}
        return {**own, **_doubled(numbers, config.rslora)}, metadata

    def unpack(self, files: AdapterFiles, adapters: Adapters) -> tuple[AdapterFiles, Adapters]:
        numbers = _numbers_before_doubling(files)
        if numbers is None:
            return files, adapters
        config = {**files.config, **numbers, "init_lora_weights": "pissa"}
        halves = {name: self._split(files, name, tensors) for name, tensors in adapters.items()}
        return files._replace(config=config), halves

    def _split(
        self, files: AdapterFiles, name: str, tensors: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """[A; A_init] and [B, -B_init] of a module as four tensors."""
        found = {self.attribute_of(kind): (kind, tensor) for kind, tensor in tensors.items()}
        for attribute in ("lora_a", "lora_b"):
            if attribute not in found:
                raise bad_key(files, f"{PREFIX}{name}.{self.kind_of(attribute)}", "is missing")
        (kind_a, a), (kind_b, b) = found["lora_a"], found["lora_b"]
        if a.dim() < 2 or b.dim() < 2 or a.shape[0] % 2 or a.shape[0] != b.shape[1]:
            raise bad_key(
                files,
                f"{PREFIX}{name}.{kind_a}",
                f"must be [2r, K] beside lora_B [N, 2r], got {list(a.shape)} and {list(b.shape)}",
            )
        (a, a_init), (b, minus_b_init) = a.chunk(2), b.chunk(2, dim=1)
        rest = {kind: tensor for kind, tensor in tensors.items() if kind not in (kind_a, kind_b)}
        return {kind_a: a, kind_b: b, LORA_A_INIT: a_init, LORA_B_INIT: -minus_b_init, **rest}

    def start(self, module: LowRankLinear) -> None:
        assert isinstance(module, LoRALinear)
        module.reset_as_peft()

    def optional(
        self, config: AdapterConfig, shapes: Mapping[str, list[int]]
    ) -> dict[str, list[int]]:
        if config.init != "pissa":
            return {}
        projections = {self.attribute_of(kind): shape for kind, shape in shapes.items()}
        return {LORA_A_INIT: projections["lora_a"], LORA_B_INIT: projections["lora_b"]}

    def options(self, stored: StoredConfig) -> dict[str, Any]:
        init = stored.fields.get("init_lora_weights", True)
        used = {key: stored.fields[key] for key in self.peft_fields if stored.fields.get(key)}
        if "use_dora" in used:
            used["dora"] = used.pop("use_dora")
        return {**stored.shared, **used, "init": INITS[init]}


def _with_start(module: LowRankLinear) -> tuple[Tensor, Tensor]:
    """[A; A_init] and [B, -B_init] of a module with a residual base."""
    a, a_init = gathered(module.lora_a), gathered(module.get_buffer("lora_a_init"))
    b, b_init = gathered(module.lora_b), gathered(module.get_buffer("lora_b_init"))
    return torch.cat([a, a_init]), torch.cat([b, -b_init], dim=1)


def _doubled(numbers: Mapping[str, Any], rslora: bool) -> dict[str, Any]:
    """r, lora_alpha and patterns of a LoRA of twice the rank with the same scaling."""
    factor = math.sqrt(2) if rslora else 2
    return {
        "r": 2 * numbers["r"],
        "lora_alpha": whole(factor * numbers["lora_alpha"]),
        "rank_pattern": {key: 2 * rank for key, rank in numbers["rank_pattern"].items()},
        "alpha_pattern": {
            key: whole(factor * alpha) for key, alpha in numbers["alpha_pattern"].items()
        },
    }


def _numbers_before_doubling(files: AdapterFiles) -> dict[str, Any] | None:
    """r, lora_alpha and patterns of a PiSSA file that ``LoRAFormat`` wrote, else None.

    None also if the config was edited since: the file is then read as the plain LoRA it also is.
    """
    text = files.metadata.get(_PISSA_KEY)
    if text is None:
        return None
    where = f"{files.caller}: {files.weights_path}: metadata {_PISSA_KEY}"
    numbers = parse_json_object(text, where)
    _check_numbers(numbers, where)
    doubled = _doubled(numbers, bool(files.config.get("use_rslora")))
    return numbers if all(files.config.get(key) == v for key, v in doubled.items()) else None


def _check_numbers(numbers: Mapping[str, Any], where: str) -> None:
    if numbers.keys() != {"r", "lora_alpha", "rank_pattern", "alpha_pattern"}:
        raise ValueError(
            f"{where} must hold r, lora_alpha and both patterns, got {quoted(sorted(numbers))}"
        )
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(numbers[name], dict):
            raise ValueError(f"{where}: {name} must be an object, got {quoted(numbers[name])}")
    try:
        for rank in (numbers["r"], *numbers["rank_pattern"].values()):
            check_rank(rank, where, "r")
        for alpha in (numbers["lora_alpha"], *numbers["alpha_pattern"].values()):
            check_alpha(alpha, where, "lora_alpha")
    except TypeError as error:
        raise ValueError(str(error)) from None
