"""Errors of afa as ComfyUI shows them: with their code, and with what helps in ComfyUI."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Iterator

#: values that are not finite; afa's own remedies are options of its command line
_NOT_FINITE = ("AFA-ENSEMBLE-033", "AFA-ENSEMBLE-034")
_REMEDY = (
    "Start ComfyUI with another type of weights (--bf16-unet or --fp32-unet), or leave this expert "
    "out."
)


@contextmanager
def codes_shown() -> Iterator[None]:
    """Add the code to the message of an error; ComfyUI shows the message alone.

    Also a decorator of functions that ComfyUI calls.
    """
    try:
        yield
    except AfaError as error:
        text = str(error)
        if error.code in text:
            raise
        if error.code in _NOT_FINITE:
            text = f"{text.split('. ')[0]}. {_REMEDY}"
        raise AfaError(error.code, f"{text} ({error.code})") from error
