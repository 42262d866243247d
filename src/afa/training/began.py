"""Compare the data of a resumed run with the data that it began with."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from afa.errors import AfaError
from afa.files import read_json
from afa.training.continuing import RECIPE, digest
from afa.training.earlier import is_earlier, require_same_pixels, require_whole_pictures
from afa.training.listing import Listing, difference

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from afa.reading import Tally
    from afa.training.data import CaptionedImages
    from afa.training.transform import Transform

_DATA = "the data"


class Began:
    """What a resumed run began with; empty for a new run.

    Args:
        folder: of the run.
        made_from: hashes in its newest checkpoint; None for a run without one.
        validates: whether pictures are held out.
        bind: compares further hashes with `made_from` and stores them; see `Trainer.bind`.

    Raises:
        AfaError: if the listing of the data is damaged.
    """

    def __init__(
        self,
        folder: Path,
        made_from: Mapping[str, str] | None,
        *,
        validates: bool,
        bind: Callable[[Mapping[str, str]], None] = lambda _: None,
    ) -> None:
        self._folder, self._made_from = folder, made_from
        self._validates, self._bind = validates, bind
        is_resumed, recipe = made_from is not None, folder / RECIPE
        #: the listing that a resumed run has stored, if any
        self.listing = Listing.read(folder) if is_resumed else None
        #: whether an earlier release read the pictures, so that all must be read and compared
        self.is_earlier = is_resumed and recipe.is_file() and is_earlier(read_json(recipe))

    def require_data(
        self, content: str, listing: Listing | None, names: CaptionedImages | None, tally: Tally
    ) -> list[str]:
        """Refuse to resume with different data.

        Args:
            content: a hash of all pictures and captions.
            listing: of the data, for the error; None if its settings determine it.
            names: the data set, for the names of samples; None for a stream.
            tally: conversions of all pictures; used only if `is_earlier`.

        Returns: notes for the user, one line each.

        Raises:
            AfaError: if the data differs, or an earlier release began the run and read the pictures
                or held out samples in a different way.
        """
        notes = []
        if self._made_from is not None:
            if self.is_earlier:
                require_same_pixels(self._folder, tally)
            if _DATA not in self._made_from:
                notes.append(require_whole_pictures(self._folder, validates=self._validates))
            elif self._made_from[_DATA] != content:
                raise AfaError(
                    "AFA-TRAIN-006",
                    f"The data differs from the data that the run in '{self._folder}' began with: "
                    f"{difference(self.listing, listing, names)}. Restore the data, or pass "
                    "another output folder.",
                )
        self._bind({_DATA: content})
        return notes

    def require_repeats(self, samples: Sequence[int]) -> None:
        """Refuse to resume with other repeats of the samples; see `repeated`.

        Raises:
            AfaError: see `Trainer.bind`.
        """
        self._bind({"the repeats of the pictures": digest(list(samples))})

    def require_split(self, validation: Sequence[int], transform: Transform) -> None:
        """Refuse to resume with other held-out samples or another transform.

        Raises:
            AfaError: see `Trainer.bind`.
        """
        self._bind(
            {
                "the held-out samples": digest(list(validation)),
                "the transform": digest(asdict(transform)),
            }
        )
