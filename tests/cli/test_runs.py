"""`afa runs` lists what is in a folder, and changes nothing there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from afa.cli import main
from afa.cli.run_folders import describe_run, find_runs
from afa.machine.ownership import is_owned, owned
from afa.training import Recipe, TrainStep, train
from tests.distilling.students import recipe as distill_recipe
from tests.distilling.students import steps_of
from tests.training.test_ending import losses, run, written


def state_of(folder: Path) -> dict[Path, tuple[int, int, int]]:
    return {
        path: (found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        for path in [folder, *folder.rglob("*")]
        if (found := path.lstat())
    }


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main(["runs", *map(str, arguments)])
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out + said.err


@pytest.fixture(scope="module")
def folder(experts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of several kinds and states."""
    other, place = tmp_path_factory.mktemp("other"), tmp_path_factory.mktemp("runs")
    asked = {"num_steps": 4, "log_every": 2}
    run(written(experts, other, **asked), place / "a" / "finished")
    run(written(experts, other, **asked), place / "a" / "interrupted", stop_after=3)
    stopping = {"patience": 2, "min_improvement": 1e-3}
    run(written(experts, other, early_stopping=stopping), place / "early")
    steps_of(distill_recipe(experts, other / "prompts.txt"), place / "student")
    (place / "comparison").mkdir()
    (place / "comparison" / "evaluation.json").write_text('{"format": "afa-evaluation"}')
    (place / "search").mkdir()
    for name in ("search.json", "study.log"):
        (place / "search" / name).write_text("{}")
    for name in ("no recipe", "damaged"):
        (place / name).mkdir()
        (place / name / "metrics.jsonl").write_text('{"step": 2, "loss": 0.5}\n{"ste')
    (place / "damaged" / "recipe.json").write_text("{")
    run(written(experts, other, **asked), torn := place / "torn")
    checkpoint = max((torn / "checkpoints").iterdir())
    checkpoint.write_bytes(checkpoint.read_bytes()[:-9])
    # other programs' files, which are no runs
    (place / "other").mkdir()
    (place / "other" / "recipe.json").write_text('{"training": "soup"}')
    (place / ".hidden").mkdir()
    (place / ".hidden" / "metrics.jsonl").touch()
    os.symlink(place / "a", place / "link")
    return place


def test_every_run_is_listed_with_its_state(folder: Path) -> None:
    before = state_of(folder)
    found = {os.path.relpath(each.path, folder): each for each in find_runs(folder)}
    assert {name: (each.kind, each.state) for name, each in found.items()} == {
        "a/finished": ("training", "finished"),
        "a/interrupted": ("training", "interrupted"),
        "comparison": ("evaluation", "interrupted"),
        "damaged": ("unknown", "broken"),
        "early": ("training", "finished"),
        "no recipe": ("unknown", "broken"),
        "search": ("search", "not running"),
        "student": ("distillation", "finished"),
        "torn": ("training", "broken"),
    }
    assert state_of(folder) == before
    done, cut = found["a/finished"], found["a/interrupted"]
    assert (done.step, done.num_steps, done.checkpoints) == (4, 4, [3, 4])
    assert (cut.step, cut.num_steps, cut.checkpoints) == (3, 4, [2, 3])
    validated = losses(folder / "a" / "finished")
    assert done.validation_loss == validated[4]
    assert done.lowest_validation_loss == min(validated.values())
    files = [path for path in (folder / "a" / "finished").rglob("*") if path.is_file()]
    assert done.num_bytes == sum(path.stat().st_size for path in files)
    assert done.changed > "2026"
    assert found["early"].step == max(losses(folder / "early"))
    assert "recipe.json" in str(found["no recipe"].error)
    assert "step-00000004" in str(found["torn"].error)


def test_a_run_that_is_running(experts: list[Path], tmp_path: Path) -> None:
    asked = Recipe.model_validate(
        written(experts, tmp_path, num_steps=3, log_every=1, checkpoint_every=3)
    )
    seen = []
    for event in train(asked, tmp_path / "run"):
        if isinstance(event, TrainStep):
            found = describe_run(tmp_path / "run")
            assert found is not None
            seen.append((found.state, found.step))
    assert seen == [("running", 1), ("running", 2), ("running", 3)]


def test_a_lock_is_seen_and_left_alone(tmp_path: Path) -> None:
    assert not is_owned(tmp_path)
    assert not any(tmp_path.iterdir())
    with owned(tmp_path):
        assert is_owned(tmp_path)
        assert is_owned(tmp_path)
    assert not is_owned(tmp_path)
    with owned(tmp_path):  # it is free again
        pass


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = call(capsys, folder)
    assert code == 0
    lines = said.splitlines()
    assert lines[0].split() == [
        "run", "kind", "state", "step", "loss", "validation", "checkpoints", "size", "changed",
    ]  # fmt: skip
    cells = next(line for line in lines if line.startswith("a/finished")).split()
    assert cells[1:4] == ["training", "finished", "4/4"]
    assert sum(line.startswith("broken: ") for line in lines) == 3
    code, said = call(capsys, folder, "--json")
    listed: list[dict[str, Any]] = json.loads(said)
    assert code == 0
    assert len(listed) == 9
    assert listed[0]["state"] == "finished"
    assert call(capsys, tmp_path) == (0, f"No runs in '{tmp_path}'.\n")
    assert call(capsys, folder / "a" / "finished")[1].splitlines()[1].startswith(str(folder))
    code, said = call(capsys, tmp_path / "none")
    assert code == 2
    assert "AFA-CLI-045" in said
