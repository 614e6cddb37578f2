"""--chat-template: how a conversation becomes a text, in place of the tokenizer's own way; it is
kept with what was trained."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowrank_ext.cli.errors import UserError, as_user_error, one_line
from lowrank_ext.cli.files import require_file, write_bytes
from lowrank_ext.files import read_bytes

FILE_NAME = "chat_template.jinja"  # transformers' name
_MAX_BYTES = 2**20


def check_template(name: str) -> None:
    """Raises UserError unless there is such a file."""
    require_file(f"--chat-template {name}", Path(name))


def use_template(tokenizer: Any, name: str) -> None:
    """Gives the tokenizer the template in a file. Raises UserError for one that is no template."""
    import jinja2

    tokenizer.chat_template = _read(Path(name), f"--chat-template {name}")
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    except jinja2.TemplateSyntaxError as error:
        raise UserError(
            f"--chat-template {name}: line {error.lineno}: {one_line(error)}"
        ) from error
    except Exception:  # it wants other messages: the data's may suit it, or it refuses those
        return


def save_template(tokenizer: Any, directory: Path) -> None:
    """Writes the tokenizer's template beside an adapter, where transformers too would look."""
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        write_bytes(directory / FILE_NAME, template.encode())


def use_templates_in(tokenizer: Any, directories: Sequence[Path]) -> None:
    """Gives the tokenizer the template that lies beside the adapters in these directories, if one
    does. Raises UserError where they have different ones."""
    paths = [directory / FILE_NAME for directory in directories]
    found = {path.parent: _read(path, str(path)) for path in paths if path.is_file()}
    if len(set(found.values())) > 1:
        named = ", ".join(str(directory) for directory in found)
        raise UserError(f"adapters must have one {FILE_NAME}, those of {named} differ")
    for template in found.values():
        tokenizer.chat_template = template


def _read(path: Path, what: str) -> str:
    with as_user_error(f"cannot read {what}", OSError, ValueError):
        return read_bytes(path, what, _MAX_BYTES).decode()
