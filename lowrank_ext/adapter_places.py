"""What a path that is given for an adapter's directory is instead, and what to do."""

import os
from pathlib import Path

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def check_holds_adapter(where: Path, caller: str) -> None:
    """Raise where ``where`` is no directory of an adapter, but something that users take for one.

    Raises:
        FileNotFoundError: there is nothing, as for the name of a repository on the Hub, or PEFT's
            old ``adapter_model.bin`` alone.
        NotADirectoryError: it is a file.
    """
    if os.path.isfile(where):
        inside = where.name in (_CONFIG, _WEIGHTS)
        way_out = f"pass {where.parent}" if inside else f"one with {_CONFIG} and {_WEIGHTS}"
        raise NotADirectoryError(
            f"{caller}: path must be the directory of an adapter, got the file {where}; {way_out}"
        )
    if not os.path.exists(where):
        named = not where.is_absolute() and len(where.parts) == 2 and where.parts[0] != ".."
        from_hub = f"; from the Hugging Face Hub: huggingface_hub.snapshot_download('{where}')"
        raise FileNotFoundError(f"{caller}: {where} does not exist{from_hub if named else ''}")
    old = where / "adapter_model.bin"
    if os.path.isfile(old) and not os.path.lexists(where / _WEIGHTS):
        raise FileNotFoundError(
            f"{caller}: {where / _WEIGHTS} does not exist, and {old.name} is a pickle, which can "
            "run code and is not read; load it by peft.PeftModel.from_pretrained(model, path) and "
            "save it again by save_pretrained(path)"
        )


def check_can_hold_adapter(where: Path, caller: str) -> None:
    """Raise NotADirectoryError where ``where``, or a directory above it, is a file."""
    for path in (where, *where.parents):
        if os.path.isdir(path):
            return
        if os.path.lexists(path):
            raise NotADirectoryError(f"{caller}: path must be a directory, got the file {path}")
