"""The record of `afa distill` in the folder of a student."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afa.files import read_json

if TYPE_CHECKING:
    from pathlib import Path

RECORD = "distill.json"


def student_record(folder: Path) -> dict[str, Any] | None:
    """Read the record of a student's folder; None if it has none.

    Raises:
        AfaError: if the record is damaged.
    """
    path = folder / RECORD
    return read_json(path) if path.is_file() else None


def baked_guidance(folder: Path) -> float | None:
    """Return the guidance scale that is part of a student's prediction; None for other models.

    Raises:
        AfaError: if the record is damaged.
    """
    found = (student_record(folder) or {}).get("guidance")
    scale = found.get("bake_in") if isinstance(found, dict) else None
    return scale if isinstance(scale, float | int) else None
