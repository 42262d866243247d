"""The split of a data set into training and validation samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from afa.errors import AfaError
from afa.reading import counted
from afa.training.data import Joined

if TYPE_CHECKING:
    from afa.training.data import CaptionedImages
    from afa.training.listing import Listing
    from afa.training.recipe import ValidationRecipe


@dataclass(frozen=True)
class Split:
    """Training and validation samples; no picture has samples in both.

    Attributes:
        training: indices of the training samples, ascending.
        validation: indices of the validation samples, in the order of validation.
        num_pictures: number of distinct pictures in the data.
        num_held_out: number of distinct pictures that are held out.
        num_samples: number of samples in the data.
        num_available: samples of the recipe's validation folder or data set; None without one.
    """

    training: list[int]
    validation: list[int]
    num_pictures: int
    num_held_out: int
    num_samples: int
    num_available: int | None = None

    @property
    def note(self) -> str:
        """A line for the user about the held-out pictures."""
        if self.num_available is not None:
            return (
                f"Validation uses {len(self.validation)} of {self.num_available} pictures that are "
                f"not trained on; the training uses {len(self.training)}."
            )
        held = self.num_samples - len(self.training)
        line = (
            f"Held out for validation: {self.num_held_out} of {self.num_pictures} different "
            f"pictures, with all {held} of their captions ({self.num_samples} in all)."
        )
        if held > len(self.validation):
            line += f" The validation loss uses {len(self.validation)} of these."
        return line


def split_for(asked: ValidationRecipe, listing: Listing, data: CaptionedImages | None) -> Split:
    """Return the split that a recipe asks for.

    Args:
        asked: the recipe's validation.
        listing: listing of all samples.
        data: all samples, the pictures that are only validated on last; None for a stream.

    Raises:
        AfaError: see `split_by_picture` and `split_of_own_data`.
    """
    if not asked.has_own_data:
        return split_by_picture(listing, asked.num_samples)
    assert isinstance(data, Joined), "they were joined to the training data"
    num_training = len(data) - len(data.parts[-1])
    return split_of_own_data(listing, num_training, asked.num_samples, data)


def split_of_own_data(
    listing: Listing, num_training: int, num_samples: int, names: CaptionedImages
) -> Split:
    """Validate on the samples after the training samples, those with the smallest hashes.

    Args:
        listing: listing of all samples.
        num_training: number of training samples, which are the first.
        num_samples: maximum number of validation samples.
        names: all samples.

    Raises:
        AfaError: if a file is a training picture and a validation picture.
    """
    of_training: dict[bytes, int] = {}
    for sample in range(num_training):
        of_training.setdefault(listing.pictures[sample].tobytes(), sample)
    rest = range(num_training, len(listing))
    both = [n for n in rest if listing.pictures[n].tobytes() in of_training]
    if both:
        same = of_training[listing.pictures[both[0]].tobytes()]
        raise AfaError(
            "AFA-TRAIN-071",
            f"{counted(len(both), 'validation picture')} of {len(rest)} "
            f"{'is' if len(both) == 1 else 'are'} also trained on: '{names.name(both[0])}' has the "
            f"content of '{names.name(same)}'. Validation pictures must be others. Remove them "
            "from one of the two, or remove validation.folder (or validation.dataset) to hold out "
            "pictures.",
        )

    def key(sample: int) -> bytes:
        return listing.pictures[sample].tobytes() + listing.captions[sample].tobytes()

    used = sorted(rest, key=key)[:num_samples]
    count = len({listing.pictures[n].tobytes() for n in used})
    return Split(
        list(range(num_training)), used, count, count, len(listing), num_available=len(rest)
    )


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
