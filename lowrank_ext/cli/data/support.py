"""Whether a model keeps the documents of a row apart."""

import inspect
from typing import Any

import torch

_STATES = ("mamba", "linear_attention", "recurrent", "conv", "ssm")


def why_not_packed(model: Any) -> str | None:
    """Why the model cannot keep documents of one row apart by `position_ids`, or None: its forward
    takes none, some of its layers carry a state through the row, or a run shows that it does
    not."""
    reason = _why_not_by_config(model.config)
    if reason is None and not keeps_documents_apart(model):
        reason = f"{_name(model.config)} does not keep the documents of a row apart"
    return reason


def _name(config: Any) -> str:
    return str(getattr(config, "model_type", "the model"))


def _why_not_by_config(config: Any) -> str | None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    name = _name(config)
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
def keeps_documents_apart(model: Any) -> bool:
    """False when what a loaded model says of the second document of a row depends on the first, or
    is not what it says of that document alone: its attention is not transformers' own. Costs two
    forwards of 16 tokens and less, without draws from the random generator."""
    embedding = model.get_input_embeddings().weight
    device = embedding.device
    tokens = torch.arange(1, 17, device=device).remainder(embedding.shape[0]).view(2, 8)
    tokens[1, 4:] = tokens[0, 4:]
    positions = torch.arange(4, device=device).repeat(2, 2)
    was_training = model.training
    model.eval()
    try:
        found = model(input_ids=tokens, position_ids=positions, use_cache=False).logits[:, 4:]
        alone = model(input_ids=tokens[:1, 4:], use_cache=False).logits
    finally:
        model.train(was_training)
    first, second = found.float()
    largest = float(first.abs().max())
    # Rows of one batch may differ in their last bits, and batches of other shapes in more.
    depends = float((first - second).abs().max()) > 1e-2 * largest
    differs = float((first - alone[0].float()).abs().max()) > 5e-2 * largest
    return not (depends or differs)
