"""SIGTERM, with which batch systems and containers end programs."""

from __future__ import annotations

import signal
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType


class Terminated(BaseException):
    """The process was asked to end; whatever is unfinished cleans up on its way out."""


def end_cleanly_on_sigterm() -> None:
    """Have SIGTERM raise `Terminated` in the main thread, once; the next one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return  # whoever runs this in a process of their own has other plans

    def end(number: int, frame: FrameType | None) -> None:
        del frame
        signal.signal(number, signal.SIG_DFL)
        raise Terminated

    signal.signal(signal.SIGTERM, end)
