"""Formats of lists of pictures: JSON lines, CSV, JSON and parquet."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

from afa.errors import AfaError
from afa.reading import counted, is_picture_file
from afa.training.data.finder import invalid_entry

if TYPE_CHECKING:
    from afa.training.data.places import Place

#: suffixes of lists
LISTS = (".jsonl", ".csv", ".json", ".parquet")
_MAX_LIST = 2_000_000_000  # bytes
_BATCH = 1000  # rows of parquet that are read at once


class Entry(NamedTuple):
    """An entry of a list: its name for errors, and its values by column."""

    name: str
    values: dict[str, Any]


class Listed(NamedTuple):
    """The entries of a list; `is_by_path` for kohya's JSON, whose keys are the paths."""

    entries: list[Entry]
    is_by_path: bool = False


def read_list(place: Place, path: Path, wanted: set[str]) -> Listed:
    """Read a list of pictures.

    Args:
        place: with the list.
        path: of the list.
        wanted: columns that are read of a parquet file, if it has them.

    Raises:
        AfaError: if it cannot be read, or is not a list of objects.
    """
    match path.suffix.lower():
        case ".csv":
            return _csv(place, path)
        case ".json":
            return _json(place, path)
        case ".parquet":
            return _parquet(place, path, wanted)
        case _:
            return _json_lines(place, path)


def _text(place: Place, path: Path) -> str:
    try:
        return place.text(path, _MAX_LIST)
    except (OSError, ValueError) as error:
        raise AfaError(
            "AFA-TRAIN-007", f"'{path}' cannot be read as UTF-8 text: {error}."
        ) from error


def _json_lines(place: Place, path: Path) -> Listed:
    entries = []
    # not splitlines, because captions may contain Unicode line separators
    for number, line in enumerate(_text(place, path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line, object_pairs_hook=_unique)
            valid = isinstance(values, dict)
        except (ValueError, RecursionError):
            valid = False
        if not valid:
            raise invalid_entry(
                path,
                f"Line {number}",
                "be a JSON object with the strings file_name and text, without duplicate keys and "
                "with valid Unicode",
                f"{line[:80]!r}",
            )
        entries.append(Entry(f"Line {number}", values))
    return Listed(entries)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; refuses duplicate keys, of which json would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("duplicate key")
    return found


def _unreadable(path: Path, what: str, why: str) -> AfaError:
    return AfaError("AFA-TRAIN-065", f"'{path}' cannot be read as {what}: {why}.")


def _csv(place: Place, path: Path) -> Listed:
    """Read every value as text: libraries for tables would turn the caption "null" into nothing."""
    entries: list[Entry] = []
    reader = csv.reader(io.StringIO(_text(place, path), newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if len(set(header)) < len(header):
            raise csv.Error("the first line has a column twice")
        for values in reader:
            if len(values) != len(header) and values:
                raise csv.Error(
                    f"line {reader.line_num} has {counted(len(values), 'value')} for "
                    f"{counted(len(header), 'column')} ({', '.join(header)[:80]}); texts with "
                    "commas must be in double quotes"
                )
            if values:
                name = f"Line {reader.line_num}"
                entries.append(Entry(name, dict(zip(header, values, strict=True))))
    except csv.Error as error:
        raise _unreadable(path, "CSV with commas", str(error)) from error
    if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
        raise _unreadable(
            path,
            "CSV with commas",
            f"its first line {header[0][:80]!r} has no comma. Save it with commas as separators",
        )
    return Listed(entries)


def _json(place: Place, path: Path) -> Listed:
    try:
        content = json.loads(_text(place, path), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, "JSON", str(error)) from error
    forms = (
        'a list of objects such as [{"file_name": "1.png", "text": "a fox"}], or captions by path '
        'such as {"1.png": {"caption": "a fox"}} or {"1.png": "a fox"}'
    )
    if isinstance(content, list) and all(isinstance(each, dict) for each in content):
        _refuse_configuration(path, content)
        return Listed([Entry(f"Entry {n}", each) for n, each in enumerate(content, start=1)])
    if isinstance(content, dict):
        values = list(content.values())
        if values and all(isinstance(each, dict) for each in values):
            return Listed([Entry(*item) for item in content.items()], is_by_path=True)
        is_text = [
            isinstance(each, str)
            or (isinstance(each, list) and each and all(isinstance(text, str) for text in each))
            for each in values
        ]
        names_pictures = all(is_picture_file(Path(PurePosixPath(name))) for name in content)
        if values and all(is_text) and names_pictures:
            rows = [Entry(name, {"caption": each}) for name, each in content.items()]
            return Listed(rows, is_by_path=True)
    raise _unreadable(path, "a list of pictures", f"it must be {forms}")


def _refuse_configuration(path: Path, content: list[dict[str, Any]]) -> None:
    """Refuse SimpleTuner's configuration of data sets, and name the settings for the first one.

    Raises:
        AfaError: if it is one.
    """
    found = next((each for each in content if "instance_data_dir" in each), None)
    if found is None:
        return
    settings = f"data.folder: '{found['instance_data_dir']}'"
    listed = found.get("parquet")
    if isinstance(listed, dict) and found.get("caption_strategy") == "parquet":
        settings = (
            f"data.folder: '{listed.get('path')}', data.file_column: "
            f"{listed.get('filename_column')} and data.caption_column: "
            f"{listed.get('caption_column')}"
        )
    raise AfaError(
        "AFA-TRAIN-101",
        f"'{path}' configures data sets of SimpleTuner, and is not a list of pictures. For its "
        f"data set '{found.get('id')}', set {settings}.",
    )


def _parquet(place: Place, path: Path, wanted: set[str]) -> Listed:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(io.BytesIO(place.content(path, _MAX_LIST)))
        schema = file.schema_arrow
        embedded = [
            field.name
            for field in schema
            if field.name in wanted
            and (pyarrow.types.is_struct(field.type) or pyarrow.types.is_binary(field.type))
        ]
        if not embedded:
            read = [name for name in schema.names if name in wanted]
            size, rows = 0, list[dict[str, Any]]()
            # in small parts, because a small file can unpack to more than the memory
            for batch in file.iter_batches(_BATCH, columns=read):
                size += batch.nbytes
                if size > _MAX_LIST:
                    raise ValueError(f"its texts have more than {_MAX_LIST} bytes")
                rows += batch.to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise _unreadable(path, "parquet", " ".join(str(error).split())[:200]) from error
    if embedded:
        raise _unreadable(
            path,
            "a list of pictures",
            f"its column '{embedded[0]}' has the pictures themselves. Set data.dataset: {{path: "
            f"parquet, data_files: '{path}'}} instead of data.folder",
        )
    unread = dict.fromkeys(name for name in schema.names if name not in read)
    return Listed([Entry(f"Row {n}", {**unread, **row}) for n, row in enumerate(rows)])
