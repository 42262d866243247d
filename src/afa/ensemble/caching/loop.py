"""Denoising loops as a denoiser sees them: a call at a time, and what each takes over."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from afa.aggregators import Fused
from afa.denoisers.prompt import forget

if TYPE_CHECKING:
    from collections.abc import Callable

    from afa.denoisers import Site
    from afa.ensemble.caching.settings import Acceleration

#: one for all experts, or one for each
Features = list[Tensor]
#: the experts that run at a step, by number; and by site where a plan names fewer
Running = tuple[Sequence[int], Mapping[str, Sequence[int]]]


@dataclass
class Kept:
    """What a step that was computed as a whole has left.

    Its latent, and by site what came out; of sites whose features nobody will ask for there is only
    the shape.
    """

    latent: Tensor
    features: dict[str, Features] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    prediction: Tensor | None = None


@dataclass
class Loop:
    """One denoising loop, so far.

    Attributes:
        timestep: its last one.
        latent: a copy of the one that it was last called with.
        num_calls: up to and with the one that runs.
        since_whole: calls since everything was computed.
        kept: of the last call that computed everything.
        graph: of its steps, where they are CUDA graphs.
        is_guarded: whether every feature of its steps is looked at from now on.
        running: the experts that ran at its last call, in all and by site; see `Running`.
    """

    timestep: float
    latent: Tensor
    num_calls: int = 1
    since_whole: int = 0
    kept: Kept | None = None
    graph: Any = None  # a `StepGraph`, which `graphs` makes and keeps here
    is_guarded: bool = False
    running: Running | None = None

    def runs(self, running: Running) -> None:
        """Note which experts run in this call; discard the features that others have made.

        A feature that some experts have made says nothing about those that run now, and neither do
        fusion weights, which are zero for experts that did not run.
        """
        if self.running is not None and self.running != running:
            self.kept = None
        self.running = running


class Loops:
    """Tells from the calls of a denoiser which loop each belongs to; threads have loops apart.

    A copy knows none: graphs of a loop are of the denoiser whose steps were recorded.
    """

    def __init__(self) -> None:
        # by prompt, and then by thread
        self._loops: Any = WeakIdKeyDictionary()

    def __reduce__(self) -> tuple[type[Loops], tuple[()]]:
        return Loops, ()

    def of(
        self,
        prompt: Tensor,
        steps: Tensor,
        latent: Tensor,
        agree: Callable[[bool], bool] = bool,
    ) -> Loop:
        """The loop that this call continues, or a new one.

        A call continues a loop if it has the prompt of an earlier call, as the same object; one
        timestep for all that is below that call's; and a latent that can have come from that
        call's: of the same shape and type, and changed by less than its own size. Otherwise another
        picture has begun, whose caller happened to hold the same prompt: the earlier loop was left
        before its end. Where a loop begins, what was computed of the prompt is discarded.

        Args:
            prompt: embedding of the text, or whatever else stays the same object in a loop.
            steps: timesteps [B].
            latent: what the denoiser is given, [B, ...].
            agree: makes one decision of those of several processes; see `Exchange.any_of`.
        """
        distinct = steps.unique().tolist()
        step = distinct[0] if len(distinct) == 1 else -math.inf
        of_prompt = self._loops.get(prompt)
        if of_prompt is None:
            of_prompt = self._loops[prompt] = {}
        thread = threading.get_ident()
        loop = of_prompt.get(thread)
        continues = (
            loop is not None
            and -math.inf < step < loop.timestep
            and is_alike(loop.latent, latent)
            and not has_moved(latent, loop.latent, 1.0)
        )
        if agree(not continues):
            forget(prompt)
            loop = of_prompt[thread] = Loop(step, latent.clone())
            return loop
        loop.timestep, loop.num_calls, loop.latent = step, loop.num_calls + 1, latent.clone()
        return loop


def is_alike(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have one shape, type and device."""
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def has_moved(now: Tensor, then: Tensor, share: float) -> bool:
    """Whether a latent has changed by more than this share of what it was (relative L1 distance).

    Only places that have changed at all count: some models are given a mask or a picture besides,
    which stay the same.
    """
    now, then = now.float(), then.float()
    size = then[now != then].abs().sum()
    return bool((now - then).abs().sum() > share * size)


class Shortcut:
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

    def kept_weights(self, site: str) -> Tensor | None:
        """With which weights a site that is computed is fused, where its rule need not run."""
        if not self.skipped or not self._settings.keep_weights or site in self.skipped:
            return None
        return self.weights.get(site)

    def take(self, site: str) -> Fused:
        """What comes out at a skipped site; without content where nobody uses it."""
        stream, kept = self._streams[site], self._kept
        taken = kept.features[site]
        entry = self._entries.get(stream) if self._is_residual else None
        if site == self._exits[stream] and entry is not None:
            before, now = kept.features[entry], self._new.features[entry]
            taken = [a + (c - b) for a, b, c in zip(now, before, taken, strict=True)]
        return Fused(taken[0] if len(taken) == 1 else taken, kept.weights.get(site))

    def note(self, site: str, fused: Fused) -> None:
        """See what came out at a site that was computed."""
        if not self._middle:
            return
        features, stream, new = _features(fused), self._streams[site], self._new
        if fused.weights is not None:
            new.weights[site] = fused.weights
        if site in (self._entries.get(stream), self._exits.get(stream)):
            new.features[site] = features
        elif site in self._middle:
            new.features[site] = [_without_content(feature) for feature in features]

    def end(self, prediction: Tensor) -> None:
        """Keep what a whole call has left."""
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
