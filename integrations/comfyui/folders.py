"""Where ComfyUI finds ensemble folders: in `models/afa`, or where its settings say."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import folder_paths
from comfy_api.latest import io

from afa.errors import AfaError
from afa.loading.ensemble_folder import AGGREGATORS
from afa.loading.weights import hash_files

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_FOLDER = "afa"
#: the choice that needs no trained aggregators
MEAN = "(mean of the experts, not trained)"


def register_folder() -> None:
    """Let ComfyUI know the folder of ensembles, which `extra_model_paths.yaml` may add to."""
    place = Path(folder_paths.models_dir) / _FOLDER
    place.mkdir(exist_ok=True)
    folder_paths.add_model_folder_path(_FOLDER, str(place))


def ensembles() -> dict[str, Path]:
    """All ensemble folders by name."""
    return {name: place for root in _roots() for name, place in _within(root)}


def _roots() -> list[Path]:
    return [Path(root) for root in folder_paths.get_folder_paths(_FOLDER)]


def _within(root: Path) -> Iterator[tuple[str, Path]]:
    """The ensemble folders in a folder, also those that are linked."""
    for folder in _folders(root):
        if (folder / "config.json").is_file() and (folder / AGGREGATORS).is_file():
            yield folder.relative_to(root).as_posix(), folder


def _folders(root: Path) -> list[Path]:
    """A folder and all folders below it; links are followed, but each place is seen once."""
    found, seen = [], set()
    for name, inside, _ in os.walk(root, followlinks=True):
        place = os.path.realpath(name)
        if place in seen:
            inside.clear()
            continue
        seen.add(place)
        found.append(Path(name))
    return sorted(found)


def plans() -> dict[str, Path]:
    """All pruning plans by name: JSON files in the same folders that are no part of an ensemble."""
    return {
        file.relative_to(root).as_posix(): file
        for root in _roots()
        for folder in _folders(root)
        if not (folder / AGGREGATORS).is_file()
        for file in sorted(folder.glob("*.json"))
    }


def ensemble_input(*, with_mean: bool = True) -> io.Combo.Input:
    """The choice of an ensemble folder."""
    options = [*ensembles(), *([MEAN] if with_mean else [])]
    return io.Combo.Input(
        "ensemble",
        options=options,
        tooltip="A folder that `afa train` wrote, copied or linked into models/afa.",
    )


def find_ensemble(name: str) -> Path | None:
    """The folder of an ensemble; None for the mean.

    Raises:
        AfaError: if there is none of this name.
    """
    if name == MEAN:
        return None
    found = ensembles()
    if name not in found:
        raise AfaError(
            "AFA-COMFY-017",
            f"No ensemble '{name}' was found in {', '.join(map(str, _roots()))}. Copy or link the "
            "folder that `afa train` wrote to there, and refresh the page.",
        )
    return found[name]


def fingerprint(name: str) -> str:
    """A hash of an ensemble's files, which changes if they do."""
    folder = find_ensemble(name)
    if folder is None:
        return MEAN
    return hash_files(folder, [folder / "config.json", folder / AGGREGATORS])


def in_a_row(given: Mapping[str, Any]) -> list[Any]:
    """The connected inputs `NAME_1`, `NAME_2`, ..., which must have no gap.

    Raises:
        AfaError: if there is a gap, because the order of the experts matters.
    """
    connected = [value for value in given.values() if value is not None]
    gap = [name for name, value in list(given.items())[: len(connected)] if value is None]
    if gap:
        raise AfaError(
            "AFA-COMFY-018",
            f"{gap[0]} is not connected, but a later one is. Connect the experts without a gap, in "
            "the order of training.",
        )
    return connected
