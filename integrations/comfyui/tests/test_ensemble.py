"""Ensembles as MODELs, sampled with ComfyUI's own samplers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.sample
import pytest
import torch

from afa.aggregators import SABWConfig
from afa.ensemble.denoiser import EnsembleDenoiser
from afa.ensemble.references import ExpertReference, Provenance
from afa.loading.ensemble_folder import save_ensemble
from integrations.comfyui.ensemble import ensemble_model, runner_of
from integrations.comfyui.tests.models import KINDS, TEXT, patcher, randomize, twin_of
from integrations.comfyui.tests.test_denoisers import twin_arguments
from integrations.comfyui.texts import join


def conditioning(kind: str, count: int, seed: int) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(1, 5, count * TEXT, generator=generator)
    pooled = torch.randn(1, count * 8, generator=generator)
    return [[text, {} if kind == "sd15" else {"pooled_output": pooled}]]


@torch.inference_mode()
def sample(
    model: Any, count: int = 1, kind: str = "sd15", *, double: bool = False, **options: Any
) -> torch.Tensor:
    """Sample latents [2, 4, 8, 8]; with `double`, each expert has the same text."""
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(4)  # some nodes draw random numbers
    texts = [conditioning(kind, 1 if double else count, seed) for seed in (2, 3)]
    positive, negative = (join([text] * count) if double else text for text in texts)
    settings = {
        "steps": 3,
        "cfg": 3.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "positive": positive,
        "negative": negative,
        "latent_image": torch.zeros_like(noise),
        **options,
    }
    return comfy.sample.sample(model, noise, disable_pbar=True, seed=5, **settings)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_one_expert_is_its_own_model(kind: str) -> None:
    model = patcher(kind)
    expected = sample(model, kind=kind)
    assert expected.isfinite().all()
    assert torch.equal(sample(ensemble_model([model], None), kind=kind), expected)


@pytest.fixture
def experts(kind: str) -> list[Any]:
    return [patcher(kind, seed) for seed in range(3)]


def saved(kind: str, experts: list[Any], folder: Path) -> EnsembleDenoiser:
    """An ensemble folder of the experts' twins with random aggregators, as afa saves it."""
    twins = [twin_of(kind, each.model.diffusion_model) for each in experts]
    config = SABWConfig(hidden_size=16, num_layers=1, num_heads=2, norm_num_groups=4)
    ensemble = EnsembleDenoiser(twins, config)
    randomize(ensemble.aggregators, 9)
    ensemble.provenance = Provenance(
        experts=tuple(ExpertReference(f"/expert-{n}", str(n)) for n in range(len(experts)))
    )
    save_ensemble(SimpleNamespace(components={ensemble.family.component: ensemble}), folder)
    return ensemble


def test_prediction_is_afas(kind: str, experts: list[Any], tmp_path: Path) -> None:
    """ComfyUI's denoisers in ComfyUI's sampler, against diffusers' denoisers called by hand."""
    twin = saved(kind, experts, tmp_path / "ensemble")
    model = ensemble_model(experts, tmp_path / "ensemble")
    seen: list[tuple[dict[str, Any], torch.Tensor]] = []

    def spy(_: Any, __: Any, call: dict[str, Any], prediction: Any) -> None:
        seen.append((call, prediction[0]))

    runner_of(model).denoiser.register_forward_hook(spy, with_kwargs=True)
    assert sample(model, 3, kind).isfinite().all()
    assert len(seen) == 3
    for call, prediction in seen:
        with torch.inference_mode():
            expected = twin(**twin_arguments(kind, call, 3), return_dict=False)[0]
        if kind == "flux":  # diffusers' latents are packed
            batch, _, height, width = prediction.shape
            tokens = expected.unflatten(1, (height // 2, width // 2)).unflatten(-1, (-1, 2, 2))
            expected = tokens.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, height, width)
        torch.testing.assert_close(prediction, expected, rtol=1e-5, atol=1e-5)
    assert max(p.std() for _, p in seen) > 0.1
