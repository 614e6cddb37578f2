"""Loads _C.so, which registers torch.ops.lowrank_ext."""

from pathlib import Path

import torch


def load_library() -> None:
    """Load ``_C.so`` beside this file.

    Raises:
        ImportError: ``_C.so`` is missing or this torch cannot load it. The message names the torch
            it was built with, the torch imported, and the command that rebuilds it.
    """
    library = Path(__file__).with_name("_C.so")
    try:
        if not library.is_file():
            raise OSError(f"{library} does not exist")
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:
        reason = error.__cause__ or error  # torch puts the linker's own message there
        raise ImportError(
            f"lowrank_ext: _C.so, built with torch {_built_with()}, cannot be loaded by "
            f"torch {torch.__version__}: {reason}. Rebuild it in the source tree for this torch: "
            "`pip install --no-build-isolation --no-deps --force-reinstall .`, "
            "or `make build` where the install is editable",
            path=str(library),
        ) from None


def _built_with() -> str:
    try:
        from lowrank_ext._build_info import TORCH_VERSION
    except ImportError:
        return "(unknown, there is no _build_info.py)"
    return TORCH_VERSION
