"""Timestep hand-over: who denoises when, and that nobody else runs."""

from __future__ import annotations

import pytest
import torch

from afa.aggregators.fusion import HandOver
from afa.aggregators.fusion.hand_over import HandOverRecipe
from afa.ensemble.denoiser import EnsembleDenoiser
from tests.refusal import refusal
from tests.tiny import inputs, tiny_unet


def test_the_order_from_noise_to_picture() -> None:
    schedule = HandOver([2, 0, 1], [700, 300])
    assert [list(schedule(t)) for t in (999, 700, 699, 300, 299, 0)] == [
        [2],
        [2],
        [0],
        [0],
        [1],
        [1],
    ]


def test_equal_shares() -> None:
    schedule = HandOver.evenly([0, 1, 2])
    assert schedule.boundaries == pytest.approx([2000 / 3, 1000 / 3])
    shares = [schedule(t)[0] for t in range(1000)]
    assert [round(shares.count(n) / 1000, 2) for n in range(3)] == [0.33, 0.33, 0.33]
    assert HandOver.evenly([1])(500) == [1]


@pytest.mark.parametrize("boundaries", [[], [300, 700], [500, 500], [1, 2, 3]])
def test_boundaries_that_do_not_fit(boundaries: list[float]) -> None:
    with refusal("AFA-FUSION-002", "2"):
        HandOver([0, 1, 2], boundaries)


def test_one_expert_at_a_time_bit_for_bit() -> None:
    experts = [tiny_unet(seed) for seed in range(2)]
    ran: list[int] = []
    for n, expert in enumerate(experts):
        expert.conv_in.register_forward_pre_hook(lambda *_, n=n: ran.append(n))
    ensemble = EnsembleDenoiser(experts, schedule=HandOver([1, 0], [400]))
    arguments = inputs()
    for timestep, expected in ((900, 1), (100, 0)):
        arguments["timestep"] = torch.tensor([timestep, timestep])
        ran.clear()
        prediction = ensemble(**arguments).sample
        assert ran == [expected]
        assert torch.equal(prediction, experts[expected](**arguments).sample)


def test_each_expert_gets_its_own_text() -> None:
    experts = [tiny_unet(seed) for seed in range(2)]
    ensemble = EnsembleDenoiser(experts, schedule=HandOver([0, 1], [400]))
    arguments = inputs()
    texts = [torch.randn_like(arguments["encoder_hidden_states"]) for _ in range(2)]
    arguments["timestep"] = 100
    joined = ensemble(**{**arguments, "encoder_hidden_states": torch.cat(texts, -1)}).sample
    alone = experts[1](**{**arguments, "encoder_hidden_states": texts[1]}).sample
    assert torch.equal(joined, alone)


def test_a_batch_of_several_timesteps_is_refused() -> None:
    ensemble = EnsembleDenoiser([tiny_unet(0)], schedule=HandOver([0], []))
    arguments = {**inputs(), "timestep": torch.tensor([1, 2])}
    with refusal("AFA-ENSEMBLE-049", "1, 2"):
        ensemble(**arguments)


def test_many_experts_have_few_candidates() -> None:
    (few,) = HandOverRecipe.rows(["a", "b", "c"]).values()
    assert len(few) == 6
    (many,) = HandOverRecipe.rows([str(n) for n in range(8)]).values()
    orders = [each.order for each in many]
    assert len(orders) == 8
    assert orders[3] == [3, 4, 5, 6, 7, 0, 1, 2]
