"""Load metrics from their recipes."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, cast

from afa.files import read_json
from afa.metrics.aesthetic import load_aesthetic
from afa.metrics.clip import ZOO_CLIP, ClipScorer, load_clip, pick_score
from afa.metrics.distances import cmmd, frechet_distance, inception_score, kernel_distance
from afa.metrics.features import (
    INCEPTION,
    ZOO_CLASSIFIER,
    classifier_logits,
    load_inception,
    load_vision,
)
from afa.metrics.hpsv2 import load_hpsv2
from afa.metrics.imagereward import load_imagereward
from afa.metrics.kinds import FeatureExtractor, Metric, ReferenceScorer, SetMetric
from afa.metrics.recipe import PUBLIC_CLIP, PUBLIC_PROCESSORS, PUBLIC_WEIGHTS, MetricRecipe
from afa.metrics.weights import MODEL_FILES, PROCESSOR_FILES, Source, is_pickle

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor


def open_metric(recipe: MetricRecipe, device: torch.device | str = "cpu") -> Metric:
    """Load one metric; see `open_metrics`."""
    return open_metrics([recipe], device)[0]


def open_metrics(
    recipes: Sequence[MetricRecipe], device: torch.device | str = "cpu"
) -> list[Metric]:
    """Load metrics; metrics with the same network share it and its stored features.

    Args:
        recipes: the metrics and their weights.
        device: device of the networks.

    Returns:
        One metric per recipe: an `ImageScorer` for clip_t, aes, pickscore, hpsv2 and imagereward, a
        `ReferenceScorer` for clip_i, a `SetMetric` for fid, kid, is and cmmd.

    Raises:
        AfaError: if weights are missing, damaged, incomplete or of another kind, or are a pickle
            and the user has not allowed pickles.
    """
    opener = _Opener(device)
    return [opener.open(recipe) for recipe in recipes]


class _Opener:
    """Opens metrics on one device, and shares networks between them."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = device
        self._networks: dict[tuple[Any, ...], Any] = {}

    def open(self, recipe: MetricRecipe) -> Metric:
        """Open the metric of a recipe."""
        name = recipe.name
        source = _source(recipe, "weights", recipe.weights or INCEPTION, PUBLIC_WEIGHTS[name])
        processor = None
        if recipe.processor is not None:
            public = PUBLIC_PROCESSORS.get(name, PUBLIC_WEIGHTS[name])
            processor = _source(recipe, "processor", recipe.processor, public)
        if name == "aes":
            clip = _source(recipe, "clip", cast("str", recipe.clip), PUBLIC_CLIP)
            return load_aesthetic(source, self._shared(load_clip, clip, None))
        if name == "hpsv2":
            return load_hpsv2(source, cast("Source", processor), self._device)
        if name == "imagereward":
            return load_imagereward(source, cast("Source", processor), self._device)
        if name == "pickscore":
            return pick_score(self._shared(load_clip, source, processor))
        if name == "clip_t":
            return ClipScorer(name, self._shared(load_clip, source, processor))
        if name == "clip_i":
            return ReferenceScorer(name, self._shared(load_clip, source, processor))
        if name == "cmmd":
            return SetMetric(name, self._shared(load_clip, source, processor), cmmd)
        if name == "is":
            return self._inception_score(source)
        network = self._set_features(source, processor)
        if name == "fid":
            return SetMetric(name, network, frechet_distance)
        measure = functools.partial(kernel_distance, subset_size=recipe.subset_size)
        return SetMetric(name, network, measure)

    def _shared(self, load: Callable[..., Any], *given: Source | str | None) -> Any:
        """Load a network, or return the one loaded before from sources of the same names."""
        key = (load, *(each.name if isinstance(each, Source) else each for each in given))
        if key not in self._networks:
            self._networks[key] = load(*given, self._device)
        return self._networks[key]

    def _set_features(self, source: Source, processor: Source | None) -> FeatureExtractor:
        """The network of FID and KID: Inception, a CLIP or another vision transformer."""
        if source.name == INCEPTION or is_pickle(source.name):
            return self._shared(load_inception, source, "2048")
        if source.name == ZOO_CLIP:
            return self._shared(load_clip, source, processor)
        folder = source.locate([*MODEL_FILES, *PROCESSOR_FILES])
        if folder.is_dir() and read_json(folder / "config.json").get("model_type") == "clip":
            return self._shared(load_clip, source, processor)
        return self._shared(load_vision, source, processor)

    def _inception_score(self, source: Source) -> SetMetric:
        if source.name != ZOO_CLASSIFIER:
            network = self._shared(load_inception, source, "logits_unbiased")
            return SetMetric(
                "is", network, inception_score, higher_is_better=True, needs_real=False
            )
        from afa.zoo.judges import load_classifier
        from afa.zoo.models import NUM_CLASSES

        def score_of_halves(logits: Tensor) -> float:
            return inception_score(logits.reshape(-1, NUM_CLASSES))  # each half is a picture

        classifier = classifier_logits(load_classifier(), self._device)
        return SetMetric("is", classifier, score_of_halves, higher_is_better=True, needs_real=False)


def _source(recipe: MetricRecipe, key: str, name: str, public: str) -> Source:
    return Source(f"The {key} of '{recipe.name}'", name, public)
