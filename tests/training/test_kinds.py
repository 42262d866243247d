"""Ensembles of every kind are trained: what a prompt is to them reaches the right place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import afa
from afa.denoisers.kinds import conditioning_of, denoiser_of, kind_of_pipeline
from afa.training import Recipe, SceneImages
from afa.training.encoding import encode_captions
from afa.training.examples import LiveExamples
from afa.training.transform import Transform
from tests.tiny_pipelines import PIPELINES, saved_experts
from tests.training.runs import SMALL, as_written, steps_of

pytestmark = pytest.mark.slow

TRAINED = [kind for kind in PIPELINES if kind not in ("dit", "refiner")]


@pytest.fixture(scope="module", params=TRAINED)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folders(kind: str, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return saved_experts(kind, tmp_path_factory.mktemp("kinds"), count=2)


def recipe(folders: list[Path], cache: Path | None, **training: Any) -> Recipe:
    """With previews, which the stock pipeline draws in the experts' own size."""
    data: dict[str, Any] = {"scenes": {"num_samples": 10}, "resolution": 16}
    data |= {"cache": False} if cache is None else {"cache": True, "cache_folder": str(cache)}
    asked = as_written(folders, data, num_steps=3, **training)
    asked["previews"] = {"prompts": ["a fox"], "every": 3, "num_steps": 1}
    return Recipe.model_validate(asked)


@pytest.mark.nightly
def test_trained_from_a_cache_or_without(kind: str, folders: list[Path], tmp_path: Path) -> None:
    losses = []
    for name, cache in (("live", None), ("cached", tmp_path / "cache")):
        steps = list(steps_of(recipe(folders, cache), tmp_path / name))
        losses.append([step.loss for step in steps])
    assert (tmp_path / "live" / "previews" / "step-00000003.png").is_file()
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    torch.manual_seed(0)
    trained = load_file(tmp_path / "live" / "aggregators.safetensors")
    assert any(tensor.abs().max() > 0 for key, tensor in trained.items() if "conv_out" in key)
    assert afa.load_ensemble(tmp_path / "live")


def test_the_prediction_is_the_pipelines_own(kind: str, folders: list[Path]) -> None:
    """One step of the stock pipeline calls its denoiser with what training would call it with."""
    pipeline: Any = afa.load_pipeline(folders, SMALL)
    pipeline.set_progress_bar_config(disable=True)
    denoiser = denoiser_of(pipeline)
    seen: dict[str, Any] = {}

    def note(_: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.update(denoiser._bind(args, kwargs))
        seen["output"] = interface.prediction(output[0])

    hook = denoiser.register_forward_hook(note, with_kwargs=True)
    is_packed = kind in ("flux", "klein", "chroma", "qwen-image")
    own = kind_of_pipeline(pipeline)
    call: dict[str, Any] = {**own.guide(3.5 if kind == "flux" else 1.0)}
    interface = own.family.interface
    if kind == "pixart":
        call["use_resolution_binning"] = False
    pipeline(
        prompt="a fox", height=16, width=16, num_inference_steps=1, output_type="latent", **call
    )
    hook.remove()
    drawn = dict(seen)
    noisy = drawn["sample" if kind == "xl" else "hidden_states"]
    if is_packed:
        unpack = conditioning_of(pipeline).unpack
        assert unpack is not None
        noisy = unpack(pipeline, noisy, 16, 16)
    conditions = encode_captions(pipeline, ["a fox"])
    conditions["sizes"] = Transform(16).sizes((16, 16), 0, 0)[None]
    timestep = drawn["timestep"].reshape(-1) * (1000 if is_packed else 1)
    denoiser.register_forward_hook(note, with_kwargs=True)
    with torch.no_grad():
        predicted = conditioning_of(pipeline).predict(
            pipeline, denoiser, noisy, timestep, conditions
        )
    assert predicted.shape == noisy.shape
    torch.testing.assert_close(seen["output"], drawn["output"], rtol=1e-4, atol=1e-5)


def test_sizes_are_those_of_the_crop() -> None:
    transform = Transform(16, crop="center")
    assert transform.sizes((64, 32), 0, 0).tolist() == [32, 64, 0, 8, 16, 16]
    transform = Transform(16, crop="random", seed=3)
    tops = {tuple(transform.sizes((16, 64), 0, v).tolist()[2:4]) for v in range(4)}
    assert len(tops) > 1
    assert all(0 <= top <= 48 and left == 0 for top, left in tops)


def test_no_prompt_is_nothing_to_stable_diffusion_xl(tmp_path: Path) -> None:
    pipeline: Any = afa.load_pipeline(saved_experts("xl", tmp_path, count=2), SMALL)
    conditions = encode_captions(pipeline, ["a fox", ""])
    assert conditions["text"][0].abs().max() > 0
    assert conditions["text"][1].abs().max() == 0 == conditions["pooled"][1].abs().max()
    _, negative, _, pooled = pipeline.encode_prompt("a fox")
    assert torch.equal(negative[0], conditions["text"][1])
    assert torch.equal(pooled[0], conditions["pooled"][1])


def test_the_shift_of_an_autoencoder(tmp_path: Path) -> None:
    """Latents as the pipeline decodes them: (z - shift) * scale."""
    pipeline: Any = afa.load_pipeline(saved_experts("sd3", tmp_path, count=2), SMALL)
    examples = LiveExamples(pipeline, SceneImages(4), Transform(16), seed=0)
    shifted = next(examples.batches([range(4)])).clean
    pipeline.vae.register_to_config(shift_factor=0.0)
    plain = next(examples.batches([range(4)])).clean
    scale = pipeline.vae.config.scaling_factor
    torch.testing.assert_close(plain - shifted, torch.full_like(plain, 0.1 * scale))
