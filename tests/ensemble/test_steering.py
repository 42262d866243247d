"""Leaning on one expert: what a bias does to the weights, where, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import afa
from afa.aggregators import Separate
from afa.aggregators.fusion.magic_fusion import MagicFusion
from afa.denoisers import discover_sites
from afa.ensemble.steering import STAGES, parse_bias, stages_of
from tests.ensemble.test_ensemble import ensemble_of
from tests.refusal import refusal
from tests.tiny import ODD, inputs, tiny_unet
from tests.tiny_transformers import tiny_transformer

SMALL = afa.SABWConfig(hidden_size=8, num_layers=1, num_heads=2, norm_num_groups=4)


@pytest.fixture
def ensemble() -> afa.EnsembleDenoiser:
    return ensemble_of()


def run(ensemble: afa.EnsembleDenoiser) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The prediction, and the fusion weights by site."""
    with torch.no_grad(), afa.record_weights(ensemble) as record:
        prediction = ensemble(**inputs()).sample
    return prediction, record.steps[0].weights


@pytest.mark.parametrize("nothing", [None, {}, {"0": 0.0}, {"0": {"up": 0.0}, "1": 0.0}])
def test_no_bias_is_bit_for_bit_none(ensemble: afa.EnsembleDenoiser, nothing: Any) -> None:
    plain, weights = run(ensemble)
    afa.steer(ensemble, {"1": 2.0})
    assert not torch.equal(run(ensemble)[0], plain)
    afa.steer(ensemble, nothing)
    again, same = run(ensemble)
    assert torch.equal(again, plain)
    assert all(torch.equal(same[site], weights[site]) for site in weights)


def test_a_bias_multiplies_the_odds_everywhere(ensemble: afa.EnsembleDenoiser) -> None:
    before = run(ensemble)[1]["conv_in"]  # what comes later depends on what came out here
    afa.steer(ensemble, {"1": 1.0, "2": -0.5})
    after = run(ensemble)[1]["conv_in"]
    for n, value in enumerate((0.0, 1.0, -0.5)):
        odds = (after[:, n] / after[:, 0]) / (before[:, n] / before[:, 0])
        torch.testing.assert_close(odds, torch.full_like(odds, math.exp(value)))
    torch.testing.assert_close(after.sum(1), torch.ones_like(after[:, 0]))


def test_a_stage_is_steered_alone(ensemble: afa.EnsembleDenoiser) -> None:
    before = run(ensemble)[1]
    afa.steer(ensemble, {"2": {"mid": 3.0}})
    after = run(ensemble)[1]
    names = [site.name for site in ensemble.sites]
    until = names[: names.index("mid")]
    assert all(torch.equal(after[site], before[site]) for site in until)
    assert (after["mid"][:, 2] > before["mid"][:, 2]).all()
    assert set(ensemble.bias) == {"mid"}


def test_enough_of_it_is_the_expert_alone(ensemble: afa.EnsembleDenoiser) -> None:
    afa.steer(ensemble, {"1": 200.0})
    with torch.no_grad():
        alone = ensemble.experts[1](**inputs()).sample
    torch.testing.assert_close(run(ensemble)[0], alone)


def test_shared_and_pooled_aggregators_and_missing_experts_are_steered() -> None:
    config = afa.SABWConfig(**{**vars(SMALL), "sharing": "width", "min_scale": 2})
    ensemble = afa.EnsembleDenoiser([tiny_unet(n) for n in range(2)], config)
    afa.steer(ensemble, {"0": 1.0})
    for weights in run(ensemble)[1].values():  # untrained: all logits are 0
        torch.testing.assert_close(weights[:, 0], torch.full_like(weights[:, 0], 0.7310586))


def test_kept_weights_are_the_steered_ones(ensemble: afa.EnsembleDenoiser) -> None:
    afa.steer(ensemble, {"0": 1.5})
    ensemble.acceleration = afa.Acceleration(interval=2, keep_weights=True)
    arguments = inputs()
    with torch.no_grad(), afa.record_weights(ensemble) as record:
        for timestep in (900, 800):
            ensemble(**{**arguments, "timestep": timestep})
    first, second = (step.weights["conv_in"] for step in record.steps)
    assert torch.equal(first, second)


