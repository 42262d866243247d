"""autoMBW: it finds what is better, keeps its study in a file and goes on to the same result."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

import afa
from afa.cli import main
from afa.evaluation import search
from afa.evaluation.search import Trial, search_block_weights
from afa.evaluation.search_recipe import SearchRecipe, load_search_recipe
from afa.merging import BlockWeights
from afa.merging.recipe import load_merge_recipe
from tests.refusal import refusal

SMALL: dict[str, Any] = {
    "experts": ["zoo:animals", "zoo:food"],
    "prompts": {"zoo": {"kinds": {"mixed": 2}, "held_out": False}},
    "sampling": {"num_steps": 1, "guidance": 3, "batch_size": 2, "num_threads": 1},
    "metric": {"name": "clip_t", "weights": "zoo:clip"},
    "num_trials": 3,
}


def recipe(**changes: Any) -> SearchRecipe:
    return SearchRecipe.model_validate({**SMALL, **changes})


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Score a trial by its weights alone: the more of the second expert in `mid`, the better."""

    def weights_as_pipeline(experts: Any, method: BlockWeights, base: Any = None) -> BlockWeights:
        return method

    def score(merged: BlockWeights, *_: Any) -> float:
        assert isinstance(merged.weights, dict)
        return merged.weights["mid"][1] - 0.1 * merged.weights["conv_in"][1]

    monkeypatch.setattr(search, "merged_pipeline", weights_as_pipeline)
    monkeypatch.setattr(search, "mean_score", score)


def test_it_draws_scores_and_writes_a_recipe_for_merging(tmp_path: Path) -> None:
    trials = list(search_block_weights(recipe(), tmp_path / "search"))
    assert [trial.number for trial in trials] == [1, 2, 3]
    assert trials[-1].best == max(trial.score for trial in trials)
    assert len({trial.score for trial in trials}) == 3, "other weights draw other pictures"
    found = load_merge_recipe(tmp_path / "search" / "merge.yaml")
    assert found.experts == ["zoo:animals", "zoo:food"]
    assert isinstance(found.block_weights, dict)
    assert {"text_encoder", "conv_in", "mid", "conv_out"} <= set(found.block_weights)
    assert all(sum(pair) == pytest.approx(1) for pair in found.block_weights.values())


@pytest.mark.usefixtures("no_drawing")
def test_the_first_trial_is_the_uniform_merge_and_later_ones_are_better(tmp_path: Path) -> None:
    trials = list(search_block_weights(recipe(num_trials=40), tmp_path / "search"))
    assert trials[0].score == pytest.approx(0.5 - 0.05)
    assert trials[-1].best > 0.85
    best = yaml.safe_load((tmp_path / "search" / "merge.yaml").read_text())["block_weights"]
    assert best["mid"][1] - 0.1 * best["conv_in"][1] == pytest.approx(trials[-1].best)


@pytest.mark.usefixtures("no_drawing")
def test_three_experts_have_a_number_each(tmp_path: Path) -> None:
    experts = ["zoo:animals", "zoo:food", "zoo:things"]
    trials = list(search_block_weights(recipe(experts=experts), tmp_path / "search"))
    assert trials[0].score == pytest.approx(0.9 / 3)
    best = yaml.safe_load((tmp_path / "search" / "merge.yaml").read_text())["block_weights"]
    assert all(len(v) == 3 and sum(v) == pytest.approx(1) for v in best.values())


def scores(trials: list[Trial]) -> list[tuple[int, float, float]]:
    return [(trial.number, trial.score, trial.best) for trial in trials]


@pytest.mark.usefixtures("no_drawing")
def test_stopped_and_started_again_it_takes_the_same_trials(tmp_path: Path) -> None:
    whole = scores(list(search_block_weights(recipe(num_trials=14), tmp_path / "whole")))
    parts: list[tuple[int, float, float]] = []
    for stop in (1, 6, 14):
        # a longer search of the same recipe is the same search
        run = search_block_weights(recipe(num_trials=stop), tmp_path / "parts")
        parts += scores(list(run))
    assert parts == whole
    assert not list(search_block_weights(recipe(num_trials=14), tmp_path / "parts"))


@pytest.mark.usefixtures("no_drawing")
@pytest.mark.parametrize("stopped_after", [0, 3])
def test_a_trial_that_was_cut_off_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_after: int
) -> None:
    whole = scores(list(search_block_weights(recipe(num_trials=6), tmp_path / "whole")))

    def cut_off(*_: Any) -> float:
        raise KeyboardInterrupt

    run = search_block_weights(recipe(num_trials=6), tmp_path / "cut")
    parts = scores(list(itertools.islice(run, stopped_after)))
    run.close()
    with monkeypatch.context() as patch:
        patch.setattr(search, "mean_score", cut_off)
        again = search_block_weights(recipe(num_trials=6), tmp_path / "cut")
        with pytest.raises(KeyboardInterrupt):
            next(again)
    parts += scores(list(search_block_weights(recipe(num_trials=6), tmp_path / "cut")))
    assert parts == whole


