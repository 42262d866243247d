"""Lists of pictures and captions: JSON lines, CSV, JSON and parquet."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from afa.errors import AfaError
from afa.files import is_unicode
from afa.reading import counted
from afa.training.data.finder import Finder, invalid_entry
from afa.training.data.list_formats import LISTS, Entry, read_list
from afa.training.data.rows import CaptionOptions, Row, Rows, kept, some

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from afa.training.data.places import Place

#: the lists of Hugging Face's `imagefolder`, which list pictures of their own folder
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
#: columns of paths, if there is no `file_name`
_FILES = ("filename", "file", "file_path", "filepath", "path", "image_path", "image_file", "image")
#: columns of captions, if there is no `text`
_CAPTIONS = ("caption", "captions", "prompt", "prompts")
#: kohya's JSON has tags beside captions, which are appended
_TAGS = "tags"
_SHOWN = 3


def rows_listed(place: Place, metadata: Path, options: CaptionOptions) -> Rows:
    """The rows of a `metadata.jsonl`, `.csv` or `.parquet` in a folder, as in `imagefolder`.

    Raises:
        AfaError: if it cannot be read or is empty, the columns of paths and captions are not clear,
            or an entry is invalid or names a missing file.
    """
    folder = metadata.parent
    found = _rows(place, metadata, options, is_metadata=True)
    used = {os.path.normpath(row.path) for row in found.rows} | {os.path.normpath(metadata)}
    unused = [
        path
        for path in place.files()
        if path.is_relative_to(folder) and os.path.normpath(path) not in used
    ]
    warnings = list(found.warnings)
    if unused:
        warnings.insert(
            0,
            f"{metadata.name} does not list {counted(len(unused), 'file')} in '{folder}', so "
            f"training does not use {'it' if len(unused) == 1 else 'them'}: "
            f"{some(unused, folder)}.",
        )
    return found._replace(unused=unused, warnings=warnings)


def rows_of_list(place: Place, path: Path, options: CaptionOptions) -> Rows:
    """The rows of any list of pictures, with paths that are relative to its folder or absolute.

    Besides CSV, parquet and JSON lines, a JSON file may have a list of objects, or an object that
    has captions by path, as kohya's `meta_cap.json`.

    Raises:
        AfaError: see `rows_listed`; also for pictures outside of the list's folder that are not
            allowed, see `afa.policy`.
    """
    return _rows(place, path, options, is_metadata=False)


def _rows(place: Place, path: Path, options: CaptionOptions, *, is_metadata: bool) -> Rows:
    wanted = {*options.columns, *_FILES, *_CAPTIONS, "file_name", "text"}
    listed = read_list(place, path, wanted | {options.file_column or "file_name"})
    if not listed.entries:
        raise AfaError("AFA-TRAIN-012", f"'{path}' is empty. It must list at least one picture.")
    columns = list(dict.fromkeys(key for entry in listed.entries for key in entry.values))
    file_column = "" if listed.is_by_path else _file_column(path, columns, options)
    texts = _caption_columns(path, columns, file_column, options)
    finder = Finder(place, path, is_metadata)
    rows: list[Row] = []
    several: list[Path] = []
    for entry in listed.entries:
        name = entry.name if listed.is_by_path else entry.values.get(file_column)
        label = f"{entry.name!r}" if listed.is_by_path else entry.name
        picture = finder.find(name, label)
        captions = _captions_of(entry, texts, label, path)
        if _TAGS in columns and listed.is_by_path and not options.columns:
            captions = _with_tags(captions, entry.values.get(_TAGS), label, path)
        several += [picture] if len(captions) > 1 else []
        rows.append(Row(picture, kept(captions, options)))
    used = {file_column, *texts}
    if listed.is_by_path and not options.columns:
        used.add(_TAGS)
    warnings = []
    if several and not options.several:
        warnings.append(
            f"{counted(len(several), 'picture')} in '{path}' with several captions: "
            f"{some(several, path.parent)}. Only the first caption is used. To use all of them, "
            "set data.captions: random."
        )
    if others := [key for key in columns if key not in used]:
        shown = ", ".join(sorted(others)[:_SHOWN])
        names = " and ".join(key for key in columns if key in used)
        warnings.append(
            f"Only the keys {names} of '{path}' are used, not {shown}"
            f"{', ...' if len(others) > _SHOWN else ''}."
        )
    remedy = f"Replace it, or remove its line from {path.name}."
    source = f"'{path}'"
    return Rows(rows, [], warnings, remedy, source)


def _file_column(path: Path, columns: list[str], options: CaptionOptions) -> str:
    if options.file_column is not None:
        return _named(path, columns, options.file_column, "data.file_column")
    if "file_name" in columns:
        return "file_name"
    found = [each for each in columns if each in _FILES]
    if len(found) > 1:
        raise _ambiguous(path, found, "paths", "data.file_column")
    if not found:
        raise AfaError(
            "AFA-TRAIN-062",
            f"'{path}' has no column with the paths of pictures; its columns are "
            f"{_shown(columns)}. It must have one named file_name, {', '.join(_FILES)}. Rename "
            "one, or set data.file_column.",
        )
    return found[0]


def _caption_columns(
    path: Path, columns: list[str], file_column: str, options: CaptionOptions
) -> tuple[str, ...]:
    if options.columns:
        return tuple(_named(path, columns, each, "data.caption_column") for each in options.columns)
    if "text" in columns:
        return ("text",)
    found = [each for each in columns if each in _CAPTIONS and each != file_column]
    if len(found) > 1:
        raise _ambiguous(path, found, "captions", "data.caption_column")
    rest = [each for each in columns if each not in (file_column, _TAGS)]
    if not found and rest:
        raise AfaError(
            "AFA-TRAIN-075",
            f"'{path}' has no column of captions; its columns are {_shown(columns)}. It must have "
            f"one named text, {', '.join(_CAPTIONS)}. Rename one, or set data.caption_column.",
        )
    return (found[0],) if found else ()


def _named(path: Path, columns: list[str], name: str, key: str) -> str:
    if name not in columns:
        raise AfaError(
            "AFA-TRAIN-076",
            f"'{path}' has no column '{name}'; it has {_shown(columns)}. Set {key} to one of them.",
        )
    return name


def _ambiguous(path: Path, found: list[str], what: str, key: str) -> AfaError:
    return AfaError(
        "AFA-TRAIN-063",
        f"'{path}' has several columns that could be {what}: {', '.join(found)}. Set {key} to the "
        "one to use.",
    )


def _shown(columns: list[str]) -> str:
    shown = ", ".join(str(each)[:40] for each in columns[:10])
    return f"{shown}, ..." if len(columns) > 10 else shown or "none"


def _captions_of(entry: Entry, columns: Iterable[str], label: str, path: Path) -> list[str]:
    """The captions of an entry; None and empty lists are missing ones.

    Raises:
        AfaError: if a value is not text.
    """
    found: list[str] = []
    for column in columns:
        value = entry.values.get(column)
        texts = value if isinstance(value, list) else [value]
        for text in texts:
            if text is None:
                continue
            if not isinstance(text, str) or not is_unicode(text):
                raise invalid_entry(
                    path,
                    label,
                    f"have a text in '{column}', or a list of texts, in Unicode",
                    f"{text!r:.80}",
                )
            found.append(text)
    # an empty text is a caption of its own only if there is no other
    return [text for text in found if text.strip()] or found[:1]


def _with_tags(captions: list[str], tags: Any, label: str, path: Path) -> list[str]:
    """Append tags to captions, as kohya's trainers do."""
    if tags is None or tags == "":
        return captions
    if not isinstance(tags, str) or not is_unicode(tags):
        raise invalid_entry(path, label, f"have a text in '{_TAGS}', in Unicode", f"{tags!r:.80}")
    return [f"{caption}, {tags}" for caption in captions] or [tags]


def lists_in(files: Iterable[Path]) -> Iterator[Path]:
    """Yield the files that could be lists."""
    return (path for path in files if path.suffix.lower() in LISTS)
