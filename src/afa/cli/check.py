"""`afa check`: what a recipe names, looked at before any work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from afa.cli.console import console, printable, say
from afa.cli.progress import Progress
from afa.errors import AfaError

if TYPE_CHECKING:
    from afa.loading.planned import Plan
    from afa.preflight.inputs import Inputs
    from afa.preflight.run import Report

_SAID = {"error": "ERROR", "warning": "warning", "note": "note"}
_HOUR, _MINUTE = 3600, 60


def check(
    recipe: Annotated[
        Path, typer.Argument(help="Of afa train, evaluate, search or merge; or an ensemble folder.")
    ],
    weights: Annotated[
        bool, typer.Option("--weights/--no-weights", help="Read all weights, too.")
    ] = True,
    output: Annotated[
        Path | None, typer.Option(help="Folder that the command is to write: may it?")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Open everything a recipe names: do the experts fit each other, and this machine?

    Models, LoRAs and parts, all pictures and captions, prompts, references, metrics. What the
    command of the recipe would refuse is refused here, in the same words. Nothing is written. Exit
    code 2 if anything would keep the work from being done.

    [bold]Example[/bold]: afa check recipe.yaml
    """
    asked = read_any(recipe)
    if asked is None and output is not None:
        raise AfaError(
            "AFA-CLI-004",
            f"--output is for recipes of afa train, evaluate, search and merge; '{recipe}' is an "
            "ensemble, which `afa generate` draws with. Leave --output out.",
        )
    report = look_at(plan_for(recipe, asked, output), with_weights=weights, visible=not as_json)
    inputs = look_at_inputs(asked, output, visible=not as_json)
    from afa.loading.finding import in_order

    report.data = inputs.summary
    report.findings = in_order([*report.findings, *inputs.findings])
    if as_json:
        console.print_json(json.dumps(_as_json(report)), ensure_ascii=True)
    else:
        _show(report)
    if report.errors:
        raise typer.Exit(2)


def read_any(place: Path) -> Any:
    """The recipe of whichever command; None for the folder of an ensemble.

    Raises:
        AfaError: it is no recipe, or a wrong one.
    """
    if place.is_dir() or str(place).startswith("zoo:"):
        return None
    from afa.recipe import read_yaml

    content = read_yaml(place)
    keys = content.keys() if isinstance(content, dict) else ()
    if "training" in keys:
        from afa.training.recipe import load_recipe

        return load_recipe(place)
    if "methods" in keys:
        from afa.evaluation.recipe import load_evaluate_recipe

        return load_evaluate_recipe(place)
    if "metric" in keys:
        from afa.evaluation.search_recipe import load_search_recipe

        return load_search_recipe(place)
    if "method" in keys:
        from afa.merging import load_merge_recipe

        return load_merge_recipe(place)
    raise AfaError(
        "AFA-CLI-005",
        f"A recipe must be one of afa train (with training), evaluate (methods), search (metric) "
        f"or merge (method); '{place}' has none of these keys.",
    )


def plan_for(place: Path, recipe: Any, output: Path | None = None) -> Plan:
    """What a recipe, or an ensemble's folder, would load.

    Args:
        place: of the recipe or the ensemble.
        recipe: from `read_any`.
        output: of a merge, which is looked at with its models; None where nobody has said it.

    Raises:
        AfaError: models that do not merge, or an output where no merge can be written.
    """
    from afa.evaluation.planned import plan_of_evaluation, plan_of_search
    from afa.evaluation.recipe import EvaluateRecipe
    from afa.evaluation.search_recipe import SearchRecipe
    from afa.loading.planned import plan_of_ensemble
    from afa.merging import MergeRecipe, plan_merge
    from afa.merging.planned import plan_of_merge
    from afa.training.planned import plan_of_training
    from afa.training.recipe import Recipe

    if isinstance(recipe, Recipe):
        return plan_of_training(recipe)
    if isinstance(recipe, EvaluateRecipe):
        return plan_of_evaluation(recipe)
    if isinstance(recipe, SearchRecipe):
        return plan_of_search(recipe)
    if isinstance(recipe, MergeRecipe):
        is_file = Path(recipe.experts[0]).is_file()
        free = place.parent / f"afa-check{'.safetensors' if is_file else ''}"
        plan_merge(recipe, output or free)
        return plan_of_merge(recipe)
    import torch

    from afa.training.engine import pick_device

    return plan_of_ensemble(str(place), torch.float32, pick_device("auto"))


