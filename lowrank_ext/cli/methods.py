"""The names that ``--method`` takes: the recipes of all methods, and the baselines.

Each has an entry, which changes the base model, saves the result and loads it again.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lowrank_ext as lr
from lowrank_ext.adapt import lowrank_modules
from lowrank_ext.checkpoint.layout import whole
from lowrank_ext.checks import matches_names
from lowrank_ext.cli.chat_template import save_template
from lowrank_ext.cli.error_lines import warnings_as_lines
from lowrank_ext.cli.errors import UserError, as_user_error
from lowrank_ext.cli.files import new_directory
from lowrank_ext.cli.models import CausalLM, holds_quantized, resolve_adapter_dtype
from lowrank_ext.cli.processes import is_main_process
from lowrank_ext.cli.quantization import num_elements
from lowrank_ext.cli.settings import Settings, lora_recipe
from lowrank_ext.cli.whole_model import save_whole_model
from lowrank_ext.files import TensorFile, quoted
from lowrank_ext.recipe import Recipe, Training
from lowrank_ext.registry import recipes
from lowrank_ext.sharding import is_sharded


class Entry(ABC):
    """A method or baseline on the command line.

    Attributes:
        name: as users type it.
        saved_name: name of the directory with its result, or None if nothing is saved.
        training: its additions to the training loop.
        trains: whether it has parameters to train.
    """

    saved_name: str | None = "adapter"
    training = Training()
    trains = True

    def __init__(self, name: str) -> None:
        self.name = name

    def build(self, model: CausalLM, settings: Settings) -> CausalLM:
        """Adapts the base model in place for training. Raises UserError for targets that do not
        exist."""
        try:
            # RuntimeError: memory that is not there, which is how torch says it
            with as_user_error(f"cannot set up {self.name}", ValueError, TypeError, RuntimeError):
                return self._build(model, settings)
        except UserError as error:  # r is the library's name of --rank
            raise UserError(str(error).replace(": r must be ", ": --rank must be ")) from error

    def save(self, model: CausalLM, tokenizer: Any, directory: Path) -> Path | None:
        """Writes the result to `directory`/`saved_name`. Every process calls it, the first one
        writes."""
        if self.saved_name is None:
            return None
        path = directory / self.saved_name
        if is_main_process():
            with new_directory(path) as temporary:
                self._save(model, tokenizer, temporary)
                save_template(tokenizer, temporary)
        elif any(is_sharded(parameter) for parameter in model.parameters()):
            self._save(model, tokenizer, path)  # takes part in gathering, and writes nothing
        return path

    def load(self, model: CausalLM, settings: Settings, directory: Path) -> CausalLM:
        """Loads what `save` wrote into the base model, in place, ready to continue training."""
        if self.saved_name is None:
            return self.build(model, settings)
        path = directory / self.saved_name
        with as_user_error(f"cannot load {path}", Exception):  # libraries raise many kinds
            return self._load(model, settings, path)

    def begin_with(self, model: CausalLM, settings: Settings, path: Path) -> CausalLM:
        """Loads the adapter in a directory into the base model, in place, as the start of a run.
        Raises UserError for one of another dtype."""
        with warnings_as_lines(), as_user_error(f"--adapter {path}: cannot load it", Exception):
            model = self._load(model, settings, path)
        wanted = resolve_adapter_dtype(settings.adapter_dtype, base_dtype(model))
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" in name and parameter.dtype is not wanted:
                raise UserError(
                    f"--adapter {path} is in {parameter.dtype}: --adapter-dtype must be the same, "
                    f"got {settings.adapter_dtype}"
                )
        return model

    def changes_base(self, settings: Settings) -> bool:
        """Whether building or training changes tensors of the base model in place."""
        return False

    def reload(self, model: CausalLM, directory: Path) -> None:
        """Gives a model that `build` has made the values that `save` wrote to `directory`."""
        path = directory / str(self.saved_name)
        with as_user_error(f"cannot load {path}", Exception):
            self._reload(model, path)

    @abstractmethod
    def _build(self, model: CausalLM, settings: Settings) -> CausalLM: ...

    @abstractmethod
    def _save(self, model: CausalLM, tokenizer: Any, directory: Path) -> None: ...

    @abstractmethod
    def _load(self, model: CausalLM, settings: Settings, path: Path) -> CausalLM: ...

    def _reload(self, model: CausalLM, path: Path) -> None:
        raise NotImplementedError


class Frozen(Entry):
    """The base model with every weight frozen, with which all others are compared."""

    saved_name = None
    trains = False

    def _build(self, model: CausalLM, settings: Settings) -> CausalLM:
        return model.requires_grad_(False)

    def _save(self, model: CausalLM, tokenizer: Any, directory: Path) -> None:
        raise NotImplementedError

    def _load(self, model: CausalLM, settings: Settings, path: Path) -> CausalLM:
        raise NotImplementedError


class Full(Entry):
    """Every weight trains; the result is a whole model in transformers' format."""

    saved_name = "model"

    def changes_base(self, settings: Settings) -> bool:
        return True

    def _build(self, model: CausalLM, settings: Settings) -> CausalLM:
        return model.requires_grad_(True)

    def _save(self, model: CausalLM, tokenizer: Any, directory: Path) -> None:
        save_whole_model(model, tokenizer, directory)

    def _load(self, model: CausalLM, settings: Settings, path: Path) -> CausalLM:
        self._reload(model, path)
        return model.requires_grad_(True)

    def _reload(self, model: CausalLM, path: Path) -> None:
        with closing(TensorFile(path / "model.safetensors", "--resume")) as file:
            values = file.read()
        missing, unexpected = model.load_state_dict(values, strict=False)
        own = model.state_dict()
        present = {own[name].data_ptr() for name in values.keys() & own.keys()}
        # Of tied tensors the file holds one.
        if lacking := [name for name in missing if own[name].data_ptr() not in present]:
            raise ValueError(f"{file.path} must hold the whole model, got no {lacking[0]}")
        if unexpected:
            raise ValueError(f"{file.path} must be of this model, got {quoted(unexpected[0])}")


