"""One call of a denoiser, with what is left out left out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from afa.ensemble.caching.guidance import guidance_of, halved_arguments, is_guided, joined_halves
from afa.ensemble.caching.loop import Shortcut

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from afa.denoisers import Family, Site
    from afa.ensemble.caching.loop import Loop
    from afa.ensemble.caching.settings import Acceleration


def predict(
    settings: Acceleration,
    loop: Loop,
    family: Family,
    sites: Sequence[Site],
    arguments: dict[str, Any],
    compute: Callable[[dict[str, Any], Shortcut], Tensor],
    agree: Callable[[bool], bool] = bool,
) -> Tensor:
    """The prediction of one call of a loop.

    Args:
        settings: what is left out.
        loop: to which the call belongs; it is changed.
        family: of the experts.
        sites: of the experts.
        arguments: by name, the latent first.
        compute: runs the experts on such arguments, and takes over what the shortcut skips.
        agree: makes one decision of those of several processes; see `Exchange.any_of`.

    Returns: [B, ...].
    """
    latent: Tensor = next(iter(arguments.values()))
    last = family.conditional_last
    may_halve = settings.guidance_until < 1 and not agree(not is_guided(latent))
    progress = 1 - loop.timestep / loop.begin if loop.begin else 1
    is_late = progress >= settings.guidance_until
    if may_halve and is_late and loop.guidance is not None and not loop.is_halved:
        loop.is_halved = True
        loop.kept = [kept.half(last) for kept in loop.kept]
    if loop.is_halved:
        arguments = halved_arguments(arguments, family.prompt, len(latent), last)
    shortcut = Shortcut(settings, sites, family.is_residual, loop, latent, agree)
    prediction = compute(arguments, shortcut)
    shortcut.end(prediction)
    if loop.is_halved:
        assert loop.guidance is not None, "it was computed before"
        return joined_halves(prediction, loop.guidance, last)
    if may_halve:
        loop.guidance = guidance_of(prediction, last)
    return prediction
