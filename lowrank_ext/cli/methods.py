"""One entry per method: how it changes the base model, and how its result is saved and loaded
again."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lowrank_ext as lr
from lowrank_ext.cli.errors import as_user_error
from lowrank_ext.cli.files import new_directory
from lowrank_ext.cli.models import CausalLM, resolve_adapter_dtype
from lowrank_ext.cli.settings import SHORTCUTS, WITH_EXPERTS, WITH_PEFT, Settings
from lowrank_ext.config import AdapterConfig

# A core holds singular values (about 10), a column of lora_b has norm 1 spread over its N entries
# (about 0.04 each). AdamW moves every entry by the same amount, so the core needs larger steps.
CORE_LR_FACTOR = 40.0

_REGEX_CHARACTERS = re.compile(r"[*+?()\[\]{}|\\^$]")


def parse_targets(targets: str) -> str | list[str]:
    """`all-linear`, a regular expression when a character says so, else comma-separated names."""
    if targets == "all-linear":
        return targets
    if not _REGEX_CHARACTERS.search(targets):
        return [name.strip() for name in targets.split(",") if name.strip()]
    with as_user_error(f"--targets {targets!r} is not a regular expression", re.error):
        re.compile(targets)
    return targets


def build(method: str, model: CausalLM, settings: Settings) -> CausalLM:
    """Turns the base model, in place, into what `method` trains. Raises UserError for targets that
    do not exist."""
    if method == "frozen":
        return model.requires_grad_(False)
    if method == "full":
        return model.requires_grad_(True)
    with as_user_error(f"cannot set up {method}", ValueError, TypeError):
        if method in WITH_PEFT:
            return _accelerated_if_asked(method, _build_peft(model, settings))
        return lr.adapt(model, adapter_config(method, settings, base_dtype(model)))


def adapter_config(method: str, settings: Settings, base: torch.dtype) -> AdapterConfig:
    """The library's configuration for every method but full and PEFT's."""
    shared: dict[str, Any] = {
        "r": settings.rank,
        "alpha": settings.alpha,
        "dropout": settings.dropout,
        "target_modules": parse_targets(settings.targets),
        "adapter_dtype": resolve_adapter_dtype(settings.adapter_dtype, base),
    }
    if method == "lora":
        return lr.LoRAConfig(**shared)
    if method == "aflora":
        return lr.AFLoRAConfig(**shared)
    if method == "set-and-sequence":
        return lr.BasisLoRAConfig(**shared)
    if method in WITH_EXPERTS:
        return lr.GOATConfig(
            **shared,
            init="goat" if method == "goat" else "zero",
            num_experts=settings.experts,
            top_k=settings.top_k,
            balance_coefficient=settings.balance,
        )
    if method in SHORTCUTS:
        return lr.ResLoRAConfig(**shared, shortcut=SHORTCUTS[method])
    return lr.LaMDAConfig(**shared, rank_budget="rank" if method == "lamda++" else None)


def _build_peft(model: CausalLM, settings: Settings) -> CausalLM:
    peft = _import_peft()
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.rank if settings.alpha is None else settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=parse_targets(settings.targets),
    )
    adapted: CausalLM = peft.get_peft_model(
        model, config, autocast_adapter_dtype=_peft_autocast(model, settings)
    )
    return adapted


def _accelerated_if_asked(method: str, model: CausalLM) -> CausalLM:
    if method == "peft-lora-accelerated":
        lr.accelerate(model)
    return model


def _peft_autocast(model: CausalLM, settings: Settings) -> bool:
    """PEFT keeps adapters in the base's dtype, or in fp32 when asked to autocast: the two that we
    allow too."""
    return resolve_adapter_dtype(settings.adapter_dtype, base_dtype(model)) is torch.float32


def _import_peft() -> Any:
    with as_user_error("PEFT's methods need `pip install peft`", ImportError):
        import peft
    return peft


def base_dtype(model: CausalLM) -> torch.dtype:
    """The dtype of the model's embedding."""
    dtype: torch.dtype = model.get_input_embeddings().weight.dtype
    return dtype


