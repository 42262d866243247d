"""Captions in text files beside pictures, as kohya's trainers, SimpleTuner and others have them."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING

from afa.errors import AfaError
from afa.reading import counted, is_picture_file
from afa.training.data.rows import CaptionOptions, Row, Rows, kept, some

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from afa.training.data.places import Place

#: suffixes of caption files
_CAPTIONS = (".txt", ".caption")
_MAX_CAPTION = 1_000_000  # bytes
_FOLDER = re.compile(r"(\d+)_(.+)")  # kohya's "10_fox" repeats its pictures ten times per epoch


def rows_beside(
    place: Place, folder: Path, files: Sequence[Path], options: CaptionOptions
) -> Rows | None:
    """The pictures among files of a folder, with captions in files of the same name.

    A caption is a line that is not blank. In the names of subfolders such as `10_fox`, kohya's
    trainers have a number of repeats, and a caption for pictures without one.

    Args:
        place: with the files.
        folder: to which the names of subfolders are relative.
        files: of the folder.
        options: how captions are read.

    Returns: None if no picture has a caption.

    Raises:
        AfaError: if a picture has two different captions, or captions are not UTF-8.
    """
    captions: dict[tuple[Path, str], list[Path]] = {}
    for path in files:
        if path.suffix.lower() in _CAPTIONS:
            captions.setdefault((path.parent, path.stem), []).append(path)
    pictures = [path for path in files if is_picture_file(path)]
    pairs = [(path, captions.get((path.parent, path.stem))) for path in pictures]
    classes = {path: folder_caption(path, folder) for path in pictures}
    from_folders = options.from_folders and any(classes.values())
    if not any(found for _, found in pairs) and not from_folders:
        return None
    repeats = {path: _repeats(path, folder) for path in pictures}
    # training counts steps, not epochs, so only their ratios matter
    divisor = math.gcd(*repeats.values()) if options.repeats else 0
    rows: list[Row] = []
    longer: list[Path] = []
    for picture, found in pairs:
        lines = _lines_of(place, found) if found else []
        longer += found[:1] if found and len(lines) > 1 else []
        texts = kept(lines, options) if found else ()
        if found and not texts:
            texts = ("",)
        if not found and from_folders and (name := classes[picture]):
            texts = (name,)
        rows.append(Row(picture, texts, repeats[picture] // divisor if divisor else 1))
    used = set(pictures) | {path for _, found in pairs for path in found or ()}
    unused = [path for path in files if path not in used]
    warnings = _warnings(folder, longer, unused, options)
    if len(set(repeats.values())) > 1 and not options.repeats:
        kohya = (_kohya(path, folder) for path in pictures)
        named = dict.fromkeys(name[0] for name in kohya if name)
        warnings.append(
            f"The repeats of kohya's trainers in the names of subfolders ({', '.join(named)}) are "
            "ignored: all pictures are used equally often. To honour them, set data.repeats: true."
        )
    warnings += _of_other_levels(pictures, folder, options)
    missing = [row.path for row in rows if not row.captions and classes[row.path]]
    if missing and not options.from_folders:
        warnings.append(
            f"{counted(len(missing), 'picture')} without a caption file in folders of kohya's "
            f"trainers: {some(missing, folder)}. To use the folder's name as caption, such as "
            f"'{classes[missing[0]]}', set data.folder_captions: true."
        )
    remedy = "Replace it, write its caption into a .txt beside it, or remove it."
    return Rows(rows, unused, warnings, remedy, f"'{folder}', captions beside pictures")


def _lines_of(place: Place, found: Sequence[Path]) -> list[str]:
    """The captions of a picture, whose caption files must be equal."""
    lines = [_caption(place, path) for path in found]
    for path, other in zip(found[1:], lines[1:], strict=True):
        if other != lines[0]:
            raise AfaError(
                "AFA-TRAIN-015",
                f"'{found[0]}' and '{path}' are captions of the same picture and differ. "
                "Delete one of them.",
            )
    return lines[0]


def _caption(place: Place, path: Path) -> list[str]:
    """The lines of a caption file that are not blank."""
    try:
        text = place.text(path, _MAX_CAPTION)
    except (OSError, ValueError) as error:
        raise AfaError(
            "AFA-TRAIN-016", f"'{path}' cannot be read as UTF-8 text: {error}."
        ) from error
    return [line.strip() for line in text.split("\n") if line.strip()]


def _warnings(
    folder: Path, longer: list[Path], unused: list[Path], options: CaptionOptions
) -> list[str]:
    warnings = []
    if unused:
        warnings.append(
            f"{counted(len(unused), 'file')} in '{folder}' {'is' if len(unused) == 1 else 'are'} "
            f"neither a picture nor its caption, and not used: {some(unused, folder)}."
        )
    if longer and not options.several:
        warnings.append(
            f"{counted(len(longer), 'caption file')} with several lines: {some(longer, folder)}. "
            "Only the first line is used. Put each caption on one line; or, if each line is a "
            "caption of its own, set data.captions: random."
        )
    return warnings


def _of_other_levels(
    pictures: Sequence[Path], folder: Path, options: CaptionOptions
) -> Iterator[str]:
    """Yield a warning if folders such as `10_fox` are not the subfolders that could have them."""
    if any(_kohya(path, folder) for path in pictures):
        return
    parents = (
        parent for path in pictures for parent in path.parents if _FOLDER.fullmatch(parent.name)
    )
    below = next((each for each in parents if each.is_relative_to(folder.parent)), None)
    set_keys = [
        key
        for key, is_set in (
            ("data.repeats", options.repeats),
            ("data.folder_captions", options.from_folders),
        )
        if is_set
    ]
    if below is not None and (set_keys or below != folder):
        what = f"The numbers and names of folders such as '{below.name}' are not used"
        yield (
            f"{what}, because '{folder}' is not the folder that contains them. To use them, set "
            f"data.folder: '{below.parent}'."
        )
    elif set_keys:
        yield (
            f"{' and '.join(set_keys)} {'have' if len(set_keys) > 1 else 'has'} no effect: no "
            f"picture of '{folder}' is in a subfolder such as 10_fox."
        )


def _kohya(path: Path, folder: Path) -> re.Match[str] | None:
    """The name of the subfolder in which kohya's trainers look for a picture."""
    parts = path.relative_to(folder).parts
    return _FOLDER.fullmatch(parts[0]) if len(parts) > 1 else None


def _repeats(path: Path, folder: Path) -> int:
    """How often kohya's trainers use a picture per epoch; those of `0_name` are used once here."""
    found = _kohya(path, folder)
    return max(int(found[1]), 1) if found else 1


def folder_caption(path: Path, folder: Path) -> str:
    """The caption that kohya's trainers use for a picture without a caption file, or nothing."""
    found = _kohya(path, folder)
    return found[2].strip() if found else ""
