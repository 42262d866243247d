"""Stop a training on Ctrl-C, SIGTERM or SIGHUP after the step is finished and saved."""

from __future__ import annotations

import signal
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType


_SAME = 2.0  # seconds within which a second signal is ignored


class Stopped(Exception):
    """A training stopped on request, after saving.

    Attributes:
        step: number of steps that are done and saved.
        num_steps: total number of steps.
    """

    def __init__(self, step: int, num_steps: int) -> None:
        super().__init__(f"stopped after step {step} of {num_steps}")
        self.step, self.num_steps = step, num_steps


class StopRequest:
    """A request to stop; `signal` is the number of the received signal, or None."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.time = 0.0

    def __call__(self) -> bool:
        """Whether to stop now."""
        return self.signal is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into a request; a later one has its usual effect.

    SIGHUP is sent when a terminal or connection is closed; it stays ignored under `nohup`.
    Signals within two seconds count as one, because launchers forward the signal that their
    processes have received already. Use it in the main thread.
    """
    request = StopRequest()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
        before[hangup] = signal.getsignal(hangup)

    def note(number: int, frame: FrameType | None) -> None:
        if request.signal is None:
            request.signal, request.time = number, time.monotonic()
        elif time.monotonic() - request.time > _SAME:
            restore()
            signal.raise_signal(number)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
