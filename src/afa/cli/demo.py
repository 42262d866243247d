"""`afa demo`: the main job on the embedded default, with a table and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from afa.cli.console import console, progress_bar, require_new_folder
from afa.machine.quiet import quieten_loading
from afa.recipe import MAX_SEED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.progress import TaskID

    from afa.studies.demo import Row


def demo(
    output: Annotated[Path, typer.Option(help="New folder for the report and the pictures.")],
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Of the training and of the pictures.")
    ] = 0,
) -> None:
    """Train an ensemble of the zoo's experts for minutes; compare it with simple other ways.

    [bold]Example[/bold]: afa demo --output runs/demo
    """
    require_new_folder(output)
    from afa.studies.demo import DemoSettings, Row, run_demo, verdict

    quieten_loading()

    rows: list[Row] = []
    with progress_bar() as progress:
        tasks: dict[str, TaskID] = {}
        for event in run_demo(output, DemoSettings(seed=seed)):
            if isinstance(event, Row):
                rows.append(event)
                continue
            if event.stage not in tasks:
                tasks[event.stage] = progress.add_task(event.stage, total=event.total, note="")
            progress.update(tasks[event.stage], completed=event.done, note=event.note)
    console.print(_table(rows))
    console.print(verdict(rows))
    console.print(
        f"Report, pictures.png and weights.png in {output}. Try: afa generate {output}/ensemble "
        "'a fox on the left and a pizza on the right, blue background' --output pictures"
    )


def _table(rows: Sequence[Row]) -> Table:
    from afa.studies.demo import OURS

    table = Table(title="Mixed prompts: the right object on the right side")
    for column in ("method", "both", "objects", "seconds per image"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in sorted(rows, key=lambda row: row.score.both.mean):
        score = row.score
        style = "bold" if row.method in OURS else None
        seconds = f"{score.seconds_per_image:.2f}"
        table.add_row(row.method, str(score.both), str(score.objects), seconds, style=style)
    return table
