"""The study of results: its rows, its grids, and its stages in few steps."""

from __future__ import annotations

import ast
import itertools
import json
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from afa.aggregators.fusion import FUSIONS, FusionRecipe
from afa.cli import main
from afa.evaluation.search_recipe import SearchRecipe
from afa.merging.recipe import WITH_BASE, MergeRecipe
from afa.studies.evaluating import folders_in
from afa.studies.jobs import Job, JobProgress
from afa.studies.results import choosing, final
from afa.studies.results.candidates import SEARCHED, Grid, fusions, merges
from afa.studies.results.choosing import choose
from afa.studies.results.development import best_of, developed, samples_of_development, widened
from afa.studies.results.entrants import Aggregated, Distilled, Drafted, Place, Tuned
from afa.studies.results.final import chosen_in
from afa.studies.results.outcomes import of_tested
from afa.studies.results.parts import Experiment, Stage
from afa.studies.results.rivals.superdiff import candidates
from afa.studies.results.rows import (
    AFA,
    DISTILLED,
    DRAFTED,
    GUIDED,
    LORA,
    MERGED,
    PREDICTIONS,
    REAL,
    TUNED,
    counted,
    trained,
)
from afa.studies.results.run import pending
from afa.studies.results.settings import WORLDS_OF, StudySettings
from afa.studies.results.stages import run_stage
from afa.studies.results.study import (
    Study,
    best_merge,
    chosen_rates,
    entrants_of,
    inputs_of_choice,
    inputs_of_lengths,
)
from afa.studies.worlds.prompts import training_prompts
from afa.studies.worlds.recipe import WORLDS, WorldRecipe
from afa.zoo.scenes import pair_set, parse_caption
from tests.refusal import refusal

SETTINGS = StudySettings()
#: what a search found
WEIGHTS = {"mid": [0.5, 0.25, 0.25]}
RATES = {TUNED: 3e-4, MERGED: 3e-4, LORA: 3e-3}
MERGE = {"method": "weighted", "weights": [0.5, 0.25, 0.25]}


@pytest.mark.parametrize("experiment", list(Experiment))
def test_the_rows_of_an_experiment(experiment: Experiment, tmp_path: Path) -> None:
    entrants = trained(experiment, SETTINGS, RATES, MERGE)
    assert len({(each.row, each.seed) for each in entrants}) == len(entrants)
    for world in WORLDS_OF[experiment]:
        place = Place(world, tmp_path / world, tmp_path / "work")
        folders = {each.folder(place) for each in entrants}
        assert len(folders) == len(entrants), "each has a folder of its own"
        for each in entrants:
            if isinstance(each, Distilled | Drafted):
                assert each.folder(place).name == each.job(place, SETTINGS).name.split(": ")[1]
                continue
            data = each.data(place, SETTINGS)
            assert data.hold_out == "fifth"
            assert set(data.without) == WORLDS[world].private_objects
            assert each.job(place, SETTINGS).arguments[-1] == each.folder(place)
    later = trained(experiment, SETTINGS, RATES, None)
    missing = {each.row for each in entrants} - {each.row for each in later}
    assert missing
    assert all(row.startswith(MERGED) for row in missing)


def test_students_learn_from_the_ensemble_of_their_seed(tmp_path: Path) -> None:
    place = Place("main", tmp_path, tmp_path / "work")
    entrants = trained(Experiment.MAIN, SETTINGS, RATES, MERGE)
    students = [each for each in entrants if isinstance(each, Distilled)]
    assert Counter(each.row for each in students) == {DISTILLED: 3, GUIDED: 3}
    ensembles = {each.seed: each.method(place)["ensemble"] for each in entrants if each.row == AFA}
    for each in students:
        recipe = each.job(place, SETTINGS).arguments[0]
        assert recipe.teacher.ensemble == [ensembles[each.seed]]
        assert ("guidance" in each.method(place)) == (each.row == GUIDED)
        assert each.samples(SETTINGS) == 64_000 + 16_000
    prompts = training_prompts(WORLDS["private"], 10_000)
    shown = [parse_caption(caption) for caption in prompts]
    assert {pair_set(each.left, each.right) for each in shown} == {"training"}
    private, owner = WORLDS["private"].private_objects, WORLDS["private"].owner
    named = [each for each in shown if private & {each.left, each.right}]
    assert named
    assert all(owner(each.left) == owner(each.right) for each in named)


