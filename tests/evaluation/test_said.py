"""What a comparison says before it draws: prompts that are cut, and how references are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from afa.evaluation import evaluate, load_evaluate_recipe
from tests.refusal import refusal

LONG = "a fox on the left and a pizza on the right " * 4
Write = Callable[..., Path]


def notes_before_drawing(recipe: Path, output: Path) -> list[str]:
    notes: list[str] = []
    for event in evaluate(load_evaluate_recipe(recipe), output):
        if event.stage == "pictures":
            break
        notes += event.notes
    return notes


def comparison(write: Write, references: Path, **sampling: Any) -> Path:
    (references.parent / "prompts.txt").write_text(f"a fox\n{LONG}\n")
    return write(
        prompts={"text": "prompts.txt"},
        methods=[{"name": "base", "model": "zoo:base"}, {"name": "fox", "model": "zoo:animals"}],
        sampling={"num_steps": 1, "guidance": 3, **sampling},
        metrics=[{"name": "clip_t", "weights": "zoo:clip"}, {"name": "fid", "weights": "zoo:clip"}],
        references=str(references),
        curve=None,
        experts=None,
        base=None,
    )


@pytest.fixture
def references(tmp_path: Path) -> Path:
    """Pictures of many kinds, and a file that is none."""
    place = tmp_path / "real"
    (place / "sub").mkdir(parents=True)
    for name in ("a.PNG", "b.TIFF", "c.avif", "d.gif", "sub/e.WebP"):
        Image.new("RGB", (64, 64), "red").save(place / name)
    Image.fromarray(np.full((64, 64), 30_000, np.uint16)).save(place / "f.tif")
    Image.new("RGBA", (64, 64)).save(place / "g.png")
    (place / "notes.txt").write_text("of no picture")
    return place


def test_all_of_it_is_said_once_for_all_methods(
    write: Write, references: Path, tmp_path: Path
) -> None:
    recipe = comparison(write, references, negative_prompt=LONG)
    for _ in range(2):  # again with the features that are kept
        notes = notes_before_drawing(recipe, tmp_path / "output")
        of = [note.split(" ")[:4] for note in notes]
        assert of == [
            ["1", "of", "2", "prompts"],
            ["1", "file", "of", f"'{references}'"],
            ["1", "of", "2", "prompts"],
            ["The", "negative", "prompt", "has"],
            ["References", "converted", "while", "reading:"],
        ]
        assert "the metric 'clip_t'" in notes[0]
        assert "such as 'notes.txt'" in notes[1]
        assert "(tokenizer)" in notes[2]
        assert "1 with more than 8 bits" in notes[-1]
        assert "1 transparent" in notes[-1]


def test_a_reference_of_an_unread_format_is_named_before_any_work(
    write: Write, references: Path, tmp_path: Path
) -> None:
    (references / "h.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with refusal("AFA-PICTURE-002", r"h\.HEIC"):
        notes_before_drawing(comparison(write, references), tmp_path / "output")
