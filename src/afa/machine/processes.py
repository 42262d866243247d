"""Share work among one or several processes.

On GPUs, start several with `accelerate launch --num_processes N -m afa evaluate ...`. On a CPU, use
`torchrun --nproc_per_node N -m afa evaluate ...`, because accelerate's launcher always starts a
single process for a CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

from afa.errors import AfaError

Work = TypeVar("Work")


def num_launched() -> int:
    """Return how many processes a launcher has started for this run; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Processes:
    """The processes of one run: several if started by a launcher, or a single one."""

    def __init__(self) -> None:
        self._state = None
        self.rank, self.count = 0, 1
        if num_launched() > 1:
            from accelerate import PartialState

            from afa.machine.devices import has_shared_gpus

            # the fastest process may wait long for the slowest
            self._state = PartialState(cpu=not has_shared_gpus(), timeout=timedelta(days=30))
            self.rank, self.count = self._state.process_index, self._state.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes reports and messages."""
        return self.rank == 0

    @property
    def device(self) -> str | None:
        """The device assigned to this process; None for a single process, which may choose."""
        return None if self._state is None else str(self._state.device)

    def share(self, work: Iterable[Work]) -> Iterator[Work]:
        """Return this process's items of a list that is the same in all processes."""
        return (item for n, item in enumerate(work) if n % self.count == self.rank)

    def wait(self) -> None:
        """Wait until all processes call this.

        Raises:
            AfaError: if another process has ended.
        """
        if self._state is not None:
            from afa.machine.exhausted import is_of_device

            try:
                self._state.wait_for_everyone()
            except RuntimeError as error:
                if is_of_device(error):
                    raise
                raise AfaError(
                    "AFA-MACHINE-004", "Another process has ended; see its error message."
                ) from error


@contextmanager
def fixed_threads(num_threads: int | None) -> Iterator[None]:
    """Set the number of CPU threads inside the block; None does not change it."""
    import torch

    before = torch.get_num_threads()
    if num_threads is not None:
        torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
