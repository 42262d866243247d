"""Aggregators that are computed in half precision beside experts that are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import afa
from afa.aggregators import SABW, Condition, Fused, FusionRule
from afa.ensemble.denoiser import EnsembleDenoiser
from tests.ensemble.caching.test_loop import arguments_of, at, ensemble_of
from tests.tiny import tiny_unet

HALVES = [torch.bfloat16, torch.float16]


def seen_types(ensemble: Any) -> list[torch.dtype]:
    """Of the hidden features within the aggregators, from now on."""
    types: list[torch.dtype] = []
    for rule in ensemble.aggregators:
        rule.res_block.register_forward_hook(lambda _, __, out: types.append(out.dtype))
    return types


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("family", ["unet", "sd3", "flux", "chroma"])
def test_they_draw_in_the_experts_type(family: str, dtype: torch.dtype) -> None:
    ensemble = ensemble_of(family).to(dtype)
    arguments = arguments_of(family, dtype=dtype)
    types = seen_types(ensemble)
    with torch.no_grad(), afa.record_weights(ensemble) as record:
        came = ensemble(**at(arguments, 500)).sample
    assert set(types) == {dtype}
    assert came.dtype == dtype
    assert {weights.dtype for weights in record.steps[0].weights.values()} == {torch.float32}
    assert {p.dtype for p in ensemble.aggregators.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_weights_are_the_same_to_their_precision(dtype: torch.dtype) -> None:
    ensemble = ensemble_of("unet").to(dtype)
    for rule in ensemble.aggregators:
        nn.init.normal_(rule.conv_out.weight, std=0.3)
    arguments = at(arguments_of("unet", dtype=dtype), 500)

    def weights() -> dict[str, torch.Tensor]:
        with torch.no_grad(), afa.record_weights(ensemble) as record:
            ensemble(**arguments)
        return record.steps[0].weights

    lowered = weights()
    ensemble.lowered.of = lambda rule, dtype: rule
    for site, exact in weights().items():
        assert exact.std() > 0.01
        torch.testing.assert_close(lowered[site], exact, rtol=0, atol=0.05)
    assert any(not torch.equal(lowered[site], exact) for site, exact in weights().items())


def test_training_is_in_float32() -> None:
    ensemble = ensemble_of("unet").to(torch.bfloat16)
    types = seen_types(ensemble)
    ensemble(**arguments_of("unet", dtype=torch.bfloat16)).sample.float().mean().backward()
    assert set(types) == {torch.float32}
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in ensemble.parameters())


@pytest.mark.parametrize("change", ["in place", "through data", "another", "moved"])
def test_parameters_that_change_are_copied_again(change: str) -> None:
    ensemble = ensemble_of("unet").to(torch.bfloat16)
    arguments = at(arguments_of("unet", dtype=torch.bfloat16), 500)
    weight = ensemble.aggregators[2].conv_out.weight
    with torch.no_grad():
        before = ensemble(**arguments).sample
        new = torch.randn_like(weight)
        if change == "in place":
            weight.copy_(new)
        elif change == "through data":  # as moving averages are copied; no version tells
            weight.data.copy_(new)
        elif change == "another":
            ensemble.aggregators[2].conv_out.weight = nn.Parameter(new)
        else:
            weight.data = new
        assert not torch.equal(ensemble(**arguments).sample, before)


def test_rules_that_do_not_ask_for_it_are_left_alone() -> None:
    class Own(FusionRule):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, features: Any, condition: Condition) -> Fused:
            assert self.scale.dtype == torch.float32
            return Fused(features[0])

    experts = [tiny_unet(n).to(torch.bfloat16) for n in range(2)]
    count = len(EnsembleDenoiser(experts).sites)
    ensemble = EnsembleDenoiser(experts, [Own() for _ in range(count)])
    with torch.no_grad():
        ensemble(**at(arguments_of("unet", dtype=torch.bfloat16), 500))


def test_the_copy_goes_with_the_aggregator() -> None:
    ensemble = ensemble_of("unet").to(torch.bfloat16)
    assert isinstance(ensemble.aggregators[0], SABW)
    with torch.no_grad():
        ensemble(**at(arguments_of("unet", dtype=torch.bfloat16), 500))
    assert len(ensemble.lowered) == len(ensemble.sites)
    ensemble.aggregators = nn.ModuleList()
    assert len(ensemble.lowered) == 0
