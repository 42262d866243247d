"""The study of distilled ensembles: its plan, and the whole of it in small."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from afa.distilling.recipe import BakeIn
from afa.evaluation.recipe import EvaluateRecipe
from afa.merging.recipe import WITH_BASE, MergeRecipe
from afa.studies.distillation.page import (
    Figures,
    inputs_of,
    read_outcomes,
    read_results,
    write_pages,
)
from afa.studies.distillation.parts import Part
from afa.studies.distillation.plan import (
    FULL,
    GUIDED,
    LORA,
    TUNED,
    Settings,
    captions_of_test,
    comparison,
    distill_recipe,
    merges_of,
    prompts,
    students,
)
from afa.studies.distillation.run import run_study
from afa.studies.zoo_build.transformer import TransformerRecipe
from afa.zoo import EXPERTS
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
    num_mixed=2,
    num_own=2,
    num_validation=4,
    num_resamples=100,
    transformers=TransformerRecipe(
        num_scenes=32, base_steps=2, expert_steps=2, batch_size=4, num_graded=4
    ),
    num_aggregator_steps=2,
    teacher_steps=2,
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
    planned = [student for part in Part for student in students(settings, part)]
    assert len({student.folder for student in planned}) == len(planned)
    assert sum(student.row == FULL for student in planned) == 3
    by_folder: dict[str, set[str]] = {}
    for student in planned:
        recipe = distill_recipe(student, settings, tmp_path)
        assert recipe.trajectories is not None
        inputs = recipe.trajectories.model_dump(mode="json", exclude={"number"})
        inputs |= recipe.recording.model_dump(mode="json")
        inputs |= recipe.teacher.model_dump(mode="json")
        by_folder.setdefault(student.recording, set()).add(json.dumps(inputs))
        assert isinstance(recipe.guidance, BakeIn) == (GUIDED in student.row)
    assert all(len(kinds) == 1 for kinds in by_folder.values())


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """A copy of the pages that the study reads and writes, without earlier figures."""
    folder = tmp_path / "docs"
    folder.mkdir()
    shutil.copyfile(ROOT / "docs" / "distillation.md", folder / "distillation.md")
    return folder


@pytest.mark.nightly
def test_the_whole_study_in_small(tmp_path: Path, docs: Path) -> None:
    work = tmp_path / "work"
    list(run_study(work, docs, SMALL, num_processes=1))
    results = json.loads((docs / "distillation.json").read_text())
    rows = {row["method"]: row for row in results["rows"]}
    assert {FULL, GUIDED, LORA, "teacher", "base", TUNED, f"transformers: {FULL}"} <= rows.keys()
    assert rows[GUIDED]["expert_calls_per_image"] * 2 == rows[FULL]["expert_calls_per_image"]
    for row in results["rows"]:
        ones = "".join(row["outcomes"]).count("1")
        assert row["both"]["mean"] == pytest.approx(ones / len("".join(row["outcomes"])))
    assert rows[TUNED]["distilled_minus_this"]["mean"] == pytest.approx(
        rows[FULL]["both"]["mean"] - rows[TUNED]["both"]["mean"]
    )
    (student,) = (s for s in results["parts"]["main"]["students"] if s["method"] == FULL)
    assert max(student["bytes"], key=student["bytes"].get).startswith("unet/")
    page = (docs / "distillation.md").read_text()
    assert "| distilled, guided |" in page
    assert "Not measured yet" not in page
    before = page
    list(run_study(work, docs, SMALL, num_processes=1))  # nothing is left to do
    assert (docs / "distillation.md").read_text() == before
    with refusal("AFA-STUDY-004"):
        list(run_study(work, docs, Settings(), num_processes=1))


def rows_of(part: Part, outcomes: dict[str, str]) -> Figures:
    """The figures of a part with made up outcomes of four prompts."""
    rows = [
        {
            "part": part,
            "method": name,
            "num_seeds": 1,
            "outcomes": [text],
            "both": {"mean": text.count("1") / 4, "low": 0.0, "high": 1.0},
            **{name: {"mean": 0.5} for name in ("clip_t", "fid", "cmmd")},
            "seconds_per_image": 1.0,
        }
        for name, text in outcomes.items()
    ]
    about = {"inputs": inputs_of(SMALL), "students": []}
    return {"about": about, "rows": rows, "own_domain": dict.fromkeys(EXPERTS, rows)}


def test_parts_of_different_runs_are_compared_prompt_by_prompt(docs: Path) -> None:
    first = {"teacher": "1111", FULL: "1110", "base": "0000"}
    write_pages(docs, SMALL, Part.MAIN, rows_of(Part.MAIN, first))
    costs = dict.fromkeys(
        [f"{name}_seconds" for name in ("teacher", "recording", "student", "total", "tuned_base")],
        1.0,
    )
    costs |= {"tuned_base_steps": 3}
    found = rows_of(Part.BUDGET, {"teacher": "1111", TUNED: "0001", "base": "0000"})
    found["about"]["costs"] = costs
    write_pages(docs, SMALL, Part.BUDGET, found)
    rows = {row["method"]: row for row in read_results(docs, SMALL)["rows"]}
    against = rows[TUNED]["distilled_minus_this"]
    assert (against["mean"], against["wins"], against["losses"]) == (0.5, 3, 1)
    page = (docs / "distillation.md").read_text()
    assert f"| {TUNED} | 1 | 0.25" in page
    assert "Not measured yet: `afa zoo distillation WORK --docs docs --part variants`" in page

    better = {"teacher": "1111", FULL: "1111", "base": "0000"}
    write_pages(docs, SMALL, Part.MAIN, rows_of(Part.MAIN, better))  # the other part stays
    rows = {row["method"]: row for row in read_results(docs, SMALL)["rows"]}
    assert rows[TUNED]["distilled_minus_this"]["mean"] == 0.75
    assert rows[FULL]["teacher_minus_this"]["mean"] == 0.0


def test_figures_of_other_settings_are_not_mixed(tmp_path: Path, docs: Path) -> None:
    first = {"teacher": "1111", FULL: "1110", "base": "0000"}
    write_pages(docs, SMALL, Part.MAIN, rows_of(Part.MAIN, first))
    with refusal("AFA-STUDY-011", "main"):
        list(run_study(tmp_path / "work", docs, Settings(), num_processes=1))
    assert not (tmp_path / "work" / "study.json").exists()
    (docs / "distillation.json").write_text('{"rows": []}')
    with refusal("AFA-STUDY-011"):
        list(run_study(tmp_path / "work", docs, SMALL, num_processes=1))


@pytest.mark.parametrize("part", [Part.MAIN, Part.TRANSFORMERS])
def test_every_merge_has_its_settings(part: Part) -> None:
    found = merges_of(part)
    assert len(found) >= 5
    for method in found.values():
        base = "b" if method["merge"]["method"] in WITH_BASE else None
        MergeRecipe(experts=list(EXPERTS), base=base, **method["merge"]).build()
    assert not merges_of(Part.BUDGET)


def test_a_missing_page_is_refused_at_the_start(tmp_path: Path, docs: Path) -> None:
    (docs / "distillation.md").unlink()
    with refusal("AFA-STUDY-012", "distillation.md"):
        next(run_study(tmp_path / "work", docs, SMALL, num_processes=1))
    assert not (tmp_path / "work").exists()


def test_outcomes_are_in_the_order_of_the_prompts(tmp_path: Path) -> None:
    text = "method,replica,seed,prompt_number,group,both,prompt\n"
    lines = [
        f"distilled,{replica},0,{number},mixed,{float(replica == number % 2)},x\n"
        for replica in (1, 0)
        for number in (10, 2, 9, 3)
    ]
    (tmp_path / "scores.csv").write_text(text + "".join(lines))
    found = read_outcomes(tmp_path / "scores.csv")
    assert found == {("distilled", "mixed"): ["1001", "0110"]}  # of prompts 2, 3, 9 and 10


def test_the_comparison_is_a_recipe(tmp_path: Path) -> None:
    folders = {FULL: [tmp_path / "full"], GUIDED: [tmp_path / "guided"], LORA: [tmp_path / "lora"]}
    for places in folders.values():
        places[0].mkdir()
    (tmp_path / "lora" / "lora.safetensors").write_bytes(b"")
    (tmp_path / "guided" / "distill.json").write_text('{"guidance": {"bake_in": 3.0}}')
    recipe = EvaluateRecipe.model_validate(comparison(Part.MAIN, Settings(), tmp_path, folders, {}))
    methods = {method.name: method for method in recipe.methods}
    assert methods[GUIDED].guidance == 1.0
    assert methods[FULL].guidance is None
    lora = methods[LORA].model
    assert lora is not None
    assert lora[0].lora == str(tmp_path / "lora" / "lora.safetensors")