@pytest.mark.usefixtures("no_drawing")
def test_what_a_killed_process_leaves_is_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output = Path("search")  # a relative path, as people give it
    before = scores(list(search_block_weights(recipe(num_trials=2), output)))
    (output / "study.log.lock").symlink_to("search/study.log")  # the library's lock, dangling
    with (output / "study.log").open("a") as journal:
        journal.write('{"op_code": 4, "work')
    (output / "merge.yaml").unlink()  # killed between a trial and its recipe
    after = scores(list(search_block_weights(recipe(num_trials=4), output)))
    whole = scores(list(search_block_weights(recipe(num_trials=4), Path("whole"))))
    assert before + after == whole
    (output / "merge.yaml").unlink()
    assert not list(search_block_weights(recipe(num_trials=4), output))
    assert (output / "merge.yaml").read_text() == Path("whole/merge.yaml").read_text()


@pytest.mark.usefixtures("no_drawing")
def test_other_checkpoints_or_prompts_are_another_search(tmp_path: Path) -> None:
    own = shutil.copytree(afa.zoo.expert_folder("animals"), tmp_path / "own")
    (tmp_path / "prompts.txt").write_text("a fox\n")
    asked = recipe(experts=[str(own), "zoo:food"], prompts={"text": str(tmp_path / "prompts.txt")})
    list(search_block_weights(asked, tmp_path / "search"))
    (tmp_path / "prompts.txt").write_text("a pizza\n")
    with refusal("AFA-EVAL-027"):
        list(search_block_weights(asked, tmp_path / "search"))
    (tmp_path / "prompts.txt").write_text("a fox\n")
    shutil.rmtree(own)
    shutil.copytree(afa.zoo.expert_folder("things"), own)
    with refusal("AFA-EVAL-027"):
        list(search_block_weights(asked, tmp_path / "search"))


def test_a_metrics_weights_are_found_beside_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "metric": {"name": "clip_t", "weights": "clip"}}))
    metric = load_search_recipe(path).metric
    assert not isinstance(metric, str)
    assert metric.weights == str(tmp_path / "clip")


@pytest.mark.usefixtures("no_drawing")
def test_another_recipe_in_the_same_folder(tmp_path: Path) -> None:
    list(search_block_weights(recipe(num_trials=1), tmp_path / "search"))
    with refusal("AFA-EVAL-027"):
        list(search_block_weights(recipe(seed=1), tmp_path / "search"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with refusal("AFA-EVAL-027"):
        list(search_block_weights(recipe(), tmp_path / "mine"))


def test_scenes_in_a_list_of_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caption = "a fox on the left and a pizza on the right, blue background"
    (tmp_path / "p.txt").write_text(f"{caption}\n")
    judged: list[str] = []

    def score(merged: Any, prompts: Any, sampling: Any, scorer: search.PictureScorer) -> float:
        blank = Image.new("RGB", (64, 64))
        found = scorer([blank] * len(prompts), [each.text for each in prompts])
        judged.extend(each.text for each in prompts)
        return next(iter(found.values()))[0]

    monkeypatch.setattr(search, "mean_score", score)
    asked = recipe(prompts={"text": str(tmp_path / "p.txt")}, metric="scenes", num_trials=1)
    (trial,) = search_block_weights(asked, tmp_path / "search")
    assert judged == [caption]
    assert trial.score == 0


def test_a_score_that_is_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        name = "broken"

        def __call__(self, pictures: Any, prompts: Any) -> dict[str, list[float]]:
            return {"broken": [float("nan")] * len(pictures)}

    monkeypatch.setattr(search, "open_scorer", lambda *_: Broken())
    with refusal("AFA-EVAL-028"):
        list(search_block_weights(recipe(), tmp_path / "search"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": ["zoo:animals"]}, "at least 2"),
        ({"metric": {"name": "fid", "weights": "zoo:clip"}}, "got fid"),
        ({"prompts": {"text": "p.txt"}, "metric": "scenes"}, "captions of scenes only"),
        ({"num_trial": 3}, "did you mean 'num_trials'?"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    (tmp_path / "p.txt").write_text("a fox in the snow\n")
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}))
    with pytest.raises(SystemExit) as stop:
        main(["search", str(path), "--output", str(tmp_path / "output")])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
    assert not (tmp_path / "output").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "search.yaml"
    path.write_text(json.dumps({**SMALL, "num_trials": 1}))
    with pytest.raises(SystemExit) as stop:
        main(["search", str(path), "--output", str(tmp_path / "output")])
    assert stop.value.code == 0
    assert "merge.yaml" in capsys.readouterr().out
