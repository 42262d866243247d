"""SECURITY.md as a page of the site: it lies in the repository's root, where hosts look for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

SOURCE = Path(__file__).parents[2] / "SECURITY.md"
PAGE = "security.md"


def on_files(files: Any, config: Any) -> Any:
    """Add the page."""
    files.append(File.generated(config, PAGE, abs_src_path=str(SOURCE)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Make links to it, and its own links, links between pages."""
    if page.file.src_uri == PAGE:
        return markdown.replace("](docs/", "](")
    return markdown.replace("](../SECURITY.md", f"]({PAGE}")
