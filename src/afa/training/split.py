"""The split of a data set into training and validation samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from afa.errors import AfaError

if TYPE_CHECKING:
    from afa.training.listing import Listing


@dataclass(frozen=True)
class Split:
    """Training and validation samples; no picture has samples in both.

    Attributes:
        training: indices of the training samples, ascending.
        validation: indices of the validation samples, in the order of validation.
        num_pictures: number of distinct pictures in the data.
        num_held_out: number of distinct pictures that are held out.
        num_samples: number of samples in the data.
    """

    training: list[int]
    validation: list[int]
    num_pictures: int
    num_held_out: int
    num_samples: int

    @property
    def note(self) -> str:
        """A line for the user about the held-out pictures."""
        held = self.num_samples - len(self.training)
        line = (
            f"Held out for validation: {self.num_held_out} of {self.num_pictures} different "
            f"pictures, with all {held} of their captions ({self.num_samples} in all)."
        )
        if held > len(self.validation):
            line += f" The validation loss uses {len(self.validation)} of these."
        return line


def split_by_picture(listing: Listing, num_samples: int) -> Split:
    """Hold out pictures with all their captions, those with the smallest hashes first.

    The split depends on the pictures' content, not on names, order or seed. Adding or removing a
    picture changes the side of few others: only as many as are needed to keep the number of
    validation samples.

    Args:
        listing: listing of all samples.
        num_samples: minimum number of held-out samples, and number of validation samples.

    Raises:
        AfaError: if no picture is left for training.
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
            f"validation.num_samples {num_samples} holds out all {len(order)} different pictures "
            f"of the data ({len(listing)} samples), because a picture is held out with all its "
            f"captions. At least one picture must remain for training. {remedy}, or remove "
            "validation.",
        )
    is_held = set(held)
    return Split(
        [sample for sample in range(len(listing)) if sample not in is_held],
        held[:num_samples],
        len(order),
        count,
        len(listing),
    )
