"""`afa check`: check everything that a recipe names before any work starts."""

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

_LABELS = {"error": "ERROR", "warning": "warning", "note": "note"}
#: the option of the commands that run the check themselves
RunCheck = Annotated[
    bool, typer.Option("--check/--no-check", help="Run the checks of afa check first.")
]
_HOUR, _MINUTE = 3600, 60


def check(
    recipe: Annotated[
        Path,
        typer.Argument(
            help="Recipe of afa train, distill, evaluate, search or merge; or an ensemble."
        ),
    ],
    weights: Annotated[
        bool, typer.Option("--weights/--no-weights", help="Also read all weights.")
    ] = True,
    output: Annotated[
        Path | None, typer.Option(help="Also check this output folder of the command.")
    ] = None,
    sheet: Annotated[
        Path | None,
        typer.Option(help="PNG file to write: training pictures with their crops and captions."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check whether the experts of a recipe fit each other and this machine.

    Opens all models, LoRAs, parts, pictures, captions, prompts, references and metrics. Reports
    the errors that the recipe's command would raise. Writes nothing but the --sheet. Exits with
    code 2 if there is an error.

    [bold]Example[/bold]: afa check recipe.yaml
    """
    asked = read_any(recipe)
    if asked is None and output is not None:
        raise AfaError(
            "AFA-CLI-004",
            "--output only applies to recipes of afa train, distill, evaluate, search and merge; "
            f"got the ensemble '{recipe}'. Remove --output.",
        )
    if sheet is not None:
        from afa.preflight.sheet import require_sheet

        require_sheet(asked, sheet)
    report = look_at(plan_for(recipe, asked, output), with_weights=weights, visible=not as_json)
    inputs = look_at_inputs(asked, output, visible=not as_json)
    from afa.loading.finding import in_order

    report.data, report.details = inputs.summary, inputs.details
    report.findings = in_order([*report.findings, *inputs.findings])
    if as_json:
        console.print_json(json.dumps(_as_json(report)), ensure_ascii=True)
    else:
        _show(report)
    if sheet is not None and inputs.transform is not None and inputs.has_data:
        from afa.preflight.sheet import write_sheet

        count = write_sheet(asked, inputs.details, inputs.transform, sheet)
        if not as_json:
            say(f"Sheet of {count} pictures: {printable(str(sheet))}")
    if report.errors:
        raise typer.Exit(2)


def read_any(place: Path) -> Any:
    """Load a recipe of any command; returns None for an ensemble.

    Raises:
        AfaError: if it is not a valid recipe.
    """
    if place.is_dir() or str(place).startswith("zoo:"):
        return None
    from afa.recipe import read_yaml

    content = read_yaml(place)
    keys = content.keys() if isinstance(content, dict) else ()
    if "teacher" in keys:
        from afa.distilling.recipe import load_distill_recipe

        return load_distill_recipe(place)
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
        f"'{place}' has none of the keys that identify a recipe: training (afa train), teacher "
        "(distill), methods (evaluate), metric (search) or method (merge). Add the one of your "
        "command.",
    )


def plan_for(place: Path, recipe: Any, output: Path | None = None) -> Plan:
    """List what a recipe or an ensemble would load.

    Args:
        place: path of the recipe, or the ensemble's folder or bundled name.
        recipe: the result of `read_any`.
        output: output of a merge; None checks the merge without it.

    Raises:
        AfaError: if the models cannot be merged, or the merge cannot be written to `output`.
    """
    from afa.distilling.planned import plan_of_distillation
    from afa.distilling.recipe import DistillRecipe
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
    if isinstance(recipe, DistillRecipe):
        return plan_of_distillation(recipe)
    if isinstance(recipe, EvaluateRecipe):
        return plan_of_evaluation(recipe)
    if isinstance(recipe, SearchRecipe):
        return plan_of_search(recipe)
    if isinstance(recipe, MergeRecipe):
        is_file = Path(recipe.experts[0]).is_file()
        unused = place.parent / f"afa-check{'.safetensors' if is_file else ''}"
        plan_merge(recipe, output or unused)
        return plan_of_merge(recipe)
    import torch

    from afa.training.engine import pick_device

    return plan_of_ensemble(str(place), torch.float32, pick_device("auto"))


def look_at_inputs(recipe: Any, output: Path | None, *, visible: bool = True) -> Inputs:
    """Check everything that a recipe names except models, and show progress."""
    from afa.distilling.recipe import DistillRecipe
    from afa.evaluation.recipe import EvaluateRecipe
    from afa.evaluation.search_recipe import SearchRecipe
    from afa.preflight import inputs
    from afa.training.recipe import Recipe

    checks: dict[type, Any] = {
        DistillRecipe: inputs.inputs_of_distillation,
        Recipe: inputs.inputs_of_training,
        EvaluateRecipe: inputs.inputs_of_evaluation,
        SearchRecipe: inputs.inputs_of_search,
    }
    if type(recipe) not in checks:
        return inputs.Inputs()
    with Progress(transient=True, visible=visible) as progress:

        def note(stage: str, done: int, total: int) -> None:
            progress.update(f"check {stage}", done, total)

        return checks[type(recipe)](recipe, output, note)


def look_at(plan: Plan, *, with_weights: bool = True, visible: bool = True) -> Report:
    """Check the models of a plan, and show progress while weights are read."""
    from afa.preflight.run import look

    with Progress(transient=True, visible=visible) as progress:

        def note(_: str, done: int, total: int) -> None:
            progress.update("check weights", done >> 20, total >> 20, unit="MiB")

        return look(plan, with_weights=with_weights, progress=note)


def require_sound(plan: Plan, *, with_weights: bool = True) -> None:
    """Check the models of a plan before work starts, and print warnings.

    Raises:
        AfaError: the first error that the check finds.
    """
    report = look_at(plan, with_weights=with_weights)
    report.require()
    for finding in report.findings:
        if finding.level == "warning":
            say(f"{_LABELS[finding.level]}: {printable(finding.text)}")


def _show(report: Report) -> None:
    from afa.loading.memory.budget import size_text

    table = Table("expert", "family", "dtypes", Column("size", justify="right"), box=None)
    for each in report.experts:
        name, size = printable(each.facts.name), size_text(each.manifest.num_bytes)
        table.add_row(name, each.facts.kind.name, each.dtypes, size)
    if report.experts:
        console.print(table)
    for label, found in report.estimates.items():
        say(
            f"{printable(label)}: needs about {size_text(found.takes)} of memory, "
            f"{size_text(found.free)} free; {found.num_steps} steps take at least "
            f"{_time(found.seconds)} on this machine"
        )
    for finding in report.findings:
        label = f"{_LABELS[finding.level]}  {finding.check} [{finding.code}]"
        say(f"{label}: {printable(finding.text)}")
    if not any(finding.level != "note" for finding in report.findings):
        say("No errors or warnings.")
    if report.details is not None:
        for line in report.details.lines():
            say(printable(line))
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
        "data_details": None if report.details is None else report.details.as_json(),
        "findings": [vars(finding) for finding in report.findings],
    }
