"""One process or several: who does which part, and where they wait for each other.

Several are started by `accelerate launch --num_processes N -m afa evaluate ...` on GPUs; without
one by `torchrun --nproc_per_node N -m afa evaluate ...`, since accelerate's launcher starts a
single process for a CPU, whatever it is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from afa.errors import AfaError

Work = TypeVar("Work")


class Processes:
    """The processes of one run, started by `accelerate launch`; a single one where it was not."""

    def __init__(self) -> None:
        self._state = None
        self.rank, self.count = 0, 1
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            import torch
            from accelerate import PartialState

            # whoever is done first waits for the slowest, however long that takes
            self._state = PartialState(
                cpu=not torch.accelerator.is_available(), timeout=timedelta(days=30)
            )
            self.rank, self.count = self._state.process_index, self._state.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes reports and talks to the user."""
        return self.rank == 0

    @property
    def device(self) -> str | None:
        """The device that was given to this process; None where it is alone and may choose."""
        return None if self._state is None else str(self._state.device)

    def share(self, work: Iterable[Work]) -> Iterator[Work]:
        """This process's part of a list that is the same in all of them."""
        return (item for n, item in enumerate(work) if n % self.count == self.rank)

    def wait(self) -> None:
        """Go on when all processes are here.

        Raises:
            AfaError: one of them has ended; it has said why.
        """
        if self._state is not None:
            from afa.machine.exhausted import is_of_device

            try:
                self._state.wait_for_everyone()
            except RuntimeError as error:
                if is_of_device(error):
                    raise
                raise AfaError(
                    "AFA-MACHINE-004", "All processes must go on, but another one stopped."
                ) from error


@contextmanager
def fixed_threads(num_threads: int | None) -> Iterator[None]:
    """Compute with so many threads inside the block; None leaves them as they are."""
    import torch

    before = torch.get_num_threads()
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
