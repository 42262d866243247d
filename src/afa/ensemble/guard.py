"""Numbers that are none: which expert gave them, at which site, and going on without it there.

A feature of one expert that overflows in half precision would be in all of them from its site on,
and in the end a black picture. Looking for it costs a step nothing until the prediction itself is
not finite; then the step is run once more, with a look at every feature.
"""

from __future__ import annotations

import warnings
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from afa.ensemble.hook import Hook
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from afa.aggregators import Fused
    from afa.ensemble.hook import Features, Inputs
    from afa.ensemble.running import Running

OnNonFinite = Literal["stop", "mask"]


@contextmanager
def decoded(pipeline: Any) -> Iterator[None]:
    """Refuse pictures of non-finite values (NaN or infinity), which would come out black.

    Around the call of a pipeline that gives pictures.

    Raises:
        AfaError: the autoencoder gave such numbers, for the denoiser's are looked at elsewhere.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "invalid value encountered in cast", RuntimeWarning)
        try:
            yield
        except RuntimeWarning:
            dtype = str(pipeline.vae.dtype).removeprefix("torch.")
            raise AfaError(
                "AFA-ENSEMBLE-029",
                f"A picture must be finite numbers, but the autoencoder gave nan or infinity in "
                f"{dtype}. Use bfloat16 or float32, or an autoencoder that was made for {dtype}: "
                "vae=FOLDER.",
            ) from None


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are."""
    return bool(torch.isfinite(tensor).all())


class Guard(Hook):
    """Looks at all that one step computes.

    Args:
        names: of the experts.
        dtype: of the experts.
        masks: whether an expert is skipped at the sites where it gives non-finite values;
            else the step is stopped there.
    """

    def __init__(self, names: Sequence[str], dtype: torch.dtype, *, masks: bool) -> None:
        self._names, self._dtype, self._masks = names, dtype, masks
        #: how often each expert was left out at each site
        self.masked: Counter[tuple[str, str]] = Counter()
        self._everywhere: Collection[int] = ()
        self._masks_here = False

    def begin(self, inputs: Inputs) -> Collection[int]:
        """The experts whose text is not finite.

        Raises:
            AfaError: the latent is not finite, nobody's text is, or one is not and nothing is
                masked.
        """
        self._running: Running = inputs.running
        if not is_finite(inputs.sample):
            raise AfaError(
                "AFA-ENSEMBLE-030",
                "The latent that is to be denoised must be finite, but it has nan or infinity "
                "before any expert ran. Are sizes, scheduler and guidance as they should be?",
            )
        given = inputs.arguments.items()
        wrong = [n for n, own in given if not all(map(is_finite, _floats(own)))]
        for number in wrong:
            self._note(number, "its text encoder", "text encoder")
        self._everywhere = wrong
        self._require_others(wrong, list(inputs.arguments), "text encoder")
        return wrong

    def look(self, site: str, features: Features) -> Collection[int]:
        """The experts whose features are not finite.

        Args:
            site: its name.
            features: those that a plan leaves out have no content.

        Raises:
            AfaError: one is not finite and nothing is masked, or nobody is left to fuse.
        """
        wrong = []
        for n, feature in features.items():
            if feature.hidden is None:
                continue
            if n in self._everywhere:
                wrong.append(n)
            elif not (is_finite(feature.hidden) and is_finite(feature.temb)):
                wrong.append(n)
                self._note(n, f"its feature at site '{site}'", site)
        self._require_others(wrong, self._running.at(site), site)
        self._masks_here = bool(wrong)
        return wrong

    def fused(self, site: str, fused: Fused) -> None:
        """Refuse what is not finite although all features were.

        Raises:
            AfaError: names the site.
        """
        made = [fused.feature] if isinstance(fused.feature, Tensor) else fused.feature
        if not self._masks_here and not all(map(is_finite, made)):
            raise AfaError(
                "AFA-ENSEMBLE-031",
                f"The experts' features at site '{site}' are finite, but what the aggregator makes "
                "of them is not. Are its weights damaged, or a bias out of all measure? Load the "
                "ensemble again, or train it again.",
            )

    def end(self, prediction: Tensor) -> None:
        """Refuse a prediction that is not finite although whoever is not was masked.

        Raises:
            AfaError: says so.
        """
        if not is_finite(prediction):
            raise AfaError(
                "AFA-ENSEMBLE-032",
                "The prediction is not finite although experts were left out where they are not. "
                "The aggregators' weights may be damaged. Load the ensemble again, or train it "
                "again.",
            )

    def _note(self, number: int, what: str, place: str) -> None:
        self.masked[self._names[number], place] += 1
        if not self._masks:
            raise AfaError(
                "AFA-ENSEMBLE-033",
                f"All that experts compute must be finite; '{self._names[number]}' gave nan or "
                f"infinity: {what}. {self._remedy()}",
            )

    def _require_others(self, wrong: Sequence[int], experts: Sequence[int], place: str) -> None:
        if set(experts) <= set(wrong):
            raise AfaError(
                "AFA-ENSEMBLE-034",
                f"All that experts compute must be finite; none of them gave such numbers at "
                f"'{place}'. {self._remedy()}",
            )

    def _remedy(self) -> str:
        if self._dtype == torch.float16:
            return (
                "In float16 nothing above 65504 can be held: use bfloat16 or float32. Or go on "
                "without it there: mask."
            )
        return "Look at its weights with afa check, leave it out, or go on without it there: mask."


def _floats(arguments: Mapping[str, Any]) -> list[Tensor]:
    """All floating-point tensors of an expert's arguments, nested ones too."""
    values = list(arguments.values())
    values += [inner for value in values if isinstance(value, dict) for inner in value.values()]
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
