"""The hook that adds a bias by region to the experts' logits; `afa.drafting` makes the bias."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afa.denoisers.tokens import TEXT
from afa.ensemble.hook import Hook
from afa.errors import AfaError

if TYPE_CHECKING:
    from torch import Tensor

    from afa.aggregators import Condition


class Regions(Hook):
    """Add a bias by region of the picture to the experts' logits, at every site.

    A text has no regions; at sites of a text stream, the bias gives each expert its mean weight
    over the picture.

    Args:
        bias: [B, N, h, w], for a batch of B pictures. In a call with classifier-free guidance, the
            batch has all pictures twice, as stock pipelines concatenate them.
    """

    def __init__(self, bias: Tensor) -> None:
        self._bias = bias

    def condition(self, site: str, condition: Condition) -> Condition:
        """Add the bias to that of the condition.

        Raises:
            AfaError: if the batch is not that of the bias.
        """
        pictures, calls = len(self._bias), len(condition.timestep)
        if calls % pictures:
            raise AfaError(
                "AFA-ENSEMBLE-061",
                f"The ensemble has a bias by region for {pictures} pictures, but draws a batch of "
                f"{calls}. Draw the pictures for which the bias was made, or set regions = None.",
            )
        bias = self._bias.to(condition.temb.device)
        if site.endswith(TEXT):
            bias = bias.softmax(1).mean((2, 3), keepdim=True).log()
        bias = bias.repeat(calls // pictures, 1, 1, 1)
        if condition.bias is not None:
            bias = bias + condition.bias.to(bias)[:, None, None]
        return condition._replace(bias=bias)
