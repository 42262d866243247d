"""Settings of the feature cache: how much of a denoising loop reuses earlier steps."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Acceleration:
    """Settings of the feature cache. With the defaults every step is a full step.

    A full step computes all sites. The steps between reuse the *fused* features of the last full
    step, which all experts share, so one cache serves all experts. A single model is accelerated
    as an ensemble of one.

    Attributes:
        interval: a full step at least every `interval` steps; between them, the features of the
            inner sites are reused (Ma et al., "DeepCache", 2024, arXiv 2312.00858). 1 to 1000.
        fresh: the number of sites at either end that every step computes; 0 reuses the prediction
            itself. Transformers reuse what the inner blocks added to the residual stream.
        drift: make a full step when the denoiser's latent has changed by more than this fraction
            since the last one (relative L1 distance over the values that changed). Its effect does
            not depend on the number of steps. `interval` remains the upper limit.
        keep_weights: in steps that reuse features, fuse the fresh sites with the fusion weights of
            the last full step, so that aggregators do not run.
        first: the number of full steps at the beginning of a loop.

    Raises AfaError: if a setting is out of range, or `drift` is set with `interval` 1.
    """

    interval: int = 1
    fresh: int = 1
    drift: float | None = None
    keep_weights: bool = False
    first: int = 1

    def __post_init__(self) -> None:
        ranges = {"interval": (1, 1000), "fresh": (0, 1000), "first": (1, 1000)}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise AfaError(
                    "AFA-ENSEMBLE-012",
                    f"acceleration.{name} must be from {low} to {high}; got {value}. "
                    f"The default is {getattr(Acceleration, name)}.",
                )
        if self.drift is None:
            return
        if not self.drift > 0:
            raise AfaError(
                "AFA-ENSEMBLE-013",
                f"acceleration.drift must be above 0; got {self.drift}. Remove it to use only the "
                "interval.",
            )
        if self.interval == 1:
            raise AfaError(
                "AFA-ENSEMBLE-014",
                "acceleration.drift needs acceleration.interval above 1; got interval = 1. Set "
                "interval to the upper limit of steps between full steps, for example 50.",
            )

    @property
    def is_exact(self) -> bool:
        """Whether every step is a full step."""
        return self.interval == 1

    def describe(self) -> dict[str, Any]:
        """The settings that differ from the defaults, as JSON."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {key: value for key, value in own.items() if value != getattr(Acceleration, key)}


#: every step is a full step
EXACT = Acceleration()
#: the values of `afa generate --speed`; docs/benchmarks.md reports their effect on quality
PRESETS = {
    "exact": EXACT,
    "balanced": Acceleration(interval=50, drift=0.15, keep_weights=True),
    "fast": Acceleration(interval=50, drift=0.2, keep_weights=True),
}


#: settings of earlier versions: the value without effect, why it was removed, what to do instead
_REMOVED: dict[str, tuple[object, str, str]] = {
    "threshold": (None, "it was no better than drift", "Use drift"),
    "order": (0, "extrapolation did not help", "Remove it"),
    "guidance_until": (1, "it costs quality and saves little time", "Remove it and use drift"),
}


def acceleration_of(given: str | Mapping[str, Any] | Acceleration) -> Acceleration:
    """Read cache settings from the name of a preset or from a mapping.

    A setting that was removed in an earlier version is ignored if its value had no effect.

    Raises:
        AfaError: if the preset or a setting is unknown, removed or out of range.
    """
    if isinstance(given, Acceleration):
        return given
    if isinstance(given, str):
        if given not in PRESETS:
            raise AfaError(
                "AFA-ENSEMBLE-015", f"A speed must be one of {', '.join(PRESETS)}; got '{given}'."
            )
        return PRESETS[given]
    for name, (neutral, reason, remedy) in _REMOVED.items():
        if given.get(name, neutral) != neutral:
            raise AfaError(
                "AFA-ENSEMBLE-016",
                f"acceleration.{name} was removed because {reason}; got {given[name]}. {remedy}.",
            )
    given = {key: value for key, value in given.items() if key not in _REMOVED}
    known = [field.name for field in fields(Acceleration)]
    unknown = [key for key in given if key not in known]
    if unknown:
        raise AfaError(
            "AFA-ENSEMBLE-017",
            f"acceleration has no setting '{unknown[0]}'. Use {', '.join(known)}.",
        )
    return Acceleration(**given)
