"""Experts on several devices: each is computed where it is, features meet on the first device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from afa.denoisers.prompt import once_per_prompt
from afa.ensemble.hook import Hook
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from afa.ensemble.hook import Arguments, Features, Inputs


class Devices(Hook):
    """Where each expert is, and how its inputs and features come and go.

    Calls to accelerators return before they are done, so that devices compute at the same time
    although one process asks them in turn.

    Args:
        names: one device per expert; fusion happens on the first.
        num_experts: N.
        prompt: the argument that is the prompt's embedding, sent once for all steps.

    Raises:
        AfaError: another number of devices than experts.
    """

    def __init__(self, names: Sequence[torch.device | str], num_experts: int, prompt: str) -> None:
        if len(names) != num_experts:
            raise AfaError(
                "AFA-ENSEMBLE-035",
                f"Experts must be placed on one device each, came {len(names)} devices for "
                f"{num_experts} experts. Name a device once for every expert on it.",
            )
        self.of_expert = tuple(torch.device(name) for name in names)
        self._prompt = prompt
        #: whether the embeddings of the timestep were gathered in this step
        self._has_temb = False

    @property
    def main(self) -> torch.device:
        """Where features are fused."""
        return self.of_expert[0]

    def begin(self, inputs: Inputs) -> Collection[int]:
        """Forget the last step."""
        del inputs
        self._has_temb = False
        return ()

    def arguments(self, arguments: Arguments) -> Arguments:
        """The inputs of every expert, where it is; nested tensors are moved, too."""
        return {
            n: {
                key: (_kept_at if key == self._prompt else _at)(value, self.of_expert[n])
                for key, value in own.items()
            }
            for n, own in arguments.items()
        }

    def features(self, site: str, features: Features) -> Features:
        """The features of experts at a site, on the first device."""
        del site
        first, with_temb = next(iter(features.values())), not self._has_temb
        self._has_temb = True

        def here(value: Tensor | None) -> Any:
            return None if value is None else value.to(self.main, non_blocking=True)

        return {
            n: feature._replace(
                hidden=here(feature.hidden), temb=here(feature.temb) if with_temb else first.temb
            )
            for n, feature in features.items()
        }

    def send(self, sent: dict[int, Tensor]) -> dict[int, Tensor]:
        """What each expert continues with, where it is."""
        return {n: own.to(self.of_expert[n], non_blocking=True) for n, own in sent.items()}


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