# -- stages -----------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, *ODD.values()])
def test_stages_of_a_unet_are_its_own(config: dict[str, Any]) -> None:
    sites = discover_sites(tiny_unet(**config))
    by_name = dict(zip((site.name for site in sites), stages_of(sites), strict=True))
    assert by_name["conv_in"] == "down"
    assert by_name["conv_out"] == "up"
    assert by_name.get("mid", "mid") == "mid"
    assert all(stage == name.split(".")[0] for name, stage in by_name.items() if "." in name)


@pytest.mark.parametrize(
    "kind", ["pixart", "sd3", "flux", "chroma", "z-image", "qwen-image", "dit"]
)
def test_stages_of_a_transformer_are_thirds(kind: str) -> None:
    sites = discover_sites(tiny_transformer(kind))
    stages = stages_of(sites)
    assert stages == sorted(stages, key=STAGES.index)
    assert set(stages) == set(STAGES)
    by_name = dict(zip((site.name for site in sites), stages, strict=True))
    assert all(by_name[site.block] == by_name[site.name] for site in sites)


# -- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bias", "number", "said"),
    [
        ({"fox": 1.0}, "055", ["'fox'"]),
        ({"3": 1.0}, "055", ["'3'", "0 0, 1 1, 2 2"]),
        ({"-1": 1.0}, "055", ["'-1'"]),
        ({"0": {"top": 1.0}}, "052", ["'0'", "'top'", "down, mid, up"]),
        ({"0": math.nan}, "053", ["'0'", "nan"]),
        ({"0": {"up": math.inf}}, "053", ["'0'", "inf"]),
    ],
)
def test_a_bias_is_checked(
    ensemble: afa.EnsembleDenoiser, bias: Any, number: str, said: list[str]
) -> None:
    afa.steer(ensemble, {"0": 1.0})
    with refusal(f"AFA-ENSEMBLE-{number}", *said):
        afa.steer(ensemble, bias)
    assert ensemble.bias["mid"][0] == 1  # the earlier one stays


def test_only_weights_of_logits_can_be_steered() -> None:
    experts = [tiny_unet(n) for n in range(2)]
    sites = afa.EnsembleDenoiser(experts).sites
    rigid = afa.EnsembleDenoiser(experts, [MagicFusion() for _ in sites])
    with refusal("AFA-ENSEMBLE-054"):
        afa.steer(rigid, {"0": 1.0})
    afa.steer(rigid, {"0": 0.0})
    last = afa.SABWConfig(**{**vars(SMALL), "sites": "conv_out"})
    noise = afa.EnsembleDenoiser([tiny_unet(n) for n in range(2)], last)
    assert isinstance(noise.aggregators[0], Separate)
    afa.steer(noise, {"0": 1.0})
    weights = run(noise)[1]
    assert list(weights) == ["conv_out"]
    assert weights["conv_out"][0, 0, 0, 0] == pytest.approx(0.7310586)


def test_experts_are_named_by_their_checkpoints(zoo_ensemble: Any) -> None:
    afa.steer(zoo_ensemble, {"animals": 1.0, "1": {"up": 2.0}})
    assert zoo_ensemble.unet.bias["mid"].tolist() == [1, 0, 0]
    assert zoo_ensemble.unet.bias["conv_out"].tolist() == [1, 2, 0]
    with refusal("AFA-ENSEMBLE-055", "0", "1", "2", "'animal'"):
        afa.steer(zoo_ensemble, {"animal": 1.0})


@pytest.fixture
def zoo_ensemble() -> Any:
    return afa.load_ensemble("zoo:ensemble")


# -- the command line -------------------------------------------------------------------------


def test_words_of_the_command_line_add_up() -> None:
    bias = parse_bias(["animals=+1.0", "animals@up=-0.5", "v1.5=a.safetensors=2", "x@y=1"])
    assert bias == {
        "animals": {"down": 1.0, "mid": 1.0, "up": 0.5},
        "v1.5=a.safetensors": dict.fromkeys(STAGES, 2.0),
        "x@y": dict.fromkeys(STAGES, 1.0),
    }


@pytest.mark.parametrize("word", ["animals", "animals=", "animals=x", "=1", "animals=nan", "a=inf"])
def test_other_words_are_refused(word: str) -> None:
    with refusal("AFA-ENSEMBLE-056", "EXPERT=NUMBER"):
        parse_bias([word])
