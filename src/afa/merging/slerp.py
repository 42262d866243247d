"""Spherical interpolation: average the directions of the experts' tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from afa.errors import AfaError
from afa.merging.method import MergeMethod, check_weights, uniform
from afa.merging.weighted import weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

_PARALLEL = 1e-6  # 1 - cosine below which arc and chord are equal in float32
_MAX_STEPS = 200
_CHUNK = 2**20


@dataclass(frozen=True)
class Slerp(MergeMethod):
    """The weighted spherical mean of the experts (Buss and Fillmore 2001), tensor by tensor.

    Each tensor is one vector. The coefficients c depend only on the directions:
    sum_n c_n t_n / |t_n| is the point of the unit sphere with the least weighted sum of squared
    angles to the directions. The result is sum_n c_n t_n. For two experts with weights (1 - t, t)
    and the angle W between them it is
    sin((1 - t) W) / sin W t_1 + sin(t W) / sin W t_2 (Shoemake 1985). It does not depend on the
    experts' order. For (nearly) parallel, opposite or zero tensors it is the weighted mean.

    Attributes:
        weights: one per expert, not negative, summing to 1; None uses 1/N each.
    """

    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        check_weights(self.weights, sum_to_one=True)
        if self.weights is not None and min(self.weights) < 0:
            raise AfaError(
                "AFA-MERGE-037",
                f"The weights of slerp must not be negative; got {list(self.weights)}. Use method "
                "'weighted' to extrapolate.",
            )

    def merge(self, name: str, tensors: Sequence[Tensor], base: Tensor | None) -> Tensor:
        """Compute the weighted spherical mean of one tensor."""
        weights = uniform(self.weights, len(tensors))
        products = np.empty((len(tensors), len(tensors)))
        for i, a in enumerate(tensors):
            for j, b in enumerate(tensors[: i + 1]):
                products[i, j] = products[j, i] = _dot(a, b)
        return weighted_sum(tensors, spherical_coefficients(products, weights))


def spherical_coefficients(products: np.ndarray, weights: Sequence[float]) -> list[float]:
    """Compute the coefficients of the weighted spherical mean of N vectors.

    The mean lies in the vectors' span, so their inner products suffice. Returns the weights if the
    mean is undefined.

    Args:
        products: inner products of the vectors [N, N].
        weights: [N], not negative, summing to 1.
    """
    norms = np.sqrt(np.diag(products))
    if not (norms > 0).all():
        return list(weights)
    cosines = products / np.outer(norms, norms)
    if (cosines > 1 - _PARALLEL).all() or (cosines < _PARALLEL - 1).any():
        return list(weights)
    w = np.array(weights)
    length = np.sqrt(max(w @ cosines @ w, 0.0))
    if length < 1e-3:  # the directions cancel
        return list(weights)
    mean = w / length
    for _ in range(_MAX_STEPS):
        to_each = np.clip(cosines @ mean, -1, 1)
        if to_each.min() < _PARALLEL - 1:
            break
        angles = np.arccos(to_each)
        stretch = 1 / np.sinc(angles / np.pi)  # angle / sin(angle), 1 at angle 0
        # the weighted mean of the vectors in the tangent space at `mean`
        step = w * stretch - (w * stretch * to_each).sum() * mean
        size = np.sqrt(max(step @ cosines @ step, 0.0))
        if size < 1e-12:
            return [float(c) for c in mean]
        mean = np.cos(size) * mean + np.sin(size) / size * step
        mean = mean / np.sqrt(mean @ cosines @ mean)
    return list(weights)


def _dot(a: Tensor, b: Tensor) -> float:
    """Inner product in float64, in chunks to save memory."""
    pairs = zip(a.reshape(-1).split(_CHUNK), b.reshape(-1).split(_CHUNK), strict=True)
    return sum(torch.dot(x.double(), y.double()).item() for x, y in pairs)