class PeftLoRA(Entry):
    """PEFT's LoRA, plain or accelerated by ``lr.accelerate``, with the options of ours."""

    def __init__(self, name: str, accelerated: bool) -> None:
        super().__init__(name)
        self.accelerated = accelerated
        self.recipe = lora_recipe()
        self.training = self.recipe.training

    def _build(self, model: CausalLM, settings: Settings) -> CausalLM:
        peft = _import_peft()
        _check_saved_modules(model, settings)
        fields, options = settings.config_fields(self.name), settings.options
        init = options["init"] or "kaiming"
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=settings.rank,
            lora_alpha=whole(lr.LoRAConfig(r=settings.rank, alpha=settings.alpha).default_alpha),
            lora_dropout=fields["dropout"],
            use_rslora=settings.rslora,
            target_modules=fields["target_modules"],
            exclude_modules=fields["exclude_modules"],
            layers_to_transform=fields["layers_to_transform"],
            modules_to_save=_paths_of(model, settings.modules_to_save) or None,
            init_lora_weights=True if init == "kaiming" else init,
            use_dora=options["dora"],
            bias=options["bias"],
            lora_bias=options["lora_bias"],
        )
        return self._finished(
            peft.get_peft_model(
                model, config, autocast_adapter_dtype=_peft_autocast(model, settings)
            ),
            settings,
        )

    def changes_base(self, settings: Settings) -> bool:
        return bool(settings.modules_to_save) or self.recipe.changes_base(settings)

    def _finished(self, model: CausalLM, settings: Settings) -> CausalLM:
        if not _peft_autocast(model, settings):
            # Over weights in 4 bits, which have no dtype, PEFT's adapters are in fp32 all the same.
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_" in name:
                    parameter.data = parameter.data.to(base_dtype(model))
        if self.accelerated:
            lr.accelerate(model)
        return model

    def _save(self, model: CausalLM, tokenizer: Any, directory: Path) -> None:
        # save_embedding_layers="auto" would ask the hub whether the vocabulary has changed.
        model.save_pretrained(str(directory), save_embedding_layers=False)

    def _load(self, model: CausalLM, settings: Settings, path: Path) -> CausalLM:
        peft = _import_peft()
        config = peft.PeftConfig.from_pretrained(str(path))
        config.lora_dropout = settings.dropout_of(self.name)
        return self._finished(
            peft.PeftModel.from_pretrained(
                model,
                str(path),
                is_trainable=True,
                config=config,
                autocast_adapter_dtype=_peft_autocast(model, settings),
            ),
            settings,
        )

    def _reload(self, model: CausalLM, path: Path) -> None:
        model.load_adapter(str(path), model.active_adapter, is_trainable=True)


