"""Experts on several devices: each is computed where it is, features meet on the first device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from afa.denoisers.prompt import once_per_prompt
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from afa.denoisers import Feature


class Devices:
    """Where each expert is, and how its inputs and features come and go.

    Calls to accelerators return before they are done, so that devices compute at the same time
    although one process asks them in turn.

    Args:
        names: one device per expert; fusion happens on the first.
        num_experts: N.

    Raises:
        AfaError: another number of devices than experts.
    """

    def __init__(self, names: Sequence[torch.device | str], num_experts: int) -> None:
        if len(names) != num_experts:
            raise AfaError(
                f"Experts must be placed on one device each, came {len(names)} devices for "
                f"{num_experts} experts. Name a device once for every expert on it."
            )
        self.of_expert = tuple(torch.device(name) for name in names)

    @property
    def main(self) -> torch.device:
        """Where features are fused."""
        return self.of_expert[0]

    def send(self, per_expert: Sequence[dict[str, Any]], prompt: str) -> list[dict[str, Any]]:
        """The inputs of every expert, where it is.

        Args:
            per_expert: arguments of their forward passes; nested tensors are moved, too.
            prompt: which of them is the prompt's embedding, sent once for all steps.
        """
        return [
            {
                key: _kept_at(value, device) if key == prompt else _at(value, device)
                for key, value in arguments.items()
            }
            for arguments, device in zip(per_expert, self.of_expert, strict=True)
        ]

    def gather(self, features: Mapping[int, Feature], *, with_temb: bool) -> dict[int, Feature]:
        """The features of experts at a site, on the first device; see `Exchange.gather`."""
        first = next(iter(features.values()))

        def here(value: Tensor | None) -> Any:
            return None if value is None else value.to(self.main, non_blocking=True)

        return {
            n: feature._replace(
                hidden=here(feature.hidden), temb=here(feature.temb) if with_temb else first.temb
            )
            for n, feature in features.items()
        }

    def scatter(self, fused: Tensor | Sequence[Tensor], experts: Sequence[int]) -> list[Tensor]:
        """What each expert goes on with, where it is.

        Args:
            fused: one for all, or one for each that runs.
            experts: the numbers of those.
        """
        each = [fused] * len(experts) if isinstance(fused, Tensor) else fused
        return [
            feature.to(self.of_expert[n], non_blocking=True)
            for n, feature in zip(experts, each, strict=True)
        ]


def _at(value: Any, device: torch.device) -> Any:
    """A tensor, or any nest of them, on a device."""
    return tree_map(
        lambda leaf: leaf.to(device, non_blocking=True) if isinstance(leaf, Tensor) else leaf, value
    )


def _kept_at(prompt: Any, device: torch.device) -> Any:
    """The same object at every step."""
    if not isinstance(prompt, Tensor) or prompt.device == device:
        return prompt
    return once_per_prompt(prompt, device, lambda: prompt.to(device))
