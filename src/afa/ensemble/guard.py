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

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from afa.denoisers import Feature

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
                f"A picture must be finite numbers, but the autoencoder gave nan or infinity in "
                f"{dtype}. Use bfloat16 or float32, or an autoencoder that was made for {dtype}: "
                "vae=FOLDER."
            ) from None


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers are."""
    return bool(torch.isfinite(tensor).all())


class Guard:
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
        self._everywhere: frozenset[int] = frozenset()

    def look_at_inputs(
        self, sample: Tensor, per_expert: Sequence[Mapping[str, Any]], running: Sequence[int]
    ) -> list[int]:
        """The experts whose text is finite.

        Raises:
            AfaError: the latent is not, or somebody's text and nothing is masked.
        """
        if not is_finite(sample):
            raise AfaError(
                "The latent that is to be denoised must be finite, but it has nan or infinity "
                "before any expert ran. Are sizes, scheduler and guidance as they should be?"
            )
        wrong = [n for n in running if not all(map(is_finite, _floats(per_expert[n])))]
        for number in wrong:
            self._note(number, "its text encoder", "text encoder")
        self._everywhere = frozenset(wrong)
        return self._others(wrong, running, "text encoder")

    def look(self, features: Mapping[int, Feature]) -> frozenset[int]:
        """The experts to leave out at a site, since their features are not finite, by number.

        Args:
            features: by the expert's number; those that a plan leaves out have no content.

        Raises:
            AfaError: one is not finite and nothing is masked, or none is.
        """
        computed = {n: feature for n, feature in features.items() if feature.hidden is not None}
        site, wrong = next(iter(features.values())).site, []
        for n, feature in computed.items():
            if n in self._everywhere:
                wrong.append(n)
            elif not (is_finite(feature.hidden) and is_finite(feature.temb)):
                wrong.append(n)
                self._note(n, f"its feature at site '{site}'", site)
        self._others(wrong, list(computed), site)
        return frozenset(wrong)

    def look_at_fused(self, site: str, fused: Tensor | Sequence[Tensor]) -> None:
        """Refuse what is not finite although all features were.

        Raises:
            AfaError: names the site.
        """
        if not all(map(is_finite, [fused] if isinstance(fused, Tensor) else fused)):
            raise AfaError(
                f"The experts' features at site '{site}' are finite, but what the aggregator makes "
                "of them is not. Are its weights damaged, or a bias out of all measure? Load the "
                "ensemble again, or train it again."
            )

    def require_some(self, chosen: Sequence[int], site: str) -> None:
        """Refuse a site where nobody is left to fuse: a plan leaves it to experts that are masked.

        Raises:
            AfaError: names the site.
        """
        if not chosen:
            self._others((), chosen, site)

    def look_at_prediction(self, prediction: Tensor) -> None:
        """Refuse a prediction that is not finite although whoever is not was masked.

        Raises:
            AfaError: says so.
        """
        if not is_finite(prediction):
            raise AfaError(
                "The prediction is not finite although experts were left out where they are not. "
                "The aggregators' weights may be damaged. Load the ensemble again, or train it "
                "again."
            )

    def _note(self, number: int, what: str, place: str) -> None:
        self.masked[self._names[number], place] += 1
        if not self._masks:
            raise AfaError(
                f"All that experts compute must be finite; '{self._names[number]}' gave nan or "
                f"infinity: {what}. {self._remedy()}"
            )

    def _others(self, wrong: Sequence[int], running: Sequence[int], place: str) -> list[int]:
        left = [n for n in running if n not in wrong]
        if not left:
            raise AfaError(
                f"All that experts compute must be finite; none of them gave such numbers at "
                f"'{place}'. {self._remedy()}"
            )
        return left

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
