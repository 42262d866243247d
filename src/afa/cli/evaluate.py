"""`afa evaluate`: compare all methods of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from afa.cli.check import RunCheck, require_sound
from afa.cli.console import say, say_warnings
from afa.cli.progress import Progress
from afa.machine.quiet import quieten_loading


def evaluate(
    recipe: Annotated[Path, typer.Argument(help="YAML file: prompts, methods, metrics.")],
    output: Annotated[Path, typer.Option(help="New folder, or that of a run to resume.")],
    run_check: RunCheck = True,
) -> None:
    """Compare methods of combining experts on the same prompts and the same initial noise.

    Run the same command again to resume. You may add methods, metrics and seeds to the recipe in
    between. Several processes: accelerate launch -m afa evaluate ...

    [bold]Example[/bold]: afa evaluate recipe.yaml --output runs/comparison
    """
    from afa.evaluation.recipe import load_evaluate_recipe

    checked = load_evaluate_recipe(recipe)

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
