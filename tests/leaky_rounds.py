"""Rounds of a soak that take no time, and keep what they should not; see `test_soak`."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

_kept: list[object] = []


def clean(number: int, folder: Path) -> dict[str, float]:
    """Make all of it, and keep nothing."""
    (folder / "file").write_bytes(b"\1" * (1 << 20) * (1 + number % 3))
    thread = threading.Thread(target=(folder / "file").read_bytes)
    thread.start()
    thread.join()
    [str(n) for n in range(10_000 * (1 + number % 3))]
    return {"clean": 0.0}


def memory(number: int, folder: Path) -> dict[str, float]:
    _kept.append(bytearray(b"\1") * (1 << 20))
    return clean(number, folder)


def files(number: int, folder: Path) -> dict[str, float]:
    path = folder / "kept"
    path.touch()
    _kept.append(path.open())
    return clean(number, folder)


def objects(number: int, folder: Path) -> dict[str, float]:
    _kept.extend([n] for n in range(500))
    return clean(number, folder)


def late(number: int, folder: Path) -> dict[str, float]:
    """Two megabytes a round, from the fifteenth on."""
    if number > 13:
        _kept.append(bytearray(b"\1") * (2 << 20))
    return clean(number, folder)


class _Ill:
    def __del__(self) -> None:
        raise RuntimeError("nobody sees this")


def unseen(number: int, folder: Path) -> dict[str, float]:
    """An error in a finalizer, once."""
    if number == 1:
        _Ill()
    return clean(number, folder)


def fails_at_last(number: int, folder: Path) -> dict[str, float]:
    if number == 2:
        raise RuntimeError("the third round")
    return clean(number, folder)
