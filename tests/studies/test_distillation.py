"""The study of distilled ensembles: its plan, and the whole of it in small."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from afa.distilling.recipe import BakeIn
from afa.evaluation.recipe import EvaluateRecipe
from afa.studies.distillation.plan import (
    FULL,
    GUIDED,
    LORA,
    Settings,
    captions_of_test,
    comparison,
    distill_recipe,
    main_students,
    prompts,
    recording_of,
    students,
)
from afa.studies.distillation.run import run_study
from afa.zoo.scenes import is_held_out, parse_caption
from tests.refusal import refusal

ROOT = Path(__file__).parents[2]
SMALL = Settings(
    num_seeds=1,
    num_trajectories=20,
    num_steps=2,
    batch_size=2,
    drawn_steps=(2,),
    curve_trajectories=(40,),
    curve_steps=(1,),
    ranks=(4,),
    num_prompts=60,
    num_mixed=4,
    num_own=4,
    num_validation=4,
    num_resamples=100,
)


def test_no_test_prompt_is_drawn_by_a_teacher() -> None:
    settings = Settings()
    drawn, tests = prompts(settings), captions_of_test(settings)
    assert len(drawn) == len(set(drawn)) == 3000
    assert not set(drawn) & set(tests)
    pairs = [parse_caption(caption) for caption in drawn]
    assert not any(is_held_out(scene.left, scene.right) for scene in pairs)


def test_students_share_what_was_recorded(tmp_path: Path) -> None:
    """A folder of recorded predictions is for one teacher, seed and sampling."""
    (tmp_path / "prompts.txt").write_text("a fox\n")
    settings = Settings()
    planned = students(settings)
    assert len({student.folder for student in planned}) == len(planned)
    assert sum(student.row == FULL for student in planned) == 3
    by_folder: dict[str, set[str]] = {}
    for student in planned:
        recipe = distill_recipe(student, settings, tmp_path)
        assert recipe.trajectories is not None
        inputs = recipe.trajectories.model_dump(mode="json", exclude={"number"})
        inputs |= recipe.recording.model_dump(mode="json")
        inputs |= recipe.teacher.model_dump(mode="json")
        by_folder.setdefault(recording_of(student), set()).add(json.dumps(inputs))
        assert isinstance(recipe.guidance, BakeIn) == (student.row == GUIDED)
    assert all(len(kinds) == 1 for kinds in by_folder.values())


@pytest.mark.nightly
def test_the_whole_study_in_small(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    for name in ("distillation.md", "results.json"):
        shutil.copyfile(ROOT / "docs" / name, docs / name)
    work = tmp_path / "work"
    list(run_study(work, docs, SMALL, num_processes=1))
    results = json.loads((docs / "distillation.json").read_text())
    rows = {row["method"]: row for row in results["rows"]}
    assert {FULL, GUIDED, LORA, "teacher", "base", "tuned base (total time)"} <= rows.keys()
    assert rows[GUIDED]["expert_calls_per_image"] * 2 == rows[FULL]["expert_calls_per_image"]
    page = (docs / "distillation.md").read_text()
    assert "| distilled, guided |" in page
    before = page
    list(run_study(work, docs, SMALL, num_processes=1))  # nothing is left to do
    assert (docs / "distillation.md").read_text() == before
    with refusal("AFA-STUDY-004"):
        list(run_study(work, docs, Settings(), num_processes=1))
    with refusal("AFA-STUDY-010", "distilled-1"):
        main_students(work)


def test_the_comparison_is_a_recipe(tmp_path: Path) -> None:
    folders = {FULL: [tmp_path / "full"], GUIDED: [tmp_path / "guided"], LORA: [tmp_path / "lora"]}
    for places in folders.values():
        places[0].mkdir()
    (tmp_path / "lora" / "lora.safetensors").write_bytes(b"")
    (tmp_path / "guided" / "distill.json").write_text('{"guidance": {"bake_in": 3.0}}')
    recipe = EvaluateRecipe.model_validate(comparison(Settings(), folders, [], {}, FULL))
    methods = {method.name: method for method in recipe.methods}
    assert methods[GUIDED].guidance == 1.0
    assert methods[FULL].guidance is None
    lora = methods[LORA].model
    assert lora is not None
    assert lora[0].lora == str(tmp_path / "lora" / "lora.safetensors")