def test_rows_of_which_sentences_speak_have_three_seeds() -> None:
    for experiment in (Experiment.MAIN, Experiment.PRIVATE):
        counts = Counter(each.row for each in trained(experiment, SETTINGS, RATES, MERGE))
        assert {*counts.values()} == {3}, counts
        for row in (AFA, PREDICTIONS, DRAFTED, counted(TUNED, 3000), counted(MERGED, 3000)):
            assert counts[row] == 3, row
    counts = Counter(e.row for e in trained(Experiment.MAIN, SETTINGS, RATES, MERGE))
    for row in (LORA, "AFA without prompt", counted(TUNED, 15_000)):
        assert counts[row] == 3, row


def test_all_samples_are_counted() -> None:
    assert Aggregated(AFA).samples(SETTINGS) == 16_000
    assert Tuned(TUNED, steps=3_000).samples(SETTINGS) == 48_000


def test_equal_pictures_for_all_that_are_trained(tmp_path: Path) -> None:
    place = Place("main", tmp_path, tmp_path)
    for seed in (0, 1):
        entrants = [Aggregated(AFA, seed), Tuned(TUNED, seed), Tuned(LORA, seed, rank=4)]
        data = [each.data(place, SETTINGS) for each in entrants]
        assert data[0] == data[1] == data[2]
    assert Aggregated(AFA, 0).data(place, SETTINGS) != Aggregated(AFA, 1).data(place, SETTINGS)


@pytest.mark.parametrize("count", [2, 3, 8])
def test_every_candidate_is_a_merge_of_all_experts(count: int) -> None:
    experts = [f"e{n}" for n in range(count)]
    for grid in merges(count).values():
        assert len(grid.methods) == len({json.dumps(each) for each in grid.points})
        assert len(grid.methods) == len({json.dumps(each) for each in grid.methods})
        for each in grid.methods:
            base = "b" if each["merge"]["method"] in WITH_BASE else None
            MergeRecipe(experts=experts, base=base, **each["merge"]).build()
    rows = fusions(experts)
    rules = {each["fusion"]["rule"] for grid in rows.values() for each in grid.methods}
    assert rules == {fusion.model_fields["rule"].default for fusion in FUSIONS}


