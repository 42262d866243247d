"""`afa search`: search the block weights of a merge for the best score."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from afa.cli.check import RunCheck, require_sound
from afa.cli.console import say, say_warnings
from afa.cli.progress import Progress
from afa.machine.quiet import quieten_loading


def search(
    recipe: Annotated[Path, typer.Argument(help="YAML file: experts, prompts, metric.")],
    output: Annotated[Path, typer.Option(help="New folder, or that of a run to resume.")],
    run_check: RunCheck = True,
) -> None:
    """Search the block weights of a merge for the best score of a metric (autoMBW).

    Run the same command again to resume.

    [bold]Example[/bold]: afa search recipe.yaml --output runs/search
    """
    from afa.evaluation.planned import plan_of_search
    from afa.evaluation.prompts import load_prompts, source_warnings
    from afa.evaluation.search import search_block_weights
    from afa.evaluation.search_recipe import load_search_recipe
    from afa.loading.prompt_warnings import warnings_of_plan

    checked = load_search_recipe(recipe)
    quieten_loading()
    plan = plan_of_search(checked)
    if run_check:
        require_sound(plan)
    prompts = [prompt.text for prompt in load_prompts(checked.prompts)]
    say_warnings(source_warnings(checked.prompts))
    sampling = checked.sampling
    syntax, negative = sampling.prompt_syntax, sampling.negative_prompt
    say_warnings(warnings_of_plan(plan, prompts, negative, sampling.guidance, syntax))
    with Progress() as progress:
        progress.update("search", 0, checked.num_trials, unit="trials")
        for trial in search_block_weights(checked, output):
            note = f"score {trial.score:.4f}  best {trial.best:.4f}"
            progress.update("search", trial.number, checked.num_trials, note, "trials")
    say(f"Best weights in {output}/merge.yaml. Try: afa merge {output}/merge.yaml --output merged")
