"""Recorded fusion weights."""

from __future__ import annotations

import pytest
import torch

import afa
from afa.ensemble.recording import WeightRecord, record_weights
from tests.ensemble.test_ensemble import ensemble_of
from tests.tiny import inputs, tiny_unet

SMALL = afa.SABWConfig(hidden_size=8, num_layers=1, num_heads=2, norm_num_groups=4)


@pytest.fixture
def ensemble() -> afa.EnsembleDenoiser:
    return ensemble_of()


def run(ensemble: afa.EnsembleDenoiser, *timesteps: int) -> WeightRecord:
    with torch.no_grad(), record_weights(ensemble) as record:
        for timestep in timesteps:
            ensemble(**{**inputs(), "timestep": timestep})
    return record


def test_every_step_and_site_is_recorded(ensemble: afa.EnsembleDenoiser) -> None:
    record = run(ensemble, 900, 500, 1)
    assert [step.timestep for step in record.steps] == [900, 500, 1]
    for step in record.steps:
        assert list(step.weights) == [site.name for site in ensemble.sites]
        for site in ensemble.sites:
            weights = step.weights[site.name]
            assert weights.shape == (2, 3, 8 // site.scale, 8 // site.scale)
            torch.testing.assert_close(weights.sum(1), torch.ones_like(weights[:, 0]))


def test_nothing_is_kept_outside_of_the_block(ensemble: afa.EnsembleDenoiser) -> None:
    record = run(ensemble, 900)
    with torch.no_grad():
        ensemble(**inputs())
    assert len(record.steps) == 1
    assert ensemble.on_weights is None


def test_recording_changes_no_output(ensemble: afa.EnsembleDenoiser) -> None:
    with torch.no_grad():
        plain = ensemble(**inputs()).sample
        with record_weights(ensemble):
            assert torch.equal(ensemble(**inputs()).sample, plain)


def test_means_are_over_sites_and_pixels(ensemble: afa.EnsembleDenoiser) -> None:
    record = run(ensemble, 900, 1)
    assert record.mean_map(0, 16).shape == (2, 3, 16, 16)
    torch.testing.assert_close(record.mean_map(0, 16).sum(1), torch.ones(2, 16, 16))
    shares = record.mean_share()
    assert shares.shape == (2, len(ensemble.sites), 3)
    torch.testing.assert_close(shares[1, 0], record.steps[1].weights["conv_in"].mean((0, 2, 3)))


def test_untrained_weights_are_a_third_each() -> None:
    ensemble = afa.EnsembleDenoiser([tiny_unet(n) for n in range(3)], SMALL)
    expected = torch.full((1, len(ensemble.sites), 3), 1 / 3)
    torch.testing.assert_close(run(ensemble, 5).mean_share(), expected)


def test_maps_are_of_a_step_and_a_site_or_means(ensemble: afa.EnsembleDenoiser) -> None:
    record = run(ensemble, 900, 1)
    assert record.places == [site.name for site in ensemble.sites]
    one = record.mean_map(1, 8, "conv_in")
    torch.testing.assert_close(one, record.steps[1].weights["conv_in"])
    every = torch.stack(
        [record.mean_map(step, 8, site) for step in range(2) for site in record.places]
    )
    torch.testing.assert_close(record.mean_map(None, 8), every.mean(0))


def test_the_last_of_a_batch_alone(ensemble: afa.EnsembleDenoiser) -> None:
    record = run(ensemble, 900, 1)
    last = record.last()
    assert [step.timestep for step in last.steps] == [900, 1]
    torch.testing.assert_close(
        last.steps[0].weights["mid"].float(), record.steps[0].weights["mid"][1:], atol=1e-3, rtol=0
    )
