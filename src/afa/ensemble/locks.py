"""A reentrant lock that can be copied with its owner."""

from __future__ import annotations

import threading


class Lock:
    """A reentrant lock for `with`. A copy is a new, unlocked lock."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __reduce__(self) -> tuple[type[Lock], tuple[()]]:
        return Lock, ()
