"""Methods of others in a published test: its prompts and its noise, beside its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, PositiveInt

from afa.errors import AfaError
from afa.evaluation.recipe import EvaluateRecipe, MethodRecipe, ModelsRecipe, resolve_method
from afa.evaluation.results import read_results
from afa.evaluation.work import Claim, Store, digest
from afa.files import is_unused, read_json, write_atomic
from afa.loading.ensemble_folder import ensemble_folder
from afa.loading.expert_source import ExpertSource
from afa.machine.ownership import owned
from afa.recipe import read_recipe, resolve_sources, validated
from afa.studies.evaluating import sampling
from afa.studies.results.analysis import Outcomes
from afa.studies.results.comparison import PROMPTS, REFERENCES, test_comparison, write_prompts
from afa.studies.results.drawn import pairs_of, render_scenes
from afa.studies.results.kept import path_of
from afa.studies.results.outcomes import row_of_test
from afa.studies.results.page import own_table, rows_table, sets_table, signed
from afa.studies.results.parts import Experiment
from afa.studies.results.settings import StudySettings
from afa.studies.results.study import FIRST
from afa.studies.worlds.build import RECIPE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

#: parts of the output folder: inputs of the test, the comparison, and both results
INPUTS, COMPARISON, TABLES, ROWS = "inputs", "comparison", "against.md", "against.json"
#: the base as this machine built it, beside the published row `base`
REBUILT = "base, rebuilt"
#: what outcomes must have
_KEYS = {"prompts", "mixed", "rows", "sampling", "num_references", "margin", "description"}
#: how scenes leave out the pairs of all tests
_HOLD_OUT = "fifth"


class AgainstRecipe(ModelsRecipe):
    """Methods that enter a published test, which sets prompts, sampling and metrics.

    Attributes:
        methods: as in a recipe of `afa evaluate`.
        trained_on: by method, all pictures on which its models were trained, with repetitions:
            those of base and experts included. Methods without it are shown as unknown.
    """

    methods: list[MethodRecipe] = Field(min_length=1)
    trained_on: dict[str, PositiveInt] = Field(default={})


def read_published(path: Path) -> dict[str, Any]:
    """Read the outcomes of a test: of a file, or those of the main experiment in a folder.

    Raises:
        AfaError: if the file has none.
    """
    if path.is_dir():
        path = path_of(path, Experiment.MAIN, FIRST)
    found = read_json(path) if path.is_file() else None
    if found is None or not found.keys() >= _KEYS:
        raise AfaError(
            "AFA-STUDY-018",
            f"'{path}' has no outcomes of a test. Pass docs/results, or one of its files, "
            "such as docs/results/main-main.json.",
        )
    return found


def against_recipe(
    path: Path, published: Mapping[str, Any], output: Path
) -> tuple[EvaluateRecipe, AgainstRecipe]:
    """Read a recipe of `AgainstRecipe`, and complete it to a comparison.

    Args:
        path: of the recipe; paths in it are relative to its own folder.
        published: see `read_published`.
        output: the folder whose `inputs` are written by `write_inputs`.

    Raises:
        AfaError: if the recipe is invalid, a method has the name of a published row, or a model was
            trained on pairs of the test or is of another world, as far as that is recorded.
    """
    asked = read_recipe(path, AgainstRecipe)
    folder = path.parent
    asked = resolve_sources(asked, folder, "experts", "base", "vae", "config", "parts").model_copy(
        update={"methods": [resolve_method(each, folder) for each in asked.methods]}
    )
    names = [method.name for method in asked.methods]
    taken = next((name for name in names if name in published["rows"] or name == REBUILT), None)
    if taken is not None:
        raise AfaError(
            "AFA-STUDY-019", f"The method '{taken}' has the name of a row of the test. Rename it."
        )
    unknown = next((name for name in asked.trained_on if name not in names), None)
    if unknown is not None:
        raise AfaError(
            "AFA-STUDY-020", f"trained_on names '{unknown}', which is no method. Correct its name."
        )
    _require_untested(asked)
    _require_world(asked, published)
    methods = list(asked.methods)
    if asked.base is not None:
        methods.append(MethodRecipe(name=REBUILT, model=[ExpertSource(asked.base)]))
    models = {name: getattr(asked, name) for name in ModelsRecipe.model_fields}
    steps = published["sampling"]["num_steps"]
    drawn = {**sampling(steps), **published["sampling"]}
    content = {**models, "methods": methods, **test_comparison(output / INPUTS, drawn)}
    return validated(content, EvaluateRecipe, path), asked


def _require_untested(asked: AgainstRecipe) -> None:
    """Refuse models that are known to be trained on pairs of the test."""
    for source in _sources(asked):
        seen = source.startswith("zoo:")
        if not seen and (ensemble_folder(source) / "recipe.json").is_file():
            recipe = read_json(ensemble_folder(source) / "recipe.json")
            scenes = (recipe.get("data") or {}).get("scenes") or {}
            seen = bool(scenes) and scenes.get("hold_out") != _HOLD_OUT
            seen |= any("zoo:" in json.dumps(expert) for expert in recipe.get("experts") or [])
        if seen:
            raise AfaError(
                "AFA-STUDY-024",
                f"'{source}' was trained on pairs of objects of the test. Use models of a world "
                f"(afa zoo build DIR --world main), and train with hold_out: {_HOLD_OUT} in the "
                "scenes of the data.",
            )


def _sources(asked: AgainstRecipe) -> Iterator[str]:
    yield from (source.source for source in asked.experts)
    yield from [] if asked.base is None else [asked.base]
    for method in asked.methods:
        yield from (source.source for source in method.model or [])
        yield from method.ensemble or []
        yield from [] if method.drafts is None else [method.drafts.judge.source]


def _require_world(asked: AgainstRecipe, published: Mapping[str, Any]) -> None:
    """Refuse a base of another world; `write_against` says if it cannot be told."""
    found = world_of(asked)
    if found is not None and found != published["description"]:
        raise AfaError(
            "AFA-STUDY-025",
            f"The base '{asked.base}' is of another world than the test, which is of the world "
            f"'{published['world']}'. Build it with afa zoo build DIR --world "
            f"{published['world']}.",
        )


def world_of(asked: AgainstRecipe) -> dict[str, Any] | None:
    """The description of the world of the base; None if it is not in a folder of a world."""
    path = None if asked.base is None else Path(asked.base).expanduser().parent / RECIPE
    return None if path is None or not path.is_file() else read_json(path)


def write_inputs(published: Mapping[str, Any], output: Path) -> None:
    """Write prompts and real scenes of a test, or resume.

    Args:
        published: see `read_published`.
        output: a new folder, or that of an earlier run against the same test.

    Raises:
        AfaError: if the folder has something else.
    """
    prompts: dict[str, list[str]] = {}
    for caption, group in published["prompts"]:
        prompts.setdefault(group, []).append(caption)
    inputs = output / INPUTS
    if not inputs.exists() and not is_unused(output):
        raise AfaError(
            "AFA-STUDY-026",
            f"The folder '{output}' has other files. Pass a new folder as --output.",
        )
    identity = {key: published[key] for key in ("sampling", "num_references", "margin")}
    identity["prompts"] = digest(published["prompts"])
    with owned(output):
        claim = Claim(inputs / "test.json", identity, "the test", (PROMPTS,))
        Store(output).claim([claim])
        write_prompts(inputs / PROMPTS, prompts)
        pairs = pairs_of(prompts[published["mixed"][0]])
        render_scenes(pairs, published["num_references"], inputs / REFERENCES)


def write_against(
    recipe: EvaluateRecipe, asked: AgainstRecipe, published: Mapping[str, Any], output: Path
) -> None:
    """Write the new rows beside the published ones: `against.md`, and `against.json` alone.

    Args:
        recipe: the finished comparison, see `against_recipe`.
        asked: the recipe as it was read.
        published: see `read_published`.
        output: folder of the comparison.
    """
    results = read_results(recipe, output / COMPARISON)
    own = {
        name: {
            **row_of_test(results, name, published["mixed"][0]),
            "budget": {"all": asked.trained_on[name]} if name in asked.trained_on else {},
        }
        for name in results.methods
    }
    content = {**published, "rows": {**published["rows"], **own}}
    outcomes = Outcomes(content, published["margin"], StudySettings.num_resamples)
    lines = ["# New rows in a published test", ""]
    if world_of(asked) is None:
        lines += ["Whether the models are of the test's world is not recorded beside them.", ""]
    if REBUILT in own and "base" in published["rows"]:
        lines += [_rebuilt(outcomes), ""]
    for name in (name for name in own if name != REBUILT):
        lines += [f"## {name}", "", *rows_table(outcomes, name), ""]
    lines += ["## Prompts of one expert", "", *own_table(outcomes), ""]
    lines += ["## Distances from real scenes", "", *sets_table(outcomes), ""]
    write_atomic(output / TABLES, "\n".join(lines))
    write_atomic(output / ROWS, json.dumps({"rows": own}, separators=(",", ":")) + "\n")


def _rebuilt(outcomes: Outcomes) -> str:
    """How far a base that was built again is from the published one."""
    ours, theirs = (outcomes.scores(name, outcomes.groups)[0] for name in (REBUILT, "base"))
    share = float((ours == theirs).mean())
    found = outcomes.compared([REBUILT], "base", outcomes.groups)[REBUILT]
    warning = " **But this base is another model, so the rows cannot be compared.**"
    return (
        f"The base that was built here minus the published one: {signed(found.paired.difference)}, "
        f"{found.verdict}; they agree on {share:.1%} of the prompts. Another "
        "processor rounds differently, so an agreement below 100 % is usual."
        + (warning if found.verdict in ("above", "below") else "")
    )
