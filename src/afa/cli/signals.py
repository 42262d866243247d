"""SIGTERM, which batch systems and containers send, and SIGHUP, which a closed terminal sends."""

from __future__ import annotations

import errno
import os
import signal
import stat
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

#: names, because Windows has no SIGHUP
_NAMES = ("SIGTERM", "SIGHUP")


class Terminated(BaseException):
    """The process received SIGTERM or SIGHUP; unwinding the stack removes unfinished files.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def end_cleanly_on_signals() -> None:
    """Make the first SIGTERM or SIGHUP raise `Terminated`; the second one ends the process at once.

    `nohup` ignores SIGHUP, and so does a program that it starts.
    """
    if threading.current_thread() is not threading.main_thread():
        return

    def end(number: int, frame: FrameType | None) -> None:
        del frame
        signal.signal(number, signal.SIG_DFL)
        raise Terminated(number)

    for name in _NAMES:
        number = getattr(signal, name, None)
        # the embedding program may have its own handler
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, end)


@contextmanager
def surviving_hangup() -> Iterator[None]:
    """Discard output inside the block, and all later one, if the terminal was closed.

    Otherwise, the failed output would end a training before the signal lets it save.
    """
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO or not _discard_output():
            raise


def _discard_output() -> bool:
    """Redirect the standard streams of a closed terminal; returns whether there was one."""
    found = False
    for number in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(number).st_mode):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, number)
                os.close(nowhere)
                found = True
    return found
