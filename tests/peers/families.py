"""A tiny model of each family of transformers that PEFT's users adapt, with a batch for it."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

VOCABULARY = 37
_SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    **_SPECIAL,
}
_ENCODER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "num_labels": 3,
}
_IMAGE: dict[str, Any] = {"image_size": 8, "patch_size": 4}

Batch = dict[str, Any]


def _ids(seed: int = 1, rows: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, 9), generator=generator)


def _floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def _causal_batch() -> Batch:
    return {"input_ids": _ids(), "labels": _ids()}


def _gpt2() -> nn.Module:
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **dropouts, **_SPECIAL))


def _mixtral() -> nn.Module:
    experts = {"num_local_experts": 3, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**_DECODER, **experts))


def _mamba() -> nn.Module:
    sizes = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 8}
    return MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, **sizes, **_SPECIAL))


def _bert() -> nn.Module:
    return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **_ENCODER))


def _vit() -> nn.Module:
    return ViTForImageClassification(ViTConfig(**_ENCODER, **_IMAGE))


def _t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    start = {"decoder_start_token_id": 0, "dropout_rate": 0.0, "pad_token_id": 0}
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes, **start))


def _whisper() -> nn.Module:
    layers = dict.fromkeys(("encoder_layers", "decoder_layers"), 2)
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    widths = dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 24)
    lengths = {"max_source_positions": 8, "max_target_positions": 16, "num_mel_bins": 5}
    sizes: dict[str, Any] = {"d_model": 16, "decoder_start_token_id": 1, "dropout": 0.0}
    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=VOCABULARY, **layers, **heads, **widths, **lengths, **sizes, **_SPECIAL
        )
    )


def _clip() -> nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "projection_dim": 12}
    text = {**sizes, "vocab_size": VOCABULARY, "max_position_embeddings": 16, **_SPECIAL}
    vision = {**sizes, **_IMAGE}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))


class Family(NamedTuple):
    """A model of one architecture.

    Attributes:
        make: the model.
        batch: what it is called with.
        task_type: PEFT's name of its task.
        output: the attribute of its output that tests compare.
        targets: target_modules. PEFT refuses some of Mamba's modules, and adds Mixtral's
            experts to "all-linear".
        exact: the widest dtype that it computes in.
        heads: modules_to_save, where PEFT knows the new head by no task_type.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    task_type: str | None
    output: str = "logits"
    targets: Any = "all-linear"
    heads: tuple[str, ...] = ()
    exact: torch.dtype = torch.float64


def _causal(model_class: Any, config_class: Any, **options: Any) -> Family:
    return Family(
        lambda: model_class(config_class(**_DECODER, **options)), _causal_batch, "CAUSAL_LM"
    )


FAMILIES = {
    "gpt2": Family(_gpt2, _causal_batch, "CAUSAL_LM"),
    "llama": _causal(LlamaForCausalLM, LlamaConfig),
    "qwen3": _causal(Qwen3ForCausalLM, Qwen3Config, head_dim=8),
    "gemma3": _causal(Gemma3ForCausalLM, Gemma3TextConfig, head_dim=8),
    "phi3": _causal(Phi3ForCausalLM, Phi3Config),
    "mixtral": Family(
        _mixtral,
        _causal_batch,
        "CAUSAL_LM",
        targets=["q_proj", "k_proj", "v_proj", "o_proj"],
        exact=torch.float32,
    ),
    "mamba": Family(_mamba, _causal_batch, "CAUSAL_LM", targets=["in_proj", "x_proj"]),
    "bert": Family(_bert, lambda: {"input_ids": _ids(), "labels": torch.tensor([0, 2])}, "SEQ_CLS"),
    "vit": Family(
        _vit,
        lambda: {"pixel_values": _floats(2, 3, 8, 8), "labels": torch.tensor([0, 2])},
        None,
        heads=("classifier",),
    ),
    "t5": Family(_t5, lambda: {"input_ids": _ids(), "labels": _ids(3)}, "SEQ_2_SEQ_LM"),
    "whisper": Family(
        _whisper, lambda: {"input_features": _floats(2, 5, 16), "labels": _ids(3)}, None
    ),
    "clip": Family(
        _clip,
        lambda: {
            "input_ids": _ids(),
            "pixel_values": _floats(2, 3, 8, 8),
            "return_loss": True,
        },
        None,
        output="logits_per_image",
    ),
}


@cache
def _made(name: str) -> nn.Module:
    state = torch.get_rng_state()
    torch.manual_seed(7)
    model = FAMILIES[name].make().requires_grad_(False).eval()
    torch.set_rng_state(state)
    return model


def base(name: str) -> Any:
    """A copy of the family's model, frozen, as that may change which product torch chooses."""
    return copy.deepcopy(_made(name))


@torch.no_grad()
def logits(model: nn.Module, name: str) -> Tensor:
    """Of the family's batch, in evaluation mode."""
    out: Tensor = getattr(model.eval()(**_batch(model, name)), FAMILIES[name].output)
    return out


def loss(model: nn.Module, name: str) -> Tensor:
    out: Tensor = model(**_batch(model, name)).loss
    return out


def _batch(model: nn.Module, name: str) -> Batch:
    """Images and sounds in the dtype of the model's first parameter."""
    dtype = next(model.parameters()).dtype

    def cast(value: Any) -> Any:
        return value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value

    return {key: cast(value) for key, value in FAMILIES[name].batch().items()}


def trained(model: Any, name: str, steps: int = 3) -> list[float]:
    """The losses of the steps of AdamW."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    history = []
    for _ in range(steps):
        value = loss(model, name)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(value.item())
    model.eval()
    return history
