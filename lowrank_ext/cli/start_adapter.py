"""--adapter: a run that begins with a saved adapter, whose options are those of its file."""

from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from lowrank_ext import registry
from lowrank_ext.adapter_files import open_adapter_files
from lowrank_ext.checkpoint.peft_config import method_in, parsed_config
from lowrank_ext.cli.adapters import base_options, find_adapter
from lowrank_ext.cli.errors import UserError, as_user_error
from lowrank_ext.cli.settings import PEFT_METHODS, comma_separated
from lowrank_ext.config import AdapterConfig
from lowrank_ext.recipe import Recipe, parse_modules

# Fields of configs that options of another name set.
_FIELDS = {"rank": "r", "experts": "num_experts", "balance": "balance_coefficient"}
_SHARED = ("rank", "alpha", "rslora", "dropout")
# What a run may choose anew: it is no part of what the adapter computes.
_OF_TRAINING = ("dropout",)


def with_adapter(options: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """The options of a run with --adapter: those of the file, where it says something, and without
    --model and --quantize those of the base that it was trained over. Raises UserError where there
    is no adapter or base, its training cannot begin in its middle, or an option says something
    else.

    Args:
        options: by name.
        given: the names of those that the user gives.
    """
    what = f"--adapter {options['adapter']}"
    source = find_adapter(Path(options["adapter"]))
    if options["compare"] is not None:
        raise UserError(f"{what} is of one method; give --method, not --compare")
    with (
        as_user_error(what, OSError, ValueError, TypeError),
        open_adapter_files(source.directory, "--adapter") as files,
    ):
        method = method_in(files)
        files, _ = method.file_format.unpack(files, {})
        config, stored = parsed_config(files, method, {}), files.config
    recipe = _recipe_of(config, what)
    of_file = {**_options_of(config, recipe), **_names_in(stored)}
    names = (recipe.name, *(PEFT_METHODS if recipe.name == "lora" else ()))
    chosen = options["method"] or recipe.name
    if chosen not in names:
        raise UserError(f"{what}: --method must be {' or '.join(names)}, got {chosen}")
    for name in set(given) & of_file.keys() - set(_OF_TRAINING):
        if not _same(name, options[name], of_file[name]):
            raise UserError(
                f"{what}: --{name.replace('_', '-')} must be {_shown(of_file[name])}, which it "
                f"has, got {_shown(options[name])}; leave it out"
            )
    kept = {name for name in _OF_TRAINING if name in given}
    new = {name: value for name, value in of_file.items() if name not in kept}
    if "model" not in given:
        base = base_options(source)
        new |= {name: value for name, value in base.items() if name not in given}
    if source.run is not None and "quantize" not in given:
        new["quantize"] = source.run.quantize
    return {**options, **new, "method": chosen, "adapter": str(source.directory.resolve())}


def _recipe_of(config: AdapterConfig, what: str) -> Recipe:
    """The recipe that makes such a config, or the one nearest to it."""
    recipes = registry.METHODS[config.peft_type].recipes
    for recipe in recipes:
        if not recipe.training.can_be_extended:
            raise UserError(
                f"{what} is of {recipe.name}, whose parts begin or freeze at steps of a run: it "
                "cannot begin in its middle"
            )
    return min(recipes, key=lambda recipe: _differences(config, recipe))


def _differences(config: AdapterConfig, recipe: Recipe) -> int:
    options = {option.name: option.default for option in recipe.options}
    own = {**options, **_options_of(config, recipe)}
    made = recipe.config({"r": config.r}, SimpleNamespace(options=own, rank=config.r))
    names = {field.name for field in fields(config)} - {"target_modules", "adapter_dtype"}
    return sum(getattr(made, name) != getattr(config, name) for name in names)


def _options_of(config: AdapterConfig, recipe: Recipe) -> dict[str, Any]:
    """The options that set fields of the config, and their values."""
    known = {field.name for field in fields(config)}
    names = (*_SHARED, *(option.name for option in recipe.options))
    pairs = {name: _FIELDS.get(name, name) for name in names}
    return {name: getattr(config, own) for name, own in pairs.items() if own in known}


def _names_in(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The options that name modules and layers, from adapter_config.json."""
    layers = stored.get("layers_to_transform")
    numbers = [layers] if isinstance(layers, int) else layers
    return {
        "targets": _joined(stored.get("target_modules")) or "all-linear",
        "exclude": _joined(stored.get("exclude_modules")),
        "layers": None if numbers is None else ",".join(map(str, sorted(numbers))),
        "modules_to_save": tuple(stored.get("modules_to_save") or ()),
    }


def _joined(modules: Any) -> str | None:
    return modules if isinstance(modules, str | None) else ",".join(sorted(modules)) or None


def _same(name: str, given: Any, of_file: Any) -> bool:
    if name in ("targets", "exclude") and given is not None and of_file is not None:
        given, of_file = parse_modules(given), parse_modules(of_file)
        return given == of_file or (
            isinstance(given, list) and isinstance(of_file, list) and set(given) == set(of_file)
        )
    if name == "modules_to_save":
        return set(comma_separated(given)) == set(of_file)
    return bool(given == of_file)


def _shown(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)
