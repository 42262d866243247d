"""Classify errors while reading files: a damaged file, out of memory, or a bug in afa.

Errors that a library raises are reported as a damaged file, out-of-memory errors as such. An error
raised by a line of afa itself is a bug, and its traceback is shown.
"""

from __future__ import annotations

import json
import pickle
import re
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from afa.errors import NO_MODEL, AfaError

if TYPE_CHECKING:
    from collections.abc import Iterator

_PACKAGE = Path(__file__).parents[1]
_ASKED = re.compile(r"GLOBAL ([\w.]+)")


class Unreadable(Exception):
    """An error about a file's content raised by afa's own readers; the text is a clause."""


# always about the file: compiled readers have no frame in a traceback
_OF_FILES = (OSError, EOFError, SafetensorError, pickle.UnpicklingError, Unreadable)


@contextmanager
def loading(requirement: str, remedy: str, *also: type[Exception]) -> Iterator[None]:
    """Convert library errors about damaged weights into `AfaError`.

    Args:
        requirement: a clause with the file: "'a.safetensors' must be a complete model".
        remedy: a sentence.
        also: further exceptions that a library raises about damaged files.

    Raises:
        AfaError: if a library cannot read the file, or memory runs out. Other `AfaError`s and bugs
            of afa (see `is_own_bug`) pass unchanged.
    """
    try:
        yield
    except AfaError:
        raise
    except NO_MODEL + _OF_FILES + (MemoryError,) + also as error:
        from afa.machine.exhausted import ran_out, when_asked  # imports torch

        shortage = ran_out(error)
        if shortage is not None:
            subject = requirement.partition(" must ")[0]
            raise AfaError(
                "AFA-MACHINE-001",
                f"{subject} does not fit into memory: out of memory{when_asked(shortage)}. Close "
                "other programs, load models in bfloat16, or pass --memory-budget (Python: "
                "memory_budget).",
            ) from error
        if is_own_bug(error, *also):
            raise
        raise AfaError(
            "AFA-MACHINE-002", f"{requirement}; loading failed with {said_by(error)}. {remedy}"
        ) from error


def metadata_json(opened: Any, key: str) -> Any:
    """Parse the JSON in a safetensors file's metadata.

    Args:
        opened: by `safetensors.safe_open`.

    Raises:
        Unreadable: if the key is missing, or its value is not JSON.
    """
    metadata = opened.metadata() or {}
    if key not in metadata:
        raise Unreadable(f"its metadata has no '{key}'")
    try:
        return json.loads(metadata[key])
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"its metadata '{key}' is not JSON ({str(error)[:100]})") from None


def is_own_bug(error: BaseException, *also: type[Exception]) -> bool:
    """Whether an exception was raised by a line of afa itself, and is not about a file.

    An exception of a compiled function is attributed to the line that called it.

    Args:
        also: further types that are always about a file.
    """
    if isinstance(error, (AfaError, *_OF_FILES, *also)):
        return False
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and Path(frames[-1].f_code.co_filename).is_relative_to(_PACKAGE)


def said_by(error: Exception) -> str:
    """Return a library's error on one line, without torch's advice to run a pickle's code."""
    if isinstance(error, pickle.UnpicklingError):
        asked = _ASKED.search(str(error))
        return f"it requests {asked[1]}" if asked else "it is another file or requests more"
    if isinstance(error, Unreadable):
        return str(error)
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
