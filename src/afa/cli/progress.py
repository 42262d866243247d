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

#: seconds between two lines of a stage without a terminal
EVERY = 30.0


@dataclass
class _Stage:
    """One stage of a command.

    Attributes:
        began: clock time of its first update, in seconds.
        first: amount that an earlier run had done by then.
        last_line: clock time of its last line, in seconds.
        bar: its bar on a terminal.
    """

    began: float
    first: int
    last_line: float
    bar: TaskID | None = None


class Progress:
    """Show each stage's progress, speed and remaining time.

    A terminal shows one bar per stage. A log file or pipe gets one line for the first and the last
    update of each stage, and one line every `EVERY` seconds in between.

    Args:
        visible: False shows nothing; only one of several processes shows progress.
        transient: remove the bars at the end, and print no line for stages that take less than
            `EVERY` seconds.
        console: where to print.
        clock: returns the time in seconds.
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
        return self  # the bars start at the first update, so an early error prints only its line

    def __exit__(self, *raised: object) -> None:
        self._bars.stop()

    def update(
        self, stage: str, done: int, total: int | None = None, note: str = "", unit: str = ""
    ) -> None:
        """Show how much of a stage is done.

        Args:
            stage: name of the stage; a new name starts a new bar.
            done: completed amount.
            total: total amount; None if it is not known yet.
            note: text beside the bar.
            unit: unit of `done`, such as "steps".
        """
        if not self._visible:
            return
        now = self._clock()
        is_new = stage not in self._stages
        shown = self._stages.setdefault(stage, _Stage(now, done, now))
        speed = _speed(done - shown.first, now - shown.began, total and total - done, unit)
        text = "  ".join(filter(None, (printable(note), speed)))
        if not self._bars.disable:
            if shown.bar is None:
                self._bars.start()
                shown.bar = self._bars.add_task(stage, total=total, note=text)
            self._bars.update(shown.bar, completed=done, total=total, note=text)
            return
        is_end = not self._transient and (is_new or done == total)
        if is_end or now - shown.last_line >= EVERY:
            shown.last_line = now
            of = "" if total is None else f"/{total}"
            line = f"{stage}: {done}{of} {unit}".rstrip() + (f", {text}" if text else "")
            self._console.print(line, soft_wrap=True)


def _speed(done: int, seconds: float, left: int | None, unit: str) -> str:
    """Format the speed and the remaining time; empty if nothing was done yet."""
    if done <= 0 or seconds <= 0:
        return ""
    rate = done / seconds
    text = f"{rate:.1f} {unit}/s" if rate >= 1 else f"{1 / rate:.1f} s/{unit.rstrip('s')}"
    if not unit:
        text = f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
    return f"{text}, {timedelta(seconds=round(left / rate))} left" if left else text
