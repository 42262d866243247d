"""Drawing in a thread: progress, pictures as anywhere else, and an end when it is asked for."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import afa
from afa.app.drawing import Drawn, Progress, Stopped, Studio
from afa.denoisers.kinds import denoiser_of
from afa.drafting import OwnDrafts, own_drafts
from afa.drafting.own import keep_drafts
from afa.drawing.contenders import (
    ENSEMBLE,
    MERGE,
    STUDENT,
    Contenders,
    load_student,
)
from afa.drawing.pictures import draw, identity_of, prepare, prepare_again
from afa.drawing.recorded import PictureRecipe, picture_recipe
from afa.loading.expert_source import ExpertSource
from afa.loading.pipeline import load_single
from afa.loading.single_file.load import Companions
from afa.loading.sources import locate
from afa.loading.student_record import RECORD
from afa.loading.vocabulary import write_words
from tests.refusal import refusal
from tests.training.runs import SMALL

PROMPT = "a fox on the left and a pizza on the right, blue background"


@pytest.fixture(scope="module")
def studio() -> Studio:
    return Studio(prepare("zoo:ensemble"))


def recipe(studio: Studio, name: str = ENSEMBLE, **changes: Any) -> PictureRecipe:
    fields = {"seed": 1, "steps": 5, "guidance": 3.0, "height": 64, "width": 64, "prompt": PROMPT}
    identity = identity_of(denoiser_of(studio.pipeline))
    fields |= {"ensemble": "zoo:ensemble", "identity": identity, "drawn_by": name}
    return picture_recipe(**{**fields, **changes})


def test_everybody_draws_and_tells_of_it(studio: Studio) -> None:
    names = studio.contenders.names
    assert names == ["animals", "food", "things", MERGE, ENSEMBLE]
    recipes = [recipe(studio, name) for name in names]
    events = list(studio.draw(recipes, threading.Event()))
    drawn = [event for event in events if isinstance(event, Drawn)]
    assert [each.recipe for each in drawn] == recipes
    for each in recipes:
        steps = [e.step for e in events if isinstance(e, Progress) and e.recipe == each]
        assert steps == [0, 1, 2, 3, 4]
    assert [each.record is not None for each in drawn] == [False] * 4 + [True]
    assert drawn[-1].record is not None
    assert len(drawn[-1].record.steps) == 5
    assert len({each.picture.tobytes() for each in drawn}) == 5
    for one in drawn:  # from what a picture says of itself
        again = draw(prepare_again(one.recipe), one.recipe)
        assert again.tobytes() == one.picture.tobytes()


def test_a_student_is_a_contender(studio: Studio, tmp_path: Path) -> None:
    shutil.copytree(locate("zoo:base"), tmp_path / "student")
    (tmp_path / "student" / RECORD).write_text('{"guidance": {"bake_in": 3.0}}')
    student = load_student(str(tmp_path / "student"), studio.pipeline)
    assert student.guidance == 1.0
    assert load_student("zoo:base", studio.pipeline).guidance is None
    with_student = Studio(studio.pipeline, student)
    assert with_student.contenders.names[-2:] == [STUDENT, ENSEMBLE]
    of = (student.source, student.identity)
    asked = recipe(studio, STUDENT, guidance=1.0, student=of)
    *_, drawn = with_student.draw([asked], threading.Event())
    assert isinstance(drawn, Drawn)
    assert drawn.record is None
    base, _ = load_single("zoo:base")
    base.set_progress_bar_config(disable=True)
    assert drawn.picture.tobytes() == draw(base, asked).tobytes()
    assert draw(prepare_again(asked), asked).tobytes() == drawn.picture.tobytes()
    changed = recipe(studio, STUDENT, student=(student.source, "another hash"))
    with refusal("AFA-DRAW-014", "weights differ"):
        prepare_again(changed)
    gone = recipe(studio, STUDENT, student=("owner/model", student.identity))
    with refusal("AFA-DRAW-015", "owner/model"):
        prepare_again(gone)
    with refusal("AFA-DRAW-001"):
        prepare_again(recipe(studio, STUDENT))


def test_a_bias_is_of_one_picture_alone(studio: Studio) -> None:
    plain, steered = recipe(studio), recipe(studio, bias={"food": {"up": 3.0}})
    events = studio.draw([plain, steered, plain], threading.Event())
    first, second, third = (e.picture.tobytes() for e in events if isinstance(e, Drawn))
    assert first == third != second


@pytest.fixture
def drafting(experts: list[Path], tmp_path: Path) -> Studio:
    """An ensemble of two experts that draws prompts without foxes by drafts."""
    pipeline = afa.load_pipeline(experts[:2], SMALL)
    judge = ExpertSource(str(experts[2]))
    drafts = OwnDrafts(judge=judge, num_steps=2, prompts="unknown_words")
    keep_drafts(pipeline, drafts, Companions(torch.float32))
    folder = afa.save_ensemble(pipeline, tmp_path / "own")
    write_words(["fox"], folder)
    return Studio(prepare(str(folder), drafts=own_drafts(folder)))


def test_prompts_with_unknown_words_are_drawn_by_drafts(drafting: Studio, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"ensemble": str(tmp_path / "own"), "height": 32, "width": 32}
    asked["identity"] = identity_of(denoiser_of(drafting.pipeline))
    fox, zebra, alone = (
        drafting.drafted(recipe(drafting, name, **asked, prompt=prompt, steps=3))
        for prompt, name in (("a fox", ENSEMBLE), ("a zebra", ENSEMBLE), ("a zebra", "expert0"))
    )
    assert [each.drafts is None for each in (fox, zebra, alone)] == [True, False, True]
    events = list(drafting.draw([fox, zebra, alone], threading.Event()))
    for each in (fox, zebra, alone):
        steps = [e.step for e in events if isinstance(e, Progress) and e.recipe == each]
        assert steps == [0, 1, 2], "drafts are no steps"
    for one in (event for event in events if isinstance(event, Drawn)):
        again = draw(prepare_again(one.recipe), one.recipe)
        assert again.tobytes() == one.picture.tobytes()


def test_it_ends_while_it_drafts(drafting: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    asked = recipe(drafting, prompt="a zebra", steps=3, height=32, width=32)
    ensemble = denoiser_of(drafting.pipeline)
    calls = []

    def count(*_: Any) -> None:
        calls.append(ensemble.is_drafting)
        stop.set()

    ensemble.register_forward_pre_hook(count)
    with pytest.raises(Stopped):
        list(drafting.draw([asked], stop))
    assert calls[0]
    assert len(calls) <= 2
    assert ensemble.drafter.thread is None


def test_it_ends_when_it_is_stopped(studio: Studio) -> None:
    stop = threading.Event()
    events = studio.draw([recipe(studio, steps=100)], stop)
    assert next(events) == Progress(recipe(studio, steps=100), 0)
    stop.set()
    with pytest.raises(Stopped):
        list(events)
    assert denoiser_of(studio.pipeline).on_weights is None
    again = list(studio.draw([recipe(studio)], threading.Event()))
    assert isinstance(again[-1], Drawn)


def test_it_ends_between_two_sites(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of large experts takes long; nobody waits for its end."""
    stop, fused = threading.Event(), []
    denoiser = denoiser_of(studio.pipeline)
    whole = denoiser.rule_at

    def slow(site: str) -> Any:
        fused.append(site)
        if len(fused) == 2:
            stop.set()
        return whole(site)

    monkeypatch.setattr(denoiser, "rule_at", slow)
    with pytest.raises(Stopped):
        list(studio.draw([recipe(studio, steps=50)], stop))
    assert len(fused) == 2