def look_at_inputs(recipe: Any, output: Path | None, *, visible: bool = True) -> Inputs:
    """Open what a recipe names besides models, under a bar while pictures are read."""
    from afa.evaluation.recipe import EvaluateRecipe
    from afa.evaluation.search_recipe import SearchRecipe
    from afa.preflight import inputs
    from afa.training.recipe import Recipe

    looks: dict[type, Any] = {
        Recipe: inputs.inputs_of_training,
        EvaluateRecipe: inputs.inputs_of_evaluation,
        SearchRecipe: inputs.inputs_of_search,
    }
    if type(recipe) not in looks:
        return inputs.Inputs()
    with Progress(transient=True, visible=visible) as progress:

        def note(what: str, done: int, total: int) -> None:
            progress.update(f"check {what}", done, total)

        return looks[type(recipe)](recipe, output, note)


def look_at(plan: Plan, *, with_weights: bool = True, visible: bool = True) -> Report:
    """Look, under a bar while weights are read."""
    from afa.preflight.run import look

    with Progress(transient=True, visible=visible) as progress:

        def note(what: str, done: int, total: int) -> None:
            del what
            progress.update("check weights", done >> 20, total >> 20, unit="MiB")

        return look(plan, with_weights=with_weights, progress=note)


def require_sound(plan: Plan, *, with_weights: bool = True) -> None:
    """Look before work, say what may disappoint, and go on only where nothing is wrong.

    Raises:
        AfaError: the first error.
    """
    report = look_at(plan, with_weights=with_weights)
    report.require()
    for finding in report.findings:
        if finding.level == "warning":
            say(f"{_SAID[finding.level]}: {printable(finding.text)}")


def _show(report: Report) -> None:
    from afa.loading.memory.budget import size_text

    table = Table("expert", "family", "numbers", Column("size", justify="right"), box=None)
    for each in report.experts:
        name, size = printable(each.facts.name), size_text(each.manifest.num_bytes)
        table.add_row(name, each.facts.kind.name, each.dtypes, size)
    if report.experts:
        console.print(table)
    for label, found in report.estimates.items():
        say(
            f"{printable(label)}: about {size_text(found.takes)} of memory, "
            f"{size_text(found.free)} are free; {found.num_steps} steps take at least "
            f"{_time(found.seconds)} here"
        )
    for finding in report.findings:
        label = f"{_SAID[finding.level]}  {finding.check} [{finding.code}]"
        say(f"{label}: {printable(finding.text)}")
    if not any(finding.level != "note" for finding in report.findings):
        say("Nothing to say against it.")
    if report.data is not None:
        say(f"Data: {report.data}.")


def _time(seconds: float) -> str:
    if seconds > _HOUR:
        return f"{seconds / _HOUR:.1f} hours"
    return f"{seconds / _MINUTE:.1f} min" if seconds > _MINUTE else f"{seconds:.2g} s"


def _as_json(report: Report) -> dict[str, Any]:
    return {
        "experts": [
            {
                "source": each.facts.name,
                "family": each.facts.kind.name,
                "identity": each.facts.identity,
                "dtypes": each.dtypes,
                "bytes": each.manifest.num_bytes,
            }
            for each in report.experts
        ],
        "estimates": {label: vars(found) for label, found in report.estimates.items()},
        "data": report.data,
        "findings": [vars(finding) for finding in report.findings],
    }
