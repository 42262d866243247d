"""Summary of a data set before training: sizes, crops, captions and duplicates."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa.reading import counted
from afa.training.data.duplicates import Pair, alike
from afa.training.data.images import Joined, repeats_of, source_of, whole_of
from afa.training.data.scenes import SceneImages

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from afa.loading.truncation import TextLimit
    from afa.training.data.images import CaptionedImages
    from afa.training.transform import Transform

    Size = tuple[int, int]

#: captions that are tokenized for the longest, of those with the most characters
_TOKENIZED = 5000
_SHOWN = 3
_NOTHING = 0.005  # share that is shown as 0%
#: share of a picture that a crop may lose, and factor by which it may be enlarged, without warning
_MAX_LOST, _MAX_ENLARGED = 0.5, 2.0


@dataclass(frozen=True)
class Frame:
    """The part of a picture that a crop shows, in pixels of the picture.

    Attributes:
        box: left, top, right and bottom.
        scale: factor by which the picture is scaled.
        target: width and height of the training picture.
    """

    box: tuple[float, float, float, float]
    scale: float
    target: tuple[int, int]

    def lost(self, size: Size) -> float:
        """The fraction of a picture of this size that is not shown."""
        left, top, right, bottom = self.box
        return max(0.0, 1 - (right - left) * (bottom - top) / (size[0] * size[1]))


def frame_of(transform: Transform, size: Size, sample: int = 0, variant: int = 0) -> Frame:
    """Return the part of a picture that a variant of a sample shows.

    Args:
        transform: of the training.
        size: width and height of the picture.
        sample: its index.
        variant: index of the variant.
    """
    _, _, top, left, height, width = transform.sizes(size, sample, variant).tolist()
    scale = 1.0 if transform.scaled(size) == size else max(width / size[0], height / size[1])
    box = left / scale, top / scale, (left + width) / scale, (top + height) / scale
    inside = box[0], box[1], min(box[2], size[0]), min(box[3], size[1])
    return Frame(inside, scale, (int(width), int(height)))


@dataclass
class DataSummary:
    """What a data set has.

    Attributes:
        source: where it comes from.
        num_samples: number of samples; None if unknown.
        sizes: width and height by sample, of the pictures that were opened.
        frames: central part of each of these that a crop shows, by size.
        captions: of each sample; empty for missing ones.
        longest: tokens of the longest caption; None without a token limit.
        same: samples with the same file content as an earlier one; None if that is unknown.
        alike: samples that only look like an earlier one; None if that is unknown.
        repeats: number of samples by number of repeats.
        names: names of the samples that warnings mention.
    """

    source: str
    num_samples: int | None
    sizes: dict[int, Size]
    frames: dict[Size, Frame]
    captions: Mapping[int, tuple[str, ...]]
    longest: int | None = None
    same: list[Pair] | None = None
    alike: list[Pair] | None = None
    repeats: Counter[int] = field(default_factory=Counter)
    names: dict[int, str] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """Describe the data, one line per subject."""
        count = "" if self.num_samples is None else f"{self.num_samples} in "
        yield f"Pictures: {count}{self.source}"
        if self.sizes:
            yield self._sizes_line()
        if self.captions:
            yield self._captions_line()
        if len(self.repeats) > 1:
            shown = ", ".join(f"{n} pictures {k}x" for k, n in sorted(self.repeats.items())[:8])
            yield f"Repeats: {shown}"
        if self.same is not None:
            found = f"{counted(len(self.same), 'picture')} with the same file as another"
            if self.alike is not None:
                found += f", {len(self.alike)} more that look like another"
            else:
                found += "; afa check finds those that only look like another"
            yield f"Duplicates: {found}"

    def _sizes_line(self) -> str:
        sizes = sorted(self.sizes.values(), key=lambda size: (size[0] * size[1], size))
        middle = sizes[len(sizes) // 2]
        ratios = [width / height for width, height in sizes]
        opened = "" if len(sizes) == self.num_samples else f" ({len(sizes)} opened)"
        if sizes[0] == sizes[-1]:
            line = f"Sizes{opened}: all {_by(sizes[0])}"
        else:
            line = f"Sizes{opened}: {_by(sizes[0])} to {_by(sizes[-1])}, median {_by(middle)}; "
            line += f"width:height {min(ratios):.2f} to {max(ratios):.2f}"
        if not self.frames:
            return line
        targets = Counter(self.frames[size].target for size in sizes)
        lost = [self.frames[size].lost(size) for size in sizes]
        (target, _), *others = targets.most_common()
        line += f"; crops of {_by(target)}{f' and {len(others)} other sizes' if others else ''}"
        if max(lost) < _NOTHING:
            return f"{line} show all of a picture"
        return f"{line} cut off {statistics.fmean(lost):.0%} on average, {max(lost):.0%} at most"

    def _captions_line(self) -> str:
        texts = [text for each in self.captions.values() for text in each]
        different = len(set(texts))
        line = f"Captions: {len(texts)}, {different} different"
        if self.longest is not None:
            line += f", the longest of {counted(self.longest, 'token')}"
        several = sum(len(each) > 1 for each in self.captions.values())
        if several:
            most = max(len(each) for each in self.captions.values())
            line += f"; {counted(several, 'picture')} with several, up to {most}"
        empty = len(self._empty())
        missing = sum(not each for each in self.captions.values())
        line += f"; {empty} empty" if empty else ""
        return line + (f"; {missing} missing" if missing else "")

    def _empty(self) -> list[int]:
        """The samples whose captions are all empty."""
        return [n for n, each in self.captions.items() if each and not "".join(each).strip()]

    def warnings(self) -> Iterator[str]:
        """Problems that a training does not stop for, one line each."""
        empty, present = self._empty(), sum(bool(each) for each in self.captions.values())
        if empty and len(empty) < present:
            yield (
                f"Empty captions: {counted(len(empty), 'picture')} ({self._named(empty)}), which "
                "are trained on as without a prompt. Write captions, or remove the pictures."
            )
        yield from self._extremes()
        pairs = self._pairs()
        if pairs:
            shown = "; ".join(
                f"{self._name(pair.second)} like {self._name(pair.first)}"
                for pair in pairs[:_SHOWN]
            )
            more = "; ..." if len(pairs) > _SHOWN else ""
            yield (
                f"Duplicates, which count more than once: {counted(len(pairs), 'picture')} "
                f"({shown}{more}). Remove them, unless they are wanted."
            )

    def _extremes(self) -> Iterator[str]:
        """Warn of pictures that a crop cuts or enlarges strongly."""
        framed = {n: self.frames[size] for n, size in self.sizes.items() if size in self.frames}
        tiny = sorted(
            (n for n, frame in framed.items() if frame.scale > _MAX_ENLARGED),
            key=lambda n: -framed[n].scale,
        )
        if tiny:
            yield (
                f"Enlarged more than {_MAX_ENLARGED:g} times, and so blurred: "
                f"{counted(len(tiny), 'picture')} ({self._named(tiny, sized=True)}). Replace them, "
                "or lower data.resolution."
            )
        cut = sorted(
            (n for n, frame in framed.items() if frame.lost(self.sizes[n]) > _MAX_LOST + 1e-3),
            key=lambda n: -framed[n].lost(self.sizes[n]),
        )
        if cut:
            yield (
                f"More than half is cut off by the crop: {counted(len(cut), 'picture')} "
                f"({self._named(cut, sized=True)}). Their captions may name what it does not show. "
                "Set data.buckets: true, crop them yourself, or remove them; afa check --sheet "
                "shows the crops."
            )

    def _named(self, samples: Sequence[int], *, sized: bool = False) -> str:
        shown = ", ".join(
            self._name(n) + (f" {_by(self.sizes[n])}" if sized else "") for n in samples[:_SHOWN]
        )
        return f"{shown}, ..." if len(samples) > _SHOWN else shown

    def _name(self, sample: int) -> str:
        if sample not in self.names:
            return f"sample {sample}"
        return f"'{short_name(self.names[sample])}'"

    def _pairs(self) -> list[Pair]:
        return [*(self.same or ()), *(self.alike or ())]

    def mentioned(self) -> set[int]:
        """The samples that warnings may name."""
        framed = {n: self.frames[size] for n, size in self.sizes.items() if size in self.frames}
        lost = sorted(framed, key=lambda n: -framed[n].lost(self.sizes[n]))[:_SHOWN]
        tiny = sorted(framed, key=lambda n: -framed[n].scale)[:_SHOWN]
        pairs = [n for pair in self._pairs()[:_SHOWN] for n in pair]
        return {*lost, *tiny, *pairs, *self._empty()[:_SHOWN]}

    def as_json(self) -> dict[str, Any]:
        """Return all counts."""
        sizes = sorted(self.sizes.values(), key=lambda size: (size[0] * size[1], size))
        lost = [self.frames[size].lost(size) for size in sizes if size in self.frames]
        ratios = [width / height for width, height in sizes]
        texts = [text for each in self.captions.values() for text in each]
        return {
            "source": self.source,
            "pictures": self.num_samples,
            "sizes": {
                "opened": len(sizes),
                "smallest": sizes[0] if sizes else None,
                "median": sizes[len(sizes) // 2] if sizes else None,
                "largest": sizes[-1] if sizes else None,
                "ratios": [min(ratios), max(ratios)] if ratios else None,
            },
            "lost_by_crops": {"mean": statistics.fmean(lost), "max": max(lost)} if lost else None,
            "captions": {
                "number": len(texts),
                "different": len(set(texts)),
                "longest_tokens": self.longest,
                "pictures_with_several": sum(len(each) > 1 for each in self.captions.values()),
                "empty": len(self._empty()),
                "missing": sum(not each for each in self.captions.values()),
            },
            "repeats": {str(count): n for count, n in sorted(self.repeats.items())},
            "duplicates": {
                "same_file": None if self.same is None else len(self.same),
                "look_alike": None if self.alike is None else len(self.alike),
            },
        }


def summarise(
    data: CaptionedImages | None,
    source: Any,
    *,
    sizes: Mapping[int, Size],
    captions: Mapping[int, tuple[str, ...]],
    transform: Transform | None = None,
    limits: Sequence[TextLimit] = (),
    hashes: Sequence[tuple[bytes, bytes]] | None = None,
    looks: Mapping[int, str] | None = None,
) -> DataSummary:
    """Summarise a data set.

    Args:
        data: pictures and captions, for names and repeats; None for a stream.
        source: the data set or the stream.
        sizes: width and height by sample.
        captions: of each sample.
        transform: crops and flips; None counts no losses.
        limits: token limits of the text encoders.
        hashes: of each sample's file and captions; None finds no equal files.
        looks: see `look_of`; None if it is unknown.
    """
    frames = {}
    if transform is not None:
        frames = {size: frame_of(transform, size) for size in set(sizes.values())}
    same, first = _same(hashes, _generated(source))
    found: list[Pair] | None = None
    if looks is not None:
        # rows of one picture with different captions are no duplicates
        found = alike({n: look for n, look in looks.items() if hashes is None or n in first})
    summary = DataSummary(
        source_of(source),
        None if data is None else len(data),
        dict(sizes),
        frames,
        captions,
        _longest(captions, limits),
        same,
        found,
    )
    if data is not None:
        summary.repeats = Counter(repeats_of(data, n) for n in range(len(data)))
        summary.names = {n: data.name(n) for n in summary.mentioned() if n < len(data)}
    return summary


def _generated(data: Any) -> Collection[int]:
    """The generated samples, whose pictures differ even if their captions are the same."""
    found: set[int] = set()
    start = 0
    for part in data.parts if isinstance(data, Joined) else ():
        if isinstance(whole_of(part), SceneImages):
            found.update(range(start, start + len(part)))
        start += len(part)
    return found


def _same(
    hashes: Sequence[tuple[bytes, bytes]] | None, without: Collection[int]
) -> tuple[list[Pair] | None, set[int]]:
    """The samples with the file and captions of an earlier one, and the first of each file."""
    if hashes is None:
        return None, set()
    rows: dict[tuple[bytes, bytes], int] = {}
    pictures: dict[bytes, int] = {}
    found = []
    for n, row in enumerate(hashes):
        if n in without:
            continue
        pictures.setdefault(row[0], n)
        if row in rows:
            found.append(Pair(rows[row], n))
        else:
            rows[row] = n
    return found, set(pictures.values())


def _longest(captions: Mapping[int, tuple[str, ...]], limits: Sequence[TextLimit]) -> int | None:
    texts = {text for each in captions.values() for text in each}
    if not texts or not limits:
        return None
    longest = sorted(texts, key=lambda text: len(text.encode(errors="replace")))[-_TOKENIZED:]
    return max(max(limit.count(longest)) for limit in limits)


def short_name(name: str) -> str:
    """Return the name of a sample with at most one folder."""
    return str(Path(*Path(name).parts[-2:]))


def _by(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
