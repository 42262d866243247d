"""Stock diffusers pipelines run with the ensemble inside, and loading experts into them."""

from __future__ import annotations

import json
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from safetensors.torch import load_file, save_file

import afa
from afa.aggregators import SABW, Only
from afa.errors import AfaError
from tests.refusal import refusal
from tests.tiny import TEXT_WIDTH, tiny_pipeline

SMALL = afa.SABWConfig(hidden_size=8, num_layers=1, num_heads=2, norm_num_groups=4)
CALL = {"num_inference_steps": 2, "output_type": "np"}


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pipeline(experts: list[Path]) -> StableDiffusionPipeline:
    pipeline = afa.load_pipeline(experts, SMALL)
    for rule in pipeline.unet.aggregators:
        torch.nn.init.normal_(rule.conv_out.weight)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(seed: int = 0, size: int = 16) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_text_to_image(pipeline: StableDiffusionPipeline) -> None:
    assert type(pipeline) is StableDiffusionPipeline
    first = pipeline("a fox", generator=noise(), **CALL).images
    again = pipeline("a fox", generator=noise(), **CALL).images
    other = pipeline("a pizza", generator=noise(), **CALL).images
    assert first.shape == (1, 16, 16, 3)
    assert np.isfinite(first).all()
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_nothing_judges_or_marks_pictures(pipeline: StableDiffusionPipeline) -> None:
    assert pipeline.components["safety_checker"] is None
    assert not pipeline.config.requires_safety_checker


def test_an_autoencoder_of_another_latent_space_is_refused(
    experts: list[Path], tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(experts[1] / "vae", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.13025}))
    with refusal("AFA-LOAD-128", "'.*other' has scaling_factor = 0.13025, .*expert0' has 0.18215"):
        afa.load_pipeline(experts, vae=other)


def test_one_expert_picked_everywhere_draws_its_own_picture(experts: list[Path]) -> None:
    sites = afa.load_pipeline(experts).unet.sites
    ensemble = afa.load_pipeline(experts, [Only(1) for _ in sites], vae=experts[1])
    # the same autoencoder object: rounding depends on where in memory its weights lie
    alone = StableDiffusionPipeline.from_pretrained(
        experts[1], vae=ensemble.vae, safety_checker=None
    )
    for p in (ensemble, alone):
        p.set_progress_bar_config(disable=True)
    mine = ensemble(["a fox", "a bee"], generator=noise(), **CALL).images
    theirs = alone(["a fox", "a bee"], generator=noise(), **CALL).images
    assert np.array_equal(mine, theirs)


def test_image_to_image(pipeline: StableDiffusionPipeline) -> None:
    other = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    call = {**CALL, "num_inference_steps": 4}
    images = other("a fox", image=picture(), strength=0.5, generator=noise(), **call).images
    assert images.shape == (1, 16, 16, 3)
    assert np.isfinite(images).all()


