"""Ctrl-C and SIGTERM: finish the step, save, then stop."""

from __future__ import annotations

import signal
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType


_SAME = 2.0  # seconds within which a signal is the echo of another


class Stopped(Exception):
    """A training was asked to stop, and has saved.

    Attributes:
        step: how many steps are done and saved.
        num_steps: how many were asked for.
    """

    def __init__(self, step: int, num_steps: int) -> None:
        super().__init__(f"stopped after step {step} of {num_steps}")
        self.step, self.num_steps = step, num_steps


class StopRequest:
    """Whether someone has asked to stop; `signal` is the number of the signal that did."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.time = 0.0

    def __call__(self) -> bool:
        """Whether to stop now."""
        return self.signal is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGINT or SIGTERM into a request; another one, later, acts as it always does.

    A launcher passes on what its processes have got already, so one that follows at once is the
    same. For the main thread of a program, around a training that asks after each step.
    """
    request = StopRequest()
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}

    def note(number: int, frame: FrameType | None) -> None:
        if request.signal is None:
            request.signal, request.time = number, time.monotonic()
        elif time.monotonic() - request.time > _SAME:
            restore()
            signal.raise_signal(number)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in signals:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
