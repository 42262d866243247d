"""Experts spread over processes: each computes its own, and features are exchanged at the sites.

Every process fuses the features of all experts and continues with the result, so all of them must
compute the same picture and take the same decisions. Both are checked at every step: processes that
were called with different pictures would mix these without a word, and processes that disagree on
whether a step is computed would wait for each other forever.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed
from torch.utils._pytree import tree_leaves

from afa.denoisers import Feature
from afa.denoisers.prompt import once_per_prompt
from afa.ensemble.hook import Hook
from afa.ensemble.placement.ranks import Processes
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from torch.distributed import ProcessGroup

    from afa.ensemble.hook import Arguments, Features, Inputs

#: how many tensors of a call the processes compare, and by how many numbers each
_MOST, _PROJECTIONS = 32, 8
_MARKS = _PROJECTIONS + 2


class Exchange(Processes, Hook):
    """Who computes which expert, and how the others come to its features.

    Expert n is computed by process n modulo the number of processes. All of them fuse; for that
    they have to be called equally often, from one thread each, with the same arguments.

    Args:
        num_experts: N.
        group: of processes; None takes all.

    Raises:
        AfaError: there is no group of processes, or it has more processes than experts.
    """

    def __init__(self, num_experts: int, group: ProcessGroup | None = None) -> None:
        if not distributed.is_initialized():
            raise AfaError(
                "AFA-ENSEMBLE-036",
                "Experts are spread over processes of torch.distributed, and there are none. Start "
                "several, torchrun --nproc_per_node N ..., and call init_process_group first.",
            )
        super().__init__(group, "spread")
        if self._count > num_experts:
            raise AfaError(
                "AFA-ENSEMBLE-037",
                f"There must be at most as many processes as experts, came {self._count} for "
                f"{num_experts}. Let groups of processes draw different pictures instead.",
            )
        self._num_experts = num_experts
        #: the experts that this process computes, by number
        self.own: list[int] = list(range(self._rank, num_experts, self._count))
        #: whether the embeddings of the timestep were gathered in this step
        self._has_temb = False

    def check_call(
        self, timesteps: Tensor, arguments: Mapping[str, Any], prompt: Tensor | None
    ) -> None:
        """See that all processes are about to compute the same step of the same picture.

        Args:
            timesteps: [B].
            arguments: of this call by name; all tensors among them are compared, however deep.
            prompt: the one of them that stays the same object in a loop; None where there is none.

        Raises:
            AfaError: gradients are recorded, which would be of this process's experts alone; this
                is another thread than the first that called; or the processes were called with
                different arguments.
        """
        if torch.is_grad_enabled():
            raise AfaError(
                "AFA-ENSEMBLE-038",
                "Experts that are spread over processes are for drawing, but gradients are "
                "recorded. Call the ensemble under torch.no_grad(), or train in one process for "
                "each sample.",
            )
        self.require_one_thread()
        if self._count == 1:
            return
        tensors = [leaf for leaf in tree_leaves(dict(arguments)) if isinstance(leaf, Tensor)]
        parts = [timesteps.double().mean().reshape(1)]
        for tensor in tensors[:_MOST]:
            if tensor is prompt:
                parts.append(once_per_prompt(tensor, marks, partial(marks, tensor)))
            else:
                parts.append(marks(tensor))
        parts = [part.to(timesteps.device) for part in parts]
        count = sum(map(len, parts))
        seen = torch.nn.functional.pad(torch.cat(parts), (0, 1 + _MOST * _MARKS - count))
        received = [torch.empty_like(seen) for _ in range(self._count)]
        distributed.all_gather(received, seen, group=self._group)
        if any(not is_close(received[0], other) for other in received[1:]):
            raise AfaError(
                "AFA-ENSEMBLE-039",
                "The processes over which the experts are spread were called with different "
                "arguments, such as timesteps, latents or prompts; they must draw the same "
                "picture. Give all of them the same prompts, size and seed.",
            )

    def begin(self, inputs: Inputs) -> Collection[int]:
        """Forget the last step."""
        del inputs
        self._has_temb = False
        return ()

    def arguments(self, arguments: Arguments) -> Arguments:
        """The arguments of the experts that this process computes."""
        return {n: arguments[n] for n in self.own}

    def features(self, site: str, features: Features) -> Features:
        """The features of all experts at a site, from those of this process's own.

        Embeddings of the timestep are gathered at the first site; at others every expert comes with
        this process's first.
        """
        own = [features[n] for n in self.own]
        if own[0].hidden is None:  # the site is skipped in all processes
            return {n: own[0] for n in range(self._num_experts)}
        hidden = self._gather([feature.hidden for feature in own])
        tembs = [own[0].temb] * self._num_experts
        if not self._has_temb:
            tembs = self._gather([feature.temb for feature in own])
        self._has_temb = True
        return {
            n: Feature(site, feature, temb)
            for n, (feature, temb) in enumerate(zip(hidden, tembs, strict=True))
        }

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


def marks(tensor: Tensor) -> Tensor:
    """A few numbers of the size of 1 that tell tensors apart, but hardly see how a device rounds.

    Number of elements and norm, as logarithms, and projections on fixed directions, [10]. Those of
    the latents of two pictures differ like random numbers, those of one picture on two kinds of
    devices by its rounding. Of whole numbers, such as classes, any difference counts.
    """
    flat = tensor.detach().flatten().double()
    angles = torch.arange(len(flat), device=flat.device, dtype=torch.float64)
    waves = [torch.cos(angles * angles * (0.1 + n)) for n in range(_PROJECTIONS)]
    size = flat.norm().clamp(min=1e-12)
    if tensor.is_floating_point():
        seen = [(flat * wave).sum() / size for wave in waves]
    else:
        seen = [torch.frac((flat * wave).sum() * 997 / (3 + n)) for n, wave in enumerate(waves)]
    return torch.stack([flat.new_tensor(math.log1p(len(flat))), torch.log(size), *seen])


def is_close(one: Tensor, other: Tensor) -> bool:
    """Whether two processes have seen the same; values that are not finite are found elsewhere."""
    return bool(torch.isclose(one, other, rtol=1e-3, atol=0.02, equal_nan=True).all())
