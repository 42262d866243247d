"""Experts on several devices: each runs on its own, and features are fused on the first one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from afa.denoisers.prompt import once_per_prompt
from afa.ensemble.hook import Hook
from afa.errors import AfaError
from afa.machine.devices import may_overlap

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from afa.ensemble.hook import Arguments, Features, Inputs


class Devices(Hook):
    """Copy inputs to each expert's device, and features to the first expert's device.

    Accelerators run asynchronously, so the devices compute at the same time although one process
    launches the work of all.

    Args:
        names: one device per expert; features are fused on the first.
        num_experts: N.
        prompt: the name of the prompt embedding's argument, which is copied once for all steps.

    Raises:
        AfaError: if the number of devices is not the number of experts.
    """

    def __init__(self, names: Sequence[torch.device | str], num_experts: int, prompt: str) -> None:
        if len(names) != num_experts:
            raise AfaError(
                "AFA-ENSEMBLE-035",
                f"Got {len(names)} devices for {num_experts} experts. List one device per expert; "
                "repeat a device that holds several experts.",
            )
        self.of_expert = tuple(torch.device(name) for name in names)
        self._prompt = prompt
        #: whether the timestep embeddings of this step were copied
        self._has_temb = False

    @property
    def main(self) -> torch.device:
        """The device where features are fused."""
        return self.of_expert[0]

    def begin(self, inputs: Inputs) -> Collection[int]:
        """Reset the state of the last step."""
        del inputs
        self._has_temb = False
        return ()

    def arguments(self, arguments: Arguments) -> Arguments:
        """Copy the inputs of every expert to its device, including nested tensors."""
        return {
            n: {
                key: (_kept_at if key == self._prompt else _at)(value, self.of_expert[n])
                for key, value in own.items()
            }
            for n, own in arguments.items()
        }

    def features(self, site: str, features: Features) -> Features:
        """Copy the experts' features at a site to the first device."""
        del site
        first, with_temb = next(iter(features.values())), not self._has_temb
        self._has_temb = True

        def here(value: Tensor | None) -> Any:
            return None if value is None else _copied(value, self.main)

        return {
            n: feature._replace(
                hidden=here(feature.hidden), temb=here(feature.temb) if with_temb else first.temb
            )
            for n, feature in features.items()
        }

    def send(self, sent: dict[int, Tensor]) -> dict[int, Tensor]:
        """Copy the feature with which each expert continues to its device."""
        return {n: _copied(own, self.of_expert[n]) for n, own in sent.items()}


def _at(value: Any, device: torch.device) -> Any:
    """Copy a tensor, or a nested structure of tensors, to a device."""
    return tree_map(lambda leaf: _copied(leaf, device) if isinstance(leaf, Tensor) else leaf, value)


def _copied(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=may_overlap(tensor.device, device))


def _kept_at(prompt: Any, device: torch.device) -> Any:
    """Copy a prompt embedding to a device; later steps get the same object."""
    if not isinstance(prompt, Tensor) or prompt.device == device:
        return prompt
    return once_per_prompt(prompt, device, lambda: prompt.to(device))
