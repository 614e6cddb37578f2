"""Adapter checkpoints: ``adapter_config.json`` and ``adapter_model.safetensors`` in a directory.

LoRA is written as PEFT writes it, and PEFT's LoRA files load here. The other methods use the same
two files with a ``peft_type`` of their own, most with more tensors per module (``layout.py``; the
``files.py`` of a method). Saving is atomic (``adapter_files.py``).
"""

from lowrank_ext.checkpoint.load import load_adapter
from lowrank_ext.checkpoint.lora_files import LoRATensors
from lowrank_ext.checkpoint.save import save_adapter, save_as_lora

__all__ = ["LoRATensors", "load_adapter", "save_adapter", "save_as_lora"]
