"""What ships: stock pipeline folders in half precision, as good and as bad as the report says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

import afa
from afa.cli import main
from afa.studies.zoo_build.evaluate import draw_pictures, scores_of
from afa.zoo import EXPERTS, MODELS, assets, expert_folder, export_zoo
from afa.zoo.judges import judge, load_classifier, report_card
from afa.zoo.scenes import evaluation_prompts
from tests.refusal import refusal

FOX = "a fox on the left and a pizza on the right, blue background"


def test_it_is_small_and_in_half_precision() -> None:
    files = [file for file in assets().rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 25e6
    weights = [file for file in files if file.suffix == ".safetensors"]
    assert len(weights) == 1 + 2 * len(MODELS) + 2 + 1  # autoencoder, models, judges, aggregators
    for file in weights:
        with safe_open(file, framework="pt") as tensors:
            dtypes = {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
        assert dtypes <= {"F16", "I64"}, file


def test_exported_models_are_stock_pipelines(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["zoo", "export", str(tmp_path / "zoo")])
    assert not stop.value.code
    assert sorted(folder.name for folder in (tmp_path / "zoo").iterdir()) == sorted(MODELS)
    for name in MODELS:
        pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "zoo" / name)
        pipeline.set_progress_bar_config(disable=True)
        assert pipeline.unet.dtype == torch.float32
        assert pipeline(FOX, num_inference_steps=1).images[0].size == (64, 64)
    with refusal("AFA-ZOO-001"):
        export_zoo(tmp_path / "zoo")


def test_experts_by_name() -> None:
    pipeline = afa.load_pipeline([f"zoo:{name}" for name in EXPERTS])
    assert [reference.source for reference in pipeline.unet.provenance.experts] == [
        "zoo:animals",
        "zoo:food",
        "zoo:things",
    ]
    assert expert_folder("animals") == expert_folder("animals")
    with refusal("AFA-ZOO-002"):
        afa.load_pipeline(["zoo:cars"])


def test_the_shipped_ensemble_draws(tmp_path: Path) -> None:
    command = ["generate", "zoo:ensemble", FOX, "--output", str(tmp_path / "out"), "--steps", "2"]
    with pytest.raises(SystemExit) as stop:
        main([*command, "--weights"])
    assert not stop.value.code
    assert len(list((tmp_path / "out").glob("*.png"))) == 2


def test_experts_know_their_own_domain_and_no_other() -> None:
    models = report_card()["models"]
    for expert in EXPERTS:
        for domain in EXPERTS:
            share = models[expert][domain]["both"]["mean"]
            assert share >= 0.9 if domain == expert else share <= 0.5, (expert, domain, share)


@pytest.mark.nightly
@pytest.mark.parametrize("expert", EXPERTS)
def test_the_report_can_be_repeated(expert: str) -> None:
    card = report_card()
    settings = card["settings"]
    pipeline = StableDiffusionPipeline.from_pretrained(expert_folder(expert), safety_checker=None)
    prompts = evaluation_prompts(settings["num_prompts"], kind=expert)  # type: ignore[arg-type]
    pictures = draw_pictures(
        pipeline,
        prompts,
        seed=settings["seed"],
        num_steps=settings["num_steps"],
        guidance_scale=settings["guidance_scale"],
    )
    # rounding differs between processors, which moves single pictures over the judge's border
    both = scores_of(judge(load_classifier(), pictures, prompts))["both"]
    assert abs(both.mean - card["models"][expert][expert]["both"]["mean"]) <= 0.05


def test_the_noise_of_a_picture_does_not_depend_on_the_batch() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(expert_folder("base"), safety_checker=None)
    prompts = evaluation_prompts(3)
    together = draw_pictures(pipeline, prompts, num_steps=1)
    apart = draw_pictures(pipeline, prompts, num_steps=1, batch_size=1)
    for a, b in zip(together, apart, strict=True):
        difference = torch.tensor(list(a.tobytes())).float() - torch.tensor(list(b.tobytes()))
        assert difference.abs().max() <= 2
    assert together[0].tobytes() != together[1].tobytes()
