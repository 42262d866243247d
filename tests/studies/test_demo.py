"""The demo: its main path and its claim, and what it says about the outcome."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

import afa
import afa.studies.demo
from afa.cli import main
from afa.statistics import wilson
from afa.studies.demo import (
    OURS,
    DemoSettings,
    Row,
    draw_comparison,
    report_text,
    rivals_reached,
    verdict,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

METHODS = {
    *("animals", "food", "things", "base", "weight merge", "noise mean", "feature mean"),
    *("AFA", "AFA, fast"),
}


def row(method: str, right: int, trials: int = 100) -> Row:
    share = wilson(right / trials, trials)
    return Row(method, share, share, share, share, 0.5)


ROWS = (("food", 10), ("AFA", 90))


def test_intervals_that_touch_are_no_victory() -> None:
    rows = [row("animals", 20), row("weight merge", 65), row("AFA", 70)]
    assert rivals_reached(rows) == ["weight merge"]
    assert verdict(rows) == "AFA is not clearly above: weight merge."
    rows = [row("animals", 20), row("weight merge", 40), row("AFA, fast", 69), row("AFA", 70)]
    assert rivals_reached(rows) == []
    assert verdict(rows).startswith("AFA is above every baseline of this table")
    assert "no baseline was trained on AFA's scenes" in verdict(rows)


def test_a_better_rival_is_named() -> None:
    assert rivals_reached([row("base", 95), row("AFA", 70)]) == ["base"]


def test_the_report_has_every_row_and_the_verdict() -> None:
    rows = [row("food", 10), row("AFA", 90)]
    text = report_text(rows, DemoSettings(), train_seconds=61.4)
    assert "| AFA | 0.90 [0.83, 0.94] |" in text
    assert "| food | 0.10 [" in text
    assert verdict(rows) in text
    assert "(61 s)" in text


def test_the_picture_of_all_methods(tmp_path: Path) -> None:
    prompt = "a fox on the left and a pizza on the right, blue background"
    Image.new("RGB", (64, 64)).save(tmp_path / "one.png")
    rows = [replace(row(*of), pictures=[tmp_path / "one.png"] * 2) for of in ROWS]
    draw_comparison(rows, [prompt] * 2, tmp_path / "pictures.png")
    with Image.open(tmp_path / "pictures.png") as picture:
        assert min(picture.size) > 200
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 2


def run_small(output: Path, monkeypatch: pytest.MonkeyPatch, **settings: int) -> dict:
    """`afa demo` with smaller settings: its report."""
    monkeypatch.setattr(afa.studies.demo, "DemoSettings", partial(DemoSettings, **settings))
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--output", str(output)])
    assert not stop.value.code
    files = {"ensemble", "pictures.png", "report.json", "report.md", "weights.png"}
    files |= {"comparison", "comparison.yaml"}
    assert {file.name for file in output.iterdir()} == files
    report = json.loads((output / "report.json").read_text())
    names = [entry["method"] for entry in report["rows"]]
    assert set(names) == METHODS | {shell_of(names)}
    for entry in report["rows"]:
        for name in ("both", "objects", "left", "right"):
            assert 0 <= entry[name]["low"] <= entry[name]["mean"] <= entry[name]["high"] <= 1
        assert entry["seconds_per_image"] > 0
    assert verdict_line(report) in (output / "report.md").read_text()
    return report


def shell_of(names: Iterable[str]) -> str:
    (shell,) = (name for name in names if name.endswith("in the ensemble's shell"))
    return shell


@pytest.mark.nightly
def test_the_main_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "demo"
    run_small(output, monkeypatch, num_train_steps=10, num_prompts=4)
    assert "AFA" in capsys.readouterr().out
    loaded = afa.load_ensemble(output / "ensemble")
    assert [r.source for r in loaded.unet.provenance.experts] == [
        "zoo:animals",
        "zoo:food",
        "zoo:things",
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]
    # the comparison goes on from its recipe: nothing is drawn again
    before = {p: p.stat().st_mtime_ns for p in output.rglob("methods/**/*.png")}
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", str(output / "comparison.yaml"), "--output", str(output / "comparison")])
    assert not stop.value.code
    assert before == {p: p.stat().st_mtime_ns for p in output.rglob("methods/**/*.png")}
    assert len(before) == 4 * len(METHODS | {"shell"})


@pytest.mark.nightly
def test_what_it_claims(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the training and half the prompts of the real demo, but the claim is as clear."""
    report = run_small(tmp_path / "demo", monkeypatch, num_train_steps=200, num_prompts=48)
    rows = {entry["method"]: entry for entry in report["rows"]}
    others = [entry["both"]["mean"] for name, entry in rows.items() if name not in OURS]
    assert all(rows[name]["both"]["mean"] > max(others) + 0.1 for name in OURS)
    # the shell by itself changes nothing: same noise, same pictures, same verdicts
    shell = shell_of(rows)
    alone = rows[shell.split()[0]]
    for name in ("both", "left", "right"):  # rounding may move one picture over the border
        assert abs(rows[shell][name]["mean"] - alone[name]["mean"]) <= 1 / 48


def verdict_line(report: dict) -> str:
    entries = report["rows"]
    low = next(e["both"]["low"] for e in entries if e["method"] == "AFA")
    beaten = all(e["both"]["high"] < low for e in entries if e["method"] not in OURS)
    return "AFA is above every baseline" if beaten else "AFA is not clearly above: "


def test_a_stopped_demo_leaves_nothing(tmp_path: Path) -> None:
    run = afa.studies.demo.run_demo(
        tmp_path / "demo", DemoSettings(num_train_steps=2, batch_size=1)
    )
    next(run)
    run.close()
    assert not list(tmp_path.iterdir())
