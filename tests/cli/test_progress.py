"""Progress without a terminal: plain lines with step, total, speed and time left."""

from __future__ import annotations

import io
import re
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from rich.console import Console

from afa.cli.progress import EVERY, Progress, _end
from tests import warm


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


NOON = datetime(2026, 11, 30, 12, 0, 30)


def log(*, terminal: bool = False) -> tuple[Console, io.StringIO]:
    written = io.StringIO()
    return Console(file=written, force_terminal=terminal, width=60, markup=False), written


def test_a_log_has_the_first_and_the_last_update_and_one_line_every_half_minute() -> None:
    console, written = log()
    clock = Clock()
    with Progress(console=console, clock=clock, now=lambda: NOON) as progress:
        for step in range(101):
            progress.update("train", step, 100, f"loss {step / 100:.2f}", "steps")
            clock.now += 2.0
    assert EVERY == 30.0
    assert written.getvalue().splitlines() == [
        "train: 0/100 steps, loss 0.00",
        *(
            f"train: {step}/100 steps, loss {step / 100:.2f}  2.0 s/step, {left}"
            for step, left in (
                (15, "0:02:50 left, ends 12:03"),
                (30, "0:02:20 left, ends 12:02"),
                (45, "0:01:50 left, ends 12:02"),
                (60, "0:01:20 left, ends 12:01"),
                (75, "0:00:50 left"),
                (90, "0:00:20 left"),
            )
        ),
        "train: 100/100 steps, loss 1.00  2.0 s/step",
    ]


def test_speed_counts_from_where_this_run_began() -> None:
    console, written = log()
    clock = Clock()
    with Progress(console=console, clock=clock, now=lambda: NOON) as progress:
        progress.update("train", 5000, 6000, unit="steps")  # an earlier run's steps took no time
        clock.now = EVERY
        progress.update("train", 5300, 6000, unit="steps")
    line = "train: 5300/6000 steps, 10.0 steps/s, 0:01:10 left, ends 12:01"
    assert written.getvalue().splitlines()[1] == line


@pytest.mark.parametrize(
    ("left", "said"),
    [
        (timedelta(hours=3), ", ends 15:00"),
        (timedelta(hours=13), ", ends Tue 01:00"),
        (timedelta(days=5), ", ends Sat 12:00"),
        (timedelta(days=7), ", ends 2026-12-07 12:00"),
        (timedelta(seconds=59), ""),
        (timedelta(days=99999999), ""),
    ],
)
def test_the_expected_end(left: timedelta, said: str) -> None:
    assert _end(NOON, left) == said


def test_every_stage_has_its_own_lines_and_an_unknown_total_is_left_out() -> None:
    console, written = log()
    with Progress(console=console, clock=Clock()) as progress:
        progress.update("hash", 3, None, unit="MB")
        progress.update("merge", 1, 1, "2/2 tensors", "MB")
    assert written.getvalue().splitlines() == ["hash: 3 MB", "merge: 1/1 MB, 2/2 tensors"]


def test_a_transient_stage_says_nothing_before_it_has_taken_long() -> None:
    console, written = log()
    clock = Clock()
    now = lambda: NOON  # noqa: E731
    with Progress(transient=True, console=console, clock=clock, now=now) as progress:
        progress.update("check weights", 0, 4)
        progress.update("check weights", 4, 4)
        said = written.getvalue()
        clock.now = EVERY
        progress.update("check references", 1, 9)
        clock.now = 2 * EVERY
        progress.update("check references", 2, 9)
    assert said == ""
    assert written.getvalue() == "check references: 2/9, 30.0 s each, 0:03:30 left, ends 12:04\n"


def test_other_processes_show_nothing() -> None:
    console, written = log()
    with Progress(visible=False, console=console) as progress:
        progress.update("train", 1, 1)
    assert written.getvalue() == ""


def test_a_terminal_has_one_bar_a_stage() -> None:
    console, written = log(terminal=True)
    with Progress(console=console, clock=Clock()) as progress:
        progress.update("encode", 1, 2)
        progress.update("train", 3, 4, "loss 0.10")
    shown = written.getvalue()
    assert "encode" in shown
    assert "3/4" in shown
    assert "loss 0.10" in shown
    assert "train: " not in shown


def test_nothing_is_shown_of_a_command_that_fails_before_its_first_update() -> None:
    console, written = log(terminal=True)
    with Progress(console=console):
        pass
    assert written.getvalue() == ""


@pytest.mark.processes
def test_the_log_of_a_command_without_a_terminal(tmp_path: Path) -> None:
    folder = (
        tmp_path / "a folder whose name is so long that eighty columns cannot hold the last line"
    )
    code, out, err = warm.run(
        ["generate", "zoo:ensemble", "a fox", "a bee", "--output", folder, "--steps", "2"],
    )
    assert (code, err) == (0, "")
    first, *_, last, said = out.splitlines()
    assert first == "generate: 0/4 steps, picture 1 of 2"
    assert re.fullmatch(r"generate: 4/4 steps, picture 2 of 2  [0-9.]+ \S+", last)
    assert said == f"2 pictures in {folder}"