def test_a_new_fusion_is_a_rival(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own class is all that a new rule takes."""

    class ModeRecipe(FusionRecipe):
        rule: str = "mode"
        width: float

        def rules(self, sites: Any) -> Any:
            return []

        @classmethod
        def rows(cls, experts: Any) -> Any:
            return {"mode": [cls(width=0.1), cls(width=0.2)], "mode of one": [cls(width=1)]}

    monkeypatch.setattr("afa.studies.results.candidates.FUSIONS", (ModeRecipe,))
    found = fusions(["a", "b"])
    assert found.keys() == {"mode", "mode of one"}
    assert found["mode"].points == [{"width": 0.1}, {"width": 0.2}]
    assert found["mode"].edges(1) == ["width"]


def test_optima_on_an_edge_are_named() -> None:
    points = [
        {"a": a, "b": b, "c": c}
        for a, b, c in itertools.product((1, 2, 3), ("x", "y", "z"), (0.5, 1.0))
    ]
    grid = Grid(points, [{}] * 18)
    assert grid.edges(0) == ["a", "c"], "names have no edges"
    middle = next(n for n in range(18) if points[n]["a"] == 2)
    assert grid.edges(middle) == ["c"]
    assert Grid(points, [{}] * 18, {"a": [1]}).edges(0) == ["c"], "nothing lies beyond it"
    uniform = merges(3)["weighted merge"]
    assert uniform.edges(0) == []
    assert uniform.edges(len(uniform.points) - 1) == ["lead"]
    rule = fusions(["a", "b", "c"])["LoRAtorio"]
    assert "temperature" in rule.edges(0)
    patches = {values["patch"] for values in rule.points}
    assert patches == {1, 2, 4, 8, 16}
    whole = next(n for n, values in enumerate(rule.points) if values["patch"] == 16)
    assert "patch" not in rule.edges(whole), "it is all of a latent"


def test_a_rival_without_outcomes_may_change() -> None:
    merge, rule = {"method": {"merge": {"method": "ties"}}}, {"method": {"fusion": {"rule": "new"}}}
    drawn = {"SuperDiff OR": {"values": {"num_steps": 10}}}
    chosen = {"rivals": {"TIES merge": merge, "new": rule}, "drawn": drawn}
    chosen["rates"] = {MERGED: 0.1, TUNED: 0.2}
    test = {"world": "main", "chosen": chosen}
    nothing: dict[str, Any] = {"rivals": {}, "drawn": {}, "rates": {}}
    assert of_tested(test, ["AFA"]) == {**test, "chosen": nothing}
    tuned = of_tested(test, ["AFA", counted(MERGED, 1_000)])
    merges_too = {"rivals": {"TIES merge": merge}, "drawn": {}, "rates": {MERGED: 0.1}}
    assert tuned == {**test, "chosen": merges_too}, "it starts from the best merge"
    every = ["AFA", "new", "SuperDiff OR", counted(MERGED, 1_000), counted(TUNED, 3_000)]
    assert of_tested(test, every) == test


def test_a_new_rival_is_added_to_what_was_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(tmp_path / "work", SETTINGS, 1, tmp_path / "docs")
    compared: list[list[str]] = []

    def compare(
        study: Study,
        place: Place,
        name: str,
        methods: Sequence[dict[str, Any]],
        trained: Sequence[Tuned],
        drawn: Mapping[str, Sequence[Any]] | None = None,
    ) -> Generator[Any, None, dict[str, Any]]:
        names = [method["name"] for method in methods] + [each.row for each in trained]
        names += [f"{row} {n}" for row, listed in (drawn or {}).items() for n in range(len(listed))]
        compared.append([name, *names])
        yield from ()
        return {"rows": [{"method": row, "groups": scored(row)} for row in names]}

    def scored(row: str) -> dict[str, Any]:  # a rate in the middle of its grid is best
        share = 0.6 if row.endswith((" at 0.0003", " at 0.003")) else 0.5
        return {"mixed": {"scores": {"both": {"mean": share}}}}

    def search(name: str, recipe: dict[str, Any], folder: Path) -> None:
        SearchRecipe.model_validate(recipe)
        (name,) = recipe["prompts"].values()
        assert Path(name).read_text().count("\n") == 1 + 4 * SETTINGS.num_tuning
        folder.mkdir(parents=True)
        content = {"method": "block_weights", "experts": [], "block_weights": WEIGHTS}
        (folder / "merge.yaml").write_text(yaml.safe_dump(content))
        searched.append(folder)

    def run(jobs: Sequence[Job], num_processes: int) -> Iterator[JobProgress]:
        for job in jobs:
            search(job.name, *job.arguments)
        yield from ()

    searched: list[Path] = []
    monkeypatch.setattr(choosing, "run_jobs", run)
    monkeypatch.setattr(choosing, "compare_candidates", compare)
    every, rules = merges(3), fusions(["animals", "food", "things"])
    monkeypatch.setattr(choosing, "merges", lambda count: {"TIES merge": every["TIES merge"]})
    monkeypatch.setattr(choosing, "fusions", lambda names: {"LoRAtorio": rules["LoRAtorio"]})
    list(choosing.choose_rivals(study, "main"))
    assert [names[0] for names in compared] == ["tuning", "tuning-rates", "tuning-merged"]
    before = study.chosen("main")
    found = before["rivals"][SEARCHED]
    assert f"{SEARCHED} 0" in compared[0]
    assert found["method"] == {"merge": {"method": "block_weights", "block_weights": WEIGHTS}}
    assert found["scores"] == [0.5]
    list(choosing.choose_rivals(study, "main"))
    assert len(compared) == 3, "nothing is new"
    assert len(searched) == 1

    monkeypatch.setattr(choosing, "fusions", lambda names: rules)
    list(choosing.choose_rivals(study, "main"))
    assert len(compared) == 4, "the best merge is the same, so no rate is chosen again"
    new = {name.rsplit(" ", 1)[0] for name in compared[-1][1:]}
    assert new == {row for row, grid in rules.items() if len(grid.points) > 1} - {"LoRAtorio"}
    after = study.chosen("main")
    assert after["rivals"].keys() == {"TIES merge", SEARCHED, *rules}
    assert after["rivals"]["nearest to the base"]["commit"]
    kept = {row: after["rivals"][row] for row in before["rivals"]}
    assert {**after, "rivals": kept} == before

    both = {row: every[row] for row in ("DARE merge", "TIES merge")}
    uneven = Grid(both["TIES merge"].points[:3], both["TIES merge"].methods[:3])
    monkeypatch.setattr(choosing, "merges", lambda count: both)
    list(choosing.choose_rivals(study, "main"))
    assert [names[0] for names in compared[5:]] == [], "equally good, and not the first"

    monkeypatch.setattr(choosing, "merges", lambda count: {**both, "TIES merge": uneven})
    list(choosing.choose_rivals(study, "main"))
    assert {name.rsplit(" ", 1)[0] for name in compared[5][1:]} == {"TIES merge"}
    assert len(study.chosen("main")["rivals"]["TIES merge"]["scores"]) == 3


def test_block_weights_have_every_expert_in_front_once() -> None:
    grid = merges(3)["MBW"]
    assert grid.points[0] == {"lead": 1 / 3, "leaders": "expert 0, expert 1, expert 2"}
    leaders = [each["leaders"] for each in grid.points[1:]]
    assert set(Counter(leaders).values()) == {5}
    assert len(set(leaders)) == 6
    last = grid.methods[-1]["merge"]["block_weights"]
    assert grid.points[-1] == {"lead": 1.0, "leaders": "expert 2, expert 1, expert 0"}
    assert (last["conv_in"], last["mid"], last["conv_out"]) == ([0, 0, 1], [0, 1, 0], [1, 0, 0])
    assert "MBW" not in merges(2)
    assert "MBW" not in merges(8), "it has three depths"


def test_a_world_has_its_own_merges_alone(tmp_path: Path) -> None:
    def rival(method: Mapping[str, Any]) -> dict[str, Any]:
        return {"method": method, "score": 0.5}

    study = Study(tmp_path / "work", SETTINGS, 1, tmp_path / "docs")
    rule, of_main = rival({"fusion": {"rule": "magic_fusion"}}), rival({"merge": {"weight": 1}})
    own = rival({"merge": {"weight": 2}})
    study.chosen_in.mkdir(parents=True)
    for world, rivals in {
        "main": {"rule": rule, "TIES merge": of_main, SEARCHED: of_main},
        "split-2": {"TIES merge": own},
    }.items():
        chosen = {"rivals": rivals, "drawn": {}, "rates": {}, "inputs": inputs_of_choice(SETTINGS)}
        (study.chosen_in / f"{world}.json").write_text(json.dumps(chosen))
    assert chosen_in(study, "split-2")["rivals"] == {"TIES merge": own, "rule": rule}
    assert chosen_in(study, "main")["rivals"].keys() == {"rule", "TIES merge", SEARCHED}


def test_the_best_candidate_is_the_first_of_equal_ones() -> None:
    def row(name: str, both: float) -> dict[str, Any]:
        groups = {"mixed": both + 0.1, "food": both - 0.1}
        scored = {group: {"scores": {"both": {"mean": share}}} for group, share in groups.items()}
        return {"method": name, "groups": scored}

    def weighted(*values: int) -> Grid:
        return Grid([{"weight": w} for w in values], [{"merge": {"weight": w}} for w in values])

    weights, others = weighted(1, 2, 3), weighted(8, 9)
    alone = Grid([{}], [{"fusion": {"rule": "feature_mean"}}])
    scores = {"w 0": 0.5, "w 1": 0.7, "w 2": 0.7, "o 0": 0.6, "o 1": 0.8}
    report = {"rows": [row(name, both) for name, both in scores.items()]}
    chosen = choose(report, {"w": weights, "o": others, "mean": alone})
    found = dict(chosen["w"])
    assert found.pop("score") == pytest.approx(0.7), "the mean of the groups"
    assert found.pop("scores") == pytest.approx([0.5, 0.7, 0.7])
    assert found == {
        "method": {"merge": {"weight": 2}},
        "values": {"weight": 2},
        "edges": [],
    }
    assert chosen["mean"]["score"] is None
    assert best_merge({"rivals": chosen}) == {"weight": 9}


def test_the_settings_of_aggregators_are_the_best_on_all_groups_of_prompts() -> None:
    listed = [Aggregated(name, steps=n, rate=0.1) for n, name in enumerate("abc")]
    found = best_of(
        listed,
        {
            "a": {"mixed": 0.9, "animals": 0.1},
            "b": {"mixed": 0.6, "animals": 0.7},
            "c": {"mixed": 0.7, "animals": 0.6},
        },
    )
    assert found.row == "b"
    assert samples_of_development(StudySettings(), 4) == (4 * 1_000 + 3_000) * 16


def test_a_rate_beyond_the_best_one_is_tried_until_it_is_worse() -> None:
    rates = [3e-4, 1e-3, 3e-3]
    assert widened(rates, 1e-3) is None
    assert widened(rates, 3e-3) == 1e-2
    assert widened([*rates, 1e-2], 1e-2) == 3e-2
    assert widened(rates, 3e-4) == 1e-4
    assert widened([*rates, 1e-4], 1e-4) == 3e-5


def test_tuned_models_of_series_are_trained_as_long_as_afa() -> None:
    settings = StudySettings(aggregator_steps=3_000)
    rates, merge = {TUNED: 1e-3, MERGED: 1e-3, LORA: 1e-3}, {"method": "slerp"}
    for experiment in (Experiment.DIVERGENCE, Experiment.EXPERTS):
        listed = trained(experiment, settings, rates, merge)
        tuned = [each for each in listed if isinstance(each, Tuned)]
        assert [each.steps for each in tuned] == [3_000, 3_000]
    lengths = [
        each.steps
        for each in trained(Experiment.PRIVATE, settings, rates, merge)
        if isinstance(each, Tuned) and each.seed == 0
    ]
    assert lengths == [1_000, 1_000, 3_000, 3_000]


def test_the_test_has_the_first_prompts_of_the_main_one_elsewhere(tmp_path: Path) -> None:
    place = Study(tmp_path, StudySettings(), 1, tmp_path).place("main")
    settings = StudySettings(num_mixed=20, num_mixed_elsewhere=8, num_own=4)
    main, data = (
        final.test_prompts(place, each, settings) for each in (Experiment.MAIN, Experiment.DATA)
    )
    assert [len(listed) for listed in main.values()] == [20, 4, 4, 4]
    assert data == {**main, "mixed": main["mixed"][:8]}


@pytest.mark.nightly
def test_the_stages_in_few_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = WorldRecipe(
        num_scenes=8, text_steps=1, base_steps=1, expert_steps=1, batch_size=2, num_graded=1
    )
    monkeypatch.setitem(WORLDS, "main", small)
    monkeypatch.setattr(
        choosing, "merges", lambda n: {"weighted merge": merges(n)["weighted merge"]}
    )
    monkeypatch.setattr(choosing, "NUM_TRIALS", 1)
    monkeypatch.setattr(choosing, "fusions", lambda names: {"LoRAtorio": _few(fusions(names))})
    monkeypatch.setattr(
        choosing, "candidates", lambda p: {k: v[:1] for k, v in candidates(p).items()}
    )
    settings = StudySettings(
        num_seeds=1,
        aggregator_lengths=(1, 2),
        aggregator_rates=(1e-4, 1e-3),
        num_development=1,
        batch_size=1,
        tuned_steps=(1, 2),
        total_steps=3,
        tuned_rates=(1e-4, 1e-3),
        lora_rates=(1e-3,),
        num_tuning=2,
        num_steps=1,
        other_steps=(2,),
        num_mixed=2,
        num_mixed_elsewhere=1,
        num_own=1,
        num_references=8,
        distilled_pictures=1,
        distilled_steps=1,
    )
    docs = tmp_path / "docs"
    study = Study(tmp_path / "work", settings, 1, docs)

    def stages(*wanted: Stage) -> None:
        for stage in wanted:
            list(run_stage(study, stage, Experiment.MAIN))

    stages(Stage.WORLDS)
    with refusal("AFA-STUDY-022", "development"):
        stages(Stage.TRAININGS)
    stages(Stage.DEVELOPMENT)
    chosen = json.loads((study.chosen_in / "developed.json").read_text())
    best = chosen["rows"][AFA]
    assert 3 <= best["num_rates"] <= 4, "of equal ones, the first one, so smaller ones are tried"
    tried = {row for row in chosen["shares"] if row.startswith(AFA)}
    assert len(tried) == best["num_rates"] + 1
    assert f"{counted(AFA, 2)} at {best['rate']:g}" in tried
    other = replace(settings, aggregator_rates=(1e-3,))
    with refusal("AFA-STUDY-023", "developed.json"):
        developed(study.chosen_in, other)
    settings = developed(study.chosen_in, settings)
    assert settings.aggregator_steps == chosen["rows"][AFA]["steps"]
    assert settings.predictions_rate == chosen["rows"][PREDICTIONS]["rate"]
    with refusal("AFA-STUDY-016", "main"):
        stages(Stage.TRAININGS)
    stages(Stage.CANDIDATES, Stage.TRAININGS)
    place = study.place("main")
    rates = chosen_rates(study)
    merge = best_merge(study.chosen("main"))
    entrants = trained(Experiment.MAIN, settings, rates, merge)
    for each in entrants:
        assert (each.folder(place) / "finished.json").is_file(), each.row
    assert not list(place.work.rglob("*-start")), "the merge is not kept"
    with refusal("AFA-STUDY-029", "main.json"):
        replace(study, settings=replace(settings, lora_rank=3)).chosen("main")
    for stage in (Stage.TRAININGS, Stage.TEST):
        with refusal("AFA-STUDY-031", "another", "oracle mask"):
            list(run_stage(replace(study, rows=("another",)), stage, Experiment.MAIN))
    part = replace(study, rows=("base", counted(TUNED, 2)))
    list(run_stage(part, Stage.TEST, Experiment.MAIN))
    outcomes = docs / "results" / "main-main.json"
    first = json.loads(outcomes.read_text())
    assert first["rows"].keys() == {*part.rows}
    assert not pending(replace(part, settings=settings), Experiment.MAIN, "main")
    stages(Stage.TEST)
    found = json.loads(outcomes.read_text())
    for row, each in first["rows"].items():
        assert found["rows"][row] == each
    assert len(outcomes.read_text().splitlines()) > len(found["rows"])
    count = len(found["prompts"])
    assert count == 2 + 3
    expected = {each.row for each in entrants} | {"base", "oracle mask", "router per prompt"}
    expected.add("AFA, 2 denoising steps")
    expected |= {"SuperDiff OR", "SuperDiff AND", "top-1", "top-2, by step", "drafts", "LoRAtorio"}
    assert expected <= found["rows"].keys()
    for row, each in found["rows"].items():
        assert all(len(bits) == count for bits in each["outcomes"]["both"]), row
        assert each["sets"]["fid"][0]["low"] <= each["sets"]["fid"][0]["high"]
        assert each["budget"]["base"] == (0 if row == REAL else 2), row
        assert (each["budget"]["experts"] > 0) == (not _is_single(row)), row
        is_tuned = row.startswith(
            (AFA, PREDICTIONS, "top-", DISTILLED, DRAFTED, TUNED, MERGED, LORA)
        )
        assert (each["budget"]["tuning"] > 0) == is_tuned, row
    own = [found["rows"][row]["budget"]["own"] for row in (AFA, "top-1", "AFA, 2 denoising steps")]
    assert own == [settings.aggregator_steps] * 3
    assert found["rows"]["router per prompt"]["budget"]["own"] == 1_024
    assert [found["rows"][row]["seeds"] for row in (AFA, "top-1", "base")] == [[0], [0], None]
    assert found["sampling"]["seeds"] == [settings.test_seed]
    assert found["chosen"].keys() == {"rivals", "drawn", "rates", "developed"}
    assert found["real"].keys() == {"fid", "kid", "cmmd"}

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    stages(*Stage)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert before == after
    assert json.loads(outcomes.read_text()) == found
    whole = replace(study, settings=settings)
    assert not pending(whole, Experiment.MAIN, "main"), "all rows have outcomes"
    del found["rows"]["top-1"]
    outcomes.write_text(json.dumps(found))
    assert {each.row for each in pending(whole, Experiment.MAIN, "main")} == {AFA}
    outcomes.write_text(json.dumps(found).replace(found["rows"][AFA]["ensembles"][0], "0" * 64))
    with refusal("AFA-STUDY-034", "top-1"):
        stages(Stage.TEST)
    outcomes.write_text(json.dumps({**found, "num_references": 9}))
    with refusal("AFA-STUDY-030", "num_references"):
        stages(Stage.TEST)


def _is_single(row: str) -> bool:
    """Whether a row uses no expert."""
    return row.startswith((TUNED, LORA)) or row in ("base", "pooled base", "wide model", REAL)


def test_only_the_last_stage_reads_the_test_prompts() -> None:
    root = Path(__file__).parents[3]
    readers = []
    for folder in ("src", "benchmarks", "tools"):
        for path in (root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                words = [each.value for each in ast.walk(node) if isinstance(each, ast.Constant)]
                if isinstance(node, ast.Call) and "test" in words:
                    name = getattr(node.func, "id", getattr(node.func, "attr", ""))
                    if name in ("prompts_of", "_set_of", "pair_set"):
                        readers.append(path.relative_to(root).as_posix())
    assert readers == ["src/afa/studies/results/final.py"]
    # and the outcomes of tests, which have them, are read by the page and by entrants alone
    known = ("read_published", "Outcomes")
    readers = [
        path.name
        for path in sorted((root / "src").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and any(each.name in known for each in node.names)
    ]
    assert readers == ["evaluate.py", "against.py", "figures.py", "page.py", "summary.py"]


def _few(rows: dict[str, Grid]) -> Grid:
    grid = rows["LoRAtorio"]
    return Grid(grid.points[:2], grid.methods[:2])


def test_a_comparison_of_a_study_may_read_the_folders_that_it_names() -> None:
    recipe = {"base": "/a/base", "methods": [{"model": [{"source": "/b/x"}], "name": "m"}], "n": 1}
    assert folders_in({**recipe, "experts": ["zoo:food", "relative/one"]}) == {"/a", "/b"}


def test_the_data_curve_has_the_lengths_that_were_chosen(tmp_path: Path) -> None:
    study = Study(tmp_path / "work", SETTINGS, 1, tmp_path / "docs")
    study.chosen_in.mkdir(parents=True)
    merge = {"method": {"merge": MERGE}, "score": 0.5}
    rates = {row: {"rate": rate} for row, rate in RATES.items()}
    chosen = {"rivals": {"m": merge}, "rates": rates, "inputs": inputs_of_choice(SETTINGS)}
    (study.chosen_in / "main.json").write_text(json.dumps(chosen))
    with refusal("AFA-STUDY-035", "candidates", "data"):
        entrants_of(study, Experiment.DATA, "main")
    numbers = {str(number): 100 for number in SETTINGS.curve_pictures} | {"10000": 3_000}
    content = {"lengths": {TUNED: numbers, MERGED: numbers}}
    study.lengths_file.write_text(json.dumps({**content, "inputs": inputs_of_lengths(SETTINGS)}))
    entrants = entrants_of(study, Experiment.DATA, "main")
    tuned = {each.row: each.steps for each in entrants if isinstance(each, Tuned)}
    assert tuned["tuned base (100 steps, 300 pictures)"] == 100
    assert tuned["merge, then tuned (3,000 steps, 10,000 pictures)"] == 3_000
    assert counted(AFA, 1_000, 100) in {each.row for each in entrants}
    other = replace(study, settings=replace(SETTINGS, aggregator_steps=3_000))
    with refusal("AFA-STUDY-029", "data.json"):
        other.lengths()


def test_a_row_belongs_to_one_experiment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for experiments in ([], ["--experiment", "main", "--experiment", "data"]):
        with pytest.raises(SystemExit) as stop:
            main(["zoo", "results", str(tmp_path / "work"), "--row", AFA, *experiments])
        assert stop.value.code == 2
        assert "AFA-CLI-030" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()
