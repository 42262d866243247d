"""Processes of torch.distributed that run the steps of one ensemble together."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import torch
from torch import distributed

from afa.errors import AfaError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Processes:
    """Processes that must run the same layers at every step, because each waits for the others.

    Args:
        group: the process group; None uses all processes.
        how: how the experts are distributed (`spread` or `sharded`), for messages.
    """

    def __init__(self, group: ProcessGroup | None, how: str) -> None:
        self._group, self._how = group, how
        self._rank, self._count = distributed.get_rank(group), distributed.get_world_size(group)
        self._thread: int | None = None

    def require_one_thread(self) -> None:
        """Refuse calls from a second thread, whose order could differ between processes.

        Raises:
            AfaError: if the first call came from another thread.
        """
        if self._thread is None:
            self._thread = threading.get_ident()
        if self._thread != threading.get_ident():
            raise AfaError(
                "AFA-ENSEMBLE-040",
                f"An ensemble with experts {self._how} over processes was called from a second "
                "thread, but every process must make the same calls in the same order. Draw from "
                "one thread, or load the experts in one process.",
            )

    def any_of(self, decision: bool) -> bool:
        """Whether the decision is true in any process; all processes get the same answer."""
        if self._count == 1:
            return decision
        flag = torch.tensor([int(decision)], device=self._device())
        distributed.all_reduce(flag, distributed.ReduceOp.MAX, group=self._group)
        return bool(flag)

    def _device(self) -> torch.device:
        """The device of tensors that the group's backend can send."""
        backend = distributed.get_backend(self._group)
        is_nccl = backend == distributed.Backend.NCCL
        return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")
