"""Add SECURITY.md to the site; code hosts expect it in the root of the repository."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

SOURCE = Path(__file__).parents[2] / "SECURITY.md"
PAGE = "security.md"


def on_files(files: Any, config: Any) -> Any:
    """Add the page to the site."""
    files.append(File.generated(config, PAGE, abs_src_path=str(SOURCE)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links to this page and on this page as links between pages of the site."""
    if page.file.src_uri == PAGE:
        return markdown.replace("](docs/", "](")
    return markdown.replace("](../SECURITY.md", f"]({PAGE}")
