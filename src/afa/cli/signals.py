"""SIGTERM, which batch systems and containers send to stop a program."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType


class Terminated(BaseException):
    """The process received SIGTERM; unwinding the stack removes unfinished files."""


def end_cleanly_on_sigterm() -> None:
    """Make the first SIGTERM raise `Terminated`; the second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return  # the embedding program has its own handler

    def end(number: int, frame: FrameType | None) -> None:
        del frame
        signal.signal(number, signal.SIG_DFL)
        raise Terminated

    signal.signal(signal.SIGTERM, end)
