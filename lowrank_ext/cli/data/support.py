"""Whether a model keeps the documents of a row apart."""

import inspect
from typing import Any

import torch

from lowrank_ext.cli.errors import UserError

_STATES = ("mamba", "linear_attention", "recurrent", "conv", "ssm")


def why_not_packed(config: Any) -> str | None:
    """Why the model of this config cannot keep documents of one row apart by `position_ids`, or
    None: its forward takes none, or some of its layers carry a state through the row."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    name = getattr(config, "model_type", "the model")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None:
        return f"{name} is no model that transformers knows"
    if "position_ids" not in inspect.signature(model_class.forward).parameters:
        return f"{name} takes no position_ids"
    kinds = {str(kind) for kind in getattr(config, "layer_types", None) or ()}
    odd = sorted(kind for kind in kinds if any(state in kind for state in _STATES))
    if odd or getattr(model_class, "_is_stateful", False):
        return f"{name} has layers that carry a state from one document to the next"
    return None


@torch.no_grad()
def check_documents_stay_apart(model: Any) -> None:
    """Raises UserError when what a loaded model says of the second document of a row depends on the
    first: another attention than transformers' own, or layers that carry a state. Costs a forward
    of 16 tokens, without draws from the random generator."""
    device = model.get_input_embeddings().weight.device
    tokens = torch.ones(2, 8, dtype=torch.int64, device=device)
    tokens[1, :4] = 2
    positions = torch.arange(4, device=device).repeat(2, 2)
    was_training = model.training
    model.eval()
    try:
        found = model(input_ids=tokens, position_ids=positions, use_cache=False).logits[:, 4:]
    finally:
        model.train(was_training)
    first, second = found.float()
    # Rows of one batch may differ in their last bits.
    if not torch.allclose(first, second, rtol=1e-2, atol=1e-2 * float(first.abs().max())):
        raise UserError("this model does not keep the documents of a row apart; use --packing off")
