"""Kinds of PEFT's LoRA beyond the plain one: which are read, as what, and which are refused."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lowrank_ext.files import quoted

WITH_PEFT = "load it by peft.PeftModel.from_pretrained(model, path)"


class Kind(NamedTuple):
    """Options of PEFT's LoRA whose files are refused: why, and what to do."""

    fields: tuple[str, ...]
    because: str
    way_out: str


BASE_CHANGES = Kind(
    ("kasa_config", "init_lora_weights"),  # the latter with other values than INITS
    "it may change base weights in a way that the file does not hold",
    "save from PEFT with path_initial_model_for_weight_conversion, where it has that for the "
    "option, else the model of merge_and_unload",
)
REFUSED = (
    BASE_CHANGES,
    Kind(
        ("alora_invocation_tokens", "arrow_config"),
        "its branch depends on the tokens of the input, or on other adapters",
        f"{WITH_PEFT}; lr.GOATConfig and lr.AdapterBank choose adapters by the input",
    ),
    Kind(
        ("layer_replication",),
        "its model has layers several times, which this one lacks",
        f"{WITH_PEFT}, or load into a model with these layers, without the field",
    ),
    Kind(
        ("use_qalora", "use_bdlora"),
        "its factors are blocks, or of groups of inputs, and no [r, K] and [N, r]",
        f"{WITH_PEFT}, or merge there",
    ),
    Kind(
        ("ensure_weight_tying",),
        "the adapters of tied modules are one, and are two here",
        f"set the field to false if no module of the file is tied to another, else {WITH_PEFT}",
    ),
)
# Options that are off at inference, and the part of a key of what they save beside the LoRA.
OF_TRAINING = {
    "velora_config": ".lora_velora_embed",
    "monteclora_config": ".lora_monteclora_sampler.",
}
# Inits of PEFT whose file is a LoRA over the unchanged base, with "pissa" over the residual, which
# is computed again; and the init of a config that loads it.
INITS = {
    True: "kaiming",
    False: "kaiming",
    None: "kaiming",
    "gaussian": "gaussian",
    "orthogonal": "kaiming",
    "eva": "kaiming",
    "mica": "kaiming",
    "pissa": "pissa",
}
FIELDS = {*OF_TRAINING, *(name for kind in REFUSED for name in kind.fields)}


def is_used(value: object) -> bool:
    """Whether a field's value is more than an option that is off."""
    return value is not None and value is not False and value not in ([], {}, "none")


def check_kind(fields: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for a file of a kind that no module here computes."""
    init = fields.get("init_lora_weights", True)
    for kind in REFUSED:
        for name in kind.fields:
            known = name == "init_lora_weights" and isinstance(init, bool | str | None)
            if is_used(fields.get(name)) and not (known and init in INITS):
                raise ValueError(
                    f"{where}: {name}={quoted(fields[name])} is not supported, {kind.because}; "
                    f"{kind.way_out}"
                )


def training_options(fields: Mapping[str, Any]) -> list[str]:
    """What the file says of the training alone: without it the LoRA trains on as a plain one."""
    used = [name for name in OF_TRAINING if is_used(fields.get(name))]
    mica = fields.get("init_lora_weights") == "mica"
    return [*used, "init_lora_weights='mica'"] if mica else used


def is_of_training(key: str, fields: Mapping[str, Any]) -> bool:
    """Whether a tensor of the file belongs to such an option, and to no adapter."""
    return any(part in key and is_used(fields.get(name)) for name, part in OF_TRAINING.items())
