"""Warnings about a data set before training; they do not stop a training."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from afa.loading.truncation import cuts_of
from afa.reading import BrokenSample, Conversion, Tally, conversions_of, counted
from afa.reading.broken import MissingCaption
from afa.training.data.duplicates import look_of
from afa.training.data.images import captions_in, sample_of, whole_of
from afa.training.data.summary import DataSummary, summarise

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from afa.loading.truncation import Cuts, TextLimit
    from afa.training.data.images import CaptionedImages, StreamedImages
    from afa.training.transform import Transform


@dataclass
class DataSurvey:
    """The result of reading every sample of a data set.

    Attributes:
        num_pictures: number of samples.
        num_without_caption: samples with a missing or an empty caption.
        num_smaller: pictures with a side shorter than the resolution.
        num_unused: files of the folder that are neither a sample nor its caption.
        cuts: captions that a text encoder truncates, one entry per encoder.
        broken: error messages of the samples that a training skips.
        tally: conversions.
        warnings: warnings for the user, one line each.
        details: sizes, crops, captions and duplicates.
    """

    num_pictures: int = 0
    num_without_caption: int = 0
    num_smaller: int = 0
    num_unused: int = 0
    cuts: list[Cuts] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    warnings: list[str] = field(default_factory=list)
    details: DataSummary | None = None

    @property
    def summary(self) -> str:
        """All counts on one line, without those that are 0.

        "24 pictures, 3 without caption, 5 captions longer than 77 tokens, 2 smaller than the
        resolution, 12 files not listed"
        """
        parts = [counted(self.num_pictures, "picture")]
        if self.broken:
            parts.append(f"{len(self.broken)} broken")
        if self.num_without_caption:
            parts.append(f"{self.num_without_caption} without caption")
        parts += [
            f"{counted(cut.num_cut, 'caption')} longer than {cut.limit.num_tokens} tokens"
            for cut in self.cuts
        ]
        if self.num_smaller:
            parts.append(f"{self.num_smaller} smaller than the resolution")
        if self.num_unused:
            parts.append(f"{counted(self.num_unused, 'file')} not listed")
        return ", ".join(parts)


def survey(
    data: CaptionedImages,
    limits: Sequence[TextLimit] = (),
    resolution: int | None = None,
    progress: Callable[[int, int], object] = lambda *_: None,
    *,
    transform: Transform | None = None,
    hashes: Sequence[tuple[bytes, bytes]] | None = None,
) -> DataSurvey:
    """Read every sample of a data set once, as a training does.

    Args:
        data: the data set, not a stream.
        limits: token limits of the text encoders; see `afa.loading.truncation`.
        resolution: side of the training pictures; None does not count small pictures.
        progress: called with the number of samples done and the total.
        transform: crops and flips, in place of the resolution; None counts no losses by crops.
        hashes: of each sample's file and captions; None finds no equal files.
    """
    found = DataSurvey(len(data), num_unused=len(getattr(whole_of(data), "unused", ())))
    captions: dict[int, tuple[str, ...]] = {}
    sizes: dict[int, tuple[int, int]] = {}
    looks: dict[int, str] = {}
    for index in range(len(data)):
        try:
            picture, texts = sample_of(data, index)
        except BrokenSample as error:
            found.broken.append(str(error))
            if isinstance(error, MissingCaption):
                captions[index] = ()
        else:
            captions[index] = texts
            sizes[index], looks[index] = picture.size, look_of(picture)
            is_small = resolution is not None and min(picture.size) < resolution
            if transform is not None:
                is_small = transform.enlarges(picture.size)
            enlarged = {Conversion.ENLARGED} if is_small else frozenset()
            found.tally.add(index, conversions_of(picture) | enlarged)
        progress(index + 1, len(data))
    found.num_without_caption = sum(not "".join(texts).strip() for texts in captions.values())
    found.num_smaller = found.tally.counts[Conversion.ENLARGED]
    flat = each_text(captions.values())
    found.cuts = cuts_of(limits, [caption for caption in flat if caption])
    found.details = summarise(
        data,
        data,
        sizes=sizes,
        captions=captions,
        transform=transform,
        limits=limits,
        hashes=hashes,
        looks=looks,
    )
    found.warnings = [
        *folder_warnings(data),
        *caption_warnings(flat, limits),
        *found.details.warnings(),
    ]
    line = found.tally.line()
    if line is not None:
        found.warnings.append(line)
    return found


def folder_warnings(data: CaptionedImages | StreamedImages) -> list[str]:
    """Warnings from opening a data set: unused files and captions."""
    return list(getattr(whole_of(data), "warnings", ()))


def caption_warnings(captions: Iterable[str | None], limits: Sequence[TextLimit]) -> list[str]:
    """Warnings about captions that are all empty, or too long for the text encoders."""
    present = [caption for caption in captions if caption is not None]
    if present and not any(caption.strip() for caption in present):
        return [
            f"All {len(present)} captions are empty, so the training cannot learn from prompts. "
            "Write captions, or set the column or file that has them."
        ]
    return [cut.line("caption", "captions") for cut in cuts_of(limits, present)]


def known_captions(
    data: CaptionedImages | StreamedImages, most: int | None = None
) -> list[tuple[str, ...]]:
    """The captions of the first samples; an empty list if that requires reading pictures."""
    return list(islice(captions_in(data) or (), most))


def each_text(captions: Iterable[tuple[str, ...]]) -> list[str | None]:
    """All captions of all samples; None for a missing one."""
    return [text for texts in captions for text in (texts or (None,))]
