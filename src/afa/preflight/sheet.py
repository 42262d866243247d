"""A contact sheet of training pictures: what crops show of them, and their captions."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from afa.errors import AfaError
from afa.files import write_png
from afa.reading import BrokenSample
from afa.training.data import StreamedImages, open_data
from afa.training.data.images import sample_of, source_of
from afa.training.data.summary import frame_of, short_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from afa.training.data import CaptionedImages
    from afa.training.data.summary import DataSummary, Frame
    from afa.training.recipe import Recipe
    from afa.training.transform import Transform

#: pictures on a sheet, and columns
_NUM_CELLS, _NUM_COLUMNS = 24, 6
#: of these, how many are the most cropped and the most enlarged ones
_NUM_EXTREMES = 6
#: side of a picture, gap between cells, size of the text and height of a line, in pixels
_SIDE, _GAP, _TEXT, _LINE = 240, 16, 13, 17
_NUM_LINES = 4  # of a caption
_PAPER, _INK, _GREY, _EDGE = (250, 250, 248), (20, 20, 20), (110, 110, 110), (190, 190, 190)
_FRAMES = (255, 70, 40), (255, 170, 60)  # of the first variant, and of others
_NOTHING = 0.005  # share that is not called cut off
_DARK = 0.35  # brightness of what no crop shows


class Cell(NamedTuple):
    """A picture on the sheet.

    Attributes:
        picture: the whole picture.
        frames: of its crops, one per variant.
        name: of the sample.
        captions: of the sample.
    """

    picture: Image.Image
    frames: list[Frame]
    name: str
    captions: tuple[str, ...]


def require_sheet(recipe: object, place: Path) -> None:
    """Check before any work that a sheet can be drawn and written.

    Raises:
        AfaError: if the recipe has no pictures that can be read now, or the file cannot be written.
    """
    from afa.training.recipe import Recipe

    said = None
    if not isinstance(recipe, Recipe):
        said = "this is no recipe of afa train"
    elif recipe.data.dataset is not None and recipe.data.dataset.streaming:
        said = "streamed pictures are only read during training"
    elif recipe.data.folder is None and recipe.data.dataset is None and recipe.data.scenes is None:
        said = "the pictures of prompts are drawn when the training starts"
    if said is not None:
        raise AfaError(
            "AFA-CLI-056",
            f"--sheet shows the pictures of a recipe of afa train, but {said}. It must have "
            "data.folder, data.dataset without streaming, or data.scenes. Remove --sheet.",
        )
    if place.suffix.lower() != ".png" or place.is_dir() or not place.absolute().parent.is_dir():
        raise AfaError(
            "AFA-CLI-057",
            f"--sheet '{place}' must be the path of a .png file in an existing folder. Pass, for "
            "example, --sheet sheet.png.",
        )


def write_sheet(
    recipe: Recipe, summary: DataSummary | None, transform: Transform, place: Path
) -> int:
    """Draw the sheet of a recipe's pictures and write it as PNG; returns the number of pictures.

    The most cropped and the most enlarged pictures come first, then others, evenly spaced.

    Args:
        recipe: of a training with pictures that are not streamed.
        summary: of the pictures, for the extremes; None without.
        transform: crops and flips of the training pictures.
        place: path of the file.

    Raises:
        AfaError: if the data cannot be opened.
    """
    data = open_data(recipe.data)
    assert data is not None, "it is required before"
    assert not isinstance(data, StreamedImages), "it is required before"
    cells = list(_cells(data, transform, _samples(len(data), summary)))
    count = f"{len(cells)} of {len(data)} pictures in {source_of(data)}"
    explained = (
        "Thick frame: what the first crop of a picture shows. Thin frames: its other crops. Dark: "
        "what no crop shows."
    )
    write_png(place, _drawn(cells, (count, explained)))
    return len(cells)


def _samples(count: int, summary: DataSummary | None) -> Iterator[int]:
    """Yield all samples, those first that are worth a look."""
    first: list[int] = []
    if summary is not None:
        framed = {
            n: summary.frames[size] for n, size in summary.sizes.items() if size in summary.frames
        }
        shares = {n: frame.lost(summary.sizes[n]) for n, frame in framed.items()}
        lost = {n: share for n, share in shares.items() if share > _NOTHING}
        first += sorted(lost, key=lambda n: (-lost[n], n))[:_NUM_EXTREMES]
        scale = {n: frame.scale for n, frame in framed.items() if frame.scale > 1}
        first += sorted(scale, key=lambda n: (-scale[n], n))[:_NUM_EXTREMES]
    spaced = [round(n * (count - 1) / max(_NUM_CELLS - 1, 1)) for n in range(_NUM_CELLS)]
    yield from dict.fromkeys([*first, *spaced, *range(min(count, 10 * _NUM_CELLS))])


def _cells(data: CaptionedImages, transform: Transform, samples: Iterator[int]) -> Iterator[Cell]:
    """Read the first samples that are not broken."""
    found = 0
    for sample in samples:
        if found == _NUM_CELLS or sample >= len(data):
            continue
        try:
            picture, captions = sample_of(data, sample)
        except BrokenSample:  # the check names them
            continue
        variants = range(transform.num_distinct(picture.size))
        frames = [frame_of(transform, picture.size, sample, n) for n in variants]
        found += 1
        yield Cell(picture, frames, data.name(sample), captions)


def _drawn(cells: Sequence[Cell], head: tuple[str, ...]) -> Image.Image:
    columns = min(_NUM_COLUMNS, max(len(cells), 3))
    rows = math.ceil(len(cells) / columns)
    height = _SIDE + (_NUM_LINES + 2) * _LINE + _GAP
    top = _GAP + len(head) * _LINE + _GAP
    sheet = Image.new(
        "RGB", (_GAP + columns * (_SIDE + _GAP), top + rows * (height + _GAP)), _PAPER
    )
    draw = ImageDraw.Draw(sheet)
    for number, line in enumerate(head):
        draw.text((_GAP, _GAP + number * _LINE), line, _INK, _font())
    for number, cell in enumerate(cells):
        left = _GAP + number % columns * (_SIDE + _GAP)
        _draw_cell(sheet, draw, cell, left, top + number // columns * (height + _GAP))
    return sheet


def _draw_cell(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, cell: Cell, left: int, top: int
) -> None:
    scale = _SIDE / max(cell.picture.size)
    width, height = (max(1, round(side * scale)) for side in cell.picture.size)
    small = cell.picture.resize((width, height), Image.Resampling.BOX)
    shown = ImageEnhance.Brightness(small).enhance(_DARK)
    boxes = [
        tuple(round(edge * scale) for edge in frame.box) for frame in dict.fromkeys(cell.frames)
    ]
    for x, y, right, bottom in boxes:
        box = x, y, max(right, x + 1), max(bottom, y + 1)
        shown.paste(small.crop(box), box)
    across, down = left + (_SIDE - width) // 2, top + (_SIDE - height) // 2
    sheet.paste(shown, (across, down))
    draw.rectangle((across - 1, down - 1, across + width, down + height), outline=_EDGE)
    for number, (x, y, right, bottom) in reversed(list(enumerate(boxes))):
        edges = across + x, down + y, across + max(right - 1, x), down + max(bottom - 1, y)
        is_thick = number == 0 and min(width, height) > 8
        draw.rectangle(edges, outline=_FRAMES[bool(number)], width=3 if is_thick else 1)
    frame = cell.frames[0]
    lines = [
        (_fitted(short_name(cell.name), keep_end=True), _INK),
        (_numbers(cell.picture.size, frame), _GREY),
        *((line, _INK) for line in _wrapped(_caption(cell.captions))),
    ]
    for number, (line, colour) in enumerate(lines):
        draw.text((left, top + _SIDE + 4 + number * _LINE), line, colour, _font())


def _numbers(size: tuple[int, int], frame: Frame) -> str:
    """The size of a picture, the factor by which it is scaled, and the part that is lost."""
    lost = frame.lost(size)
    parts = [f"{size[0]}x{size[1]}", f"scaled x{frame.scale:.2g}"]
    return " · ".join([*parts, f"{lost:.0%} cut off" if lost > _NOTHING else "whole"])


def _caption(captions: tuple[str, ...]) -> str:
    if not "".join(captions).strip():
        return "(empty caption)"
    more = f"[1 of {len(captions)}] " if len(captions) > 1 else ""
    return more + " ".join(captions[0].split())


@cache
def _font() -> ImageFont.FreeTypeFont:
    """The font of matplotlib, which has more letters than Pillow's."""
    import matplotlib

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(file, _TEXT)


def _fitted(text: str, *, keep_end: bool = False) -> str:
    """Shorten a text to one line of a cell."""
    text = text.encode(errors="replace").decode()
    if _font().getlength(text) <= _SIDE:
        return text
    while text and _font().getlength(f"{text}...") > _SIDE:
        text = text[1:] if keep_end else text[:-1]
    return f"...{text}" if keep_end else f"{text}..."


def _wrapped(text: str) -> list[str]:
    """Break a text into the lines of a cell; the last one is shortened."""
    text = text[:1000].encode(errors="replace").decode()
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".strip()
        if _font().getlength(longer) <= _SIDE or not lines[-1]:
            lines[-1] = longer
        elif len(lines) < _NUM_LINES:
            lines.append(word)
        else:
            lines[-1] += " " + word
    return [_fitted(line) for line in lines]
