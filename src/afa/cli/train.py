"""`afa train`: a recipe to an ensemble folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from afa.cli.console import console, quieten_loading, show_steps


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file: experts, data, aggregator, training.")],
    output: Annotated[Path, typer.Option(help="New folder, or one of an earlier run to go on.")],
) -> None:
    """Train the aggregators of an ensemble; the experts stay frozen.

    The same command goes on where an earlier run was stopped.

    [bold]Example[/bold]: afa train recipe.yaml --output runs/first
    """
    from afa.recipe import load_recipe

    checked = load_recipe(recipe)

    from afa.training import train as train_ensemble

    quieten_loading()
    show_steps(train_ensemble(checked, output), "train")
    console.print(f"Ensemble in {output}. Try: afa generate {output} 'a prompt' --output pictures")
