"""The hook that adds a bias to the experts' logits; `afa.ensemble.steering` makes the bias."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afa.ensemble.hook import Hook

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from afa.aggregators import Condition


class Steering(Hook):
    """Add a bias to the experts' logits, of which fusion weights are the softmax (AFA, eq. 3).

    Args:
        bias: by site, the bias [N] of the experts' logits.
    """

    is_recordable = True

    def __init__(self, bias: Mapping[str, Tensor]) -> None:
        self._bias = bias

    def condition(self, site: str, condition: Condition) -> Condition:
        """Add the bias of a site to the condition, on the device of the condition's tensors."""
        if site not in self._bias:
            return condition
        device = condition.temb.device
        if self._bias[site].device != device:
            self._bias = {name: own.to(device) for name, own in self._bias.items()}
        return condition._replace(bias=self._bias[site])
