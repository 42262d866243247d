"""What `afa generate` is asked to draw: prompts, and the settings that may differ between them."""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from afa.errors import AfaError
from afa.recipe import MAX_SEED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from afa.drawing.parameters import Parameters

#: how other programs write a random seed
_RANDOM = ("random", "-1")


@dataclass(frozen=True)
class Wanted:
    """A prompt and its settings; None for a size is the experts' own, for a scheduler as well."""

    prompt: str
    negative_prompt: str
    seed: int
    steps: int
    guidance: float
    height: int | None
    width: int | None
    scheduler: str | None

    @property
    def pixels(self) -> int | None:
        """Height times width; None if one of them is the experts' own."""
        return self.height * self.width if self.height and self.width else None


def parse_seed(text: str, what: str = "--seed", *, room: int = 1, num_processes: int = 1) -> int:
    """Read a seed; `random` and -1 draw one.

    Args:
        text: of the option.
        what: its name, for errors.
        room: how many seeds follow each other.
        num_processes: how many processes share the pictures.

    Raises:
        AfaError: if it is neither a number in range nor random, or several processes would draw
            different ones.
    """
    if is_random(text) and num_processes > 1:
        raise AfaError(
            "AFA-CLI-039",
            f"{what} is random, but {num_processes} processes share the pictures and would draw "
            "different seeds. Pass a number.",
        )
    if is_random(text):
        return secrets.randbelow(MAX_SEED + 2 - room)
    if not re.fullmatch(r"\d{1,10}", text.strip()) or int(text) > MAX_SEED:
        raise AfaError(
            "AFA-CLI-032",
            f"{what} must be a number from 0 to {MAX_SEED}, or random; got '{text[:40]}'.",
        )
    return int(text)


def is_random(text: str) -> bool:
    """Whether a seed is to be drawn."""
    return text.strip().lower() in _RANDOM


def parse_size(text: str, what: str = "--size") -> tuple[int, int]:
    """Read a size such as 512x768, width before height.

    Returns: height and width.

    Raises:
        AfaError: if it has another form.
    """
    found = re.fullmatch(r"\s*(\d{1,5})\s*[xX×*]\s*(\d{1,5})\s*", text)
    if found is None:
        raise AfaError(
            "AFA-CLI-033",
            f"{what} must be WIDTHxHEIGHT in pixels, such as 512x768; got '{text[:40]}'.",
        )
    return int(found[2]), int(found[1])


def size_of_options(
    size: str | None, height: int | None, width: int | None
) -> tuple[int | None, int | None]:
    """Height and width of --size, or of --height and --width.

    Raises:
        AfaError: if there are both.
    """
    if size is None:
        return height, width
    if height is not None or width is not None:
        raise AfaError(
            "AFA-CLI-034", "--size excludes --height and --width. Remove the one or the others."
        )
    return parse_size(size)


def of_parameters(
    found: Parameters, wanted: Wanted, given: Sequence[str], scheduler: str | None
) -> Wanted:
    """What the text of another program's picture asks for.

    Args:
        found: the text.
        wanted: the options of the command.
        given: the names of the options that the user has passed, which replace the text's.
        scheduler: the canonical name of the text's sampler; None if it has none.
    """
    own = {name: value for name, value in found.given.items() if name not in given}
    if scheduler is not None and "scheduler" not in given:
        own["scheduler"] = scheduler
    if "size" in given:
        own = {name: value for name, value in own.items() if name not in ("height", "width")}
    return replace(wanted, prompt=found.prompt, **own)
