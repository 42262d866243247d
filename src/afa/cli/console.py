"""What all commands share of the terminal: messages, progress bars, quiet libraries."""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from afa.studies.zoo_build.fit import FitStep
    from afa.training import TrainStep

    Step = TypeVar("Step", TrainStep, FitStep)

#: names of files and prompts are printed as they are: brackets in them are no markup
console = Console(markup=False, highlight=False)


def say_error(message: str) -> None:
    """One line on standard error."""
    sys.stderr.write(f"afa: error: {printable(message)}\n")


def say_warnings(lines: Iterable[str]) -> None:
    """What a user should know although the work goes on, each on one line."""
    for line in lines:
        console.print(f"warning: {printable(line)}", soft_wrap=True)


def printable(text: str) -> str:
    """A text on one line in which nothing steers the terminal: names in files may be anything."""
    line = " ".join(text.split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)


def progress_bar(*, transient: bool = False) -> Progress:
    """The look of every progress bar; a transient one leaves nothing behind."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=transient,
        disable=transient and not console.is_terminal,
    )


def show_steps(steps: Iterator[Step], name: str) -> None:
    """Run a training to its end under a bar with smoothed loss and speed, one bar a stage."""
    first = next(steps, None)  # before the bar, so that an early mistake prints one line alone
    if first is None:
        return
    with progress_bar() as progress:
        tasks, loss, seconds = {}, 0.0, 0.0
        for step in itertools.chain([first], steps):
            stage = getattr(step, "name", name)
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=step.num_steps, note="")
                loss, seconds = step.loss, step.seconds
            loss += 0.05 * (step.loss - loss)
            seconds += 0.05 * (step.seconds - seconds)
            note = f"loss {loss:.4f}  {1 / max(seconds, 1e-9):.1f} steps/s"
            progress.update(tasks[stage], completed=step.step, note=note)


def require_new_folder(folder: Path) -> None:
    """Refuse an output folder that holds something.

    Raises:
        AfaError: it is a file, or not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AfaError(f"The output folder must be new; '{folder}' exists. Name another one.")
