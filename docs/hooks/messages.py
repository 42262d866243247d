"""Every message that afa can end with, read from its source while the site is built."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).parents[2] / "src" / "afa"
PLACE = "<!-- every message -->"
#: what is raised with a message for users: `AfaError`, and what is derived from it
ERRORS = ("AfaError", "Ambiguous", "BrokenPicture", "MissingCaption", "NotFinite")
#: from which argument on a `Finding` says something
FINDING = 2
#: what is done in a package, or in a part of one; the longest path counts
TITLES = {
    "app": "The page",
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


def messages() -> dict[str, list[str]]:
    """By what is done, the messages of `AfaError`s; what is filled in is in angle brackets."""
    found: dict[str, list[str]] = {}
    for file in sorted(SOURCE.rglob("*.py")):
        texts = []
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in ERRORS:
                text = _text(node.args[0])
            elif name == "Finding" and len(node.args) > FINDING:  # of a look before any work
                text = " ".join(_text(part) for part in node.args[FINDING:])
            else:
                continue
            if text:
                texts.append(" ".join(text.split()))
        known = found.setdefault(_title(file), [])
        known += [text for text in texts if text not in known]
    return dict(sorted(found.items()))


def _title(file: Path) -> str:
    """What is done where a file is."""
    parts = file.relative_to(SOURCE).with_suffix("").parts
    paths = ("/".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((TITLES[path] for path in paths if path in TITLES), "Experts and ensembles")


def _text(node: ast.expr) -> str:
    """A message as it is written; empty where it comes from somewhere else."""
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
    """What is filled in, as the code calls it."""
    value = part.value
    while isinstance(value, ast.Call) and value.args:
        value = value.args[-1]
    for node in ast.walk(value):
        name = getattr(node, "attr", getattr(node, "id", None))
        if name:
            return str(name).strip("_").replace("_", " ")
    return "..."


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the messages where a page asks for them."""
    if PLACE not in markdown:
        return markdown
    lines = []
    for title, texts in messages().items():
        lines += ["", f"## {title}", ""]
        lines += [f"- `{text}`" for text in texts]
    return markdown.replace(PLACE, "\n".join(lines))
