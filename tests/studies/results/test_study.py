"""The study: its plan is sound, its words follow the figures, and all of it runs."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from afa.aggregators.fusion import FusionRecipe
from afa.evaluation.recipe import EvaluateRecipe
from afa.evaluation.search_recipe import SearchRecipe
from afa.studies.results import plan
from afa.studies.results import run as study
from afa.studies.results.conclusions import conclusions, verdict
from afa.studies.results.page import difference, row_of
from afa.studies.results.plan import (
    OTHER_EXPERTS,
    VARIANTS,
    StudySettings,
    aggregator_recipes,
    block_presets,
    candidates,
    comparison_recipe,
    search_recipe,
    training_name,
    transformers,
    tuning_recipe,
)
from afa.studies.results.run import choose, run_study
from afa.studies.zoo_build.transformer import TransformerRecipe, build_transformer_zoo
from tests import warm
from tests.refusal import refusal

pytestmark = pytest.mark.processes

TINY = StudySettings(
    num_train_steps=2,
    batch_size=2,
    num_mixed=3,
    num_own=2,
    num_tuning=2,
    tuning_steps=1,
    num_trials=1,
    num_steps=1,
    curve_steps=(1, 2),
    num_resamples=100,
)
ROWS = {
    *("AFA", "weighted merge", "SLERP merge", "TIES merge", "DARE merge", "MBW", "autoMBW"),
    *("MagicFusion", "noise mean", "timestep hand-over", "base"),
    *("tuned base (steps)", "tuned base (time)"),
    *(f"{kind}: {name}" for kind in ("shell", "expert") for name in ("animals", "food", "things")),
    *(f"ablation: {name}" for name in ("no spatial", "no timestep", "no prompt")),
    *("ablation: shared by width", "ablation: conv_out only", "AFA, the paper's size"),
    *("AFA, fast", "tuned base (time), fast", "add-difference merge, fast"),
}


def test_the_recipes_are_sound_and_have_every_row() -> None:
    settings = StudySettings()
    SearchRecipe.model_validate(search_recipe(settings))
    bases = {"tuned base (steps) 0.001": Path("a")}
    tuning = EvaluateRecipe.model_validate(tuning_recipe(settings, bases))
    assert len(tuning.methods) == sum(map(len, candidates().values())) + 1
    trained = {name: Path(name) for name in aggregator_recipes(settings)}
    chosen = {name: listed[0] for name, listed in candidates().items()}
    chosen["autoMBW"] = {"merge": {"method": "weighted"}}
    tuned = {"tuned base (steps)": [Path("a")], "tuned base (time)": [Path("b")]}
    recipe = comparison_recipe(settings, trained, tuned, chosen)
    assert {method.name for method in EvaluateRecipe.model_validate(recipe).methods} >= ROWS


def test_a_new_fusion_is_tuned_and_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own class is all that a new rule takes."""

    class ModeRecipe(FusionRecipe):
        rule: str = "mode"
        width: float

        def rules(self, sites: Any) -> Any:
            return []

        @classmethod
        def rows(cls, experts: Any) -> Any:
            return {"mode": [cls(width=0.1), cls(width=0.2)], "mode of one": [cls(width=1)]}

    monkeypatch.setattr(plan, "FUSIONS", (ModeRecipe,))
    assert [c["fusion"]["width"] for c in candidates()["mode"]] == [0.1, 0.2]
    settings = StudySettings()
    names = [method["name"] for method in tuning_recipe(settings, {})["methods"]]
    assert names[-2:] == ["mode 0", "mode 1"]
    trained = {name: Path(name) for name in aggregator_recipes(settings)}
    methods = comparison_recipe(settings, trained, {}, {"mode": candidates()["mode"][1]})["methods"]
    by_name = {method.pop("name"): method for method in methods}
    assert by_name["mode"] == {"fusion": {"rule": "mode", "width": 0.2}}
    assert by_name["mode of one"] == {"fusion": {"rule": "mode", "width": 1.0}}


