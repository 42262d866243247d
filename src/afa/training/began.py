"""How a run began, and what its continuation is held against."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from afa.training.continuing import _DATA, digest, is_earlier_run, require_data_of_run
from afa.training.listing import Listing

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from afa.reading import Tally
    from afa.training.data import CaptionedImages
    from afa.training.trainer import Trainer
    from afa.training.transform import Transform


class Began:
    """What a run began with that continues now; of a new run, nothing.

    Args:
        trainer: that has read the newest checkpoint.
        folder: of the run.
        validates: whether pictures are held out.

    Raises:
        AfaError: the listing of the data is damaged.
    """

    def __init__(self, trainer: Trainer, folder: Path, *, validates: bool) -> None:
        self._trainer, self._folder, self._validates = trainer, folder, validates
        #: of the data, where the run continues and has kept one
        self.listing = Listing.read(folder) if trainer.first else None
        #: whether an earlier release read the pictures, so that all are read again and compared
        self.is_earlier = bool(trainer.first) and is_earlier_run(folder)

    def require_data(
        self, content: str, listing: Listing | None, names: CaptionedImages | None, tally: Tally
    ) -> list[str]:
        """Refuse to continue with other data; returns what a user should read.

        Args:
            content: a hash of all pictures and captions.
            listing: of the data, for the error; None where settings decide all of it.
            names: the data set, which names samples; None where it cannot.
            tally: what was converted while all pictures were read, where `is_earlier`.

        Raises:
            AfaError: see `require_data_of_run`.
        """
        began = self._trainer.began if self._trainer.first else None
        notes = require_data_of_run(
            self._folder,
            began,
            content,
            self.listing,
            listing,
            names,
            tally,
            validates=self._validates,
        )
        self._trainer.bind({_DATA: content})
        return notes

    def require_split(self, validation: Sequence[int], transform: Transform) -> None:
        """Refuse to continue with other held-out samples, or pictures that look otherwise.

        Raises:
            AfaError: see `Trainer.bind`.
        """
        self._trainer.bind(
            {
                "the held-out samples": digest(list(validation)),
                "the transform": digest(asdict(transform)),
            }
        )
