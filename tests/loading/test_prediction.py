"""What a model predicts: who says it, who is believed, and what is refused."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

import afa
from afa.denoisers.forward_process import Diffusion, forward_process
from afa.loading.compare import compare
from afa.loading.expert_source import ExpertSource
from afa.loading.facts import read_facts
from afa.loading.inspection import describe
from afa.loading.pipeline import load_single
from afa.loading.prediction import Evidence, decide, evidence_of, scheduler_of
from afa.loading.single_file.identify import config_folder, config_of
from afa.loading.single_file.load import Companions, describe_expert
from tests.loading.single_file.test_load import described, made
from tests.preflight.test_preflight import changed
from tests.refusal import refusal
from tests.single_file import original_layout

if TYPE_CHECKING:
    from pathlib import Path

SCHEDULER = "scheduler/scheduler_config.json"
V = {"model": {"params": {"parameterization": "v"}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny XL pipeline."""
    root = tmp_path_factory.mktemp("xl")
    made("xl", root)
    return root / "xl-0"


@pytest.fixture(scope="module")
def tensors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Of its single file."""
    return original_layout(made("xl", tmp_path_factory.mktemp("file")))


def written(place: Path, tensors: dict[str, Any], *marks: str, **metadata: str) -> Path:
    """A single file with marker tensors and metadata of modelspec."""
    given = {f"modelspec.{key}": value for key, value in metadata.items()}
    content = {key: tensor.clone() for key, tensor in tensors.items()}
    save_file({**content, **{mark: torch.zeros(1) for mark in marks}}, place, given or None)
    return place


def told(file: Path, beside: Path, **named: Any) -> Any:
    """What a file predicts, described by a folder that stands beside it in a recipe."""
    companions = Companions(torch.float32, fallback=beside).of(
        ExpertSource.of({"model": str(file), **named} if named else file)
    )
    return describe_expert(file, companions).prediction


# -- who is believed --------------------------------------------------------------------------


def test_without_evidence_the_configuration_is_assumed_and_said(
    folder: Path, tensors: Any, tmp_path: Path
) -> None:
    file = written(tmp_path / "a.safetensors", tensors)
    found = told(file, folder)
    assert (found.type, found.zero_snr, found.is_assumed) == ("epsilon", False, True)
    companions = Companions(torch.float32, fallback=folder).of(ExpertSource.of(file))
    facts = read_facts("a", describe_expert(file, companions), path=file)
    notes = [each.text for each in compare([facts]) if each.check == "prediction"]
    assert len(notes) == 1
    assert "'a' does not say what it predicts; epsilon is assumed" in notes[0]


@pytest.mark.parametrize(
    ("marks", "metadata", "beside", "expected"),
    [
        (("v_pred",), {}, None, ("v_prediction", False)),
        (("v_pred", "ztsnr"), {}, None, ("v_prediction", True)),
        ((), {"prediction_type": "v"}, None, ("v_prediction", False)),
        ((), {"predict_key": "v"}, None, ("v_prediction", False)),
        ((), {"prediction_type": "epsilon"}, None, ("epsilon", False)),
        ((), {}, V, ("v_prediction", False)),
        ((), {}, {"model": {"params": {"linear_start": 0.00085}}}, ("epsilon", False)),
        (("v_pred",), {"prediction_type": "v"}, V, ("v_prediction", False)),
    ],
)
def test_a_file_says_what_it_predicts(
    marks: Any,
    metadata: Any,
    beside: Any,
    expected: Any,
    folder: Path,
    tensors: Any,
    tmp_path: Path,
) -> None:
    file = written(tmp_path / "a.safetensors", tensors, *marks, **metadata)
    if beside is not None:
        file.with_suffix(".yaml").write_text(yaml.safe_dump(beside))
    found = told(file, folder)
    assert (found.type, found.zero_snr) == expected
    assert not found.is_assumed
    scheduler = scheduler_of(folder, found)
    assert scheduler.config.prediction_type == expected[0]
    assert bool(scheduler.config.rescale_betas_zero_snr) is expected[1]
    if expected[1]:
        assert scheduler.config.timestep_spacing == "trailing"
        assert scheduler.alphas_cumprod[-1] < 1e-6


@pytest.mark.parametrize(
    ("target", "expected"),
    [("EpsScaling", "epsilon"), ("VScaling", "v_prediction"), ("VScalingWithEDMcNoise", None)],
)
def test_a_configuration_of_generative_models_beside_a_file(
    target: str, expected: str | None, tmp_path: Path
) -> None:
    scaling = {"target": f"sgm.modules.diffusionmodules.denoiser_scaling.{target}"}
    params = {"denoiser_config": {"params": {"scaling_config": scaling}}}
    file = written(tmp_path / "a.safetensors", {})
    (tmp_path / "a.yml").write_text(yaml.safe_dump({"model": {"params": params}}))
    (found,) = evidence_of(file, {})
    assert found.is_edm is (expected is None)
    assert found.is_edm or found.type == expected


@pytest.mark.parametrize(
    ("content", "code", "value"),
    [
        ("model: [", "AFA-LOAD-046", "a.yaml'"),
        ("model: {params: {parameterization: z}}", "AFA-LOAD-047", "parameterization = z"),
        ("model: {params: {denoiser_config: 3}}", "AFA-LOAD-047", "scaling_config = nothing"),
    ],
)
def test_a_yaml_beside_that_says_something_unknown(
    content: str, code: str, value: str, tmp_path: Path
) -> None:
    file = written(tmp_path / "a.safetensors", {})
    file.with_suffix(".yaml").write_text(content)
    with refusal(code, value):
        evidence_of(file, {})


def test_a_recipe_of_that_name_says_nothing(tmp_path: Path) -> None:
    file = written(tmp_path / "a.safetensors", {})
    file.with_suffix(".yaml").write_text("method: weighted\nexperts: [a, b]\n")
    assert evidence_of(file, {}) == []


def test_contradictions_are_refused_and_a_recipe_settles_them(
    folder: Path, tensors: Any, tmp_path: Path
) -> None:
    file = written(tmp_path / "a.safetensors", tensors, "v_pred", prediction_type="epsilon")
    with refusal("AFA-LOAD-051", "'v_pred'", "'modelspec.prediction_type'"):
        told(file, folder)
    found = told(file, folder, prediction_type="v_prediction")
    assert (found.type, found.overruled) == (
        "v_prediction",
        "'modelspec.prediction_type' in its metadata says epsilon",
    )
    # a configuration that somebody named, against the file
    with refusal("AFA-LOAD-051", "'xl-0'"):
        told(
            file := written(tmp_path / "b.safetensors", tensors, "v_pred"),
            folder,
            config=str(folder),
        )
    both = {"config": str(folder), "prediction_type": "epsilon"}
    assert told(file, folder, **both).type == "epsilon"
    # noise at a level where there is nothing but noise
    file = written(tmp_path / "c.safetensors", tensors, "ztsnr")
    with refusal("AFA-LOAD-049"):
        told(file, folder)
    found = told(file, folder, prediction_type="v_prediction")
    assert (found.type, found.zero_snr) == ("v_prediction", True)


def test_stable_diffusion_2_is_told_by_what_it_says(tmp_path: Path) -> None:
    shapes = {
        key: tuple(t.shape) for key, t in original_layout(described("stable-diffusion-2")).items()
    }
    assert config_of(shapes, "x", "v_prediction") == "stable-diffusion-2"
    assert config_of(shapes, "x", "epsilon") == "stable-diffusion-2-base"
    for architecture, kind in (("v2-768-v", "v_prediction"), ("v2-512", "epsilon")):
        place = tmp_path / f"{architecture}.safetensors"
        file = written(place, {}, architecture=f"stable-diffusion-{architecture}")
        assert [each.type for each in evidence_of(file, {})] == [kind]


def test_flow_models_predict_the_flow_whatever_metadata_says() -> None:
    config = config_folder("stable-diffusion-3-medium")
    # trainers write epsilon into every file of this family
    found = decide("x", config, [Evidence("its metadata", "epsilon")])
    assert (found.type, found.scheduler) == ("flow_prediction", None)
    with refusal("AFA-LOAD-048", "epsilon", "flow_prediction"):
        decide("x", config, asked="epsilon")


def test_a_scheduler_that_cannot_rescale_is_replaced() -> None:
    config = config_folder("stable-diffusion-1.5")
    found = decide("x", config, [Evidence("the tensor 'v_pred'", "v_prediction", zero_snr=True)])
    assert type(scheduler_of(config)).__name__ == "PNDMScheduler"
    scheduler = scheduler_of(config, found)
    assert type(scheduler).__name__ == "EulerDiscreteScheduler"
    assert scheduler.config.beta_schedule == "scaled_linear"
    assert scheduler.config.prediction_type == "v_prediction"
    process = forward_process(scheduler)
    assert isinstance(process, Diffusion)
    assert process.predicts_velocity
    assert process.scheduler.alphas_cumprod[-1] == 0


# -- continuous noise levels ------------------------------------------------------------------


@pytest.mark.parametrize("mark", ["edm_vpred.sigma_max", "edm_mean"])
def test_continuous_noise_levels_need_their_scheduler(
    mark: str, folder: Path, tensors: Any, tmp_path: Path
) -> None:
    file = written(tmp_path / "cos.safetensors", tensors, mark)
    for named in ({}, {"config": str(folder)}, {"prediction_type": "v_prediction"}):
        with refusal("AFA-LOAD-050", f"'{mark}'"):
            told(file, folder, **named)
    edm = tmp_path / "edm"
    shutil.copytree(folder, edm)
    index = json.loads((edm / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EDMEulerScheduler"]
    (edm / "model_index.json").write_text(json.dumps(index))
    (edm / SCHEDULER).write_text(
        json.dumps({"sigma_max": 120.0, "sigma_data": 1.0, "prediction_type": "v_prediction"})
    )
    assert told(file, folder, config=str(edm)).type == "v_prediction"
    scheduler = scheduler_of(edm)
    with refusal("AFA-TRAIN-040"):
        forward_process(scheduler)
    other = changed(edm, tmp_path / "other", SCHEDULER, sigma_max=80.0)
    with refusal("AFA-LOAD-010", r"= \(0.002, 80.0, 1.0\)", "120"):
        afa.load_pipeline([edm, other])


# -- in ensembles -----------------------------------------------------------------------------


def test_what_each_expert_predicts_is_known_everywhere(
    folder: Path, tensors: Any, tmp_path: Path
) -> None:
    noise = written(tmp_path / "noise.safetensors", tensors)
    velocity = written(tmp_path / "velocity.safetensors", tensors, "v_pred")
    mixtures: list[list[Any]] = [
        [folder, velocity],
        [{"model": str(folder), "prediction_type": "epsilon"}, velocity],
        [noise, {"model": str(noise), "prediction_type": "v_prediction"}, folder],
        [folder, {"model": str(folder), "prediction_type": "v_prediction"}],
    ]
    for n, experts in enumerate(mixtures):
        pipeline = afa.load_pipeline(experts, allow_duplicates=True)
        found = pipeline.unet.objectives.experts
        rest = ["epsilon"] if len(experts) == 3 else []
        assert [each.predicts for each in found] == ["epsilon", "v_prediction", *rest]
        again = afa.load_ensemble(afa.save_ensemble(pipeline, tmp_path / f"{n}"))
        assert again.unet.objectives == pipeline.unet.objectives


def test_what_a_recipe_says_is_used_kept_and_found_again(
    folder: Path, tensors: Any, tmp_path: Path
) -> None:
    file = written(tmp_path / "a.safetensors", tensors)
    asked = {"model": str(file), "config": str(folder), "prediction_type": "v_prediction"}
    pipeline = afa.load_pipeline([asked])
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert load_single(asked)[0].scheduler.config.prediction_type == "v_prediction"
    saved = afa.save_ensemble(pipeline, tmp_path / "ensemble")
    (expert,) = describe(saved)["experts"]
    assert expert["prediction_type"] == "v_prediction"
    for moved in (None, [file]):
        again = afa.load_ensemble(saved, experts=moved)
        assert again.scheduler.config.prediction_type == "v_prediction"
        assert (
            again.unet.provenance.experts[0].identity
            == pipeline.unet.provenance.experts[0].identity
        )
    plain = afa.load_pipeline([file], config=folder)
    assert plain.unet.provenance.experts[0].identity != pipeline.unet.provenance.experts[0].identity
    with refusal("AFA-LOAD-074"):
        afa.load_pipeline([{"model": str(folder), "config": str(folder)}])


def test_a_yaml_beside_is_remembered_when_it_is_gone(
    folder: Path, tensors: Any, tmp_path: Path
) -> None:
    file = written(tmp_path / "a.safetensors", tensors)
    velocity = changed(folder, tmp_path / "v", SCHEDULER, prediction_type="v_prediction")
    beside = file.with_suffix(".yaml")
    beside.write_text(yaml.safe_dump(V))
    pipeline = afa.load_pipeline([velocity, file], allow_duplicates=True)
    saved = afa.save_ensemble(pipeline, tmp_path / "ensemble")
    beside.unlink()
    assert describe(saved)["experts"][1]["prediction_type"] == "v_prediction"
    afa.load_ensemble(saved)
