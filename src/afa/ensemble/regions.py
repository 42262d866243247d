"""The hook that fuses by a bias by region of the picture; `afa.drafting` makes the bias."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afa.aggregators import Mean
from afa.denoisers.tokens import TEXT
from afa.ensemble.hook import Hook
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor

    from afa.aggregators import Condition, Fused


class Regions(Hook):
    """Add a bias by region of the picture to the experts' logits, or use it alone, at every site.

    A text has no regions; at sites of a text stream, the bias gives each expert its mean weight
    over the picture.

    Args:
        bias: [B, N, h, w], for a batch of B pictures. In a call with classifier-free guidance, the
            batch has all pictures twice, as stock pipelines concatenate them.
        replaced: the sites at which the weights are the softmax of the bias alone.
    """

    def __init__(self, bias: Tensor, replaced: Collection[str] = ()) -> None:
        self._bias, self.replaced = bias, frozenset(replaced)
        self._condition: Condition | None = None

    def condition(self, site: str, condition: Condition) -> Condition:
        """Add the bias to that of the condition.

        Raises:
            AfaError: if the batch is not that of the bias.
        """
        pictures, calls = len(self._bias), len(condition.timestep)
        if calls not in (pictures, 2 * pictures, 3 * pictures):  # PAG has three
            raise AfaError(
                "AFA-ENSEMBLE-061",
                f"The ensemble has a bias by region for {pictures} pictures, but draws a batch of "
                f"{calls}. Draw the pictures for which the bias was made, or set regions = None.",
            )
        if self._bias.device != condition.temb.device:
            self._bias = self._bias.to(condition.temb.device)
        bias = self._bias
        if site.endswith(TEXT):
            bias = bias.softmax(1).mean((2, 3), keepdim=True).clamp(min=1e-6).log()
        bias = bias.repeat(calls // pictures, 1, 1, 1)
        if condition.bias is not None:
            bias = bias + condition.bias.to(bias)[:, None, None]
        self._condition = condition._replace(bias=bias)
        return self._condition

    def fuse(self, site: str, hidden: Mapping[int, Tensor]) -> Fused | None:
        """Fuse without the site's rule, if it is replaced."""
        if site not in self.replaced:
            return None
        assert self._condition is not None, "a step calls condition first"
        return _MEAN.fuse_some(hidden, self._condition)


_MEAN = Mean()
