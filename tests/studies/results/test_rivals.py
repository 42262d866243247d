"""Rivals that draw in their own way: bounds, a router, and the superposition of models."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from afa import load_ensemble, save_ensemble
from afa.evaluation.work import draw
from afa.studies.results.entrants import Place
from afa.studies.results.rivals.oracle_mask import OracleMask
from afa.studies.results.rivals.other_steps import OtherSteps
from afa.studies.results.rivals.prompt_router import PromptRouter, _Routed
from afa.studies.results.rivals.real_scenes import RealScenes
from afa.studies.results.rivals.rival import SAMPLING
from afa.studies.results.rivals.superdiff import SuperDiff, _Superposed, alike
from afa.training import SceneImages
from afa.zoo import export_zoo
from afa.zoo.judges import judge, load_classifier
from afa.zoo.scenes import evaluation_prompts


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The bundled zoo, in the place of a world."""
    folder = tmp_path_factory.mktemp("zoo")
    export_zoo(folder / "main")
    return Place("main", folder / "main", folder)


@pytest.mark.slow
def test_who_knows_the_layout_draws_it(place: Place) -> None:
    captions = evaluation_prompts(8)
    pictures, cost = OracleMask(place, 10).open().draw(captions, range(8), 0)
    right = [verdict.both for verdict in judge(load_classifier(), pictures, captions)]
    assert sum(right) >= 7
    assert cost.expert_calls == 8 * 10 * 3 * 2


def test_the_judge_recognises_real_scenes_through_the_autoencoder(place: Place) -> None:
    captions = evaluation_prompts(16)
    drawer = RealScenes(place, 10).open()
    pictures, cost = drawer.draw(captions, range(16), 0)
    assert all(verdict.both for verdict in judge(load_classifier(), pictures, captions))
    assert cost.expert_calls == 0
    again, _ = drawer.draw(captions[3:5], [3, 4], 1)
    difference = np.abs(np.asarray(again[0], dtype=int) - np.asarray(pictures[3], dtype=int))
    assert difference.max() <= 1, "a caption has one scene"
    assert np.asarray(pictures[0]).tobytes() != np.asarray(pictures[1]).tobytes()


@pytest.mark.slow
def test_other_numbers_of_steps_are_of_the_same_ensemble(place: Place) -> None:
    folder = place.work / "ensemble"
    save_ensemble(load_ensemble("zoo:ensemble"), folder)
    rival, captions = OtherSteps(place, 2, folder), evaluation_prompts(2)
    pictures, cost = rival.open().draw(captions, range(2), 5)
    assert cost.expert_calls == 2 * 2 * 3 * 2
    expected = draw(load_ensemble("zoo:ensemble"), captions, range(2), 5, 2, SAMPLING)
    assert [each.tobytes() for each in pictures] == [each.tobytes() for each in expected]
    before = rival.identity()
    assert OtherSteps(place, 3, folder).identity() != before
    weights = load_file(folder / "aggregators.safetensors")
    save_file({k: v + 1 for k, v in weights.items()}, folder / "aggregators.safetensors")
    assert rival.identity() != before


@pytest.mark.slow
def test_a_router_finds_the_expert_of_a_domain(place: Place) -> None:
    drawer = PromptRouter(place, 2, SceneImages(96, seed=7), num_pictures=96, num_levels=2).open()
    assert isinstance(drawer, _Routed)
    names = list(place.experts)
    for kind in ("animals", "food", "things"):
        captions = evaluation_prompts(16, kind=kind, seed=5)
        chosen = (drawer.features(captions) @ drawer._weights).argmax(1)
        assert (chosen == names.index(kind)).float().mean() > 0.5, kind
    captions = evaluation_prompts(3)
    pictures, cost = drawer.draw(captions, [4, 5, 6], 0)
    assert cost.expert_calls == 3 * 2 * 2
    alone = drawer.draw(captions[1:2], [5], 0)[0][0]
    difference = torch.tensor(list(alone.tobytes())) - torch.tensor(list(pictures[1].tobytes()))
    assert difference.abs().max() <= 1, "each picture depends on its own number alone"


def test_densities_of_gaussians_are_those_along_the_path() -> None:
    """Of a standard normal around each expert's mean, the log-densities are known."""
    torch.manual_seed(0)
    means = torch.tensor([[2.0, 0.0], [-1.0, 1.0]])[:, :, None, None]  # [N, C, 1, 1]
    drawer = object.__new__(_Superposed)
    drawer._asked = SuperDiff(None, 1, "or", temperature=0.0)  # type: ignore[arg-type]
    variances = torch.logspace(2, -2, 4001).tolist()  # of the noise
    place = means.mean(0, keepdim=True) + 10 * torch.randn(4, 2, 1, 1)

    def density(x: torch.Tensor, variance: float) -> torch.Tensor:
        distance = (x[:, None] - means).square().sum((2, 3, 4))
        return -distance / (2 * (1 + variance)) - torch.log(torch.tensor(1 + variance))

    logs, start = torch.zeros(4, 2), density(place, variances[0])
    generators = [torch.Generator().manual_seed(n) for n in range(4)]
    for now, after in itertools.pairwise(variances):
        alpha, following = 1 / (1 + now), 1 / (1 + after)
        scores = (means - place[:, None]) / (1 + now)
        clean = place[:, None] + now * scores
        latents, logs = drawer._step(
            place * alpha**0.5, clean, clean, logs, alpha, following, generators
        )
        place = latents / following**0.5
    change = density(place, variances[-1]) - start
    # the estimate lacks a term that is the same for all experts
    torch.testing.assert_close(
        logs[:, 0] - logs[:, 1], change[:, 0] - change[:, 1], atol=0.15, rtol=0.05
    )


def test_and_changes_all_densities_alike() -> None:
    torch.manual_seed(0)
    scores, densities = torch.randn(3, 3, 4, 2, 2), torch.randn(3, 3, 4, 2, 2)
    noise, change = torch.randn(3, 4, 2, 2), 0.3
    weights = alike(scores, densities, change, noise)
    torch.testing.assert_close(weights.sum(1), torch.ones(3))
    move = change * torch.einsum("bn,bnchw->bchw", weights, scores) + noise
    along = torch.einsum("bchw,bnchw->bn", move, densities)
    changes = along - change / 2 * densities.square().sum((2, 3, 4))
    torch.testing.assert_close(changes, changes[:, :1].expand_as(changes), atol=1e-4, rtol=1e-4)
    same = scores[:, :1].expand_as(scores)
    torch.testing.assert_close(alike(same, same, change, noise), torch.full((3, 3), 1 / 3))


@pytest.mark.slow
def test_superposed_models_draw(place: Place) -> None:
    captions = evaluation_prompts(2)
    drawn = [
        SuperDiff(place, 4, "or", 1e-3).open().draw(captions, [0, 1], 0),
        SuperDiff(place, 4, "and").open().draw(captions, [0, 1], 0),
    ]
    for pictures, cost in drawn:
        assert [picture.size for picture in pictures] == [(64, 64)] * 2
        assert cost.expert_calls == 2 * 4 * 3 * 2
    assert drawn[0][0][0].tobytes() != drawn[1][0][0].tobytes()
    again = SuperDiff(place, 4, "and").open().draw(captions[1:], [1], 0)[0][0]
    difference = torch.tensor(list(again.tobytes())) - torch.tensor(list(drawn[1][0][1].tobytes()))
    assert difference.abs().max() <= 1
