"""Progress of long commands: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from afa.cli.console import console as standard_output
from afa.cli.console import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console
    from rich.progress import TaskID

#: seconds between two lines of a stage where there is no terminal
EVERY = 30.0


@dataclass
class _Stage:
    """One stage of a command.

    Attributes:
        began: seconds of the clock at its first update.
        first: what was done then, by an earlier run.
        said: seconds of the clock at its last line.
        bar: on a terminal.
    """

    began: float
    first: int
    said: float
    bar: TaskID | None = None


class Progress:
    """Show how far each stage of a command is, its speed and the time left.

    On a terminal every stage has a bar. Elsewhere (a log file, a pipe, nohup) every stage has a
    plain line at its first and last update, and one every `EVERY` seconds between.

    Args:
        visible: False shows nothing: of several processes, one shows progress.
        transient: leave nothing behind. Bars are removed at the end, and a stage has no line
            before `EVERY` seconds are over.
        console: where to print.
        clock: seconds.
    """

    def __init__(
        self,
        *,
        visible: bool = True,
        transient: bool = False,
        console: Console = standard_output,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._visible, self._transient = visible, transient
        self._console, self._clock = console, clock
        self._stages: dict[str, _Stage] = {}
        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            transient=transient,
            disable=not (visible and console.is_terminal),
        )

    def __enter__(self) -> Progress:
        return self  # the bars start at the first update: an early error is then one line alone

    def __exit__(self, *raised: object) -> None:
        self._bars.stop()

    def update(
        self, stage: str, done: int, total: int | None = None, note: str = "", unit: str = ""
    ) -> None:
        """Show how much of a stage is done.

        Args:
            stage: what is done; a new name is a new bar.
            done: how much of it.
            total: of how much; None where that is not known yet.
            note: shown beside it.
            unit: of `done`, such as "steps".
        """
        if not self._visible:
            return
        now = self._clock()
        shown = self._stages.get(stage)
        is_new = shown is None
        if shown is None:
            shown = self._stages[stage] = _Stage(now, done, now)
        speed = _speed(done - shown.first, now - shown.began, total and total - done, unit)
        said = "  ".join(filter(None, (printable(note), speed)))
        if not self._bars.disable:
            if shown.bar is None:
                self._bars.start()
                shown.bar = self._bars.add_task(stage, total=total, note=said)
            self._bars.update(shown.bar, completed=done, total=total, note=said)
            return
        is_end = not self._transient and (is_new or done == total)
        if is_end or now - shown.said >= EVERY:
            shown.said = now
            of = "" if total is None else f"/{total}"
            line = f"{stage}: {done}{of} {unit}".rstrip() + (f", {said}" if said else "")
            self._console.print(line, soft_wrap=True)


def _speed(done: int, seconds: float, left: int | None, unit: str) -> str:
    """The speed and the time left as text; empty where nothing was done yet."""
    if done <= 0 or seconds <= 0:
        return ""
    rate = done / seconds
    text = f"{rate:.1f} {unit}/s" if rate >= 1 else f"{1 / rate:.1f} s/{unit.rstrip('s')}"
    if not unit:
        text = f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
    return f"{text}, {timedelta(seconds=round(left / rate))} left" if left else text
