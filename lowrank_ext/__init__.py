"""Low-rank fine-tuning on fused torch ops: LoRA, LaMDA and their relatives."""

from lowrank_ext._load import load_library

load_library()

__version__ = "0.1.0"

__all__ = ["__version__"]
