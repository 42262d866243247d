"""A process that has imported all of afa, of which commands are forks: they begin at once.

Everything else is theirs alone: the environment, the folder, the head of a group, both streams.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Mapping, Sequence

from afa.cli.console import quieten

quieten()  # before the libraries read their settings

import matplotlib.backends.backend_agg  # noqa: E402
import matplotlib.figure  # noqa: E402, F401
import PIL.Image  # noqa: E402
import torch  # noqa: E402

import afa.baselines.merging.run  # noqa: E402
import afa.cli.check  # noqa: E402
import afa.evaluation.run  # noqa: E402
import afa.evaluation.scoring  # noqa: E402
import afa.pictures  # noqa: E402
import afa.plots  # noqa: E402
import afa.training.run  # noqa: E402, F401

PIL.Image.init()  # its readers of formats

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__])


class Running:
    """A command of afa in a process of its own; the part of `subprocess.Popen` that tests need.

    Args:
        arguments: of afa.
        environment: all of it.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        handle, self._said = tempfile.mkstemp()
        os.close(handle)
        given = (list(arguments), dict(environment), os.getcwd(), self._said)
        self._process = _CONTEXT.Process(target=_command, args=given)
        self._process.start()
        self.pid: int = self._process.pid or 0

    @property
    def returncode(self) -> int | None:
        """Its exit code, or the number of the signal that ended it, below zero."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """As `returncode`."""
        return self.returncode

    def communicate(self, timeout: float = 600) -> tuple[None, str]:
        """Wait for its end; what it said on standard error is the second."""
        self._process.join(timeout)
        if self.returncode is None:
            self._process.kill()
            raise TimeoutError(f"it did not end within {timeout} seconds")
        with open(self._said, encoding="utf-8") as file:
            said = file.read()
        os.unlink(self._said)
        return None, said


def _command(
    arguments: list[str], environment: dict[str, str], folder: str, standard_error: str
) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(standard_error, os.O_WRONLY), 2)
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))

    from afa.cli import main

    main(arguments)
