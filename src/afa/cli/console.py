"""What all commands share of the terminal: messages and the output folder."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from rich.console import Console

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

#: names of files and prompts are printed as they are: brackets in them are no markup
console = Console(markup=False, highlight=False)


def say_error(message: str, code: str = "") -> None:
    """Print one line on standard error, with the error's code."""
    label = f"error [{code}]" if code else "error"
    sys.stderr.write(f"afa: {label}: {printable(message)}\n")


def say(text: str) -> None:
    """Print lines as they are: neither a terminal's nor a log's width wraps them."""
    console.print(text, soft_wrap=True)


def say_warnings(lines: Iterable[str]) -> None:
    """What a user should know although the work goes on, each on one line."""
    for line in lines:
        say(f"warning: {printable(line)}")


def printable(text: str) -> str:
    """A text on one line in which nothing steers the terminal: names in files may be anything."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def require_new_folder(folder: Path) -> None:
    """Refuse an output folder that holds something.

    Raises:
        AfaError: it is a file, or not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AfaError(
            "AFA-CLI-006", f"The output folder must be new; '{folder}' exists. Name another one."
        )
