"""AFA Load Ensemble: the checkpoints that an ensemble folder names.

ComfyUI knows checkpoints of published sizes alone; here its loader is replaced by one of tiny
models. `tools.comfyui_server` loads checkpoints of the size of Stable Diffusion 1.5.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.diffusers_load
import comfy.sd
import folder_paths
import pytest
import torch
from safetensors.torch import load_file, save_file

from afa import load_pipeline, save_ensemble
from afa.aggregators import SABWConfig
from afa.denoisers.kinds import denoiser_of
from integrations.comfyui.ensemble import ensemble_model, runner_of
from integrations.comfyui.loading import load_ensemble_parts
from integrations.comfyui.nodes.recipe import recipe_of
from integrations.comfyui.tests.models import lora_of, patcher, randomize, twin_of
from integrations.comfyui.tests.test_ensemble import sample
from integrations.comfyui.tests.test_nodes import Clip
from tests.refusal import refusal
from tests.tiny import tiny_pipeline

SMALL = SABWConfig(hidden_size=16, num_layers=1, num_heads=2, norm_num_groups=4)


@pytest.fixture
def experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """MODELs by the folder of their twins in diffusers, which ComfyUI's loader returns."""
    models = {}
    for n in range(3):
        folder, model = tmp_path / f"expert-{n}", patcher("sd15", n)
        pipeline = tiny_pipeline(tmp_path / "made", n)
        pipeline.register_modules(unet=twin_of("sd15", model.model.diffusion_model))
        pipeline.save_pretrained(folder)
        models[str(folder)] = model

    def load(folder: str, **_: Any) -> tuple[Any, Any, Any]:
        number = list(models).index(folder)
        return models[folder].clone(), Clip(number), f"VAE {number}"

    monkeypatch.setattr(comfy.diffusers_load, "load_diffusers", load)
    places = {"embeddings": ([str(tmp_path)], {".pt"})}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", places)
    return models


@pytest.fixture
def ensemble(experts: dict[str, Any], tmp_path: Path) -> Path:
    pipeline = load_pipeline(list(experts), SMALL)
    randomize(denoiser_of(pipeline).aggregators, 3)
    return save_ensemble(pipeline, tmp_path / "ensemble")


def changed(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


def test_all_parts_are_loaded(experts: dict[str, Any], ensemble: Path) -> None:
    model, clip, vae = load_ensemble_parts(ensemble)
    assert vae == "VAE 0"
    assert [each.number for each in clip.clips] == [0, 1, 2]
    expected = sample(ensemble_model(list(experts.values()), ensemble), 3)
    assert torch.equal(sample(model, 3), expected)
    recipe = recipe_of(model)
    assert recipe["experts_are_checked"] is True
    assert [each["name"] for each in recipe["experts"]] == ["expert-0", "expert-1", "expert-2"]
    assert runner_of(model).origin.aggregators == recipe["aggregators"]


def test_other_weights_are_refused(experts: dict[str, Any], ensemble: Path) -> None:
    file = Path(list(experts)[1]) / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file, {"format": "pt"})
    with refusal("AFA-LOAD-082", "expert-1"):
        load_ensemble_parts(ensemble)


def test_what_experts_predict_is_read_from_their_schedulers(
    experts: dict[str, Any], ensemble: Path
) -> None:
    """ComfyUI does not read it, and would take all experts for models that predict noise."""
    plain = load_ensemble_parts(ensemble).model
    for folder in experts:
        place = Path(folder) / "scheduler/scheduler_config.json"
        config = json.loads(place.read_text())
        config |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
        place.write_text(json.dumps(config))
    model = load_ensemble_parts(ensemble).model
    sampling = model.get_model_object("model_sampling")
    assert [base.__name__ for base in type(sampling).__bases__][1] == "V_PREDICTION"
    assert sampling.sigma_max > 2 * plain.get_model_object("model_sampling").sigma_max
    assert sample(model, 3).isfinite().all()


def test_missing_parts_are_refused(
    experts: dict[str, Any], ensemble: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = next(iter(experts.values()))
    cases: list[tuple[str, Any]] = [
        ("AFA-COMFY-024", (None, None, None)),
        ("AFA-COMFY-021", (model, None, "VAE")),
        ("AFA-COMFY-022", (model, Clip(0), None)),
    ]
    changed(ensemble, vae=None)
    for code, found in cases:
        monkeypatch.setattr(comfy.diffusers_load, "load_diffusers", lambda *_, f=found, **__: f)
        with refusal(code):
            load_ensemble_parts(ensemble)

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such model")

    monkeypatch.setattr(comfy.diffusers_load, "load_diffusers", fails)
    with refusal("AFA-COMFY-024", "no such model"):
        load_ensemble_parts(ensemble)


def test_parts_of_other_files_are_refused(experts: dict[str, Any], ensemble: Path) -> None:
    config = json.loads((ensemble / "config.json").read_text())
    changed(ensemble, parts=config["experts"][:1])
    with refusal("AFA-COMFY-020"):
        load_ensemble_parts(ensemble)


def test_drafts_are_not_used_and_named(
    experts: dict[str, Any], ensemble: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = json.loads((ensemble / "config.json").read_text())
    changed(ensemble, judge=config["experts"][0], drafts={})
    load_ensemble_parts(ensemble)
    assert "draws by drafts" in caplog.text


def test_another_autoencoder(
    experts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny_pipeline(tmp_path / "made", 9).vae
    other.save_pretrained(tmp_path / "vae")
    pipeline = load_pipeline(list(experts), SMALL, vae=tmp_path / "vae")
    folder = save_ensemble(pipeline, tmp_path / "with-vae")
    monkeypatch.setattr(comfy.sd, "VAE", lambda sd: sd)
    vae = load_ensemble_parts(folder).vae
    own = other.state_dict()
    assert vae.keys() == own.keys()
    assert all(torch.equal(vae[name], tensor) for name, tensor in own.items())
    file = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in vae.items()}, file, {"format": "pt"})
    with refusal("AFA-LOAD-082", "Autoencoder"):
        load_ensemble_parts(folder)


def test_loras_of_experts(experts: dict[str, Any], tmp_path: Path) -> None:
    sources = list(experts)
    lora = tmp_path / "style.safetensors"
    base = experts[sources[0]]
    save_file(lora_of(base), lora)
    given: list[Any] = [sources[0], {"base": sources[0], "lora": str(lora), "scale": 0.8}]
    folder = save_ensemble(load_pipeline(given, SMALL), tmp_path / "with-lora")
    patched = comfy.sd.load_lora_for_models(base, None, lora_of(base), 0.8, 0)[0]
    expected = sample(ensemble_model([base, patched], folder), 2)
    model, clip, _ = load_ensemble_parts(folder)
    assert [each.patches for each in clip.clips] == [0.0, 0.8]
    assert torch.equal(sample(model, 2), expected)
    save_file(lora_of(base, seed=8), lora)
    with refusal("AFA-COMFY-023", "style"):
        load_ensemble_parts(folder)
