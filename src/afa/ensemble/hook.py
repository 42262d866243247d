"""`Hook`, the base of everything that takes part in a step of an ensemble.

`afa.ensemble.step` documents when each method is called, and `afa.ensemble.hooks` lists all hooks
in their order.
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

#: by the expert's number in the ensemble, never by its position among the running experts
Arguments = dict[int, dict[str, Any]]
Features = dict[int, "Feature"]


@dataclass(frozen=True)
class Inputs:
    """The inputs of a step.

    Attributes:
        sample: the noisy latent [B, ...].
        timesteps: the timesteps [B].
        arguments: the arguments of every running expert, by its number.
        running: which experts run, and at which sites.
    """

    sample: Tensor
    timesteps: Tensor
    arguments: Mapping[int, Mapping[str, Any]]
    running: Running


class Hook:
    """A part of a step. By default it does nothing; subclasses override the methods they need.

    All methods name an expert by its number in the ensemble. A hook that is used for several steps
    must reset its state in `begin`. Calls of one ensemble never overlap.
    """

    #: sites whose features are not computed in this step; `fuse` must supply them
    skipped: Collection[str] = frozenset()
    #: whether a step with this hook can be a CUDA graph: it only launches GPU work, stores nothing
    is_recordable = False

    def begin(self, inputs: Inputs) -> Collection[int]:
        """Receive the inputs of a step.

        Returns: the experts whose texts are excluded from the mean text of the fusion rules.
        """
        del inputs
        return ()

    def arguments(self, arguments: Arguments) -> Arguments:
        """Change the experts' arguments; experts without arguments do not run in this process."""
        return arguments

    def features(self, site: str, features: Features) -> Features:
        """Supply the features of all running experts, from those that this process computed.

        Args:
            site: the name of the site.
            features: the features by expert; `hidden` is None if the site is skipped.
        """
        del site
        return features

    def look(self, site: str, features: Features) -> Collection[int]:
        """Receive the features of all running experts.

        Returns: the experts that are not fused at this site.
        """
        del site, features
        return ()

    def condition(self, site: str, condition: Condition) -> Condition:
        """Change the condition, the input of a site's fusion rule besides the features."""
        del site
        return condition

    def fuse(self, site: str, hidden: Mapping[int, Tensor]) -> Fused | None:
        """Fuse in place of the site's rule.

        Args:
            site: the name of the site.
            hidden: the features [B, C, H, W] of the experts to fuse.

        Returns: the fused feature; None leaves it to the next hook, or to the site's rule.
        """
        del site, hidden
        return None

    def fused(self, site: str, fused: Fused) -> None:
        """Receive the fused feature and the fusion weights of a site."""

    def send(self, sent: dict[int, Tensor]) -> dict[int, Tensor]:
        """Change the feature [B, C, H, W] with which each expert continues."""
        return sent

    def end(self, prediction: Tensor) -> None:
        """Receive the prediction [B, ...] of the step."""
