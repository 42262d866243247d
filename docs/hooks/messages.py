"""List every error of afa by its code, read from the source when the site is built."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "afa"
#: the nodes for ComfyUI
NODES = ROOT / "integrations" / "comfyui"
PLACE = "<!-- every message -->"
#: exceptions with messages for users: `AfaError` and its subclasses
ERRORS = ("AfaError", "Ambiguous", "BrokenPicture", "MissingCaption", "NotFinite")
#: the first argument of a `Finding` that is text; its code is the first argument
FINDING = 3
#: headings by package or part of one; the longest matching path is used
TITLES = {
    "app": "Browser app",
    "cli": "Command line",
    "drawing": "Pictures",
    "ensemble/caching": "Speed",
    "ensemble/placement": "Memory",
    "ensemble/steering": "Steering",
    "evaluation": "Comparing",
    "loading/memory": "Memory",
    "loading/quantization": "Memory",
    "machine/exhausted": "Memory",
    "merging": "Merging and fusing",
    "aggregators/fusion": "Merging and fusing",
    "metrics": "Metrics",
    "policy": "Recipes",
    "reading": "Pictures",
    "recipe": "Recipes",
    "statistics": "Comparing",
    "studies": "Comparing",
    "studies/zoo_build": "The zoo",
    "training": "Training",
    "zoo": "The zoo",
}


def messages() -> dict[str, dict[str, str]]:
    """Messages by code under each heading; values are in angle brackets."""
    found: dict[str, dict[str, str]] = {}
    for file in sorted([*SOURCE.rglob("*.py"), *NODES.rglob("*.py")]):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in ERRORS:
                parts = node.args[1:]
            elif name == "Finding":  # of the preflight checks
                parts = node.args[FINDING:]
            elif name == "say_error" and len(node.args) == 2:
                parts = node.args[:1]
            else:
                continue
            code = node.args[-1 if name == "say_error" else 0]
            if isinstance(code, ast.Constant):
                text = " ".join(" ".join(_text(part) for part in parts).split())
                found.setdefault(_title(file), {})[str(code.value)] = text
    return {title: dict(sorted(by_code.items())) for title, by_code in sorted(found.items())}


def _title(file: Path) -> str:
    """Return the heading for a source file."""
    if file.is_relative_to(NODES):
        return "In ComfyUI"
    parts = file.relative_to(SOURCE).with_suffix("").parts
    paths = ("/".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((TITLES[path] for path in paths if path in TITLES), "Experts and ensembles")


def _text(node: ast.expr) -> str:
    """Return a message as written in the source; empty if it is not a literal."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            _text(part) if isinstance(part, ast.Constant) else f"<{_name(part)}>"
            for part in node.values
        )
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return ""


def _name(part: Any) -> str:
    """Return the name of a formatted value in the source."""
    value = part.value
    while isinstance(value, ast.Call) and value.args:
        value = value.args[-1]
    for node in ast.walk(value):
        name = getattr(node, "attr", getattr(node, "id", None))
        if name:
            return str(name).strip("_").replace("_", " ")
    return "..."


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Insert the messages into the page that has the marker."""
    if PLACE not in markdown:
        return markdown
    lines = []
    for title, by_code in messages().items():
        lines += ["", f"## {title}", ""]
        lines += [
            f'- <a id="{code}"></a>**{code}**' + (f": `{text}`" if text else "")
            for code, text in by_code.items()
        ]
    return markdown.replace(PLACE, "\n".join(lines))
