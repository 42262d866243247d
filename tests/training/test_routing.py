"""Shares, entropies, their gradients, and who is warned of."""

from __future__ import annotations

import math

import pytest
import torch

from afa.ensemble.denoiser import EnsembleDenoiser
from afa.training.routing import CollapseWatch, Routing, WeightTap, tapped
from tests.tiny import inputs, tiny_unet
from tests.training.runs import SMALL


def tap_of(*weights: torch.Tensor) -> WeightTap:
    return WeightTap({f"site {n}": w for n, w in enumerate(weights)})


def test_uniform_and_one_hot_weights() -> None:
    uniform = torch.full((2, 3, 4, 4), 1 / 3)
    one_hot = torch.zeros(2, 3, 4, 4)
    one_hot[:, 0, :2], one_hot[:, 1, 2:] = 1, 1
    routing = tap_of(uniform, one_hot).routing()
    assert routing.sites == ("site 0", "site 1")
    torch.testing.assert_close(routing.shares, torch.tensor([[1 / 3] * 3, [0.5, 0.5, 0.0]]))
    torch.testing.assert_close(routing.entropy, torch.tensor([1.0, 0.0]))
    # hard weights that are shared out evenly cost entropy alone
    tap = tap_of(one_hot)
    assert tap.penalty(1.0, 0.0).item() == pytest.approx(1.0)
    assert tap.penalty(0.0, 1.0).item() == pytest.approx(1 - math.log(2) / math.log(3))
    assert tap_of(uniform).penalty(2.0, 3.0).item() == pytest.approx(0, abs=1e-6)


def test_penalties_have_finite_gradients_even_of_hard_weights() -> None:
    logits = torch.tensor([200.0, 0.0, -200.0]).view(1, 3, 1, 1).requires_grad_()
    tap_of(logits.softmax(1)).penalty(1.0, 1.0).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_the_mean_of_several() -> None:
    first = Routing(("a",), torch.tensor([[1.0, 0.0]]), torch.tensor([0.2]))
    second = Routing(("a",), torch.tensor([[0.0, 1.0]]), torch.tensor([0.4]))
    mean = Routing.mean([first, second])
    assert mean.shares.tolist() == [[0.5, 0.5]]
    assert mean.entropy.tolist() == pytest.approx([0.3])


@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_tap_sees_every_site_and_the_gradients_go_through(checkpoints: bool) -> None:
    ensemble = EnsembleDenoiser([tiny_unet(0), tiny_unet(1)], SMALL).train()
    if checkpoints:
        ensemble.enable_gradient_checkpointing()
    seen: list[str] = []
    ensemble.on_weights = lambda timestep, site, weights: seen.append(site)
    with tapped(ensemble) as tap:
        ensemble(**inputs())
    assert list(tap.weights) == [site.name for site in ensemble.sites] == seen
    tap.penalty(1.0, 1.0).backward()
    # at the uniform weights of the beginning both are largest, so the gradients are zero but there
    assert all(p.grad is not None for p in ensemble.aggregators.parameters())
    ensemble(**inputs())
    assert len(seen) == 2 * len(ensemble.sites)  # the observer that was there is back


def routing_of(*shares: list[float]) -> Routing:
    sites = tuple("abcdef"[: len(shares)])
    return Routing(sites, torch.tensor(shares), torch.zeros(len(shares)))


def test_a_starved_expert_is_named_once_and_again_when_it_is_worse() -> None:
    watch = CollapseWatch(["fox", "owl"], patience=3)
    good, bad = routing_of([0.5, 0.5], [0.5, 0.5]), routing_of([0.97, 0.03], [0.5, 0.5])
    said = [watch.see(bad, step) for step in (1, 2, 3, 4)]
    assert [len(lines) for lines in said] == [0, 0, 1, 0]
    assert "'owl'" in said[2][0]
    assert "1 of 2 sites in the last 3 reports (step 3): a." in said[2][0]
    worse = routing_of([0.97, 0.03], [0.98, 0.02])
    said = [watch.see(worse, step) for step in (5, 6, 7)]
    assert [len(lines) for lines in said] == [0, 0, 1]
    assert "2 of 2 sites in the last 3 reports (step 7): a, b." in said[2][0]
    assert not any(watch.see(good, step) for step in range(8, 20))


def test_a_single_expert_starves_nobody() -> None:
    ensemble = EnsembleDenoiser([tiny_unet(0)], SMALL)
    with tapped(ensemble) as tap:
        ensemble(**inputs())
    routing = tap.routing()
    assert routing.shares.unique().tolist() == [1.0]
    assert routing.entropy.unique().tolist() == [0.0]
    assert not CollapseWatch(["fox"], patience=1).see(routing, 1)
