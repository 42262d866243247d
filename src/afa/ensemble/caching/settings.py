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
        order: 0 takes features over as they were; 1 goes on along the line through the last two
            (Liu et al., "TaylorSeers", 2025, arXiv 2503.06923).
        drift: all is computed as soon as the latent that the denoiser is given has changed by more
            than this share since it last was (relative L1 distance, over what changes at all);
            `interval` is then the most steps between. Unlike an interval, it means the same however
            many steps there are.
        threshold: likewise, by the feature at the last of the first `fresh` sites ("first block
            cache", ParaAttention).
        keep_weights: whether, where features are taken over, the fresh sites are fused with the
            weights that they had when all was computed, so that aggregators do not run.
        first: so many steps at the beginning are computed as a whole in any case.
        guidance_until: the share of the noise levels, counted from where the loop began, after
            which the unconditional half of classifier-free guidance is no longer computed: its
            distance from the conditional half stays what it was. 1 computes it to the end.

    Raises AfaError: settings out of range, or that ask for nothing together.
    """

    interval: int = 1
    fresh: int = 1
    order: int = 0
    drift: float | None = None
    threshold: float | None = None
    keep_weights: bool = False
    first: int = 1
    guidance_until: float = 1.0

    def __post_init__(self) -> None:
        ranges = {
            "interval": (1, 1000),
            "fresh": (0, 1000),
            "order": (0, 1),
            "first": (1, 1000),
            "guidance_until": (0, 1),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise AfaError(
                    f"acceleration.{name} must be from {low} to {high}, came {value}. "
                    f"Leave it out for {getattr(Acceleration, name)}."
                )
        for name in ("drift", "threshold"):
            value = getattr(self, name)
            if value is None:
                continue
            if not value > 0:
                raise AfaError(
                    f"acceleration.{name} must be above 0, came {value}. Leave it out to go by the "
                    "interval alone."
                )
            if self.interval == 1:
                raise AfaError(
                    f"acceleration.{name} needs an interval above 1, the most steps between those "
                    "where all is computed, came interval = 1."
                )
        if self.threshold is not None and self.fresh == 0:
            raise AfaError(
                "acceleration.threshold needs a site that is computed at every step, came "
                "fresh = 0. Use drift instead."
            )

    @property
    def is_exact(self) -> bool:
        """Whether nothing is left out."""
        return self.interval == 1 and self.guidance_until == 1

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


def acceleration_of(given: str | Mapping[str, Any] | Acceleration) -> Acceleration:
    """Settings from the name of a preset, or from some of them by name.

    Raises:
        AfaError: no such preset or setting, or one out of range.
    """
    if isinstance(given, Acceleration):
        return given
    if isinstance(given, str):
        if given not in PRESETS:
            raise AfaError(f"A speed must be one of {', '.join(PRESETS)}, came '{given}'.")
        return PRESETS[given]
    known = [field.name for field in fields(Acceleration)]
    unknown = [key for key in given if key not in known]
    if unknown:
        raise AfaError(f"acceleration has {', '.join(known)}; there is no '{unknown[0]}'.")
    return Acceleration(**given)