def trainable_parameters(model: CausalLM) -> list[nn.Parameter]:
    """In the order of model.parameters(), each once."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def parameter_groups(model: CausalLM, lr: float) -> list[tuple[list[nn.Parameter], float]]:
    """(parameters, learning rate) pairs: LaMDA's cores have their own, see CORE_LR_FACTOR."""
    cores = [module.core for module in lamda_modules(model)]
    core_ids = set(map(id, cores))
    others = [
        parameter for parameter in trainable_parameters(model) if id(parameter) not in core_ids
    ]
    return [(group, rate) for group, rate in ((others, lr), (cores, CORE_LR_FACTOR * lr)) if group]


def count(parameters: Iterable[nn.Parameter]) -> int:
    """Number of elements."""
    return sum(parameter.numel() for parameter in parameters)


def lamda_modules(model: CausalLM) -> list[lr.nn.LaMDALinear]:
    """What LaMDA's freezing schedule works on."""
    return [module for module in model.modules() if isinstance(module, lr.nn.LaMDALinear)]


def freeze_schedule(
    model: CausalLM, settings: Settings
) -> lr.FreezeSchedule | lr.AdaptiveFreezeSchedule | None:
    """What freezes parts of the model while it trains; None where nothing is to be frozen."""
    if lamda_modules(model):
        return lr.FreezeSchedule(model, settings.steps, eta=settings.freeze_eta)
    if any(isinstance(module, lr.nn.AFLoRALinear) for module in model.modules()):
        return lr.AdaptiveFreezeSchedule(
            model,
            settings.steps,
            eta=settings.freeze_eta,
            start=settings.freeze_start,
            decay=settings.freeze_decay,
            window=settings.score_window(),
        )
    return None


def stage(model: nn.Module) -> str | None:
    """ "set" or "sequence" for a model of set-and-sequence, None for others."""
    config = getattr(model, "lowrank_config", None)
    if not isinstance(config, lr.BasisLoRAConfig):
        return None
    return "sequence" if config.residuals else "set"


def has_experts(model: nn.Module) -> bool:
    """Whether a router chooses experts in the model."""
    return any(isinstance(module, lr.nn.GOATLinear) for module in model.modules())


def balance_loss(model: nn.Module) -> Tensor | None:
    """What the routers of the last forward add to the loss; None where there are none."""
    return lr.balance_loss(model) if has_experts(model) else None


def saved_name(method: str) -> str | None:
    """The directory that holds a method's result: an adapter, a whole model, or nothing."""
    return {"frozen": None, "full": "model"}.get(method, "adapter")


def save(method: str, model: CausalLM, tokenizer: Any, directory: Path) -> Path | None:
    """Writes the result as `directory`/adapter (PEFT's format) or `directory`/model (transformers'
    format)."""
    name = saved_name(method)
    if name is None:
        return None
    with new_directory(directory / name) as temporary:
        if method == "full":
            _save_full(model, tokenizer, temporary)
        elif method in WITH_PEFT:
            # save_embedding_layers="auto" would ask the hub whether the vocabulary has changed.
            model.save_pretrained(str(temporary), save_embedding_layers=False)
        else:
            lr.save_adapter(model, temporary)
    return directory / name


def _save_full(model: CausalLM, tokenizer: Any, directory: Path) -> None:
    # A model read from GGUF says so in its config; what is written here is plain safetensors.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def load(method: str, model: CausalLM, settings: Settings, directory: Path) -> CausalLM:
    """Turns the base model, in place, into what `save` wrote, ready to go on training."""
    name = saved_name(method)
    if name is None:
        return build(method, model, settings)
    path = directory / name
    with as_user_error(f"cannot load {path}", Exception):  # whatever the reading library raises
        if method in WITH_PEFT:
            return _accelerated_if_asked(method, _load_peft(model, settings, path))
        if method == "full":
            return _load_full(model, path)
        return lr.load_adapter(model, path, trainable=True)


def _load_peft(model: CausalLM, settings: Settings, path: Path) -> CausalLM:
    loaded: CausalLM = _import_peft().PeftModel.from_pretrained(
        model, str(path), is_trainable=True, autocast_adapter_dtype=_peft_autocast(model, settings)
    )
    return loaded


def _load_full(model: CausalLM, path: Path) -> CausalLM:
    from safetensors.torch import load_model

    load_model(model, path / "model.safetensors")
    return model.requires_grad_(True)
