"""Convert out-of-memory errors into one line that says what would fit."""

from __future__ import annotations

import errno
import re
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_ASKED = re.compile(r"ried to allocate (\d[\d.]* \w+)")
#: oneDNN's error for convolutions on the CPU, which is mostly but not only out of memory
_UNSURE = re.compile(r"could not (create|execute) a (primitive|memory object)")
_PHRASES = (
    "annot allocate memory",
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC",
)


@contextmanager
def saying_what_fits(what: str, remedy: Callable[[], str]) -> Iterator[None]:
    """Convert torch's out-of-memory errors into `AfaError`.

    Args:
        what: the work and its size, such as "A step with batch_size 8".
        remedy: returns a sentence; called only in case of an error.

    Raises:
        AfaError: if memory runs out.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_exhausted(error):
            raise
        detail = when_asked(error)
        raise AfaError(
            "AFA-MEMORY-004",
            f"{what} does not fit into memory: out of memory{detail}. {remedy()}",
        ) from error


def when_asked(error: BaseException) -> str:
    """Return the requested size, if the library reports it, to follow "out of memory"."""
    unsure = _UNSURE.search(str(error))
    if unsure:
        return f" (the usual reason for '{unsure[0]}')"
    asked = _ASKED.search(str(error))
    return f" when allocating {asked[1]} more" if asked else ""


def ran_out(error: BaseException) -> BaseException | None:
    """Return the out-of-memory error in a chain of exceptions; None without one.

    Libraries that read files catch everything and raise their own exceptions.
    """
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        if is_exhausted(current):
            return current
        seen.add(id(current))
        current = current.__cause__ or current.__context__
    return None


def is_of_device(error: BaseException) -> bool:
    """Whether an exception comes from this process's own device or memory.

    Devices are asynchronous, so it may be raised while processes wait for each other.
    """
    return is_exhausted(error) or isinstance(error, torch.AcceleratorError)


def is_exhausted(error: BaseException) -> bool:
    """Whether an exception is an out-of-memory error."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:  # of mmap
        return True
    text = str(error)
    is_memory = any(words in text for words in _PHRASES) or _UNSURE.search(text) is not None
    return isinstance(error, RuntimeError | SafetensorError) and is_memory


def smaller_batch(
    size: int, key: str, accumulation: int | None, otherwise: str
) -> Callable[[], str]:
    """Return a function that names a smaller batch and what else can be done.

    Args:
        size: of the batch.
        key: its name in the recipe.
        accumulation: gradient accumulation steps, which can be increased instead; None if they do
            not apply.
        otherwise: a further remedy, a sentence.
    """
    half = size // 2

    def remedy() -> str:
        if not half:
            return otherwise
        if accumulation is None:
            return f"Set {key}: {half}. {otherwise}"
        times = -(-size * accumulation // half)
        return (
            f"Set {key}: {half} and gradient_accumulation_steps: {times}, which is equivalent. "
            f"{otherwise}"
        )

    return remedy
