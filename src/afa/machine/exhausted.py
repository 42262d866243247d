"""Memory that runs out in the middle of work: one line that says what would fit."""

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
#: oneDNN, which computes convolutions on the CPU, has no other words for it, nor only this meaning
_UNSURE = re.compile(r"could not (create|execute) a (primitive|memory object)")
_SAYS = (
    "annot allocate memory",
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC",
)


@contextmanager
def saying_what_fits(what: str, remedy: Callable[[], str]) -> Iterator[None]:
    """Turn whatever torch says of memory that is not there into one line.

    Args:
        what: was being done, with its size: "A step with batch_size 8".
        remedy: says what to do; asked only then.

    Raises:
        AfaError: memory ran out.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_exhausted(error):
            raise
        detail = when_asked(error)
        raise AfaError(
            "AFA-MEMORY-004", f"{what} must fit into memory, which ran out{detail}. {remedy()}"
        ) from error


def when_asked(error: BaseException) -> str:
    """For a message after "ran out": how much was asked for, where the library says it."""
    unsure = _UNSURE.search(str(error))
    if unsure:
        return f", if '{unsure[0]}' means what it most often does"
    asked = _ASKED.search(str(error))
    return f" when {asked[1]} more were asked for" if asked else ""


def ran_out(error: BaseException) -> BaseException | None:
    """The exception in a chain that says that there is no more memory; None where none does.

    Libraries that read files catch everything and raise something of their own.
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
    """Whether an exception is of this process's own device or memory.

    Devices compute on their own, so that it may surface where processes wait for each other.
    """
    return is_exhausted(error) or isinstance(error, torch.AcceleratorError)


def is_exhausted(error: BaseException) -> bool:
    """Whether an exception says that there is no more memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:  # of mmap
        return True
    said = str(error)
    is_said = any(words in said for words in _SAYS) or _UNSURE.search(said) is not None
    return isinstance(error, RuntimeError | SafetensorError) and is_said


def smaller_batch(
    size: int, key: str, accumulation: int | None, otherwise: str
) -> Callable[[], str]:
    """The remedy of a batch that was too large.

    Args:
        size: of the batch.
        key: what a recipe calls it.
        accumulation: batches of one step, which may become more instead; None where a batch is a
            step's own affair.
        otherwise: what helps besides, a sentence.
    """
    half = size // 2

    def remedy() -> str:
        if not half:
            return otherwise
        if accumulation is None:
            return f"Take {key}: {half}. {otherwise}"
        times = -(-size * accumulation // half)
        return (
            f"Take {key}: {half} with gradient_accumulation_steps: {times}, which learns the same. "
            f"{otherwise}"
        )

    return remedy