def test_every_training_has_the_same_settings_but_its_own_point() -> None:
    recipes = aggregator_recipes(StudySettings())
    full = recipes["afa-0"]
    assert {recipes[f"afa-{seed}"].training.seed for seed in range(3)} == {0, 1, 2}
    for row, switches in VARIANTS.items():
        recipe = recipes[training_name(row)]
        assert recipe.training == full.training
        assert recipe.data == full.data
        own, whole = vars(recipe.aggregator), vars(full.aggregator)
        assert {key: own[key] for key in own if own[key] != whole[key]} == switches
    for name, experts in OTHER_EXPERTS.items():
        sources = [expert.source for expert in recipes[name].experts]
        assert sources == [f"zoo:{expert}" for expert in experts]


def test_hand_made_block_weights_have_every_order() -> None:
    presets = block_presets()
    assert len(presets) == 12
    assert len({json.dumps(preset) for preset in presets}) == 12
    assert all(sum(v) == pytest.approx(1) for preset in presets for v in preset.values())


def test_the_best_candidate_is_chosen_and_of_equals_the_first() -> None:
    means = dict.fromkeys(
        [f"{name} {n}" for name, listed in candidates().items() for n in range(len(listed))], 0.1
    )
    means |= {
        "TIES merge 4": 0.3,
        "tuned base (steps) 0.0003": 0.5,
        "tuned base (steps) 0.001": 0.4,
    }
    report = {
        "rows": [
            {"method": name, "groups": {"mixed": {"scores": {"both": {"mean": mean}}}}}
            for name, mean in means.items()
        ]
    }
    chosen, base = choose(report, StudySettings())
    assert chosen["TIES merge"] == candidates()["TIES merge"][4]
    assert chosen["SLERP merge"] == candidates()["SLERP merge"][0]
    assert base == "tuned base (steps) 0.0003"


# -- words ------------------------------------------------------------------------------------


