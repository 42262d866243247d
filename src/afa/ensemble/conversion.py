"""The hook that lets experts with different objectives be fused.

Experts of one architecture may differ in what they predict (noise, velocity, flow) and in their
noise schedule. All see the same ratio of noise to picture: each gets the timestep at which its own
schedule has it, and the latent in its own scale. At the last site, their predictions are converted
into what the ensemble predicts; see `afa.denoisers.objective`. A schedule that does not reach the
ensemble's level, for instance pure noise (zero terminal SNR), is used at its nearest level.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from afa.denoisers.interface import Interface
from afa.denoisers.objective import convert
from afa.denoisers.predictor import predictor_blocks
from afa.ensemble.hook import Hook
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import Tensor

    from afa.denoisers import Family, Site
    from afa.denoisers.objective import Level, Objective
    from afa.ensemble.hook import Arguments, Features, Inputs


class Objectives(NamedTuple):
    """What the experts of an ensemble predict, and what the ensemble itself does."""

    experts: tuple[Objective, ...]
    wanted: Objective

    @classmethod
    def of(cls, experts: Sequence[Objective | None]) -> Objectives | None:
        """The objectives of an ensemble that predicts what its first expert does.

        Returns: None if all are equal, so that there is nothing to convert; or all unknown, which
            `afa.loading.compare` refuses if they differ.

        Raises:
            AfaError: if some are unknown, and so cannot be converted.
        """
        known = tuple(each for each in experts if each is not None)
        if 0 < len(known) < len(experts):
            raise AfaError(
                "AFA-ENSEMBLE-073",
                "An expert's scheduler has noise levels or timesteps that cannot be converted into "
                "those of another expert. Use experts with ordinary schedulers.",
            )
        return cls(known, known[0]) if len(set(known)) > 1 else None

    @property
    def prefers_predictions(self) -> bool:
        """Whether predictions alone are fused by default, since fused features are worse.

        It was so on emoji scenes if the first expert's schedule begins with pure noise, which
        another's does not reach, and the contrary if that other one was the first; see
        docs/checkpoints.md.
        """
        begin = [each.begins_with_noise for each in self.experts]
        return self.wanted.begins_with_noise and not all(begin)


def can_convert(family: Family) -> bool:
    """Whether the coroutines of a family take the latent and the timestep as they are."""
    is_plain = type(family.interface).arguments is Interface.arguments
    return is_plain and not any(kind.packs for kind in family.pipelines)


class Conversion(Hook):
    """Run every expert on its own time axis, and convert its prediction.

    Args:
        family: of the experts.
        site: the last site, whose feature is the prediction; its first channels are those of the
            latent, a variance may follow.
        objectives: of the experts and of the ensemble.

    Raises:
        AfaError: if the family packs latents, so that predictions have another shape.
    """

    is_recordable = True

    def __init__(self, family: Family, site: Site, objectives: Objectives) -> None:
        if family.blocks is not predictor_blocks and not can_convert(family):
            raise AfaError(
                "AFA-ENSEMBLE-065",
                f"The experts predict different quantities, which cannot be converted for the "
                f"family '{family.name}'. Use experts with one prediction type.",
            )
        self.objectives = objectives
        self._wanted = objectives.wanted
        #: the objectives that differ from the ensemble's, by expert
        self._others = {n: e for n, e in enumerate(objectives.experts) if e != self._wanted}
        self._family, self._site = family, site
        self._level: Level | None = None
        #: by expert: the latent that it sees, its level, and its timesteps if they are others
        self._own: dict[int, tuple[Tensor, Level, Tensor | None]] = {}

    def begin(self, inputs: Inputs) -> Collection[int]:
        """Find the level of a step, and each expert's latent and timestep."""
        divisor = self._family.timestep_divisor
        angle = self._wanted.angle(inputs.timesteps * divisor)
        self._level = self._wanted.level(angle)
        self._own = {}
        for n in self._others.keys() & set(inputs.running.experts):
            objective, sample = self._others[n], inputs.arguments[n][self._family.latent]
            if objective.same_levels(self._wanted):
                self._own[n] = sample, self._level, None
                continue
            steps = objective.timestep(angle)
            level = objective.level(objective.angle(steps))
            scale = level.norm / self._level.norm
            self._own[n] = self._scaled(sample, scale), level, steps / divisor
        return ()

    def arguments(self, arguments: Arguments) -> Arguments:
        """Give each expert the latent and the timesteps of its own schedule."""
        changed = dict(arguments)
        for n, (noisy, _, steps) in self._own.items():
            if steps is not None and n in changed:
                own = {self._family.latent: noisy, "timestep": steps}
                changed[n] = {**changed[n], **own}
        return changed

    def features(self, site: str, features: Features) -> Features:
        """Convert the predictions of experts with another objective."""
        if site != self._site.name:
            return features
        assert self._level is not None, "a step has begun"
        wanted, changed = (self._wanted, self._level), dict(features)
        for n, (noisy, level, _) in self._own.items():
            if n not in features or (hidden := features[n].hidden) is None:
                continue
            count = self._count(noisy)
            latent, rest = hidden[:, :count], hidden[:, count:]
            converted = convert(latent, noisy[:, :count], (self._others[n], level), wanted)
            together = torch.cat([converted.to(hidden.dtype), rest], 1)
            changed[n] = features[n]._replace(hidden=together)
        return changed

    def _scaled(self, sample: Tensor, scale: Tensor) -> Tensor:
        """A latent [B, C, H, W] times factors [B]; masks and masked pictures in it are kept."""
        count = self._count(sample)
        latent = sample[:, :count].float() * scale.view(-1, 1, 1, 1)
        return torch.cat([latent.to(sample.dtype), sample[:, count:]], 1)

    def _count(self, sample: Tensor) -> int:
        """The channels of the latent in the denoiser's input and in its prediction."""
        return min(sample.shape[1], self._site.channels)
