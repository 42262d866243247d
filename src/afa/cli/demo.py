"""`afa demo`: the main job on the embedded default, with a table and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from afa.cli.console import console, require_new_folder


def demo(
    output: Annotated[Path, typer.Option(help="New folder for the report and the pictures.")],
    seed: Annotated[int, typer.Option(min=0, help="Of the training and of the pictures.")] = 0,
) -> None:
    """Train an ensemble of the zoo's experts for minutes and compare it with its rivals.

    [bold]Example[/bold]: afa demo --output runs/demo
    """
    require_new_folder(output)
    from afa.demo import run_demo

    run_demo(output, console=console, seed=seed)
