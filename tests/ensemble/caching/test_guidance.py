"""Classifier-free guidance with one half of it left out late."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import afa
from afa.ensemble.caching.guidance import halved_arguments, is_guided
from tests.ensemble.caching.test_loop import FAMILIES, STEPS, arguments_of, at, ensemble_of


def guided(family: str, batch: int = 2) -> dict[str, Any]:
    """A call whose halves have the same latents and different prompts."""
    return arguments_of(family, batch=batch)


def same_latents(arguments: dict[str, Any]) -> dict[str, Any]:
    latent = next(key for key in ("sample", "hidden_states") if key in arguments)
    half = len(arguments[latent]) // 2
    return {
        **arguments,
        latent: arguments[latent][:half].repeat(2, *(1,) * (arguments[latent].ndim - 1)),
    }


def draw(ensemble: Any, arguments: dict[str, Any]) -> list[Tensor]:
    with torch.no_grad():
        return [
            ensemble(**same_latents(at(arguments, step)), return_dict=False)[0] for step in STEPS
        ]


@pytest.mark.parametrize("family", FAMILIES)
def test_late_the_difference_of_the_halves_stays(family: str) -> None:
    ensemble, arguments = ensemble_of(family), guided(family)
    exact = draw(ensemble, arguments)
    ensemble.acceleration = afa.Acceleration(guidance_until=0.5)
    came = draw(ensemble, arguments)
    last = family != "dit"
    for number, (now, before) in enumerate(zip(came, exact, strict=True)):
        conditional = slice(1, 2) if last else slice(0, 1)
        other = slice(0, 1) if last else slice(1, 2)
        if 1 - STEPS[number] / STEPS[0] < 0.5:
            assert torch.equal(now, before)
            kept = before[conditional] - before[other]
            continue
        torch.testing.assert_close(now[conditional], before[conditional], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(now[other], now[conditional] - kept)
        assert not torch.allclose(now[other], before[other], atol=1e-4)


@pytest.mark.parametrize("family", ["unet", "flux", "dit"])
def test_half_of_the_batch_is_run(family: str) -> None:
    ensemble, arguments = ensemble_of(family), guided(family)
    sizes: list[int] = []
    layers = ensemble.family.layers(ensemble.experts[0])

    def note(module: Any, args: Any, kwargs: Any) -> None:
        sizes.append(len(args[0] if args else kwargs["hidden_states"]))

    layers[len(layers) // 2].register_forward_pre_hook(note, with_kwargs=True)
    ensemble.acceleration = afa.Acceleration(guidance_until=0.5)
    draw(ensemble, arguments)
    assert sizes == [2, 2, 2, 1, 1]


def test_it_goes_together_with_caching() -> None:
    ensemble, arguments = ensemble_of("unet"), guided("unet")
    ensemble.acceleration = afa.Acceleration(interval=2)
    cached = draw(ensemble, arguments)
    ensemble.acceleration = afa.Acceleration(interval=2, guidance_until=0.5)
    came = draw(ensemble, arguments)
    for now, before in zip(came, cached, strict=True):
        torch.testing.assert_close(now[1], before[1], rtol=1e-4, atol=1e-5)
    ensemble.acceleration = afa.Acceleration(interval=2, fresh=0, guidance_until=0.5)
    assert [len(prediction) for prediction in draw(ensemble, arguments)] == [2] * len(STEPS)


def test_equal_noise_for_two_prompts_is_no_guidance() -> None:
    """Only the first latents are the same; the pictures are two."""
    ensemble, arguments = ensemble_of("unet"), guided("unet")

    def two(acceleration: afa.Acceleration) -> list[Tensor]:
        ensemble.acceleration = acceleration
        calls = [same_latents(at(arguments, STEPS[0])), *(at(arguments, s) for s in STEPS[1:])]
        with torch.no_grad():
            return [ensemble(**call).sample for call in calls]

    exact, came = two(afa.Acceleration()), two(afa.Acceleration(guidance_until=0))
    assert all(torch.equal(a, b) for a, b in zip(came, exact, strict=True))


def test_the_prompt_s_half_stays_the_same_object() -> None:
    text, latent = torch.randn(4, 3, 2), torch.randn(2, 5).repeat(2, 1)
    nested = {"b": [torch.arange(4), "name"], "c": torch.zeros(3)}
    arguments = {"sample": latent, "text": text, "nested": nested, "timestep": torch.tensor(7)}
    with torch.no_grad():
        first, again = (halved_arguments(arguments, "text", 4, True) for _ in range(2))
    assert first["text"] is again["text"]
    assert torch.equal(first["text"], text[2:])
    assert torch.equal(first["nested"]["b"][0], torch.tensor([2, 3]))
    assert first["nested"]["b"][1] == "name"
    assert len(first["nested"]["c"]) == 3
    assert first["timestep"].ndim == 0
    before = halved_arguments(arguments, "text", 4, False)
    assert torch.equal(before["text"], text[:2])


def test_what_guidance_looks_like() -> None:
    latent = torch.randn(2, 3)
    assert is_guided(latent.repeat(2, 1))
    assert not is_guided(torch.randn(4, 3))
    assert not is_guided(latent[:1])
    assert not is_guided(torch.cat([latent[:1]] * 3))