def test_it_ends_when_nobody_listens(studio: Studio) -> None:
    events = studio.draw([recipe(studio, steps=150) for _ in range(20)], threading.Event())
    next(events)
    started = time.perf_counter()
    events.close()  # type: ignore[attr-defined]
    assert time.perf_counter() - started < 20  # all of them would take minutes
    assert isinstance(list(studio.draw([recipe(studio)], threading.Event()))[-1], Drawn)


def test_what_goes_wrong_comes_out(studio: Studio) -> None:
    with refusal("AFA-DRAW-001"):
        list(studio.draw([recipe(studio, "nobody")], threading.Event()))


def test_experts_of_one_name_are_told_apart() -> None:
    import afa

    pipeline = afa.load_pipeline(
        ["zoo:animals", "zoo:animals", "zoo:food"],
        afa.SABWConfig(hidden_size=32, norm_num_groups=8),
        allow_duplicates=True,
    )
    names = Contenders(pipeline).names
    assert names == ["animals (0)", "animals (1)", "food", MERGE, ENSEMBLE]
    assert all(Contenders(pipeline).pipeline(name) is not None for name in names)


def test_streamed_experts_draw_together_alone() -> None:
    pipeline = prepare("zoo:ensemble", place="stream")
    assert Contenders(pipeline).names == [ENSEMBLE]
    with refusal("AFA-DRAW-001"):
        Contenders(pipeline).pipeline("animals")
