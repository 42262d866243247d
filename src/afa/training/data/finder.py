"""Find the pictures that a list names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa.errors import AfaError
from afa.files import is_unicode
from afa.policy import require_within
from afa.reading import is_picture_file

if TYPE_CHECKING:
    from afa.training.data.places import Place


def invalid_entry(path: Path, label: str, must: str, got: str) -> AfaError:
    """Return the error for an entry of a list.

    Args:
        path: of the list.
        label: the entry.
        must: what it must be or have.
        got: what it is or has.
    """
    said = f"{label} of '{path}' must {must}; got {got}."
    if path.suffix.lower() == ".jsonl":
        return AfaError("AFA-TRAIN-008", said)
    return AfaError("AFA-TRAIN-066", said)


class Finder:
    """Finds the pictures that a list names.

    Args:
        place: with the pictures.
        path: of the list.
        is_metadata: whether pictures must be in the list's folder.
    """

    def __init__(self, place: Place, path: Path, is_metadata: bool) -> None:
        self._place, self._path, self._is_metadata = place, path, is_metadata
        self._by_stem: dict[Path, list[Path]] | None = None

    def find(self, name: Any, label: str) -> Path:
        """The path of a picture.

        Args:
            name: as in the list; it may lack the suffix.
            label: the entry, for errors.

        Raises:
            AfaError: if it is not a path, leads out of its folder, or names no regular file.
        """
        folder = self._path.parent
        if not isinstance(name, str) or not name or "\0" in name or not is_unicode(name):
            raise invalid_entry(self._path, label, "have the path of a picture", f"{name!r:.80}")
        if "://" in name:
            raise invalid_entry(
                self._path,
                label,
                "have the path of a local picture (download it first)",
                f"{name:.80}",
            )
        path = folder / name
        if not self._place.exists(path) and "\\" in name:  # of a list made on Windows
            path = folder / name.replace("\\", "/")
        path = self._within(path, name, label)
        if not self._place.exists(path) and not is_picture_file(path):
            path = self._with_suffix(path, label)
        if (what := self._place.irregular(path)) is not None:
            raise AfaError(
                "AFA-TRAIN-010",
                f"{label} of '{self._path}' names '{path}', which is {what}; it must be a "
                "regular file. Replace it, or remove the line.",
            )
        if not self._place.is_file(path):
            raise AfaError(
                "AFA-TRAIN-011",
                f"{label} of '{self._path}' names '{path}', which does not exist."
                f"{self._elsewhere(path)}",
            )
        return path

    def _elsewhere(self, path: Path) -> str:
        """A hint for a list that is not in the folder to which its paths are relative."""
        stems = {path.name, path.stem}
        for each in self._place.files():
            if is_picture_file(each) and {each.name, each.stem} & stems:
                return (
                    f" '{each}' has that name. Paths must be relative to the list's folder: move "
                    "the list, or its pictures."
                )
        return ""

    def _within(self, path: Path, name: str, label: str) -> Path:
        """Refuse pictures elsewhere: a list may come from the web."""
        folder = self._path.parent
        if not self._is_metadata and self._place.root == folder:
            require_within(path, folder, f"{label} of '{self._path}'")
            return path
        root = self._place.root if not self._is_metadata else folder
        if not os.path.normpath(path).startswith(f"{os.path.normpath(root)}{os.sep}"):
            raise AfaError(
                "AFA-TRAIN-009",
                f"{label} of '{self._path}' must name a file inside that folder; got "
                f"'{name[:80]}'. Move the picture there, or link it.",
            )
        # archives have no `..` and `.`
        return path if self._place.exists(path) else Path(os.path.normpath(path))

    def _with_suffix(self, path: Path, label: str) -> Path:
        """The picture whose path lacks its suffix, as SimpleTuner's and kohya's lists have it."""
        if self._by_stem is None:
            self._by_stem = {}
            for each in self._place.files():
                if is_picture_file(each):
                    key = Path(os.path.normpath(each.with_suffix("")))
                    self._by_stem.setdefault(key, []).append(each)
        found = self._by_stem.get(Path(os.path.normpath(path)), [])
        if len(found) > 1:
            raise AfaError(
                "AFA-TRAIN-072",
                f"{label} of '{self._path}' names '{path}', which could be '{found[0].name}' or "
                f"'{found[1].name}'. Write the name with its suffix.",
            )
        return found[0] if found else path
