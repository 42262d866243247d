"""Features at the sites: the teacher's fused ones, and the student's own.

A student has the architecture of one expert, so its feature at a site has the shape of the fused
feature there. Both are taken from an `EnsembleDenoiser`, which for a single model computes the same
bits as the model alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from afa.ensemble.denoiser import EnsembleDenoiser
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from afa.aggregators import Fused


class FeatureTap:
    """The fused features of the last call of an ensemble, at some sites.

    Args:
        ensemble: the ensemble; hooks are added to its fusion rules.
        sites: names of image sites.

    Raises:
        AfaError: if a site does not exist, or belongs to a transformer's text.
    """

    def __init__(self, ensemble: EnsembleDenoiser, sites: Sequence[str]) -> None:
        known = {site.name: n for n, site in enumerate(ensemble.sites) if site.stream == "image"}
        unknown = [name for name in sites if name not in known]
        if unknown:
            raise AfaError(
                "AFA-DISTILL-017",
                f"features.sites names '{unknown[0]}', which must be one of {', '.join(known)}.",
            )
        #: features [B, C, H, W] by site, with gradients if the call had any
        self.seen: dict[str, Tensor] = {}
        self.ensemble = ensemble
        for name in sites:
            ensemble.aggregators[known[name]].register_forward_hook(self._hook(name))

    def _hook(self, site: str) -> Any:
        def note(_: Any, __: Any, output: Fused) -> None:
            if not isinstance(output.feature, torch.Tensor):
                raise AfaError(
                    "AFA-DISTILL-018",
                    f"The teacher's fusion rule at '{site}' keeps one feature for each expert, so "
                    "there is no fused one to learn. Remove features from the recipe.",
                )
            self.seen[site] = output.feature

        return note


def sizes_at(ensemble: EnsembleDenoiser, sites: Sequence[str], height: int, width: int) -> int:
    """Return the number of values of the features at some sites, for latents of this size."""
    return sum(
        site.channels * -(-height // site.scale) * -(-width // site.scale)
        for site in ensemble.sites
        if site.name in sites
    )


def distance(seen: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> Tensor:
    """Return the mean over sites of the squared error, relative to the target's mean square."""
    parts = []
    for site, target in targets.items():
        target = target.float()
        error = (seen[site].float() - target).square().mean()
        parts.append(error / target.square().mean().clamp(min=1e-12))
    return torch.stack(parts).mean()


def expose_features(model: Any, sites: Sequence[str]) -> FeatureTap:
    """Let a model note its features at some sites whenever it is called with gradients.

    Its calls then go through an `EnsembleDenoiser` of this one model, which runs its layers and
    makes the same prediction.
    """
    shell = EnsembleDenoiser([model])  # freezes the model
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        return shell(*args, **kwargs) if torch.is_grad_enabled() else plain(*args, **kwargs)

    model.forward = forward
    return FeatureTap(shell, sites)
