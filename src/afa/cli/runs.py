"""`afa runs`: list the runs in a folder."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from afa.cli.console import printable, say

if TYPE_CHECKING:
    from afa.cli.run_folders import Run

_TITLES = ("run", "kind", "state", "step", "loss", "validation", "checkpoints", "size", "changed")


def runs(
    folder: Annotated[Path, typer.Argument(help="Folder with runs, also in subfolders.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List trainings, distillations, evaluations and searches, and how far each is.

    The validation loss is the last one, with the lowest in brackets. Nothing is changed, and runs
    may be in progress.

    [bold]Example[/bold]: afa runs runs
    """
    from afa.errors import AfaError

    if not folder.is_dir():
        raise AfaError(
            "AFA-CLI-045", f"'{folder}' is not a folder; it must contain runs. Pass their folder."
        )

    from afa.cli.run_folders import find_runs

    found = list(find_runs(folder))
    if as_json:
        say(json.dumps([asdict(run) for run in found], indent=2))
        return
    if not found:
        say(f"No runs in '{folder}'.")
        return
    rows = [_TITLES, *(_row(run, folder) for run in found)]
    widths = [max(len(row[n]) for row in rows) for n in range(len(_TITLES))]
    for row in rows:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for run in found:
        if run.error is not None:
            say(f"broken: {printable(run.error)}")


def _row(run: Run, folder: Path) -> tuple[str, ...]:
    """Format a run as the cells of a row."""
    name = os.path.relpath(run.path, folder)
    validation = _number(run.validation_loss)
    if run.validation_loss != run.lowest_validation_loss:
        validation += f" ({_number(run.lowest_validation_loss)})"
    step = "-" if run.step is None else f"{run.step:,}"
    if run.num_steps is not None:
        step += f"/{run.num_steps:,}"
    return (
        printable(str(folder) if name == os.curdir else name),
        run.kind,
        run.state,
        step,
        _number(run.loss),
        validation,
        _listed(run.checkpoints),
        _size(run.num_bytes),
        run.changed.replace("T", " ")[:-3],
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _listed(steps: list[int]) -> str:
    if len(steps) > 3:
        return f"{len(steps)}: {steps[0]} to {steps[-1]}"
    return " ".join(map(str, steps)) or "-"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
