"""The learning curves beside metrics.jsonl."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.figure
import pytest
from PIL import Image

from afa.training import curves
from afa.training.changing import History
from afa.training.curves import CURVES, Curves
from tests.training.test_ending import AGGREGATORS, run, written


def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The texts of the legend of each picture that is drawn from now on."""
    found: list[list[str]] = []
    write = curves.save_figure

    def save(figure: matplotlib.figure.Figure, path: Path, dpi: int = 130) -> None:
        write(figure, path, dpi)
        found.append([text.get_text() for text in figure.legends[0].get_texts()])

    monkeypatch.setattr(curves, "save_figure", save)
    return found


def test_a_run_has_its_curves(
    experts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, output = drawn(monkeypatch), tmp_path / "run"
    settings = {"num_steps": 6, "log_every": 1, "checkpoint_every": 3}
    run(written(experts, tmp_path, **settings), output, stop_after=4)
    with Image.open(output / CURVES) as picture:
        assert picture.size == (880, 594)
    assert found[-1] == ["loss, smoothed", "validation loss", found[-1][-1]]
    assert found[-1][-1].startswith("lowest: ")
    run(written(experts, tmp_path, **settings), output)
    assert "resumed" in found[-1]
    run(written(experts, tmp_path, **{**settings, "num_steps": 8, "learning_rate": 0.01}), output,
        change=True)  # fmt: skip
    assert "after step 6: learning_rate: 0.05 -> 0.01" in found[-1]
    assert len(found) < 10  # the time between two of them is longer than this run


def test_two_lines_are_needed(experts: list[Path], tmp_path: Path) -> None:
    run(written(experts, tmp_path, num_steps=2), tmp_path / "run")
    assert not (tmp_path / "run" / CURVES).exists()


def test_curves_that_cannot_be_drawn_end_nothing(
    experts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    asked = written(experts, tmp_path, num_steps=4, log_every=1)
    run(asked, tmp_path / "whole")
    monkeypatch.setattr(curves, "save_figure", fail)
    _, notes = run(asked, tmp_path / "run")
    warnings = [note for note in notes if "curves" in note]
    assert warnings == ["warning: The learning curves could not be drawn: No space left on device"]
    whole, ours = ((tmp_path / name / AGGREGATORS).read_bytes() for name in ("whole", "run"))
    assert ours == whole


def test_they_are_drawn_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = drawn(monkeypatch)
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    entries = [{"step": n, "loss": 1 / n, "learning_rate": 1e-3} for n in range(1, 50)]
    each = Curves(tmp_path, entries, [0], History(((0, {}),), 0), 100)
    for step in range(50, 100):
        entries.append({"step": step, "loss": 1 / step, "learning_rate": 1e-3})
        each.draw()
        now[0] += 1
    assert len(found) == 2
    each.draw(is_last=True)
    each.draw(is_last=True)  # nothing is new
    assert len(found) == 3
