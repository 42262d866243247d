"""Methods of others in a published test: its prompts and its noise, beside its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from afa.errors import AfaError
from afa.evaluation.recipe import EvaluateRecipe, MethodRecipe, ModelsRecipe, resolve_method
from afa.evaluation.results import read_results
from afa.files import read_json, write_atomic
from afa.loading.expert_source import ExpertSource
from afa.recipe import read_recipe, resolve_sources
from afa.studies.evidence.analysis import Outcomes
from afa.studies.evidence.comparison import REFERENCES, test_comparison
from afa.studies.evidence.drawn import pairs_of, render_scenes
from afa.studies.evidence.outcomes import row_of_test
from afa.studies.evidence.page import own_table, rows_table, sets_table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from afa.studies.evidence.settings import EvidenceSettings

#: parts of the output folder: inputs of the test, the comparison, and both results
INPUTS, COMPARISON, TABLES, ROWS = "inputs", "comparison", "against.md", "against.json"
#: the base as this machine built it, beside the published row `base`
REBUILT = "base, rebuilt"


class AgainstRecipe(ModelsRecipe):
    """Methods that enter a published test, which sets prompts, sampling and metrics.

    Attributes:
        methods: as in a recipe of `afa evaluate`.
        trained_on: by method, all pictures on which its models were trained, with repetitions:
            those of base and experts included. Methods without it are shown as unknown.
    """

    methods: list[MethodRecipe] = Field(min_length=1)
    trained_on: dict[str, int] = Field(default={})


def read_published(path: Path) -> dict[str, Any]:
    """Read the outcomes of a test.

    Raises:
        AfaError: if the file has none.
    """
    found = read_json(path) if path.is_file() else None
    if found is None or not {"prompts", "mixed", "rows"} <= found.keys():
        raise AfaError(
            "AFA-STUDY-018",
            f"'{path}' has no outcomes of a test. Pass a file of docs/evidence, such as "
            "docs/evidence/main-main.json.",
        )
    return found


def against_recipe(
    path: Path, published: Mapping[str, Any], output: Path, settings: EvidenceSettings
) -> tuple[EvaluateRecipe, AgainstRecipe]:
    """Read a recipe of `AgainstRecipe`, and complete it to a comparison; writes its inputs.

    Args:
        path: of the recipe; paths in it are relative to its own folder.
        published: see `read_published`.
        output: gets prompts and real scenes in `inputs`.
        settings: of the study.

    Raises:
        AfaError: if the recipe is invalid, or a method has the name of a published row.
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
    methods = list(asked.methods)
    if asked.base is not None:
        methods.append(MethodRecipe(name=REBUILT, model=[ExpertSource(asked.base)]))
    prompts: dict[str, list[str]] = {}
    for caption, group in published["prompts"]:
        prompts.setdefault(group, []).append(caption)
    inputs = output / INPUTS
    inputs.mkdir(parents=True, exist_ok=True)
    mixed = [caption for group in published["mixed"] for caption in prompts[group]]
    render_scenes(pairs_of(mixed), settings.num_references, inputs / REFERENCES)
    models = {name: getattr(asked, name) for name in ModelsRecipe.model_fields}
    content = {**models, "methods": methods, **test_comparison(inputs, prompts, settings)}
    return EvaluateRecipe.model_validate(content), asked


def write_against(
    recipe: EvaluateRecipe,
    asked: AgainstRecipe,
    published: Mapping[str, Any],
    output: Path,
    settings: EvidenceSettings,
) -> None:
    """Write the new rows beside the published ones: `against.md`, and `against.json` alone.

    Args:
        recipe: the finished comparison, see `against_recipe`.
        asked: the recipe as it was read.
        published: see `read_published`.
        output: folder of the comparison.
        settings: of the study.
    """
    results = read_results(recipe, output / COMPARISON)
    own = {
        name: {
            **row_of_test(results, name, published["mixed"][0]),
            "budget": {"all": asked.trained_on[name]} if name in asked.trained_on else {},
        }
        for name in results.methods
    }
    if REBUILT in own and "base" in published["rows"]:
        own[REBUILT]["budget"] = published["rows"]["base"]["budget"]
    content = {**published, "rows": {**published["rows"], **own}}
    outcomes = Outcomes(content, settings.margin, settings.num_resamples)
    lines = ["# New rows in a published test", ""]
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
    return (
        f"The base that was built here is right in {ours.mean():.3f} of all prompts, the published "
        f"one in {theirs.mean():.3f}; they agree on {share:.1%} of the prompts. Models that are "
        "built on another machine differ in their last digits, so an agreement below 100 % is "
        "usual; a clearly different share of right pictures is not."
    )
