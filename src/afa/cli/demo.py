"""`afa demo`: train and compare an ensemble of the bundled experts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from afa.cli.console import console, require_new_folder, say
from afa.cli.progress import Progress
from afa.machine.quiet import quieten_loading
from afa.recipe import MAX_SEED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from afa.studies.demo import Row


def demo(
    output: Annotated[Path, typer.Option(help="New folder for the report and the pictures.")],
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Seed of the training and the pictures.")
    ] = 0,
) -> None:
    """Train an ensemble of the bundled experts for minutes, and compare it with simple baselines.

    [bold]Example[/bold]: afa demo --output runs/demo
    """
    require_new_folder(output)
    from afa.studies.demo import DemoSettings, read_rows, run_demo, verdict

    quieten_loading()
    with Progress() as progress:
        for event in run_demo(output, DemoSettings(seed=seed)):
            progress.update(event.stage, event.done, event.total, event.note)
    rows = read_rows(output / "comparison")
    console.print(_table(rows))
    say(verdict(rows))
    say(
        f"Report, pictures.png and weights.png in {output}. Try: afa generate {output}/ensemble "
        "'a fox on the left and a pizza on the right, blue background' --output pictures"
    )


def _table(rows: Sequence[Row]) -> Table:
    from afa.studies.demo import OURS

    table = Table(title="Mixed prompts: the right object on the right side")
    for column in ("method", "both", "objects", "seconds per image"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in sorted(rows, key=lambda row: row.both.mean):
        style = "bold" if row.method in OURS else None
        seconds = f"{row.seconds_per_image:.2f}"
        table.add_row(row.method, str(row.both), str(row.objects), seconds, style=style)
    return table
