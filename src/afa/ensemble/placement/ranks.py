"""Processes of torch.distributed that call one ensemble in step, and decide together."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch
from torch import distributed

from afa.errors import AfaError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Processes:
    """Processes that must run the same layers at every step, since each waits for the others.

    Args:
        group: of processes; None takes all.
        how: how the experts are divided among the processes, for messages.
    """

    def __init__(self, group: ProcessGroup | None, how: str) -> None:
        self._group, self._how = group, how
        self._rank, self._count = distributed.get_rank(group), distributed.get_world_size(group)
        self._thread: int | None = None

    def require_one_thread(self) -> None:
        """Refuse calls from a second thread, whose order could differ between the processes.

        Raises:
            AfaError: another thread has called before.
        """
        if self._thread is None:
            self._thread = threading.get_ident()
        if self._thread != threading.get_ident():
            raise AfaError(
                "AFA-ENSEMBLE-040",
                f"An ensemble whose experts are {self._how} over processes was called from a "
                "second thread; the order of its calls must be the same in every process. Draw "
                "from one thread, or load the experts in one process.",
            )

    def any_of(self, decision: bool) -> bool:
        """Whether any process decides so; what all of them then do."""
        if self._count == 1:
            return decision
        flag = torch.tensor([int(decision)], device=self._device())
        distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=self._group)
        return bool(flag)

    def _device(self) -> torch.device:
        """Where tensors have to be that the group's backend sends."""
        backend = distributed.get_backend(self._group)
        is_nccl = backend == distributed.Backend.NCCL
        return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")
