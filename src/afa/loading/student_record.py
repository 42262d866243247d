"""The record of `afa distill` in the folder of a student."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from afa.files import read_json

if TYPE_CHECKING:
    from pathlib import Path

#: the file in a folder, and the entry in the metadata of a single file or a LoRA
RECORD, ENTRY = "distill.json", "afa_distill"


def student_record(place: Path) -> dict[str, Any] | None:
    """Read the record of a student: of its folder, or in the metadata of a file made from it.

    Returns: None for other models.

    Raises:
        AfaError: if the record is damaged.
    """
    if place.suffix == ".safetensors" and place.is_file():
        with safe_open(place, framework="pt") as file:
            text = (file.metadata() or {}).get(ENTRY)
        return None if text is None else json.loads(text)
    path = place / RECORD
    return read_json(path) if path.is_file() else None


def baked_guidance(place: Path) -> float | None:
    """Return the guidance scale that is part of a student's prediction; None for other models.

    Raises:
        AfaError: if the record is damaged.
    """
    found = (student_record(place) or {}).get("guidance")
    scale = found.get("bake_in") if isinstance(found, dict) else None
    return scale if isinstance(scale, float | int) else None
