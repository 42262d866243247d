"""The pictures and captions of a folder, and its unused files."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from afa.errors import AfaError
from afa.files import irregular, is_unicode, read_text
from afa.reading import counted, files_in, is_picture_file

METADATA = "metadata.jsonl"
_KEYS = {"file_name", "text"}
#: suffixes of caption files
_CAPTIONS = (".txt", ".caption")
_MAX_METADATA = 2_000_000_000  # bytes
_MAX_CAPTION = 1_000_000  # bytes
_REPEATS = re.compile(r"(\d+)_.+")  # kohya's "10_fox" repeats its pictures ten times per epoch
_SHOWN = 3  # names in a warning


class Rows(NamedTuple):
    """The contents of a folder.

    Attributes:
        rows: pictures and captions; None for a missing caption.
        unused: all other files except hidden ones.
        warnings: warnings for the user, one line each.
        remedy: advice for broken rows.
    """

    rows: list[tuple[Path, str | None]]
    unused: list[Path]
    warnings: list[str]
    remedy: str


def is_listed(folder: Path) -> bool:
    """Whether a folder has a `metadata.jsonl`, even one that cannot be read or is a broken link."""
    return os.path.lexists(folder / METADATA)


def rows_listed(folder: Path) -> Rows:
    """The rows of a `metadata.jsonl`.

    Raises:
        AfaError: if it is empty or not UTF-8, or a line is invalid or names a missing file.
    """
    metadata = folder / METADATA
    rows: list[tuple[Path, str | None]] = []
    others: set[str] = set()
    try:
        text = read_text(metadata, _MAX_METADATA)
    except (OSError, ValueError) as error:
        raise AfaError(
            "AFA-TRAIN-007", f"'{metadata}' cannot be read as UTF-8 text: {error}."
        ) from error
    # not splitlines, because captions may contain Unicode line separators
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_unique)
            others.update(row.keys() - _KEYS)
            path, caption = folder / row["file_name"], row.get("text")
            valid = caption is None or (isinstance(caption, str) and is_unicode(caption))
            valid = valid and "\0" not in row["file_name"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            valid = False
        if not valid:
            raise AfaError(
                "AFA-TRAIN-008",
                f"Line {number} of '{metadata}' must be a JSON object with the strings file_name "
                f"and text, without duplicate keys and with valid Unicode; got {line[:80]!r}.",
            )
        if not os.path.normpath(path).startswith(f"{os.path.normpath(folder)}{os.sep}"):
            raise AfaError(
                "AFA-TRAIN-009",
                f"Line {number} of '{metadata}' must name a file inside that folder; got "
                f"'{row['file_name'][:80]}'. Move the picture there, or link it.",
            )
        if (what := irregular(path)) is not None:
            raise AfaError(
                "AFA-TRAIN-010",
                f"Line {number} of '{metadata}' names '{path}', which is {what}; it must be a "
                "regular file. Replace it, or remove the line.",
            )
        if not path.is_file():
            raise AfaError(
                "AFA-TRAIN-011",
                f"Line {number} of '{metadata}' names '{path}', which does not exist.",
            )
        rows.append((path, caption))
    if not rows:
        raise AfaError(
            "AFA-TRAIN-012", f"'{metadata}' is empty. It must list at least one picture."
        )
    used = {os.path.normpath(path) for path, _ in rows} | {os.path.normpath(metadata)}
    unused = [path for path in files_in(folder) if os.path.normpath(path) not in used]
    warnings = []
    if unused:
        warnings.append(
            f"{METADATA} does not list {counted(len(unused), 'file')} in '{folder}', so training "
            f"does not use {'it' if len(unused) == 1 else 'them'}: {_some(unused, folder)}."
        )
    if others:
        shown = ", ".join(sorted(others)[:_SHOWN])
        warnings.append(
            f"Only the keys file_name and text of '{metadata}' are used, not {shown}"
            f"{', ...' if len(others) > _SHOWN else ''}."
        )
    return Rows(rows, unused, warnings, f"Replace it, or remove its line from {METADATA}.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; refuses duplicate keys, of which json would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("duplicate key")
    return found


def rows_beside(folder: Path) -> Rows:
    """The pictures of a folder and its subfolders, with captions in files of the same name.

    A caption is the first line that is not blank, as in kohya's trainers. Their repeats, the number
    in the name of a subfolder such as `10_fox`, are ignored.

    Raises:
        AfaError: if there is no folder or no caption, a picture has two different captions, or
            captions are not UTF-8.
    """
    if not folder.is_dir():
        raise AfaError("AFA-TRAIN-013", f"The data folder '{folder}' does not exist.")
    files = list(files_in(folder))
    captions: dict[tuple[Path, str], list[Path]] = {}
    for path in files:
        if path.suffix.lower() in _CAPTIONS:
            captions.setdefault((path.parent, path.stem), []).append(path)
    pictures = [path for path in files if is_picture_file(path)]
    pairs = [(path, captions.get((path.parent, path.stem))) for path in pictures]
    if not any(found for _, found in pairs):
        raise AfaError(
            "AFA-TRAIN-014",
            f"The data folder '{folder}' has no metadata.jsonl and no picture with a .txt. Write a "
            'metadata.jsonl with lines such as {"file_name": "0001.png", "text": "a fox"}, or a '
            ".txt with the caption beside each picture. For other formats that the library "
            f"`datasets` reads (metadata.csv, ...), set data.dataset: {{path: '{folder}'}}.",
        )
    rows: list[tuple[Path, str | None]] = []
    longer: list[Path] = []
    for picture, found in pairs:
        caption = None
        if found:
            lines = {path: _caption(path) for path in found}
            if len({tuple(each) for each in lines.values()}) > 1:
                raise AfaError(
                    "AFA-TRAIN-015",
                    f"'{found[0]}' and '{found[1]}' are captions of the same picture and differ. "
                    "Delete one of them.",
                )
            of_file = lines[found[0]]
            caption = of_file[0] if of_file else ""
            longer += found[:1] if len(of_file) > 1 else []
        rows.append((picture, caption))
    used = set(pictures) | {path for _, found in pairs for path in found or ()}
    unused = [path for path in files if path not in used]
    return Rows(
        rows,
        unused,
        _warnings_beside(folder, pictures, longer, unused),
        "Replace it, write its caption into a .txt beside it, or remove it.",
    )


def _warnings_beside(
    folder: Path, pictures: list[Path], longer: list[Path], unused: list[Path]
) -> list[str]:
    warnings = []
    if unused:
        warnings.append(
            f"{counted(len(unused), 'file')} in '{folder}' {'is' if len(unused) == 1 else 'are'} "
            f"neither a picture nor its caption, and not used: {_some(unused, folder)}."
        )
    if longer:
        warnings.append(
            f"{counted(len(longer), 'caption file')} with several lines: {_some(longer, folder)}. "
            "Only the first line is used. Put each caption on one line."
        )
    repeats = {_repeats(path.relative_to(folder).parts) for path in pictures}
    if len(repeats) > 1:  # equal repeats change nothing, because training counts steps, not epochs
        warnings.append(
            "The repeats of kohya's trainers in the names of subfolders (10_fox) are ignored: all "
            "pictures are used equally often. To use some more often, list them several times in a "
            f"{METADATA}."
        )
    return warnings


def _caption(path: Path) -> list[str]:
    """The lines of a caption file that are not blank."""
    try:
        text = read_text(path, _MAX_CAPTION)
    except (OSError, ValueError) as error:
        raise AfaError(
            "AFA-TRAIN-016", f"'{path}' cannot be read as UTF-8 text: {error}."
        ) from error
    return [line.strip() for line in text.split("\n") if line.strip()]


def _repeats(parts: tuple[str, ...]) -> int:
    """How often kohya's trainers use a picture with this relative path per epoch."""
    found = _REPEATS.fullmatch(parts[0]) if len(parts) > 1 else None
    return int(found[1]) if found else 1


def _some(files: list[Path], folder: Path) -> str:
    shown = ", ".join(str(path.relative_to(folder)) for path in files[:_SHOWN])
    return f"{shown}, ..." if len(files) > _SHOWN else shown
