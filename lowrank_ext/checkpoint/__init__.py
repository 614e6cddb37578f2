"""Adapter checkpoints: ``adapter_config.json`` and ``adapter_model.safetensors`` in a directory.

LoRA is written as PEFT writes it, and PEFT's LoRA files load here. The other methods use the same
two files with their own ``peft_type``, most with more tensors per module (``layout.py``, and
``files.py`` in the method's folder). Saving is atomic (``lowrank_ext.adapter_files``).
"""

from lowrank_ext.checkpoint.export import export_lora
from lowrank_ext.checkpoint.load import load_adapter
from lowrank_ext.checkpoint.lora_files import LoRATensors
from lowrank_ext.checkpoint.save import save_adapter

__all__ = ["LoRATensors", "export_lora", "load_adapter", "save_adapter"]