def figures(means: dict[str, float], tuned: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """A report in which every method has one mean in every group; intervals are +-0.05."""
    means = {"AFA": 0.9, "tuned base (steps)": tuned, "tuned base (time)": tuned, **means}
    names = [f"{kind}: {d}" for kind in ("expert", "shell") for d in ("animals", "food", "things")]
    means |= {name: means.get(name, 0.2) for name in names}
    means |= {name: means.get(name, 0.5) for name in VARIANTS}
    means |= {name: means.get(name, 0.9) for name in OTHER_EXPERTS}
    groups = ("mixed", "animals", "food", "things")

    def interval(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.05, "high": mean + 0.05}

    report: dict[str, Any] = {
        "rows": [
            {
                "method": name,
                "num_replicas": 1,
                "groups": {
                    g: {
                        "scores": {
                            "both": {**interval(mean), "by_replica": [mean]},
                            "clip_t": {**interval(mean / 2), "by_replica": [mean / 2]},
                        },
                        "sets": {},
                    }
                    for g in groups
                },
                "expert_calls_per_image": 2,
                "measured": {"seconds_per_image": 0.5, "peak_memory_mib": 9},
            }
            for name, mean in means.items()
        ],
        "paired": [
            {
                "group": group,
                "role": "subject",
                "score": "both",
                "against": name,
                "difference": interval(means["AFA"] - mean),
                "wins": 9,
                "losses": 0,
                "ties": 0,
                "p_value": 0.01,
            }
            for group in groups
            for name, mean in means.items()
            if name != "AFA"
        ],
        "curve": [
            {
                "method": name,
                "num_steps": steps,
                "num_prompts": 3,
                "scores": {"both": interval(0.1 * steps)},
                "measured": {"seconds_per_image": seconds * steps},
            }
            for name, seconds in (("AFA", 0.3), ("AFA, fast", 0.11), ("base", 0.1))
            for steps in (1, 2, 5)
        ],
    }
    results = {
        "rows": [row_of(report, row, "mixed") for row in report["rows"]],
        "own_domain": {
            group: [row_of(report, row, group) for row in report["rows"]] for group in groups[1:]
        },
        "curve": report["curve"],
        "sampling": {"num_steps": 5},
    }
    return report, results


@pytest.mark.parametrize(
    ("mean", "low", "expected"),
    [(0.1, 0.01, "above"), (-0.1, -0.19, "below"), (0.0, -0.1, "not significant")],
)
def test_a_verdict_needs_an_interval_without_zero(mean: float, low: float, expected: str) -> None:
    interval = {"mean": mean, "low": low, "high": 2 * mean - low, "p_value": 0.01}
    assert verdict(interval) == expected
    assert verdict({**interval, "p_value": 0.125}) == "not significant"


def test_where_it_wins_the_words_say_so() -> None:
    text = " ".join(conclusions(figures({"TIES merge": 0.3, "base": 0.6}, tuned=0.7)[1]))
    assert "AFA (0.90) is significantly above all of TIES merge, base" in text
    assert "the closest of them is base with 0.60" in text
    assert "The tuned base (steps) gets 0.70: AFA is significantly above it" in text
    assert "ablation: no spatial (0.50, one seed) is significantly worse than AFA" in text
    assert "AFA, things twice (0.90, one seed) is not significantly different from AFA" in text
    assert "in the same time (plus 10 %), base gets 0.20 with 2 steps" in text
    assert "has the same scores as alone" in text


def test_where_it_does_not_win_the_words_say_so() -> None:
    means = {"TIES merge": 0.88, "base": 0.97, "expert: food": 0.99, "shell: animals": 0.1}
    text = " ".join(conclusions(figures(means, tuned=0.98)[1]))
    assert "is not significantly different from TIES merge" in text
    assert "is significantly below base, expert: food" in text
    assert "**AFA is significantly below it**" in text
    assert "food only, AFA (0.90) is significantly **below** the expert of food (0.99" in text
    assert "by at most 0.79 in `both`" in text


def test_one_seed_within_the_range_of_the_subjects_seeds_is_not_significant() -> None:
    _, results = figures({"ablation: no prompt": 0.7}, tuned=0.5)
    subject = next(row for row in results["rows"] if row["method"] == "AFA")
    subject["both"]["by_replica"] = [0.65, 0.9, 1.0]
    text = " ".join(conclusions(results))
    assert "ablation: no prompt (0.70, one seed) is not significantly different" in text
    assert "ablation: no spatial (0.50, one seed) is significantly worse" in text


def test_whoever_takes_longer_is_not_compared_at_equal_time() -> None:
    report, results = figures({}, tuned=0.5)
    for row in report["curve"]:
        if row["method"] == "base":
            row["measured"]["seconds_per_image"] = 9.0
    assert "no other method finishes a picture" in " ".join(conclusions(results))


def test_a_few_hundredths_of_the_time_hide_no_rival() -> None:
    report, results = figures({}, tuned=0.5)
    seconds = [
        row["measured"]["seconds_per_image"] for row in report["curve"] if row["method"] == "AFA"
    ]
    for row in report["curve"]:
        if row["method"] == "base":
            row["measured"]["seconds_per_image"] = 1.05 * min(seconds)
    assert "base gets" in " ".join(conclusions(results))


def test_the_fast_one_is_compared_at_its_own_time() -> None:
    _, results = figures({"AFA, fast": 0.87}, tuned=0.5)
    fast = next(row for row in results["rows"] if row["method"] == "AFA, fast")
    fast["seconds_per_image"] = 0.7
    text = " ".join(conclusions(results))
    assert "AFA, fast gets 0.87, not significantly different from AFA at the exact speed" in text
    assert "(difference +0.03" in text
    assert "in 1.4 times the time of one expert" in text
    assert "At 1 steps, AFA takes 0.30 s per picture and gets 0.10 right" in text
    assert "At 5 steps, AFA, fast takes 0.55 s per picture and gets 0.50 right; in the" in text
    assert "above all of" in text
    assert "AFA, fast gets 0.50 with" not in text


def test_the_subject_has_no_difference_from_itself() -> None:
    report, _ = figures({}, tuned=0.5)
    assert difference(report, "AFA", "mixed") is None
    found = difference(report, "tuned base (time)", "mixed")
    assert found is not None
    assert found["mean"] == pytest.approx(0.4)


# -- work -------------------------------------------------------------------------------------


@pytest.mark.nightly
def test_the_whole_study_in_small(tmp_path: Path) -> None:
    work, docs = tmp_path / "work", tmp_path / "docs"
    list(run_study(work, docs, TINY, num_processes=2))
    results = json.loads((docs / "results.json").read_text())
    rows = {row["method"]: row for row in results["rows"]}
    assert set(rows) >= ROWS
    for name, row in rows.items():
        assert 0 <= row["both"]["low"] <= row["both"]["mean"] <= row["both"]["high"] <= 1
        assert (row["afa_minus_this"] is None) == (name == "AFA")
        assert row["seconds_per_image"] > 0
    assert rows["AFA"]["num_seeds"] == rows["tuned base (time)"]["num_seeds"] == 3
    assert results["training"]["tuned base (time)"]["num_steps"] >= 2
    assert len(results["made_from"]["commit"]) >= 12
    page = (docs / "results.md").read_text()
    images = [part.split(")")[0] for part in page.split("](images/")[1:]]
    assert len(images) >= 4
    assert all((docs / "images" / image).is_file() for image in images)
    # a second call has nothing left to do and comes to the same figures, in one process, too
    before = (docs / "results.json").read_text()
    list(run_study(work, docs, TINY, num_processes=1))
    assert (docs / "results.json").read_text() == before
    with refusal("AFA-STUDY-004", str(work)):
        list(run_study(work, docs, StudySettings(), num_processes=2))


def forked(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` of `python -m ...`."""
    code, out, err = warm.run(command[3:], module=command[2])
    return subprocess.CompletedProcess(command, code, out, err)


@pytest.mark.nightly
def test_the_study_of_transformers_in_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "subprocess", SimpleNamespace(run=forked))
    recipe = TransformerRecipe(
        num_scenes=64, base_steps=2, expert_steps=2, batch_size=2, num_graded=2
    )
    with refusal("AFA-STUDY-003", "base, animals, .* afa zoo build"):
        transformers(tmp_path / "zoo")
    list(build_transformer_zoo(tmp_path / "zoo", recipe))
    zoo, docs = transformers(tmp_path / "zoo"), tmp_path / "docs"
    docs.mkdir()
    settings = replace(TINY, num_seeds=1)
    list(run_study(tmp_path / "work", docs, settings, num_processes=1, zoo=zoo))
    results = json.loads((docs / "results-dit.json").read_text())
    rows = {row["method"]: row for row in results["rows"]}
    expected = ROWS - set(VARIANTS) - {"MBW", "autoMBW"}
    assert set(rows) >= expected
    # 2 halves of guidance, 1 step
    assert rows["base"]["expert_calls_per_image"] == 2
    assert rows["AFA"]["expert_calls_per_image"] == 6
    assert (docs / "results.md").read_text().startswith("## Diffusion transformers\n")
    alone = (docs / "results.md").read_text()
    (docs / "results.md").write_text(f"# Results\n\nOf U-Nets.\n\n{alone}")
    page = (docs / "results.md").read_text()
    images = [part.split(")")[0] for part in page.split("](images/")[1:]]
    assert images
    assert all((docs / "images" / image).is_file() for image in images)
    # again, it takes its own place
    list(run_study(tmp_path / "work", docs, settings, num_processes=1, zoo=zoo))
    assert (docs / "results.md").read_text() == page
    with refusal("AFA-STUDY-004", str(tmp_path / "work")):
        list(run_study(tmp_path / "work", docs, settings, num_processes=1))
