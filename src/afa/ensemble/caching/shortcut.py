"""The feature cache: a hook that reuses fused features of earlier steps."""

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
    """Decide whether a call is a full step, and reuse the last full step's features if it is not.

    The method is DeepCache (Ma et al., 2024, arXiv 2312.00858), applied to the fused features.

    Args:
        settings: the settings of the cache.
        sites: the experts' sites, in order.
        is_residual: whether every block adds to its input; then the sum of the inner blocks'
            outputs is reused instead of the feature.
        loop: the loop of this call; it is changed.
        latent: the latent that the denoiser receives, [B, ...], with both halves of guidance.
        agree: combines the decisions of several processes; see `Exchange.any_of`.
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
        is_full = not self._middle or self._is_due(latent)
        #: sites whose features are not computed in this call
        self.skipped = frozenset() if is_full else frozenset(self._middle)
        loop.since_full = 0 if is_full else loop.since_full + 1

    def _is_due(self, latent: Tensor) -> bool:
        """Whether this call must be a full step."""
        settings, loop = self._settings, self._loop
        if (
            loop.kept is None
            or loop.num_calls <= settings.first
            or loop.since_full + 1 >= settings.interval
        ):
            return True
        if settings.drift is None:
            return False
        return self._agree(has_moved(latent, loop.kept.latent, settings.drift))

    @property
    def handles_features(self) -> bool:
        """Whether this call reuses features, or keeps features for later calls."""
        return bool(self.skipped or (self._middle and self._settings.fresh))

    @property
    def prediction(self) -> Tensor | None:
        """The reused prediction; None if this call computes its own."""
        return None if not self.skipped or self._settings.fresh else self._kept.prediction

    @property
    def _kept(self) -> Kept:
        assert self._loop.kept is not None, "the first step is a full one"
        return self._loop.kept

    @property
    def weights(self) -> dict[str, Tensor]:
        """Fusion weights [B, N, H, W] of the last full step, by site."""
        return self._kept.weights

    def fuse(self, site: str, hidden: Mapping[int, Tensor]) -> Fused | None:
        """Supply the kept feature at a skipped site; elsewhere fuse with kept weights, if set."""
        if site in self.skipped:
            return self._reused(site)
        if not self.skipped or not self._settings.keep_weights or site not in self.weights:
            return None
        weights = self.weights[site]
        return Fused(weighted_sum(list(hidden.values()), weights[:, list(hidden)]), weights)

    def _reused(self, site: str) -> Fused:
        """The kept feature of a skipped site; only the last one of a stream has content."""
        stream, kept = self._streams[site], self._kept
        reused = kept.features[site]
        entry = self._entries.get(stream) if self._is_residual else None
        if site == self._exits[stream] and entry is not None:
            before, now = kept.features[entry], self._new.features[entry]
            reused = [a + (c - b) for a, b, c in zip(now, before, reused, strict=True)]
        return Fused(reused[0] if len(reused) == 1 else reused, kept.weights.get(site))

    def fused(self, site: str, fused: Fused) -> None:
        """Note the feature and the weights of a site that was computed."""
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
        """Keep the results of a full step. This is not in `end`, which replayed graphs skip."""
        if self._middle and not self.skipped:
            self._new.prediction = prediction
            self._new.latent = self._new.latent.clone()  # the caller may change it in place
            self._loop.kept = self._new


def _parts(
    settings: Acceleration, sites: Sequence[Site]
) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """The sites that may be skipped; by stream, the last site before them and the last of them.

    All are empty if every step is a full step.
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
    """A placeholder of the same shape that takes no memory."""
    return feature.new_zeros(()).expand(feature.shape)
