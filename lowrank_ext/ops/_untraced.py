"""What torch.compile does not trace into. Imported by traced code only: the mark imports dynamo."""

import torch


@torch.compiler.assume_constant_result
def fp32_precision() -> str:
    """Torch's setting for fp32 products on a GPU, a constant of the graph.

    Dynamo cannot trace the getter. Dynamo guards the setting itself, so that a change recompiles.
    """
    return torch.backends.cuda.matmul.fp32_precision
