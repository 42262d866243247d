"""Noise on the prompt: who sees it, how much, and what it depends on."""

from __future__ import annotations

import pytest
import torch

import afa
from afa.aggregators import Condition, Mean
from afa.training.noise import noise_on_prompt
from tests.tiny import inputs, tiny_unet

LEVEL = 0.5


class Noted(Mean):
    """The mean, which keeps the text that it was given."""

    def forward(self, features, condition: Condition):  # type: ignore[no-untyped-def]
        self.text = condition.text
        return super().forward(features, condition)


@pytest.fixture
def ensemble() -> afa.EnsembleDenoiser:
    experts = [tiny_unet(n) for n in range(2)]
    count = len(afa.EnsembleDenoiser(experts).aggregators)
    return afa.EnsembleDenoiser(experts, [Noted() for _ in range(count)])


def texts(ensemble: afa.EnsembleDenoiser) -> list[torch.Tensor]:
    return [rule.text for rule in ensemble.aggregators]


def test_only_the_rules_see_it_and_all_see_the_same(ensemble: afa.EnsembleDenoiser) -> None:
    given = inputs()
    plain = ensemble(**given).sample
    clean = texts(ensemble)[0]
    with noise_on_prompt(ensemble, LEVEL, range(len(clean))):
        noisy = ensemble(**given).sample
    assert torch.equal(noisy, plain), (
        "the mean does not look at the text, and experts have it clean"
    )
    first, *others = texts(ensemble)
    assert all(other is first for other in others)
    added = (first - clean).std((1, 2)) / clean.std((1, 2))
    torch.testing.assert_close(added, torch.full_like(added, LEVEL), rtol=0.1, atol=0)
    assert torch.equal(ensemble(**given).sample, plain)
    assert torch.equal(texts(ensemble)[0], clean), "none after the block"


def test_a_sample_has_the_same_noise_in_every_batch(ensemble: afa.EnsembleDenoiser) -> None:
    given = inputs()
    seeds = list(range(7, 7 + len(given["sample"])))
    with noise_on_prompt(ensemble, LEVEL, seeds):
        ensemble(**given)
    together = texts(ensemble)[0]
    for n, seed in enumerate(seeds):
        alone = {
            key: value[n : n + 1] if torch.is_tensor(value) and value.ndim else value
            for key, value in given.items()
        }
        with noise_on_prompt(ensemble, LEVEL, [seed]):
            ensemble(**alone)
        assert torch.equal(texts(ensemble)[0], together[n : n + 1])
