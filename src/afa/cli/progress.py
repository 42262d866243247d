"""Progress of long commands: bars on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from afa.cli.console import console as standard_output
from afa.cli.console import printable
from afa.cli.signals import surviving_hangup

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console
    from rich.progress import TaskID

#: seconds between two lines of a stage without a terminal
EVERY = 30.0
#: columns of a terminal from which there are a bar, and the elapsed time
_WIDTH_OF_ALL, _WIDTH_OF_TEXT = 130, 90
_WEEK = timedelta(days=6)  # in which a weekday names one day


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
    """Show each stage's progress, speed, remaining time and expected end.

    A terminal shows one bar per stage. A log file or pipe gets one line for the first and the last
    update of each stage, and one line every `EVERY` seconds in between.

    Args:
        visible: False shows nothing; only one of several processes shows progress.
        transient: remove the bars at the end, and print no line for stages that take less than
            `EVERY` seconds.
        console: where to print.
        clock: returns the time in seconds.
        now: returns the local date and time.
    """

    def __init__(
        self,
        *,
        visible: bool = True,
        transient: bool = False,
        console: Console = standard_output,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._visible, self._transient = visible, transient
        self._console, self._clock, self._now = console, clock, now
        self._stages: dict[str, _Stage] = {}
        # a narrow terminal would cut off the numbers
        bar = [BarColumn()] if console.width >= _WIDTH_OF_ALL else []
        elapsed = [TimeElapsedColumn()] if console.width >= _WIDTH_OF_TEXT else []
        self._bars = Bars(
            TextColumn("{task.description}", markup=False),
            *bar,
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            *elapsed,
            console=console,
            transient=transient,
            disable=not (visible and console.is_terminal),
        )

    def __enter__(self) -> Progress:
        return self  # the bars start at the first update, so an early error prints only its line

    def __exit__(self, *raised: object) -> None:
        with surviving_hangup():
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
        if self._visible:
            with surviving_hangup():
                self._update(stage, done, total, note, unit)

    def _update(self, stage: str, done: int, total: int | None, note: str, unit: str) -> None:
        now = self._clock()
        is_new = stage not in self._stages
        shown = self._stages.setdefault(stage, _Stage(now, done, now))
        done_here, seconds = done - shown.first, now - shown.began
        speed = _speed(done_here, seconds, unit)
        left = None
        if total is not None and total > done and speed:
            left = timedelta(seconds=round((total - done) * seconds / done_here))
        times = "" if left is None else f", {left} left{_end(self._now(), left)}"
        text = "  ".join(filter(None, (printable(note), speed + times)))
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


def _end(now: datetime, left: timedelta) -> str:
    """Format the clock time of the expected end; empty if it is less than a minute away."""
    if left < timedelta(minutes=1):
        return ""
    try:
        end = now + left
    except OverflowError:
        return ""
    if end.date() == now.date():
        return f", ends {end:%H:%M}"
    return f", ends {end:%a %H:%M}" if left < _WEEK else f", ends {end:%Y-%m-%d %H:%M}"


def _speed(done: int, seconds: float, unit: str) -> str:
    """Format the speed; empty if nothing was done yet."""
    if done <= 0 or seconds <= 0:
        return ""
    rate = done / seconds
    text = f"{rate:.1f} {unit}/s" if rate >= 1 else f"{1 / rate:.1f} s/{unit.rstrip('s')}"
    if not unit:
        text = f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
    return text
