"""Experts spread over processes: each computes its own, and features are exchanged at the sites."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed

from afa.denoisers import Feature
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed import ProcessGroup


class Exchange:
    """Who computes which expert, and how the others come to its features.

    Expert n is computed by process n modulo the number of processes. All of them fuse; for that
    they have to be called equally often, with the same arguments.

    Args:
        num_experts: N.
        group: of processes; None takes all.

    Raises:
        AfaError: there is no group of processes, or it has more processes than experts.
    """

    def __init__(self, num_experts: int, group: ProcessGroup | None = None) -> None:
        if not distributed.is_initialized():
            raise AfaError(
                "Experts are spread over processes of torch.distributed, and there are none. Start "
                "several, torchrun --nproc_per_node N ..., and call init_process_group first."
            )
        self._group = group
        self._rank, self._count = distributed.get_rank(group), distributed.get_world_size(group)
        if self._count > num_experts:
            raise AfaError(
                f"There must be at most as many processes as experts, came {self._count} for "
                f"{num_experts}. Let groups of processes draw different pictures instead."
            )
        self._num_experts = num_experts
        #: the experts that this process computes, by number
        self.own: list[int] = list(range(self._rank, num_experts, self._count))

    def gather(self, features: Sequence[Feature], *, with_temb: bool) -> list[Feature]:
        """The features of all experts at a site, from those of this process's own.

        Args:
            features: in the order of `own`.
            with_temb: whether the embeddings of the timestep are gathered, too; else every expert
                comes with this process's first.
        """
        first = features[0]
        hidden = self._gather([feature.hidden for feature in features])
        tembs = [first.temb] * self._num_experts
        if with_temb:
            tembs = self._gather([feature.temb for feature in features])
        return [
            Feature(first.site, feature, temb) for feature, temb in zip(hidden, tembs, strict=True)
        ]

    def scatter(
        self, fused: Tensor | Sequence[Tensor], experts: Sequence[int]
    ) -> Tensor | Sequence[Tensor]:
        """What this process's experts go on with, of what all do."""
        return fused if isinstance(fused, Tensor) else [fused[n] for n in experts]

    def _gather(self, own: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of one shape, one for each expert, from this process's."""
        # in the order of their memory, so that what comes is laid out as what went
        is_last = own[0].ndim == 4 and own[0].stride(1) == 1 and not own[0].is_contiguous()
        laid = [tensor.movedim(1, -1) if is_last else tensor for tensor in own]
        most = -(-self._num_experts // self._count)
        laid += [laid[0]] * (most - len(laid))  # all send as many
        sent = torch.stack(laid).contiguous()
        received = [torch.empty_like(sent) for _ in range(self._count)]
        distributed.all_gather(received, sent, group=self._group)
        every: list[Tensor] = []
        for n in range(self._num_experts):
            rank, place = n % self._count, n // self._count
            if rank == self._rank:
                every.append(own[place])
            else:
                tensor = received[rank][place]
                every.append(tensor.movedim(-1, 1) if is_last else tensor)
        return every
