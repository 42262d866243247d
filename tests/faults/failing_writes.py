"""Runs a command again and again, each time with another of its writes failing.

    python -m tests.faults.failing_writes ROOT OUT -- ARGUMENTS OF AFA

Every run is a fork of this, so `tests.warm` is to start it, where all is imported. A write is
whatever opens a file to write, makes a folder or renames something under ROOT. From the one that
fails on, all do, as on a disk that is full. OUT gets a line of JSON for each run: the number of the
write, what it was, the exit code and what was said, for the run that fails and for the one that
follows without a fault. Before each pair of runs ROOT is as it was at first.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND


class Disk:
    """Counts writes under a folder, and fails from one of them on."""

    def __init__(self, root: str, last: float) -> None:
        self.root, self.last = root, last
        self.writes: list[str] = []
        self._is_on = True

    def hook(self, event: str, given: tuple[Any, ...]) -> None:
        """An audit hook; see `sys.addaudithook`."""
        if not self._is_on or event not in ("open", "os.rename", "os.mkdir", "os.link"):
            return
        if event == "open" and not (given[2] or 0) & _WRITES:
            return
        path = str(given[1] if event == "os.rename" else given[0])
        if not path.startswith(self.root):
            return
        self.writes.append(f"{event} {path.removeprefix(self.root)}")
        if len(self.writes) > self.last:
            raise OSError(errno.ENOSPC, "No space left on device", path)

    def stop(self) -> None:
        """Let everything through."""
        self._is_on = False


def forked(function: Callable[[], None]) -> tuple[int, str]:
    """The exit code of a function in a process of its own, and its standard error."""
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if child == 0:
            os.dup2(said.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            try:
                function()
            except SystemExit as stop:
                os._exit(stop.code if isinstance(stop.code, int) else 1)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(99)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        said.seek(0)
        return os.waitstatus_to_exitcode(status), said.read()


def run(arguments: list[str], root: Path, last: float, tell: Path) -> tuple[int, str]:
    """A command whose writes fail after so many; `tell` gets a list of them."""

    def work() -> None:
        from afa.cli import main

        disk = Disk(str(root), last)
        sys.addaudithook(disk.hook)
        try:
            main(arguments)
        finally:
            disk.stop()
            tell.write_text(json.dumps(disk.writes))

    return forked(work)


def main() -> None:
    """See the module."""
    root, out = Path(sys.argv[1]), Path(sys.argv[2])
    arguments = sys.argv[4:]
    import afa.cli.check
    from afa.preflight.run import Report

    # the look before the work writes nothing, and is taken often enough elsewhere
    afa.cli.check.look_at = lambda plan, **_: Report()

    keep, tell = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp()) / "writes"
    shutil.copytree(root, keep / "root")

    def restore() -> None:
        shutil.rmtree(root)
        shutil.copytree(keep / "root", root)

    code, said = run(arguments, root, float("inf"), tell)
    writes = json.loads(tell.read_text())
    with out.open("w") as file:
        line: dict[str, Any] = {"write": -1, "code": code, "said": said, "writes": writes}
        file.write(json.dumps(line) + "\n")
        file.flush()
        shutil.copytree(root, out.with_suffix(".whole"))
        for number in range(len(writes)):
            restore()
            code, said = run(arguments, root, number, tell)
            shutil.copytree(root, out.parent / f"failed{number}")
            again = run(arguments, root, float("inf"), tell)
            shutil.copytree(root, out.parent / f"again{number}")
            line = {"write": number, "what": writes[number], "code": code, "said": said}
            file.write(json.dumps({**line, "again": again}) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