def test_inpainting(pipeline: StableDiffusionPipeline) -> None:
    other = StableDiffusionInpaintPipeline(**pipeline.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    mask = Image.fromarray(np.pad(np.full((16, 8), 255, np.uint8), ((0, 0), (0, 8))))
    images = other(
        "a fox", image=picture(), mask_image=mask, height=16, width=16, generator=noise(), **CALL
    ).images
    assert images.shape == (1, 16, 16, 3)
    assert np.isfinite(images).all()


def test_controlnet(pipeline: StableDiffusionPipeline) -> None:
    config = pipeline.unet.config
    controlnet = ControlNetModel(
        in_channels=4,
        block_out_channels=config.block_out_channels,
        down_block_types=config.down_block_types,
        layers_per_block=config.layers_per_block,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
        conditioning_embedding_out_channels=(4, 8),
    ).eval()
    entry = controlnet.controlnet_cond_embedding.conv_out
    for layer in [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block, entry]:
        torch.nn.init.normal_(layer.weight)  # zero at first
    afa.attach_controlnet(controlnet, 3)
    other = StableDiffusionControlNetPipeline(
        **pipeline.components, controlnet=controlnet, requires_safety_checker=False
    )
    other.set_progress_bar_config(disable=True)
    drawn = [
        other("a fox", image=picture(seed), height=16, width=16, generator=noise(), **CALL).images
        for seed in (0, 1)
    ]
    assert np.isfinite(drawn[0]).all()
    assert not np.array_equal(*drawn)  # the control picture reaches the experts
    for prompt, is_same in (("a fox", True), ("a (fox:1.3) BREAK a pizza", False)):
        call = afa.encode_prompt(other, prompt)
        found = other(image=picture(0), height=16, width=16, generator=noise(), **call, **CALL)
        assert np.array_equal(found.images, drawn[0]) is is_same


def test_expert_parts(experts: list[Path]) -> None:
    pipeline = afa.load_pipeline(experts, SMALL)
    assert [r.source for r in pipeline.unet.provenance.experts] == [str(e) for e in experts]
    assert all(isinstance(rule, SABW) for rule in pipeline.unet.aggregators)
    assert not any(p.requires_grad for p in pipeline.unet.experts.parameters())
    assert not any(p.requires_grad for p in pipeline.vae.parameters())
    half = afa.load_pipeline(experts[:1], SMALL, torch_dtype=torch.bfloat16)
    assert half.unet.dtype == half.text_encoder.dtype == half.vae.dtype == torch.bfloat16
    assert half.unet.aggregators[0].conv_in.weight.dtype == torch.float32


def test_the_autoencoder_is_the_first_experts_or_the_one_named(experts: list[Path]) -> None:
    def first_weight(pipeline: StableDiffusionPipeline) -> torch.Tensor:
        return next(pipeline.vae.parameters())

    own = [load_file(e / "vae" / "diffusion_pytorch_model.safetensors") for e in experts]
    name = next(k for k, _ in afa.load_pipeline(experts).vae.named_parameters())
    assert torch.equal(first_weight(afa.load_pipeline(experts)), own[0][name])
    assert torch.equal(first_weight(afa.load_pipeline(experts, vae=experts[2])), own[2][name])


def test_saved_and_loaded_it_draws_the_same_picture(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    folder = afa.save_ensemble(pipeline, tmp_path / "ensemble")
    loaded = afa.load_ensemble(folder)
    loaded.set_progress_bar_config(disable=True)
    pictures = [p("a fox", generator=noise(), **CALL).images for p in (pipeline, loaded)]
    assert np.array_equal(*pictures)
    assert [r.sha256 for r in loaded.unet.provenance.experts] == [
        r.sha256 for r in pipeline.unet.provenance.experts
    ]


@pytest.mark.parametrize(
    "switches",
    [
        {"spatial": False},
        {"timestep": False},
        {"prompt": False},
        {"sharing": "width"},
        {"sites": "conv_out"},
        {"prompt": False, "sharing": "width"},
        {"hidden_ratio": 0.5, "min_scale": 4},
    ],
)
def test_ablations_are_saved_and_loaded(
    experts: list[Path], tmp_path: Path, switches: dict[str, Any]
) -> None:
    pipeline = afa.load_pipeline(experts[:2], replace(SMALL, **switches))
    for rule in pipeline.unet.aggregators:
        if isinstance(rule, afa.SABW):
            torch.nn.init.normal_(rule.conv_out.weight)
    folder = afa.save_ensemble(pipeline, tmp_path / "ensemble")
    saved = json.loads((folder / "config.json").read_text())["aggregator"]
    assert {key: saved.get(key) for key in switches} == switches
    loaded = afa.load_ensemble(folder)
    pictures = [
        p("a fox", num_inference_steps=2, output_type="np", generator=noise()).images
        for p in (pipeline, loaded)
    ]
    assert abs(pictures[0] - pictures[1]).max() < 1e-5
    untrained = afa.load_pipeline(experts[:2], replace(SMALL, **switches))
    assert not all(
        torch.equal(a, b)
        for a, b in zip(untrained.unet.parameters(), loaded.unet.parameters(), strict=True)
    )


def test_what_says_nothing_of_its_shape_has_the_paper_s(
    experts: list[Path], tmp_path: Path
) -> None:
    """Folders that were written before there was another one."""
    paper = replace(SMALL, hidden_ratio=None, min_scale=1)
    folder = afa.save_ensemble(afa.load_pipeline(experts[:2], paper), tmp_path / "ensemble")
    saved = json.loads((folder / "config.json").read_text())["aggregator"]
    assert not {"hidden_ratio", "min_scale"} & saved.keys()
    config = afa.load_ensemble(folder).unet.aggregators[0].config
    assert (config.hidden_ratio, config.min_scale) == (None, 1)


def test_no_expert_weights_are_written(pipeline: StableDiffusionPipeline, tmp_path: Path) -> None:
    folder = afa.save_ensemble(pipeline, tmp_path / "ensemble")
    assert sorted(f.name for f in folder.iterdir()) == [
        "README.md",
        "aggregators.safetensors",
        "config.json",
    ]
    tensors = load_file(folder / "aggregators.safetensors")
    own = sum(p.numel() for p in pipeline.unet.aggregators.parameters())
    assert sum(t.numel() for t in tensors.values()) == own
    assert "mid.res_block.norm1.weight" in tensors


def test_ensemble_and_experts_can_move_together(experts: list[Path], tmp_path: Path) -> None:
    here = tmp_path / "here"
    for expert in experts:
        shutil.copytree(expert, here / expert.name)
    pipeline = afa.load_pipeline([here / e.name for e in experts], SMALL)
    afa.save_ensemble(pipeline, here / "ensemble")
    here.rename(tmp_path / "there")
    loaded = afa.load_ensemble(tmp_path / "there" / "ensemble")
    assert loaded.unet.provenance.experts[0].source == str(tmp_path / "there" / experts[0].name)


def test_a_changed_expert_is_an_error_with_both_hashes(experts: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / "expert"
    shutil.copytree(experts[0], copy)
    pipeline = afa.load_pipeline([copy, experts[1]], SMALL)
    before = pipeline.unet.provenance.experts[0].sha256
    folder = afa.save_ensemble(pipeline, tmp_path / "ensemble")
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.bias"] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    after = afa.load_pipeline([copy]).unet.provenance.experts[0].sha256
    with pytest.raises(AfaError) as caught:
        afa.load_ensemble(folder)
    assert before in str(caught.value)
    assert after in str(caught.value)
    # the same file somewhere else is no change
    afa.load_ensemble(folder, experts=[str(experts[0]), str(experts[1])])


def test_an_expert_that_moved_is_named(experts: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere" / "expert"
    shutil.copytree(experts[0], copy)
    folder = afa.save_ensemble(afa.load_pipeline([copy], SMALL), tmp_path / "a" / "ensemble")
    shutil.rmtree(copy)
    with refusal("AFA-LOAD-079", "elsewhere/expert"):
        afa.load_ensemble(folder)


def test_existing_output_folder_is_left_alone(
    pipeline: StableDiffusionPipeline, tmp_path: Path
) -> None:
    with refusal("AFA-LOAD-021"):
        afa.save_ensemble(pipeline, tmp_path)
    assert not list(tmp_path.iterdir())


def change(folder: Path, key: str, value: object = None) -> None:
    """Put another value into an ensemble's configuration; without one take the entry out."""
    config = json.loads((folder / "config.json").read_text())
    config.pop(key)
    (folder / "config.json").write_text(
        json.dumps(config if value is None else {**config, key: value})
    )


@pytest.mark.parametrize(
    ("damage", "code", "value"),
    [
        (lambda f: (f / "config.json").unlink(), "AFA-LOAD-061", "config.json"),
        (lambda f: (f / "config.json").write_text("{"), "AFA-FILE-004", "config.json"),
        (lambda f: (f / "config.json").write_text('{"format": "x"}'), "AFA-LOAD-062", "'x'"),
        (lambda f: change(f, "vae"), "AFA-LOAD-063", "'vae'"),
        (lambda f: change(f, "experts", []), "AFA-LOAD-063", "'experts'"),
        (lambda f: change(f, "aggregator", {"type": "?"}), "AFA-LOAD-063", "'aggregator.type'"),
        (
            lambda f: (f / "aggregators.safetensors").write_bytes(
                (f / "aggregators.safetensors").read_bytes()[:-4]
            ),
            "AFA-LOAD-092",
            "aggregators.safetensors",
        ),
        (
            lambda f: save_file({"a": torch.zeros(1)}, f / "aggregators.safetensors"),
            "AFA-LOAD-018",
            "1 unknown .first: a.",
        ),
    ],
)
def test_damaged_ensembles(
    pipeline: StableDiffusionPipeline, tmp_path: Path, damage: object, code: str, value: str
) -> None:
    folder = afa.save_ensemble(pipeline, tmp_path / "ensemble")
    damage(folder)  # type: ignore[operator]
    with refusal(code, value):
        afa.load_ensemble(folder)


def test_experts_of_two_architectures(experts: list[Path], tmp_path: Path) -> None:
    other = tiny_pipeline(tmp_path / "tokenizer", block_out_channels=(8, 32))
    other.save_pretrained(tmp_path / "other")
    with refusal("AFA-LOAD-004"):
        afa.load_pipeline([experts[0], tmp_path / "other"])


def test_experts_of_two_objectives(experts: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / "expert"
    shutil.copytree(experts[1], copy)
    config = copy / "scheduler" / "scheduler_config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "prediction_type": "v_prediction"})
    )
    objectives = afa.load_pipeline([experts[0], copy]).unet.objectives
    assert [each.predicts for each in objectives.experts] == ["epsilon", "v_prediction"]


def test_experts_of_two_tokenizers(experts: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / "expert"
    shutil.copytree(experts[1], copy)
    for file in (copy / "tokenizer").iterdir():
        file.write_text(file.read_text().replace("æ", "\N{SNOWMAN}"))
    with refusal("AFA-LOAD-007"):
        afa.load_pipeline([experts[0], copy])


def test_other_pipelines_and_copies_have_the_provenance(experts: list[Path]) -> None:
    pipeline = afa.load_pipeline(experts, SMALL)
    known = pipeline.unet.provenance
    assert known.names == [expert.name for expert in experts]
    other = StableDiffusionImg2ImgPipeline(**pipeline.components)
    assert other.unet.provenance == deepcopy(pipeline).unet.provenance == known
