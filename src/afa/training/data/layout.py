"""Find out how a folder, an archive or a list keeps its pictures and captions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from afa.errors import AfaError
from afa.reading import counted, is_picture_file
from afa.training.data.captions import folder_caption, rows_beside
from afa.training.data.list_formats import LISTS
from afa.training.data.lists import METADATA, lists_in, rows_listed, rows_of_list
from afa.training.data.places import Folder, Zip
from afa.training.data.rows import CaptionOptions, Rows, some

if TYPE_CHECKING:
    from collections.abc import Sequence

    from afa.training.data.places import Place

#: names of folders with the parts of a data set, as in `datasets`
_TRAINING = ("train", "training")
_OTHER_SPLITS = ("validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation")
_ARCHIVES = {".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar", ".zst"}


def read_place(path: Path, options: CaptionOptions) -> tuple[Place, Rows]:
    """Read the pictures and captions of a folder, a zip archive or a list.

    A folder has a `metadata.jsonl`, `.csv` or `.parquet`, or a folder `train`, or captions beside
    pictures, or such lists in its subfolders, or one other list.

    Args:
        path: of the folder, the archive or the list.
        options: how captions are read.

    Raises:
        AfaError: if there is nothing at the path, or it is not understood; see also `rows_listed`,
            `rows_beside` and `Zip`.
    """
    if path.is_dir():
        place: Place = Folder(path)
        return place, _rows_in(place, path, options)
    archive = next((each for each in (path, *path.parents) if _is_zip(each)), None)
    if archive is not None:
        return _read_zip(Zip(archive), path, options)
    if not path.exists():
        raise AfaError("AFA-TRAIN-013", f"The data folder '{path}' does not exist.")
    suffix = path.suffix.lower()
    if suffix in LISTS:
        place = Folder(path.parent)
        _refuse_folder_options(path, options)
        return place, rows_of_list(place, path, options)
    advice = f"It must be a folder, a .zip, or a list ({', '.join(LISTS)})."
    if suffix == ".toml":
        advice += " Of a configuration of kohya's trainers, set data.folder to its image_dir."
    if suffix in _ARCHIVES:
        advice += " Unpack it, or pack it as .zip. Tar files in the format of WebDataset are read "
        advice += f"with data.dataset: {{path: webdataset, data_files: '{path}'}}."
    raise AfaError("AFA-TRAIN-069", f"data.folder '{path}' is not understood. {advice}")


def _is_zip(path: Path) -> bool:
    return path.suffix.lower() == ".zip" and path.is_file()


def _read_zip(place: Zip, path: Path, options: CaptionOptions) -> tuple[Place, Rows]:
    """Read an archive, or a folder or a list in it."""
    if path.suffix.lower() in LISTS and place.is_file(path):
        _refuse_folder_options(path, options)
        return place, rows_of_list(place, path, options)
    inside = [each for each in place.files() if each.is_relative_to(path)]
    if path != place.root and not inside:
        raise AfaError(
            "AFA-TRAIN-074",
            f"The data folder '{path}' does not exist: the archive '{place.root}' has no such "
            "folder.",
        )
    return place, _rows_in(place, _top(place, path), options)


def _top(place: Place, top: Path) -> Path:
    """The folder that contains everything in a folder of an archive."""
    files = [path for path in place.files() if path.is_relative_to(top)]
    while True:
        inside = {path.relative_to(top).parts for path in files}
        names = {parts[0] for parts in inside}
        if len(names) != 1 or any(len(parts) == 1 for parts in inside):
            return top
        (name,) = names
        if name in _TRAINING or folder_caption(top / name / "x", top):
            return top
        top /= name


def _rows_in(place: Place, folder: Path, options: CaptionOptions) -> Rows:
    files = [path for path in place.files() if path.is_relative_to(folder)]
    own = _metadata(place, folder)
    if own is not None:
        _refuse_folder_options(own, options)
        return rows_listed(place, own, options)
    training, others = _splits(files, folder)
    if training is None:
        return _unlisted(place, folder, files, options)
    inside = [path for path in files if path.is_relative_to(training)]
    own = _metadata(place, training)
    if own is not None:
        _refuse_folder_options(own, options)
        found = rows_listed(place, own, options)
    else:
        found = _unlisted(place, training, inside, options)
    splits = {training, *(folder / name for name in others)}
    rest = [path for path in files if not any(path.is_relative_to(each) for each in splits)]
    if rest:
        line = (
            f"{counted(len(rest), 'file')} in '{folder}' {'is' if len(rest) == 1 else 'are'} "
            f"outside of '{training.name}', and not used: {some(rest, folder)}."
        )
        found = found._replace(unused=[*rest, *found.unused], warnings=[line, *found.warnings])
    if not others:
        return found
    names = " and ".join(f"'{name}'" for name in others)
    note = (
        f"'{training.name}' of '{folder}' is used, not {names}. To validate a training on one, set "
        f"validation: {{folder: {folder / others[0]}}}."
    )
    return found._replace(warnings=[note, *found.warnings])


def _metadata(place: Place, folder: Path) -> Path | None:
    """The list of a folder.

    Raises:
        AfaError: if it has several.
    """
    found = [folder / name for name in METADATA if place.exists(folder / name)]
    if len(found) > 1:
        raise AfaError(
            "AFA-TRAIN-064",
            f"The folder '{folder}' has {' and '.join(path.name for path in found)}, and must have "
            f"one of them. Remove the others, or set data.folder: '{found[0]}' to use one as list.",
        )
    return found[0] if found else None


def _splits(files: Sequence[Path], folder: Path) -> tuple[Path | None, list[str]]:
    """The folder of the training split, and the names of the other splits beside it."""
    parts = [path.relative_to(folder).parts for path in files]
    if any(len(each) == 1 and is_picture_file(Path(each[0])) for each in parts):
        return None, []
    names = {each[0] for each in parts if len(each) > 1}
    found = [name for name in _TRAINING if name in names]
    if len(found) != 1:
        return None, []
    return folder / found[0], sorted(name for name in names if name in _OTHER_SPLITS)


def _unlisted(place: Place, folder: Path, files: Sequence[Path], options: CaptionOptions) -> Rows:
    """The rows of a folder without a list of its own."""
    found = rows_beside(place, folder, files, options)
    if found is not None:
        if options.columns or options.file_column:
            raise _without_effect(
                f"data.caption_column and data.file_column are for lists, and '{folder}' has none: "
                "its captions are beside the pictures. Remove these keys, or set data.folder to "
                "a list."
            )
        return found
    nested = [path for path in files if path.name in METADATA and path.parent != folder]
    if nested:
        _refuse_folder_options(nested[0], options)
        return _of_subfolders(place, folder, files, nested, options)
    lists = [
        path
        for path in lists_in(files)
        if path.parent == folder and path.name != "multidatabackend.json"
    ]
    if len(lists) == 1:
        _refuse_folder_options(lists[0], options)
        return rows_of_list(place, lists[0], options)
    raise _no_captions(folder, files, lists, options)


def _of_subfolders(
    place: Place,
    folder: Path,
    files: Sequence[Path],
    nested: Sequence[Path],
    options: CaptionOptions,
) -> Rows:
    """The rows of subfolders that each have a list."""
    outer = [
        path
        for path in nested
        if not any(
            path.parent.is_relative_to(other.parent)
            for other in nested
            if other.parent != path.parent
        )
    ]
    parts = []
    for parent in dict.fromkeys(path.parent for path in outer):
        own = _metadata(place, parent)
        assert own is not None, "it was found before"
        parts.append((own, rows_listed(place, own, options)))
    rest = [path for path in files if not any(path.is_relative_to(own.parent) for own, _ in parts)]
    warnings = [line for _, rows in parts for line in rows.warnings]
    if rest:
        warnings.insert(
            0,
            f"{counted(len(rest), 'file')} in '{folder}' {'is' if len(rest) == 1 else 'are'} in no "
            f"list of a subfolder, and not used: {some(rest, folder)}.",
        )
    return Rows(
        [row for _, rows in parts for row in rows.rows],
        rest + [path for _, rows in parts for path in rows.unused],
        warnings,
        "Replace it, or remove its line from its list.",
        f"'{folder}', {counted(len(parts), 'list')} in subfolders",
    )


def _refuse_folder_options(path: Path, options: CaptionOptions) -> None:
    """Refuse what applies only to captions beside pictures.

    Raises:
        AfaError: if it is set.
    """
    for is_set, key in (
        (options.repeats, "data.repeats"),
        (options.from_folders, "data.folder_captions"),
    ):
        if is_set:
            raise _without_effect(
                f"{key} is for captions beside pictures in folders such as 10_fox; the captions "
                f"come from the list '{path}'. Remove {key}."
            )


def _without_effect(said: str) -> AfaError:
    """The error for a key that has no effect for these pictures."""
    return AfaError("AFA-TRAIN-073", said)


def _no_captions(
    folder: Path, files: Sequence[Path], lists: Sequence[Path], options: CaptionOptions
) -> AfaError:
    """The error for a folder whose captions are not found; names what the folder has."""
    pictures = [path for path in files if is_picture_file(path)]
    named = next((name for path in pictures if (name := folder_caption(path, folder))), None)
    hints = []
    if named is not None:
        hints.append(
            f"To use the names of kohya's folders as captions, such as '{named}', set "
            "data.folder_captions: true."
        )
    elif options.from_folders:
        hints.append("data.folder_captions needs subfolders such as 10_fox.")
    if lists:
        hints.append(
            f"It has several lists ({some(list(lists), folder)}); set data.folder to one, for "
            f"example '{lists[0]}'."
        )
    archives = [path for path in files if path.suffix.lower() in (".zip", *_ARCHIVES)]
    if archives and not pictures:
        is_zip = archives[0].suffix.lower() == ".zip"
        hints.append(
            f"It has archives ({some(archives, folder)}); "
            + (
                f"set data.folder: '{archives[0]}'."
                if is_zip
                else f"set data.dataset: {{path: webdataset, data_files: '{folder}/*.tar'}}."
            )
        )
    tables = [path for path in files if path.suffix.lower() in (".parquet", ".arrow")]
    if tables and not pictures:
        kind = tables[0].suffix[1:].lower()
        hints.append(
            f"It has tables ({some(tables, folder)}); if these have the pictures, set "
            f"data.dataset: {{path: {kind}, data_files: '{folder}/**/*.{kind}'}}."
        )
    what = counted(len(pictures), "picture")
    return AfaError(
        "AFA-TRAIN-014",
        f"The data folder '{folder}' has {what} and no captions: no metadata.jsonl, .csv or "
        ".parquet, and no picture with a .txt or .caption. Write a metadata.jsonl with lines such "
        'as {"file_name": "0001.png", "text": "a fox"}, or a .txt with the caption beside each '
        "picture." + "".join(f" {hint}" for hint in hints),
    )
