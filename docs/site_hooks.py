"""What mkdocs does for this site beyond its configuration: included text, one menu, one check.

Nothing here and nothing in mkdocs.yml names a method: README and docs/methods/ do.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parents[1]
# Pages whose text is a file of the repository's root, where GitHub looks for it.
INCLUDED = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
TABLE_MARK = re.compile(r"<!-- The site shows the README's table of methods here .*-->")
LOADED_FROM_ELSEWHERE = re.compile(
    r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>"
)


def table_of_methods() -> str:
    """The README's."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| method |"))
    return "\n".join(lines[start : lines.index("", start)])


def on_config(config: Any) -> Any:
    """The menu of methods: the first column of the README's table."""
    pages = re.findall(r"^\| \[(.+?)\]\(docs/(methods/\w+\.md)\)", table_of_methods(), re.MULTILINE)
    for entry in config.nav:
        if entry.get("Methods") == "methods":
            entry["Methods"] = ["methods/index.md", *({title: path} for title, path in pages)]
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Included text, its links to docs/ made links between pages."""
    if source := INCLUDED.get(page.file.src_uri):
        return (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
    table = table_of_methods().replace("](docs/methods/", "](").replace("](docs/", "](../")
    return TABLE_MARK.sub(lambda _: table, markdown)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """A page that would load something from another host ends the build."""
    if found := LOADED_FROM_ELSEWHERE.search(output):
        raise PluginError(f"{page.file.src_uri} loads from another host: {found.group()}")
    return output
