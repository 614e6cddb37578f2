"""What mkdocs does for this site beyond its configuration: two included pages and one check."""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

# Pages whose text is a file of the repository's root, where GitHub looks for it.
INCLUDED = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
LOADED_FROM_ELSEWHERE = re.compile(
    r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>"
)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The included file, its links to docs/ made links between pages."""
    source = INCLUDED.get(page.file.src_uri)
    if source is None:
        return markdown
    root = Path(config.config_file_path).parent
    return (root / source).read_text(encoding="utf-8").replace("](docs/", "](")


def on_post_page(output: str, page: Any, config: Any) -> str:
    """A page that would load something from another host ends the build."""
    if found := LOADED_FROM_ELSEWHERE.search(output):
        raise PluginError(f"{page.file.src_uri} loads from another host: {found.group()}")
    return output
