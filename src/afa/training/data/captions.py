"""Which pictures of a folder have which captions, and which of its files nobody uses."""

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
#: of a file with a picture's caption
_CAPTIONS = (".txt", ".caption")
_MAX_METADATA = 2_000_000_000  # bytes
_MAX_CAPTION = 1_000_000  # bytes
_REPEATS = re.compile(r"(\d+)_.+")  # kohya's: "10_fox" shows its pictures ten times an epoch
_SHOWN = 3  # names in a warning


class Rows(NamedTuple):
    """What a folder holds.

    Attributes:
        rows: pictures and captions; None where a caption is missing.
        unused: the other files, but for hidden ones.
        warnings: what a user should know, one line each.
        remedy: of a row that is broken.
    """

    rows: list[tuple[Path, str | None]]
    unused: list[Path]
    warnings: list[str]
    remedy: str


def is_listed(folder: Path) -> bool:
    """Whether a list says which pictures of a folder are used; it may be one that cannot be read.

    Where a link to it leads nowhere, captions beside pictures are not meant.
    """
    return os.path.lexists(folder / METADATA)


def rows_listed(folder: Path) -> Rows:
    """The rows of a `metadata.jsonl`.

    Raises:
        AfaError: it is not UTF-8, empty, or has a line that is none or names a missing file.
    """
    metadata = folder / METADATA
    rows: list[tuple[Path, str | None]] = []
    others: set[str] = set()
    try:
        text = read_text(metadata, _MAX_METADATA)
    except (OSError, ValueError) as error:
        raise AfaError(
            "AFA-TRAIN-007", f"'{metadata}' must be UTF-8 text, but reading it: {error}."
        ) from error
    # not splitlines: a caption may hold a line separator of Unicode
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_once)
            others.update(row.keys() - _KEYS)
            path, caption = folder / row["file_name"], row.get("text")
            valid = caption is None or (isinstance(caption, str) and is_unicode(caption))
            valid = valid and "\0" not in row["file_name"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            valid = False
        if not valid:
            raise AfaError(
                "AFA-TRAIN-008",
                f"Line {number} of '{metadata}' must be an object with the strings file_name "
                f"and text, each once and of whole characters, came {line[:80]!r}.",
            )
        if not os.path.normpath(path).startswith(f"{os.path.normpath(folder)}{os.sep}"):
            raise AfaError(
                "AFA-TRAIN-009",
                f"Line {number} of '{metadata}' must name a file in that folder, came "
                f"'{row['file_name'][:80]}'. Move the picture there, or link it.",
            )
        if (what := irregular(path)) is not None:
            raise AfaError(
                "AFA-TRAIN-010",
                f"Line {number} of '{metadata}' names '{path}', which is {what} and must be a "
                "regular file. Replace it or take the line out.",
            )
        if not path.is_file():
            raise AfaError(
                "AFA-TRAIN-011", f"Line {number} of '{metadata}' names '{path}', which is missing."
            )
        rows.append((path, caption))
    if not rows:
        raise AfaError(
            "AFA-TRAIN-012", f"The data folder '{folder}' must hold pictures; its list is empty."
        )
    used = {os.path.normpath(path) for path, _ in rows} | {os.path.normpath(metadata)}
    unused = [path for path in files_in(folder) if os.path.normpath(path) not in used]
    warnings = []
    if unused:
        warnings.append(
            f"{counted(len(unused), 'file')} in '{folder}' {_are(unused)} not used, since "
            f"{METADATA} does not list {'it' if len(unused) == 1 else 'them'}: "
            f"{_some(unused, folder)}."
        )
    if others:
        shown = ", ".join(sorted(others)[:_SHOWN])
        warnings.append(
            f"Of the keys in '{metadata}' only file_name and text are used, not {shown}"
            f"{', ...' if len(others) > _SHOWN else ''}."
        )
    return Rows(rows, unused, warnings, f"Replace it or take its line out of {METADATA}.")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys are there once; of two equal ones json takes the last.

    Raises:
        ValueError: one is there twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def rows_beside(folder: Path) -> Rows:
    """The pictures of a folder and its subfolders with the captions that lie beside them.

    A caption is the first line with words, as kohya's trainers read it. The number in the name of a
    subfolder such as `10_fox`, with which they repeat its pictures in an epoch, is not used.

    Raises:
        AfaError: no folder, none with a caption, one with two, or captions that are not UTF-8.
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
            f"The data folder '{folder}' must hold pictures and a metadata.jsonl with lines such "
            'as {"file_name": "0001.png", "text": "a fox"}, or a .txt with its caption beside each '
            "picture; it has no metadata.jsonl and no picture with a .txt. What the library "
            f"`datasets` reads (metadata.csv, ...) goes under data.dataset: {{path: '{folder}'}}.",
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
                    f"A picture must have one caption, but '{found[0]}' and '{found[1]}' differ. "
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
        "Replace it, write its caption into a .txt beside it, or take it out.",
    )


def _warnings_beside(
    folder: Path, pictures: list[Path], longer: list[Path], unused: list[Path]
) -> list[str]:
    warnings = []
    if unused:
        warnings.append(
            f"{counted(len(unused), 'file')} in '{folder}' {_are(unused)} not used, being neither "
            f"a picture nor the caption of one: {_some(unused, folder)}."
        )
    if longer:
        warnings.append(
            f"Only the first line is used of {counted(len(longer), 'caption file')} with several: "
            f"{_some(longer, folder)}. Put each caption on one line."
        )
    repeats = {_repeats(path.relative_to(folder).parts) for path in pictures}
    if len(repeats) > 1:  # where all are alike they change nothing: epochs have no meaning here
        warnings.append(
            "The numbers in the names of subfolders (10_fox), with which kohya's trainers repeat "
            "pictures, are not used: every picture is seen equally often. To show some more often, "
            f"list them several times in a {METADATA}."
        )
    return warnings


def _caption(path: Path) -> list[str]:
    """The lines of a caption file that have words."""
    try:
        text = read_text(path, _MAX_CAPTION)
    except (OSError, ValueError) as error:
        raise AfaError(
            "AFA-TRAIN-016", f"'{path}' must be UTF-8 text, but reading it: {error}."
        ) from error
    return [line.strip() for line in text.split("\n") if line.strip()]


def _repeats(parts: tuple[str, ...]) -> int:
    """How often kohya's trainers would show a picture of this relative path in an epoch."""
    found = _REPEATS.fullmatch(parts[0]) if len(parts) > 1 else None
    return int(found[1]) if found else 1


def _are(files: list[Path]) -> str:
    return "is" if len(files) == 1 else "are"


def _some(files: list[Path], folder: Path) -> str:
    shown = ", ".join(str(path.relative_to(folder)) for path in files[:_SHOWN])
    return f"{shown}, ..." if len(files) > _SHOWN else shown
