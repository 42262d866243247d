"""What a hook of a step is: one feature of an ensemble that takes part in a step of its experts.

`afa.ensemble.step` says when each method is called, `afa.ensemble.hooks` in which order hooks are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from torch import Tensor

    from afa.aggregators import Condition, Fused
    from afa.denoisers import Feature
    from afa.ensemble.running import Running

#: of each expert by its number in the ensemble, never by its position among those that run
Arguments = dict[int, dict[str, Any]]
Features = dict[int, "Feature"]


@dataclass(frozen=True)
class Inputs:
    """What a step begins with.

    Attributes:
        sample: the latent [B, ...].
        timesteps: [B].
        arguments: of every expert that runs.
        running: which experts run, and where.
    """

    sample: Tensor
    timesteps: Tensor
    arguments: Mapping[int, Mapping[str, Any]]
    running: Running


class Hook:
    """A part of a step. By default it does nothing; a subclass overrides what it needs.

    Experts are named by their number in the ensemble everywhere. A hook that lives longer than a
    step must forget the last one in `begin`; calls of one ensemble never overlap.
    """

    #: sites whose features are not computed in this step; `fuse` must supply them
    skipped: Collection[str] = frozenset()
    #: whether a step with it can be a CUDA graph: it launches work on the GPU and keeps no results
    is_recordable = False

    def begin(self, inputs: Inputs) -> Collection[int]:
        """See what a step begins with.

        Returns: the experts whose texts are excluded from what the fusion rules see.
        """
        del inputs
        return ()

    def arguments(self, arguments: Arguments) -> Arguments:
        """What the experts are called with; those that are missing are not run here."""
        return arguments

    def features(self, site: str, features: Features) -> Features:
        """The features of all experts that run, from those that are computed here.

        Args:
            site: its name.
            features: `hidden` is None where the site is skipped.
        """
        del site
        return features

    def look(self, site: str, features: Features) -> Collection[int]:
        """See the features of all experts that run.

        Returns: the experts that are excluded at this site.
        """
        del site, features
        return ()

    def condition(self, site: str, condition: Condition) -> Condition:
        """What the fusion rule of a site sees besides the features."""
        del site
        return condition

    def fuse(self, site: str, hidden: Mapping[int, Tensor]) -> Fused | None:
        """Fuse instead of the site's rule; None leaves it to the next hook, or to the rule.

        Args:
            site: its name.
            hidden: the features [B, C, H, W] of the experts that are fused.
        """
        del site, hidden
        return None

    def fused(self, site: str, fused: Fused) -> None:
        """See what was fused."""

    def send(self, sent: dict[int, Tensor]) -> dict[int, Tensor]:
        """The feature [B, C, H, W] that each expert continues with."""
        return sent

    def end(self, prediction: Tensor) -> None:
        """See the prediction of the step, [B, ...]."""
