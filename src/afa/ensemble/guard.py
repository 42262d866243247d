"""Non-finite values (NaN or infinity): find the expert and the site, and optionally skip it there.

If one expert overflows in half precision, fusion spreads the non-finite values to all experts, and
the picture is black. Only the prediction of a step is checked. If it is not finite, the step runs
again and every feature is checked.
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
    """Refuse pictures with non-finite values (NaN or infinity), which would be black.

    Enter it around a pipeline call that decodes pictures.

    Raises:
        AfaError: if the autoencoder's output is not finite; `Guard` checks the denoiser's.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "invalid value encountered in cast", RuntimeWarning)
        try:
            yield
        except RuntimeWarning:
            dtype = str(pipeline.vae.dtype).removeprefix("torch.")
            raise AfaError(
                "AFA-ENSEMBLE-029",
                f"The autoencoder computed NaN or infinity in {dtype}, which makes a black "
                f"picture. Use bfloat16 or float32, or an autoencoder made for {dtype}: "
                "vae=FOLDER.",
            ) from None


def is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite."""
    return bool(torch.isfinite(tensor).all())


class Guard(Hook):
    """Check every text and feature of one step for non-finite values.

    Args:
        names: the experts' names.
        dtype: the experts' data type.
        masks: whether an expert is skipped at the sites where it computes non-finite values;
            otherwise the step raises an error there.
    """

    def __init__(self, names: Sequence[str], dtype: torch.dtype, *, masks: bool) -> None:
        self._names, self._dtype, self._masks = names, dtype, masks
        #: by (expert, site), how often the expert was masked there
        self.masked: Counter[tuple[str, str]] = Counter()
        self._everywhere: Collection[int] = ()
        self._masks_here = False

    def begin(self, inputs: Inputs) -> Collection[int]:
        """Find the experts whose text embedding is not finite.

        Raises:
            AfaError: if the latent is not finite, if no expert's text is finite, or if one is not
                and masking is off.
        """
        self._running: Running = inputs.running
        if not is_finite(inputs.sample):
            raise AfaError(
                "AFA-ENSEMBLE-030",
                "The noisy latent has NaN or infinity before any expert ran. Check the size, the "
                "scheduler and the guidance scale.",
            )
        given = inputs.arguments.items()
        wrong = [n for n, own in given if not all(map(is_finite, _floats(own)))]
        for number in wrong:
            self._note(number, "its text encoder", "text encoder")
        self._everywhere = wrong
        self._require_others(wrong, list(inputs.arguments), "text encoder")
        return wrong

    def look(self, site: str, features: Features) -> Collection[int]:
        """Find the experts whose features at a site are not finite.

        Args:
            site: the name of the site.
            features: the experts' features; `hidden` is None if a plan skips the expert there.

        Raises:
            AfaError: if one is not finite and masking is off, or if no expert is left to fuse.
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
        """Check that a fused feature is finite if the experts' features are.

        Raises:
            AfaError: if it is not; it names the site.
        """
        made = [fused.feature] if isinstance(fused.feature, Tensor) else fused.feature
        if not self._masks_here and not all(map(is_finite, made)):
            raise AfaError(
                "AFA-ENSEMBLE-031",
                f"The aggregator at site '{site}' computed NaN or infinity from finite features. "
                "Its weights may be damaged, or a bias is too large. Lower the bias, or load or "
                "train the ensemble again.",
            )

    def end(self, prediction: Tensor) -> None:
        """Check that the prediction is finite after masking.

        Raises:
            AfaError: if it is not.
        """
        if not is_finite(prediction):
            raise AfaError(
                "AFA-ENSEMBLE-032",
                "The prediction has NaN or infinity although the experts with non-finite values "
                "were masked. The aggregators' weights may be damaged. Load the ensemble again, or "
                "train it again.",
            )

    def _note(self, number: int, what: str, place: str) -> None:
        self.masked[self._names[number], place] += 1
        if not self._masks:
            raise AfaError(
                "AFA-ENSEMBLE-033",
                f"Expert '{self._names[number]}' computed NaN or infinity: {what}. "
                f"{self._remedy()}",
            )

    def _require_others(self, wrong: Sequence[int], experts: Sequence[int], place: str) -> None:
        if set(experts) <= set(wrong):
            raise AfaError(
                "AFA-ENSEMBLE-034",
                f"All experts that run at '{place}' computed NaN or infinity; none can be fused. "
                f"{self._remedy()}",
            )

    def _remedy(self) -> str:
        if self._dtype == torch.float16:
            return (
                "float16 overflows above 65504: use --dtype bfloat16 or float32, or pass "
                "--on-nonfinite mask to skip an expert where it overflows."
            )
        return (
            "Check the weights with afa check, remove the expert, or pass --on-nonfinite mask to "
            "skip an expert at such a site."
        )


def _floats(arguments: Mapping[str, Any]) -> list[Tensor]:
    """All floating-point tensors of an expert's arguments, including those in dictionaries."""
    values = list(arguments.values())
    values += [inner for value in values if isinstance(value, dict) for inner in value.values()]
    return [v for v in values if isinstance(v, Tensor) and v.is_floating_point()]
