"""How much of a denoising loop is computed, and how much is taken over from earlier steps."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Acceleration:
    """What is left out of a denoising loop. The defaults leave out nothing.

    Whatever is taken over is the *fused* feature, which all experts share: one cache serves them
    all. The same settings speed up a single model, which is an ensemble of one.

    Attributes:
        interval: every so many steps all is computed; between them, features of the sites in the
            middle are taken over (Ma et al., "DeepCache", 2024, arXiv 2312.00858).
        fresh: how many sites at either end are computed at every step; 0 takes over the prediction
            itself. In transformers what is taken over is what the blocks between have added.
        drift: all is computed as soon as the latent that the denoiser is given has changed by more
            than this share since it last was (relative L1 distance, over what changes at all);
            `interval` is then the most steps between. Unlike an interval, it means the same however
            many steps there are.
        keep_weights: whether, where features are taken over, the fresh sites are fused with the
            weights that they had when all was computed, so that aggregators do not run.
        first: so many steps at the beginning are computed as a whole in any case.

    Raises AfaError: settings out of range, or that ask for nothing together.
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
                    f"acceleration.{name} must be from {low} to {high}, came {value}. "
                    f"Leave it out for {getattr(Acceleration, name)}.",
                )
        if self.drift is None:
            return
        if not self.drift > 0:
            raise AfaError(
                "AFA-ENSEMBLE-013",
                f"acceleration.drift must be above 0, came {self.drift}. Leave it out to go by the "
                "interval alone.",
            )
        if self.interval == 1:
            raise AfaError(
                "AFA-ENSEMBLE-014",
                "acceleration.drift needs an interval above 1, the most steps between those "
                "where all is computed, came interval = 1.",
            )

    @property
    def is_exact(self) -> bool:
        """Whether nothing is left out."""
        return self.interval == 1

    def describe(self) -> dict[str, Any]:
        """What differs from the exact settings, as JSON."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return {key: value for key, value in own.items() if value != getattr(Acceleration, key)}


#: nothing is left out
EXACT = Acceleration()
#: by what `afa generate --speed` calls them; docs/benchmarks.md has what each costs
PRESETS = {
    "exact": EXACT,
    "balanced": Acceleration(interval=50, drift=0.15, keep_weights=True),
    "fast": Acceleration(interval=50, drift=0.2, keep_weights=True),
}


#: settings of earlier versions: the value that changed nothing, why it was removed, what to use
_REMOVED: dict[str, tuple[object, str, str]] = {
    "threshold": (None, "no gain over drift was found", "Use drift"),
    "order": (0, "no gain from extrapolation was found", "Leave it out"),
    "guidance_until": (1, "it costs quality and saves little time", "Leave it out and use drift"),
}


def acceleration_of(given: str | Mapping[str, Any] | Acceleration) -> Acceleration:
    """Settings from the name of a preset, or from some of them by name.

    A setting of an earlier version that was removed is ignored where its value changes nothing.

    Raises:
        AfaError: no such preset or setting, one that was removed, or one out of range.
    """
    if isinstance(given, Acceleration):
        return given
    if isinstance(given, str):
        if given not in PRESETS:
            raise AfaError(
                "AFA-ENSEMBLE-015", f"A speed must be one of {', '.join(PRESETS)}, came '{given}'."
            )
        return PRESETS[given]
    for name, (neutral, reason, remedy) in _REMOVED.items():
        if given.get(name, neutral) != neutral:
            raise AfaError(
                "AFA-ENSEMBLE-016",
                f"acceleration.{name} was removed, since {reason}; came {given[name]}. {remedy}.",
            )
    given = {key: value for key, value in given.items() if key not in _REMOVED}
    known = [field.name for field in fields(Acceleration)]
    unknown = [key for key in given if key not in known]
    if unknown:
        raise AfaError(
            "AFA-ENSEMBLE-017", f"acceleration has {', '.join(known)}; there is no '{unknown[0]}'."
        )
    return Acceleration(**given)
