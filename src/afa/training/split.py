"""Which pictures are held out for validation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from afa.errors import AfaError

if TYPE_CHECKING:
    from afa.training.listing import Listing


@dataclass(frozen=True)
class Split:
    """Samples to train on and samples to validate with; no picture has samples in both.

    Attributes:
        training: numbers of the samples that are trained on, ascending.
        validation: numbers of the samples whose loss is measured, in the order of validation.
        num_pictures: different pictures of the data.
        num_held_out: how many of them are held out.
        num_samples: of the data.
    """

    training: list[int]
    validation: list[int]
    num_pictures: int
    num_held_out: int
    num_samples: int

    @property
    def note(self) -> str:
        """What was held out, a line."""
        held = self.num_samples - len(self.training)
        line = (
            f"Held out for validation: {self.num_held_out} of {self.num_pictures} different "
            f"pictures, with all {held} of their captions ({self.num_samples} in all)."
        )
        if held > len(self.validation):
            line += f" The validation loss is of {len(self.validation)} of these."
        return line


def split_by_picture(listing: Listing, num_samples: int) -> Split:
    """Hold out whole pictures, those with the smallest hashes, until they have enough samples.

    Whether a picture is held out depends on its content, not on its name, its place in the list or
    the seed. A picture that is added to the data, or taken out, moves at most as many pictures from
    one side to the other as it takes the place of.

    Args:
        listing: of all samples.
        num_samples: for validation.

    Raises:
        AfaError: no picture would be left to train on.
    """
    samples_of: dict[bytes, list[int]] = {}
    for sample, picture in enumerate(listing.pictures):
        samples_of.setdefault(picture.tobytes(), []).append(sample)
    order = sorted(samples_of)
    held: list[int] = []
    count = 0
    while len(held) < num_samples and count < len(order):
        held += sorted(samples_of[order[count]], key=lambda n: listing.captions[n].tobytes())
        count += 1
    if count == len(order):
        most = len(listing) - len(samples_of[order[-1]])
        remedy = f"Set validation.num_samples to at most {most}" if most else "Add other pictures"
        raise AfaError(
            "AFA-TRAIN-047",
            f"validation.num_samples is {num_samples}, which holds out all {len(order)} different "
            f"pictures of the data ({len(listing)} samples): a picture is held out with all its "
            f"captions. At least one picture must be left to train on. {remedy}, or leave "
            "validation out.",
        )
    is_held = set(held)
    return Split(
        [sample for sample in range(len(listing)) if sample not in is_held],
        held[:num_samples],
        len(order),
        count,
        len(listing),
    )
