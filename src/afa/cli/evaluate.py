"""`afa evaluate`: compare all methods of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from afa.cli.check import RunCheck, require_sound
from afa.cli.console import say, say_warnings
from afa.cli.progress import Progress
from afa.machine.quiet import quieten_loading

if TYPE_CHECKING:
    from afa.evaluation.recipe import EvaluateRecipe


def evaluate(
    recipe: Annotated[Path, typer.Argument(help="YAML file: prompts, methods, metrics.")],
    output: Annotated[Path, typer.Option(help="New folder, or that of a run to resume.")],
    against: Annotated[
        Path | None,
        typer.Option(help="Outcomes of a published test, whose prompts and rows are used."),
    ] = None,
    run_check: RunCheck = True,
) -> None:
    """Compare methods of combining experts on the same prompts and the same initial noise.

    Run the same command again to resume. You may add methods, metrics and seeds to the recipe in
    between. Several processes: accelerate launch -m afa evaluate ...

    With --against, the recipe only has models and methods, which enter a test of the study.

    [bold]Example[/bold]: afa evaluate recipe.yaml --output runs/comparison
    """
    if against is not None:
        _evaluate_against(recipe, output, against, run_check=run_check)
        return
    from afa.evaluation.recipe import load_evaluate_recipe

    _evaluate(load_evaluate_recipe(recipe), output, run_check=run_check)


def _evaluate_against(recipe: Path, output: Path, against: Path, *, run_check: bool) -> None:
    """Compare in a published test; see `afa.studies.results.against`."""
    from afa.machine.processes import Processes
    from afa.studies.results.against import (
        COMPARISON,
        TABLES,
        against_recipe,
        read_published,
        write_against,
        write_inputs,
    )

    published, processes = read_published(against), Processes()
    checked, asked = against_recipe(recipe, published, output)
    if processes.is_main:
        write_inputs(published, output)
    processes.wait()
    if _evaluate(checked, output / COMPARISON, run_check=run_check):
        write_against(checked, asked, published, output)
        say(f"The new rows beside those of '{against}': {output / TABLES}")


def _evaluate(checked: EvaluateRecipe, output: Path, *, run_check: bool) -> bool:
    """Compare, and show the progress; returns whether this is the main process."""
    from afa.evaluation.planned import plan_of_evaluation
    from afa.evaluation.run import evaluate as run
    from afa.machine.processes import Processes

    quieten_loading()
    is_main = Processes().is_main
    if is_main and run_check:
        require_sound(plan_of_evaluation(checked))
    with Progress(visible=is_main) as progress:
        for event in run(checked, output):
            if is_main:
                say_warnings(event.notes)
            progress.update(event.stage, event.done, event.total, event.note)
    if is_main:
        say(f"Report, tables and figures in {output}: report.md, report.json, scores.csv")
    return is_main
