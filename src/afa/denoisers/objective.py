"""What a denoiser predicts, and on which noise schedule: the common time axis of experts.

Every model here sees a latent x = n (cos(phi) clean + sin(phi) noise) with an angle phi from 0
(clean) to pi / 2 (pure noise). Diffusion (DDPM) has n = 1 and a table of angles by timestep, from
its products of alphas: cos(phi)^2 is the product. Rectified flow has x = (1 - s) clean + s noise
with s = timestep / T, so tan(phi) = s / (1 - s) and n = 1 / (cos(phi) + sin(phi)). Two models see
the same ratio of noise to picture at the same angle, whatever their timesteps are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from diffusers import SchedulerMixin
    from torch import Tensor

PredictionType = Literal["epsilon", "v_prediction", "flow_prediction", "sample"]
FLOW: PredictionType = "flow_prediction"
#: products of alphas up to this one are of pure noise
_PURE_NOISE = 2**-24


class Level(NamedTuple):
    """A level of noise.

    Attributes:
        cos: of the angle, the share of the picture, [B].
        sin: of the angle, the share of the noise, [B].
        norm: n, [B].
    """

    cos: Tensor
    sin: Tensor
    norm: Tensor


@dataclass(frozen=True)
class Objective:
    """What a denoiser predicts, and on which noise schedule.

    Attributes:
        predicts: noise (`epsilon`), velocity (`v_prediction`, Salimans & Ho, 2022, arXiv
            2202.00512), noise - clean (`flow_prediction`), or the clean latent (`sample`).
        angles: the angle of each timestep from 0, increasing; empty for rectified flow.
        num_timesteps: T.
    """

    predicts: PredictionType
    angles: tuple[float, ...]
    num_timesteps: int

    @property
    def described(self) -> dict[str, Any]:
        """The objective as JSON, with the angles of five timesteps; none for rectified flow."""
        last = len(self.angles) - 1
        angles = [round(self.angles[last * n // 4], 3) for n in range(5)] if self.angles else []
        kind = {"predicts": self.predicts, "num_timesteps": self.num_timesteps}
        return {**kind, "angles": angles}

    @property
    def begins_with_noise(self) -> bool:
        """Whether the last timestep is of pure noise (zero terminal SNR), as in rectified flow."""
        return not self.angles or math.cos(self.angles[-1]) ** 2 <= _PURE_NOISE

    def same_levels(self, other: Objective) -> bool:
        """Whether both have one noise schedule, so that their timesteps mean the same."""
        return (self.angles, self.num_timesteps) == (other.angles, other.num_timesteps)

    def angle(self, timestep: Tensor) -> Tensor:
        """The angles [B] in float32 at timesteps [B], also between those of the schedule."""
        steps = timestep.float()
        if not self.angles:
            share = steps / self.num_timesteps
            return torch.atan2(share, 1 - share)
        table = self._table(steps)
        steps = steps.clamp(0, len(table) - 1)
        low = steps.floor().long()
        high = (low + 1).clamp(max=len(table) - 1)
        return torch.lerp(table[low], table[high], steps - low)

    def timestep(self, angle: Tensor) -> Tensor:
        """The timesteps [B] in float32 with these angles [B], or the nearest ones there are."""
        if not self.angles:
            share = angle.sin() / (angle.sin() + angle.cos())
            return share.clamp(1 / self.num_timesteps, 1) * self.num_timesteps
        table = self._table(angle)
        high = torch.searchsorted(table, angle.contiguous()).clamp(1, len(table) - 1)
        below, above = table[high - 1], table[high]
        return high - 1 + ((angle - below) / (above - below)).clamp(0, 1)

    def level(self, angle: Tensor) -> Level:
        """The level of noise at angles [B]."""
        cos, sin = angle.cos(), angle.sin()
        norm = torch.ones_like(cos) if self.angles else 1 / (cos + sin)
        return Level(cos, sin, norm)

    def _table(self, like: Tensor) -> Tensor:
        return _table_on(self.angles, like.device)


@lru_cache(maxsize=32)
def _table_on(angles: tuple[float, ...], device: torch.device) -> Tensor:
    """The angles on a device; copied once, because CUDA graphs cannot copy from the CPU."""
    with torch.inference_mode(False):
        return torch.tensor(angles, dtype=torch.float32, device=device)


def objective_of(scheduler: SchedulerMixin) -> Objective | None:
    """The objective of a model, by its sampling scheduler.

    Returns: None for continuous noise levels (EDM), noise levels without products of alphas,
        timesteps of another meaning, and unknown prediction types, which cannot be converted.
    """
    config, name = scheduler.config, type(scheduler).__name__
    predicts = predicted_by(name, config)
    count = config.get("num_train_timesteps")
    if name.startswith("EDM") or predicts not in get_args(PredictionType) or count is None:
        return None
    if config.get("invert_sigmas") or config.get("timestep_type") == "continuous":
        return None  # its timesteps mean something else
    if predicts == FLOW:
        return Objective(predicts, (), count)
    products = getattr(scheduler, "alphas_cumprod", None)
    if products is None:
        return None  # a scheduler with noise levels of its own
    products = products.cpu().double()
    # some schedulers replace the product of pure noise, to divide by it
    products = torch.where(products <= _PURE_NOISE, torch.zeros_like(products), products)
    angles = torch.atan2((1 - products).clamp(min=0).sqrt(), products.clamp(min=0).sqrt())
    return Objective(predicts, tuple(angles.tolist()), count)


def predicted_by(class_name: str, settings: Mapping[str, Any]) -> Any:
    """The prediction type in a scheduler's configuration.

    Args:
        class_name: of the scheduler.
        settings: its configuration.
    """
    if class_name.startswith("FlowMatch"):
        return FLOW
    return str(settings.get("prediction_type") or "epsilon")


def convert(
    prediction: Tensor,
    noisy: Tensor,
    own: tuple[Objective, Level],
    wanted: tuple[Objective, Level],
) -> Tensor:
    """Convert a prediction into what another objective predicts.

    The prediction determines the clean latent and the noise at the model's own level. At any level
    this is possible: no model that predicts noise has a level of pure noise (cos = 0), and none
    that predicts the clean latent has one without noise.

    Args:
        prediction: [B, C, H, W].
        noisy: what the model saw, at its own level, [B, C, H, W].
        own: the model's objective, and the level at which it ran.
        wanted: the other objective and the level at which its prediction is wanted. It differs from
            the own level only if one schedule does not reach the other's.

    Returns: [B, C, H, W] in float32.
    """
    prediction, noisy = prediction.float(), noisy.float()
    (objective, level), (other, other_level) = own, wanted
    cos, sin, norm = (_per_sample(each, noisy) for each in level)
    if objective.predicts == "v_prediction":
        unit = noisy / norm
        clean, noise = cos * unit - sin * prediction, sin * unit + cos * prediction
    elif objective.predicts == FLOW:  # noise - clean, and noisy / (norm (cos + sin)) is a mean
        total = cos + sin
        mean = noisy / (norm * total)
        clean = mean - sin / total * prediction
        noise = mean + cos / total * prediction
    elif objective.predicts == "epsilon":
        clean, noise = (noisy / norm - sin * prediction) / cos, prediction
    else:
        clean, noise = prediction, (noisy / norm - cos * prediction) / sin
    if other.predicts == "epsilon":
        return noise
    if other.predicts == "sample":
        return clean
    if other.predicts == FLOW:
        return noise - clean
    cos, sin, _ = (_per_sample(each, noisy) for each in other_level)
    return cos * noise - sin * clean


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
