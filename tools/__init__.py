"""Commands for maintainers, run by `make`: pins, licences, advisories, the wheel."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from afa.errors import AfaError

ROOT = Path(__file__).parent.parent


def run(main: Callable[[], int | None]) -> None:
    """Run a command and exit with its code, or with one line and 2 after an `AfaError`."""
    try:
        sys.exit(main())
    except AfaError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)


def say(text: str) -> None:
    """Print a line."""
    sys.stdout.write(f"{text}\n")
