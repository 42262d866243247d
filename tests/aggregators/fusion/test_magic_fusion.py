"""MagicFusion against the paper's formula written out for two, and against a literal."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from afa.aggregators import Condition
from afa.aggregators.fusion import MagicFusion, magic_fusion
from afa.ensemble.denoiser import EnsembleDenoiser
from tests.refusal import refusal
from tests.tiny import TEXT_WIDTH, tiny_unet


def guided(batch: int = 2, timestep: float = 500.0, size: int = 8) -> Condition:
    latent = torch.randn(batch, 4, size, size)
    rows = 2 * batch
    return Condition(
        torch.full((rows,), timestep),
        torch.zeros(rows, 3),
        torch.zeros(rows, 5, 6),
        latent.repeat(2, 1, 1, 1),
    )


def original(general: torch.Tensor, specific: torch.Tensor, scale: float, k: float) -> torch.Tensor:
    """Equations 5 to 8 of the paper for two models: the guided prediction [B, C, H, W]."""
    predictions, saliencies = [], []
    for null, prompted in (general.chunk(2), specific.chunk(2)):
        predictions.append(null + scale * (prompted - null))
        response = F.avg_pool2d((prompted - null).abs(), 4, stride=1, padding=1)
        response = F.interpolate(response, size=null.shape[-2:], mode="bilinear").mean(1)
        flat = response.flatten(1)
        saliencies.append(torch.softmax(k * flat, dim=1).view_as(response))
    mask = (saliencies[1] > saliencies[0]).unsqueeze(1).to(general.dtype)
    return mask * predictions[1] + (1 - mask) * predictions[0]


@pytest.mark.parametrize("k", [0.5, 40.0])
def test_two_experts_as_in_the_paper(k: float) -> None:
    condition = guided()
    first, second = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8)
    fused = MagicFusion(k)([first, second], condition)
    null, prompted = fused.feature.chunk(2)
    torch.testing.assert_close(
        null + 7.5 * (prompted - null), original(first, second, 7.5, k), rtol=1e-5, atol=1e-5
    )
    shares = fused.weights.mean((0, 2, 3))
    assert 0.1 < shares[0] < 0.9, "both experts must be chosen somewhere, or this shows nothing"


def test_the_expert_that_responds_where_it_responds() -> None:
    condition = guided(batch=1, size=12)
    experts = [torch.zeros(2, 4, 12, 12) for _ in range(3)]
    experts[0][1, :, :, :4] = 1.0  # with prompt, in its own third of the map
    experts[1][1, :, :, 4:8] = -1.0
    experts[2][1, :, :, 8:] = 2.0
    weights = MagicFusion(5.0)(experts, condition).weights
    middle_of_thirds = weights[1, :, 6, [1, 6, 10]]
    assert middle_of_thirds.argmax(0).tolist() == [0, 1, 2]
    assert torch.equal(weights.sum(1), torch.ones(2, 12, 12))
    assert torch.equal(weights[0], weights[1]), "the same choice without and with prompt"


def test_early_steps_are_the_first_experts() -> None:
    features = [torch.randn(4, 4, 8, 8) for _ in range(2)]
    rule = MagicFusion(fuse_below=600)
    assert torch.equal(rule(features, guided(timestep=600.0)).feature, features[0])
    assert not torch.equal(rule(features, guided(timestep=599.0)).feature, features[0])


def test_one_temperature_for_each() -> None:
    features = [torch.randn(4, 4, 8, 8)] * 2
    # the same saliency, but the second map is sharper where it is large
    weights = MagicFusion([1.0, 50.0])(features, guided()).weights
    assert 0 < weights[:, 1].mean() < 1
    with refusal("AFA-FUSION-005", "2", "3"):
        MagicFusion([1.0, 2.0, 3.0])(features, guided())


def test_inside_an_ensemble_and_without_guidance() -> None:
    experts = [tiny_unet(seed) for seed in range(2)]
    ensemble = EnsembleDenoiser(experts)
    ensemble = EnsembleDenoiser(experts, magic_fusion(ensemble.sites))
    sample = torch.randn(1, 4, 8, 8)
    text = torch.randn(2, 5, TEXT_WIDTH)
    fused = ensemble(sample.repeat(2, 1, 1, 1), 500, text).sample
    alone = torch.stack([e(sample.repeat(2, 1, 1, 1), 500, text).sample for e in experts])
    matches = (fused == alone).all(2)  # [N, 2, H, W]
    assert matches.any(0).all(), "every pixel is one expert's own prediction"
    with refusal("AFA-FUSION-007", "1"):
        ensemble(torch.randn(2, 4, 8, 8), 500, text)
    with refusal("AFA-FUSION-007", "1"):
        ensemble(sample, 500, text[:1])


def test_temperatures_must_be_positive() -> None:
    with refusal("AFA-FUSION-004"):
        MagicFusion([1.0, 0.0])
