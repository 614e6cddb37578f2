"""Messages for options that a config does not have, above all those of PEFT's LoraConfig."""

from collections.abc import Collection

from lowrank_ext.checks import did_you_mean

# PEFT's names of our options.
_RENAMED = {
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "init_lora_weights": "init",
    "use_dora": "dora",
}
_BY_PEFT = "leave it out, or use PEFT and lr.accelerate(peft_model)"
_FILE_ENTRY = "an entry of PEFT's files; leave it out"
# PEFT's options that have no counterpart, and what to do.
_ABSENT = {
    "task_type": "the model's class tells the task; leave it out",
    "peft_type": "the config's class is the method; leave it out",
    "inference_mode": "use lr.load_adapter(model, path, trainable=False)",
    "fan_in_fan_out": "found from each module; leave it out",
    "auto_mapping": _FILE_ENTRY,
    "base_model_name_or_path": _FILE_ENTRY,
    "peft_version": _FILE_ENTRY,
    "revision": _FILE_ENTRY,
    "runtime_config": _FILE_ENTRY,
    **dict.fromkeys(
        (
            "alora_invocation_tokens",
            "arrow_config",
            "corda_config",
            "ensure_weight_tying",
            "eva_config",
            "kasa_config",
            "layer_replication",
            "loftq_config",
            "lora_ga_config",
            "megatron_config",
            "megatron_core",
            "monteclora_config",
            "qalora_group_size",
            "target_parameters",
            "trainable_token_indices",
            "use_bdlora",
            "use_qalora",
            "velora_config",
        ),
        f"not supported; {_BY_PEFT}",
    ),
}


def check_options(options: Collection[str], known: Collection[str], owner: str) -> None:
    """Raise TypeError where an option is not among ``known``, with the name or the way to use."""
    for name in options:
        if name in known:
            continue
        if name in _RENAMED:
            raise TypeError(f"{owner}: {name} is called {_RENAMED[name]} here")
        if name in _ABSENT:
            raise TypeError(f"{owner}: {name} is no option here: {_ABSENT[name]}")
        raise TypeError(f"{owner}: {name!r} is no option{did_you_mean(name, known)}")
