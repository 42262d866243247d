"""Output of all commands: messages on the terminal and the output folder."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING

from rich.console import Console

from afa.cli.signals import surviving_hangup
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

#: prints file names and prompts literally: brackets and `:x:` in them are not markup
console = Console(markup=False, highlight=False, emoji=False)


def replace_unprintable() -> None:
    """Print `?` for characters that a terminal or log cannot encode, such as those of Windows."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="replace")


def say_error(message: str, code: str = "") -> None:
    """Print an error and its code on standard error, on one line."""
    label = f"error [{code}]" if code else "error"
    sys.stderr.write(f"afa: {label}: {printable(message)}\n")


def say(text: str) -> None:
    """Print text without wrapping it to the width of the terminal or log."""
    with surviving_hangup():
        console.print(text, soft_wrap=True)


def say_warnings(lines: Iterable[str]) -> None:
    """Print each warning on one line."""
    for line in lines:
        say(f"warning: {printable(line)}")


def printable(text: str) -> str:
    """Put text on one line without control characters, which untrusted names may contain."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def require_new_folder(folder: Path) -> None:
    """Require that an output folder is absent or empty.

    Raises:
        AfaError: if it is a file or a folder that is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AfaError(
            "AFA-CLI-006", f"The output folder '{folder}' exists. Pass a new folder as --output."
        )
