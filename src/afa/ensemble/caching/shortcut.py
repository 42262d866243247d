"""The cache of features: the hook of a step that reuses what earlier steps have fused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from afa.aggregators import Fused, weighted_sum
from afa.ensemble.caching.loop import Kept, has_moved
from afa.ensemble.hook import Hook

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from afa.denoisers import Site
    from afa.ensemble.caching.loop import Features, Loop
    from afa.ensemble.caching.settings import Acceleration


class Shortcut(Hook):
    """What one call takes over from the whole ones before it.

    Args:
        settings: how much.
        sites: of the experts.
        is_residual: whether blocks add to their input, so that what they added is taken over.
        loop: to which the call belongs; it is changed.
        latent: what the denoiser is given, both halves of guidance.
        agree: makes one decision of those of several processes; see `Exchange.any_of`.
    """

    def __init__(
        self,
        settings: Acceleration,
        sites: Sequence[Site],
        is_residual: bool,
        loop: Loop,
        latent: Tensor,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        self._settings, self._is_residual, self._loop = settings, is_residual, loop
        self._agree = agree
        self._middle, self._entries, self._exits = _parts(settings, sites)
        self._streams = {site.name: site.stream for site in sites}
        self._new = Kept(latent)
        is_whole = not self._middle or self._is_due(latent)
        #: sites whose features nobody computes in this call
        self.skipped = frozenset() if is_whole else frozenset(self._middle)
        loop.since_whole = 0 if is_whole else loop.since_whole + 1

    def _is_due(self, latent: Tensor) -> bool:
        """Whether all has to be computed."""
        settings, loop = self._settings, self._loop
        if (
            loop.kept is None
            or loop.num_calls <= settings.first
            or loop.since_whole + 1 >= settings.interval
        ):
            return True
        if settings.drift is None:
            return False
        return self._agree(has_moved(latent, loop.kept.latent, settings.drift))

    @property
    def takes_features(self) -> bool:
        """Whether anything is taken over in this call, or features are kept for others."""
        return bool(self.skipped or (self._middle and self._settings.fresh))

    @property
    def prediction(self) -> Tensor | None:
        """The prediction, where even that is taken over."""
        return None if not self.skipped or self._settings.fresh else self._kept.prediction

    @property
    def _kept(self) -> Kept:
        assert self._loop.kept is not None, "nothing is skipped before"
        return self._loop.kept

    @property
    def weights(self) -> dict[str, Tensor]:
        """Fusion weights [B, N, H, W] by site, of the last whole call."""
        return self._kept.weights

    def fuse(self, site: str, hidden: Mapping[int, Tensor]) -> Fused | None:
        """What was fused at a skipped site; at others, with kept weights, what these make."""
        if site in self.skipped:
            return self._taken(site)
        if not self.skipped or not self._settings.keep_weights or site not in self.weights:
            return None
        weights = self.weights[site]
        return Fused(weighted_sum(list(hidden.values()), weights[:, list(hidden)]), weights)

    def _taken(self, site: str) -> Fused:
        """What came out at a skipped site; without content where nobody uses it."""
        stream, kept = self._streams[site], self._kept
        taken = kept.features[site]
        entry = self._entries.get(stream) if self._is_residual else None
        if site == self._exits[stream] and entry is not None:
            before, now = kept.features[entry], self._new.features[entry]
            taken = [a + (c - b) for a, b, c in zip(now, before, taken, strict=True)]
        return Fused(taken[0] if len(taken) == 1 else taken, kept.weights.get(site))

    def fused(self, site: str, fused: Fused) -> None:
        """Note what came out at a site that was computed."""
        if not self._middle or site in self.skipped:
            return
        features, stream, new = _features(fused), self._streams[site], self._new
        if fused.weights is not None:
            new.weights[site] = fused.weights
        if site in (self._entries.get(stream), self._exits.get(stream)):
            new.features[site] = features
        elif site in self._middle:
            new.features[site] = [_without_content(feature) for feature in features]

    def keep(self, prediction: Tensor) -> None:
        """Keep what a whole call has left; not in `end`, since graphs replay calls without it."""
        if self._middle and not self.skipped:
            self._new.prediction = prediction
            self._new.latent = self._new.latent.clone()  # who calls may change it in place
            self._loop.kept = self._new


def _parts(
    settings: Acceleration, sites: Sequence[Site]
) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """Sites that may be taken over, and by stream the last ones before and the last ones of them.

    There are none where everything is computed at every step.
    """
    names, fresh = [site.name for site in sites if site.stream == "image"], settings.fresh
    inner = set(names[fresh : len(names) - fresh])
    middle = [site for site in sites if site.block in inner]
    if not middle or settings.interval == 1:
        return [], {}, {}
    before = sites[: sites.index(middle[0])]
    return (
        [site.name for site in middle],
        {site.stream: site.name for site in before},
        {site.stream: site.name for site in middle},
    )


def _features(fused: Fused) -> Features:
    return [fused.feature] if isinstance(fused.feature, Tensor) else list(fused.feature)


def _without_content(feature: Tensor) -> Tensor:
    """A tensor of the same shape that takes no memory."""
    return feature.new_zeros(()).expand(feature.shape)
