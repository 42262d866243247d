"""Errors of libraries that read files: is it the file, the machine's memory, or a bug in afa?

Only what a library raises about a file is reported as a damaged file. An error that a line of afa
itself raised is a bug; its traceback is shown. Memory that ran out is reported as that.
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
    """What a reader of afa itself raises about a file's content, as the middle of a sentence."""


# about the file whoever raises them: compiled readers have no frame of their own in a traceback
_OF_FILES = (OSError, EOFError, SafetensorError, pickle.UnpicklingError, Unreadable)


@contextmanager
def loading(must: str, remedy: str, *also: type[Exception]) -> Iterator[None]:
    """Turn whatever a library says of damaged weights into one line.

    Args:
        must: names the weights and says what they must be: "'a.safetensors' must be complete".
        remedy: what to do then, a sentence.
        also: further exceptions that a library raises about damaged files.

    Raises:
        AfaError: "`must`, but loading says ... - `remedy`"; or memory ran out. One that was raised
            inside stays as it is, and so does a bug of afa, see `is_own_bug`.
    """
    try:
        yield
    except AfaError:
        raise
    except NO_MODEL + _OF_FILES + (MemoryError,) + also as error:
        from afa.machine.exhausted import ran_out, when_asked  # imports torch

        shortage = ran_out(error)
        if shortage is not None:
            subject = must.partition(" must ")[0]
            raise AfaError(
                "AFA-MACHINE-001",
                f"{subject} must fit into memory, which ran out{when_asked(shortage)}. Close other "
                "programs, load models in bfloat16, or keep experts elsewhere: --memory-budget "
                "(Python: memory_budget).",
            ) from error
        if is_own_bug(error, *also):
            raise
        raise AfaError(
            "AFA-MACHINE-002", f"{must}, but loading says {said_by(error)} - {remedy}"
        ) from error


def metadata_json(opened: Any, key: str) -> Any:
    """The JSON under a key of a safetensors file's metadata.

    Args:
        opened: by `safetensors.safe_open`.
        key: of the metadata.

    Raises:
        Unreadable: there is no such key, or it holds no JSON.
    """
    metadata = opened.metadata() or {}
    if key not in metadata:
        raise Unreadable(f"its metadata has no '{key}'")
    try:
        return json.loads(metadata[key])
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"its metadata '{key}' is not JSON ({str(error)[:100]})") from None


def is_own_bug(error: BaseException, *also: type[Exception]) -> bool:
    """Whether an exception was raised by a line of afa itself, and is no word about a file.

    What a compiled function raises counts as the line's that called it.

    Args:
        error: that was caught.
        also: further types that are always about a file.
    """
    if isinstance(error, (AfaError, *_OF_FILES, *also)):
        return False
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and Path(frames[-1].f_code.co_filename).is_relative_to(_PACKAGE)


def said_by(error: Exception) -> str:
    """What a library says of a file, on a line; not torch's advice to run a pickle's code."""
    if isinstance(error, pickle.UnpicklingError):
        asked = _ASKED.search(str(error))
        return f"it asks for {asked[1]}" if asked else "it is no such file or asks for more"
    if isinstance(error, Unreadable):
        return str(error)
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
