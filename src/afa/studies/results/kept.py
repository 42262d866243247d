"""Where the outcomes of tests are kept, and which rows have some already."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afa.files import read_json

if TYPE_CHECKING:
    from pathlib import Path

    from afa.studies.results.parts import Experiment


def path_of(folder: Path, experiment: Experiment | str, world: str) -> Path:
    """The file of the outcomes of a test."""
    return folder / f"{experiment}-{world}.json"


def read_rows(folder: Path, experiment: Experiment, world: str) -> dict[str, dict[str, Any]]:
    """The rows of a test that have outcomes already, by name."""
    path = path_of(folder, experiment, world)
    rows: dict[str, dict[str, Any]] = read_json(path)["rows"] if path.exists() else {}
    return rows
