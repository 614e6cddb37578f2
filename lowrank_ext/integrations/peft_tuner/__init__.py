"""The methods of this library as methods of PEFT: ``peft_config``, ``register_with_peft``.

PEFT then builds, trains, switches, saves and loads them as it does its own (``get_peft_model``,
``PeftModel``, transformers' Trainer, ``peft_config=`` of TRL):

    registration.py  the entries in PEFT's tables
    conversion.py    a config of this library as one of PEFT
    config.py        a PeftConfig for each method, whose fields are those of adapter_config.json
    tuner.py         a BaseTuner for each method: which modules, which keys
    layer.py         a linear module with the adapters of one method, by name
"""

from lowrank_ext.integrations.peft_tuner.conversion import peft_config
from lowrank_ext.integrations.peft_tuner.registration import register_with_peft

__all__ = ["peft_config", "register_with_peft"]
