"""Getter that torch.compile calls without tracing it; imported while tracing only, because its
decorator imports torch._dynamo."""

import torch


@torch.compiler.assume_constant_result
def fp32_precision() -> str:
    """torch.backends.cuda.matmul.fp32_precision, a constant of the graph.

    Dynamo cannot trace the getter. It guards the setting itself, so that a change recompiles.
    """
    return torch.backends.cuda.matmul.fp32_precision
