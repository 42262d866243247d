"""Experts spread over processes: each process computes some, and all exchange features.

Every process fuses the features of all experts and continues with the result, so all processes must
draw the same picture and make the same decisions. Every step checks both. Otherwise processes with
different pictures would mix them silently, and processes that disagree on whether a step is
computed would wait for each other forever.
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

#: the number of tensors of a call that are compared, and of numbers in a tensor's fingerprint
_MOST, _PROJECTIONS = 32, 8
_FINGERPRINT = _PROJECTIONS + 2


class Exchange(Processes, Hook):
    """Assign the experts to processes, and gather the features of all experts in each process.

    Process n modulo the number of processes computes expert n. Every process fuses. All of them
    must make the same calls, with the same arguments, from one thread each.

    Args:
        num_experts: N.
        group: the process group; None uses all processes.

    Raises:
        AfaError: if there is no process group, or it has more processes than experts.
    """

    def __init__(self, num_experts: int, group: ProcessGroup | None = None) -> None:
        if not distributed.is_initialized():
            raise AfaError(
                "AFA-ENSEMBLE-036",
                "There is no process group of torch.distributed over which to spread the experts. "
                "Start several processes, torchrun --nproc_per_node N ..., and call "
                "init_process_group first.",
            )
        super().__init__(group, "spread")
        if self._count > num_experts:
            raise AfaError(
                "AFA-ENSEMBLE-037",
                f"Got {self._count} processes for {num_experts} experts; there must be at most one "
                "per expert. Let groups of processes draw different pictures instead.",
            )
        self._num_experts = num_experts
        #: the numbers of the experts that this process computes
        self.own: list[int] = list(range(self._rank, num_experts, self._count))
        #: whether the timestep embeddings of this step were gathered
        self._has_temb = False

    def check_call(
        self, timesteps: Tensor, arguments: Mapping[str, Any], prompt: Tensor | None
    ) -> None:
        """Check that all processes are about to compute the same step of the same picture.

        Args:
            timesteps: [B].
            arguments: the arguments of this call by name; tensors in nested structures are
                compared, too.
            prompt: the argument that stays the same object in a denoising loop; None if there is
                none.

        Raises:
            AfaError: if gradients are on, which would flow only to this process's experts; if an
                earlier call came from another thread; or if the arguments differ between processes.
        """
        if torch.is_grad_enabled():
            raise AfaError(
                "AFA-ENSEMBLE-038",
                "Experts that are spread over processes can only draw, but gradients are on. Call "
                "the ensemble under torch.no_grad(), or train with all experts in every process.",
            )
        self.require_one_thread()
        if self._count == 1:
            return
        tensors = [leaf for leaf in tree_leaves(dict(arguments)) if isinstance(leaf, Tensor)]
        parts = [timesteps.double().mean().reshape(1)]
        for tensor in tensors[:_MOST]:
            if tensor is prompt:
                parts.append(once_per_prompt(tensor, fingerprint, partial(fingerprint, tensor)))
            else:
                parts.append(fingerprint(tensor))
        parts = [part.to(timesteps.device) for part in parts]
        count = sum(map(len, parts))
        seen = torch.nn.functional.pad(torch.cat(parts), (0, 1 + _MOST * _FINGERPRINT - count))
        received = [torch.empty_like(seen) for _ in range(self._count)]
        distributed.all_gather(received, seen, group=self._group)
        if any(not is_close(received[0], other) for other in received[1:]):
            raise AfaError(
                "AFA-ENSEMBLE-039",
                "The processes over which the experts are spread got different timesteps, latents "
                "or prompts, but they must draw the same picture. Pass the same prompts, size and "
                "seed in every process.",
            )

    def begin(self, inputs: Inputs) -> Collection[int]:
        """Reset the state of the last step."""
        del inputs
        self._has_temb = False
        return ()

    def arguments(self, arguments: Arguments) -> Arguments:
        """Select the arguments of the experts that this process computes."""
        return {n: arguments[n] for n in self.own}

    def features(self, site: str, features: Features) -> Features:
        """Gather the features of all experts at a site.

        Timestep embeddings are gathered only at the first site, the only one that needs them; at
        the others, all features have the embedding of this process's first expert.
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
        """Gather one tensor per expert, all of one shape, from all processes."""
        # channels-last tensors are sent with channels last, so that they keep their memory format
        is_last = own[0].ndim == 4 and own[0].stride(1) == 1 and not own[0].is_contiguous()
        laid = [tensor.movedim(1, -1) if is_last else tensor for tensor in own]
        most = -(-self._num_experts // self._count)
        laid += [laid[0]] * (most - len(laid))  # padding: all processes send equally many
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


def fingerprint(tensor: Tensor) -> Tensor:
    """Compute a fingerprint [10] that differs between tensors but tolerates rounding.

    It holds the logarithms of the number of elements and of the norm, and 8 projections on fixed
    directions. Fingerprints of two pictures' latents differ like random numbers; those of one
    picture on two kinds of devices differ by rounding. For integers, such as class labels, any
    difference counts.
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
    """Whether two fingerprints are equal up to rounding; NaN equals NaN, which `Guard` reports."""
    return bool(torch.isclose(one, other, rtol=1e-3, atol=0.02, equal_nan=True).all())
