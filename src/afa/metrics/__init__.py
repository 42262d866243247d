"""Metrics of the paper's evaluation: pictures -> features -> one number.

    recipes = [MetricRecipe(name=name, weights="zoo:clip") for name in ("clip_t", "fid")]
    clip_t, fid = open_metrics(recipes)
    clip_t.score(pictures, prompts)
    fid.compute(fid.extractor.features(pictures), fid.extractor.features(real_pictures))

Importing this package loads no network and no library that only some metrics need.
"""

from afa.metrics.distances import (
    cmmd,
    cosine_scores,
    frechet_distance,
    inception_score,
    kernel_distance,
)
from afa.metrics.kinds import FeatureExtractor, ImageScorer, Metric, ReferenceScorer, SetMetric
from afa.metrics.opening import open_metric, open_metrics
from afa.metrics.recipe import PUBLIC_WEIGHTS, MetricRecipe

__all__ = [
    "PUBLIC_WEIGHTS",
    "FeatureExtractor",
    "ImageScorer",
    "Metric",
    "MetricRecipe",
    "ReferenceScorer",
    "SetMetric",
    "cmmd",
    "cosine_scores",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "open_metric",
    "open_metrics",
]
