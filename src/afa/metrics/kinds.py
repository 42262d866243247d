"""The three kinds of metrics and their interfaces."""

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
    """Scores each picture with its own prompt."""

    @property
    def name(self) -> str:
        """Name of the metric in a recipe: `clip_t`, `aes`, ..."""

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger score is better."""

    def score(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Score each picture with its prompt; both have the same order."""


class FeatureExtractor(Protocol):
    """A network that computes features of pictures, one picture at a time.

    Two extractors with the same `name` compute the same features, so stored ones can be reused.
    """

    @property
    def name(self) -> str:
        """Identifies the network and its weights."""

    def features(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Compute features [pictures, width], float32 on the CPU."""


@dataclass(frozen=True)
class ReferenceScorer:
    """Scores each picture with its own reference picture: CLIP-I."""

    name: str
    extractor: FeatureExtractor
    higher_is_better: bool = True

    def score(self, generated: Tensor, real: Tensor) -> list[float]:
        """Compute the cosine similarity of each picture's features with those of its reference.

        Args:
            generated: features [n, d] of `extractor`.
            real: features [n, d] of the references, in the same order.

        Raises:
            AfaError: if the shapes differ.
        """
        return cosine_scores(generated, real)


@dataclass(frozen=True)
class SetMetric:
    """Scores a set of pictures by their features: FID, KID, IS, CMMD.

    `measure` takes features of generated [n, d] and of real pictures [m, d]; if `needs_real` is
    False, only those of generated pictures.
    """

    name: str
    extractor: FeatureExtractor
    measure: Callable[..., float]
    _: KW_ONLY
    higher_is_better: bool = False
    needs_real: bool = True

    def compute(self, generated: Tensor, real: Tensor | None = None) -> float:
        """Compute the metric from features of `extractor`.

        Args:
            generated: features [n, d] of generated pictures.
            real: features [m, d] of real pictures; None if not `needs_real`.

        Raises:
            AfaError: if `real` is missing, or is not needed.
        """
        if self.needs_real == (real is None):
            raise AfaError(
                "AFA-METRIC-013",
                f"The metric '{self.name}' {'requires' if self.needs_real else 'does not use'} "
                f"features of real pictures; got {'none' if real is None else 'some'}. See its "
                "needs_real.",
            )
        return self.measure(generated) if real is None else self.measure(generated, real)


Metric: TypeAlias = ImageScorer | ReferenceScorer | SetMetric