class Adapted(Entry):
    """A recipe of one of the library's methods."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe.name)
        self.recipe = recipe
        self.training = recipe.training

    def _build(self, model: CausalLM, settings: Settings) -> CausalLM:
        _check_saved_modules(model, settings)
        dtype = resolve_adapter_dtype(settings.adapter_dtype, base_dtype(model))
        shared = {**settings.config_fields(self.name), "adapter_dtype": dtype}
        return lr.adapt(model, self.recipe.config(shared, settings))

    def _save(self, model: CausalLM, tokenizer: Any, directory: Path) -> None:
        lr.save_adapter(model, directory)

    def _load(self, model: CausalLM, settings: Settings, path: Path) -> CausalLM:
        lr.load_adapter(model, path, trainable=True)
        dropout = settings.dropout_of(self.name)
        for module in lowrank_modules(model, "load_adapter").values():
            module.dropout = dropout
        model.lowrank_config = dataclasses.replace(model.lowrank_config, dropout=dropout)
        return model

    def _reload(self, model: CausalLM, path: Path) -> None:
        lr.load_adapter(model, path, trainable=True)

    def changes_base(self, settings: Settings) -> bool:
        return bool(settings.modules_to_save) or self.recipe.changes_base(settings)


def entry(name: str) -> Entry:
    """The entry of the method ``name`` of valid settings."""
    return next(found for found in _entries() if found.name == name)


def _entries() -> list[Entry]:
    return [
        Frozen("frozen"),
        Full("full"),
        PeftLoRA("peft-lora", accelerated=False),
        PeftLoRA("peft-lora-accelerated", accelerated=True),
        *(Adapted(recipe) for recipe in recipes()),
    ]


def _paths_of(model: CausalLM, names: tuple[str, ...]) -> list[str]:
    """The modules of these names as `adapt` takes them: PEFT by itself takes `norm` for
    `input_layernorm` too, and leaves out a name that the model lacks."""
    found = [path for path, _ in model.named_modules() if matches_names(path, names)]
    for name in names:
        if not any(matches_names(path, [name]) for path in found):
            raise ValueError(f"modules_to_save must name modules of the model, got {name!r}")
    return found


def _check_saved_modules(model: CausalLM, settings: Settings) -> None:
    """Raises UserError for --modules-to-save of quantized modules, which would get no gradients."""
    for path in _paths_of(model, settings.modules_to_save):
        if holds_quantized(model.get_submodule(path)):
            raise UserError(
                f"--modules-to-save: {path} is quantized, and only dense modules train: embeddings,"
                " head and norms, or any without --quantize"
            )


def _peft_autocast(model: CausalLM, settings: Settings) -> bool:
    """Whether PEFT keeps adapters in fp32 (autocast_adapter_dtype), else the base's dtype."""
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
    """The parameters that train, each once, in the order of model.parameters()."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def count(parameters: Iterable[nn.Parameter]) -> int:
    """Number of elements, of a quantized weight those that it stands for."""
    return sum(num_elements(parameter) for parameter in parameters)
