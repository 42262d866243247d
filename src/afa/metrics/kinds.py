"""The three kinds of metric, and what a harness asks of each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

from afa.errors import AfaError
from afa.metrics.distances import cosine_scores

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


class ImageScorer(Protocol):
    """One number per picture, of the picture with its own prompt; pairs are never crossed."""

    @property
    def name(self) -> str:
        """Of the metric, as in a recipe: `clip_t`, `aes`, ..."""

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger score is a better picture."""

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """The score of every picture with the prompt at its place."""


class FeatureExtractor(Protocol):
    """A network that turns pictures into features, one picture at a time.

    Two extractors of one `name` give the same features, so stored ones can be used again.
    """

    @property
    def name(self) -> str:
        """Of the network and its weights, as in a recipe."""

    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Features [pictures, width], float32 on the CPU."""


@dataclass(frozen=True)
class ReferenceScorer:
    """One number per picture, of the picture with its own reference picture: CLIP-I."""

    name: str
    extractor: FeatureExtractor
    higher_is_better: bool = True

    def score(self, generated: Tensor, real: Tensor) -> list[float]:
        """The cosine of every picture's features with those of its reference.

        Args:
            generated: features [n, d], from `extractor`.
            real: features [n, d] of the references, in the same order.

        Raises:
            AfaError: another number of references, or another network's features.
        """
        return cosine_scores(generated, real)


@dataclass(frozen=True)
class SetMetric:
    """One number for a whole set of pictures, from their features: FID, KID, IS, CMMD.

    `measure` takes the features of generated and of real pictures, [n, d] and [m, d]; only those
    of generated ones where not `needs_real`.
    """

    name: str
    extractor: FeatureExtractor
    measure: Callable[..., float]
    _: KW_ONLY
    higher_is_better: bool
    needs_real: bool

    def compute(self, generated: Tensor, real: Tensor | None = None) -> float:
        """The metric of features from `extractor`.

        Args:
            generated: features [n, d] of generated pictures.
            real: features [m, d] of real ones, where `needs_real`.

        Raises:
            AfaError: real features are missing, or are given where none are compared.
        """
        if self.needs_real == (real is None):
            raise AfaError(
                "AFA-METRIC-013",
                f"The metric '{self.name}' needs features of generated "
                f"{'and of real' if self.needs_real else 'pictures and of no real'} ones, came "
                f"{'none' if real is None else 'some'} of real ones. See its needs_real.",
            )
        return self.measure(generated) if real is None else self.measure(generated, real)


Metric: TypeAlias = ImageScorer | ReferenceScorer | SetMetric
