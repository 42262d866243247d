"""A process that has imported all of afa, of which commands are forks: they begin at once.

Everything else is theirs alone: arguments, environment, folder, the head of a group, both streams.
What libraries make up once in a process is made up, too. A command of its own takes ten seconds of
a processor for all that, so only tests of that, and of what launches commands, have one.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from afa.machine.quiet import quieten

quieten()  # before the libraries read their settings

import matplotlib.backends.backend_agg  # noqa: E402
import matplotlib.figure  # noqa: E402, F401
import PIL.Image  # noqa: E402
import torch  # noqa: E402
from diffusers import DDIMScheduler  # noqa: E402
from transformers.conversion_mapping import get_checkpoint_conversion_mapping  # noqa: E402

import afa.cli.check  # noqa: E402
import afa.drawing.pictures  # noqa: E402
import afa.drawing.plots  # noqa: E402
import afa.ensemble.calibrate  # noqa: E402
import afa.evaluation.run  # noqa: E402
import afa.evaluation.scoring  # noqa: E402
import afa.merging.run  # noqa: E402
import afa.preflight.inputs  # noqa: E402
import afa.training.run  # noqa: E402
import afa.zoo.judges  # noqa: E402, F401
from afa.denoisers import discover_sites  # noqa: E402
from tests.tiny import tiny_unet  # noqa: E402

PIL.Image.init()  # its readers of formats
get_checkpoint_conversion_mapping("clip_text_model")  # a thousand regular expressions
_ = DDIMScheduler().compatibles  # each of them is a module
discover_sites(tiny_unet())

#: that a process has where it is to have one thread, as several run side by side
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}
#: of capget(2) and capabilities(7)
_VERSION, _MAY_WRITE_ANYWHERE = 0x20080522, 1
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__])


class Running:
    """A command in a process of its own; the part of `subprocess.Popen` that tests need.

    Args:
        arguments: of the command.
        environment: what this process's own is changed by.
        module: as `python -m` takes it.
        like_anyone: without the administrator's right to write anywhere.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        environment: Mapping[str, str] | None = None,
        module: str = "afa",
        like_anyone: bool = False,
    ) -> None:
        self._said: list[Path] = []
        for _ in range(2):
            handle, name = tempfile.mkstemp()
            os.close(handle)
            self._said.append(Path(name))
        own = {**os.environ, **ENVIRONMENT, **(environment or {})}
        given = (module, list(map(str, arguments)), own, os.getcwd(), self._said, like_anyone)
        self._process = _CONTEXT.Process(target=_command, args=given)
        self._process.start()
        self.pid: int = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        """Its exit code, or the number of the signal that ended it, below zero."""
        return self._process.exitcode

    @property
    def output(self) -> str:
        """What it has said on standard output so far."""
        return self._said[0].read_text(encoding="utf-8")

    def poll(self) -> int | None:
        """As `returncode`."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """To the process alone."""
        os.kill(self.pid, number)

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """Wait for its end; what it said on standard output and on standard error.

        Raises:
            TimeoutError: it did not end, and is killed.
        """
        self._process.join(timeout)
        is_late = self.returncode is None
        if is_late:
            self._process.kill()
            self._process.join()
        out, err = (place.read_text(encoding="utf-8") for place in self._said)
        for place in self._said:
            place.unlink()
        if is_late:
            raise TimeoutError(f"it did not end within {timeout} seconds:\n{out}\n{err}")
        return out, err


def run(
    arguments: Sequence[object],
    environment: Mapping[str, str] | None = None,
    module: str = "afa",
    like_anyone: bool = False,
) -> tuple[int, str, str]:
    """The exit code of a command, and what it said on standard output and standard error."""
    process = Running(arguments, environment, module, like_anyone)
    out, err = process.communicate()
    assert process.returncode is not None
    return process.returncode, out, err


def run_ranks(
    arguments: Sequence[object],
    count: int = 2,
    environment: Mapping[str, str] | None = None,
    module: str = "afa",
    timeout: float = 300,
) -> list[tuple[int, str, str]]:
    """As `run`, of so many processes that know of each other, as `torchrun` starts them.

    Where one fails, the others are killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        **(environment or {}),
    }
    ranks = [
        Running(arguments, {**common, "RANK": str(n), "LOCAL_RANK": str(n)}, module)
        for n in range(count)
    ]
    end = time.monotonic() + timeout
    while None in (codes := [rank.returncode for rank in ranks]):
        if any(codes) or time.monotonic() > end:
            time.sleep(2)  # whoever fails by itself has said why by now
            for rank in ranks:
                if rank.returncode is None:
                    rank._process.kill()
        time.sleep(0.05)
    said = [rank.communicate() for rank in ranks]
    return [(rank.returncode or 0, *each) for rank, each in zip(ranks, said, strict=True)]


def _command(
    module: str,
    arguments: list[str],
    environment: dict[str, str],
    folder: str,
    said: list[Path],
    like_anyone: bool,
) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, place in enumerate(said, start=1):
        os.dup2(os.open(place, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if like_anyone:
        _give_up_writing_anywhere()
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _give_up_writing_anywhere() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_VERSION, 0)  # of this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; and the upper halves
    for call in (libc.capget, libc.capset):
        if call(header, sets):
            raise OSError(ctypes.get_errno(), "capabilities cannot be changed")
        sets[0] &= ~(1 << _MAY_WRITE_ANYWHERE)
