from lowrank_ext import reference
from lowrank_ext.ops._branch import draw_seed


def moe_lowrank_add(base_out, x, router_weight, lora_a, lora_b, *, top_k, scaling=1.0, dropout_p=0.0, shared_dropout=False, seed=None, token_mask=None):
    seed = draw_seed(dropout_p, seed, x.device)
    return reference.moe_lowrank_add(base_out, x, router_weight, lora_a, lora_b, top_k=top_k, scaling=scaling, dropout_p=dropout_p, shared_dropout=shared_dropout, seed=seed, token_mask=token_mask)
