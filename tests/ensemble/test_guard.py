"""Numbers that are none: who gave them, where, and going on without that expert there."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import afa
from afa.drawing.pictures import draw
from afa.drawing.recorded import picture_recipe
from tests.ensemble.caching.test_plan import plan_of
from tests.refusal import refusal
from tests.tiny import inputs
from tests.training.runs import SMALL, recipe, steps_of


@pytest.fixture
def pipeline(experts: list[Path]) -> Any:
    pipeline = afa.load_pipeline(experts, SMALL)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        for rule in pipeline.unet.aggregators:
            rule.conv_out.weight.normal_()
    return pipeline


def spoil(part: Any, value: float = float("nan")) -> None:
    with torch.no_grad():
        part.weight[0] = value


def drawn(pipeline: Any, **settings: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 3, "generator": generator, "output_type": "pt"}
    return pipeline("a fox", **{**options, **settings}).images


PLACES: dict[str, Any] = {
    "conv_in": lambda unet: unet.conv_in,
    "down.0.0": lambda unet: unet.down_blocks[0].resnets[0].conv1,
    "mid": lambda unet: unet.mid_block.resnets[1].conv2,
    "up.1.0": lambda unet: unet.up_blocks[1].attentions[0].proj_out,
    "conv_out": lambda unet: unet.conv_out,
}


@pytest.mark.fault(
    "non-finite values",
    "generate",
    how="NaN or infinity in an expert, at five sites",
    holds="the run stops; the error names the expert and the site",
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("site", PLACES)
def test_the_expert_and_the_site_are_named(site: str, value: float, pipeline: Any) -> None:
    spoil(PLACES[site](pipeline.unet.experts[1]), value)
    with refusal("AFA-ENSEMBLE-033", "'expert1'", f"'{site}'") as e:
        drawn(pipeline)
    assert "\n" not in str(e.value)


@pytest.mark.fault(
    "non-finite values",
    "generate --on-nonfinite mask",
    how="NaN in an expert, at five sites, exact and fast",
    holds="the picture is finite; the expert's weight is zero at that site and positive at all "
    "others",
)
@pytest.mark.parametrize("speed", ["exact", "fast"])
@pytest.mark.parametrize("site", PLACES)
def test_an_expert_is_masked_there_and_nowhere_else(site: str, speed: str, pipeline: Any) -> None:
    spoil(PLACES[site](pipeline.unet.experts[1]))
    pipeline.unet.on_nonfinite = "mask"
    afa.accelerate(pipeline, speed)
    shares: dict[str, float] = {}

    def observe(_: Tensor, name: str, weights: Tensor) -> None:
        if weights.isfinite().all():
            shares[name] = float(weights[:, 1].max())

    pipeline.unet.on_weights = observe
    assert drawn(pipeline).isfinite().all()
    assert {place for _, place in pipeline.unet.masked} == {site}
    assert {expert for expert, _ in pipeline.unet.masked} == {"expert1"}
    assert sum(pipeline.unet.masked.values()) == 3  # steps
    assert shares[site] == 0
    assert all(share > 0 for name, share in shares.items() if name != site)


def test_masking_is_what_the_others_alone_give(pipeline: Any) -> None:
    """At the last site, where each goes on from the others' feature: theirs, renormalised."""
    call = inputs(text_width=48)
    with torch.no_grad():
        rule = pipeline.unet.aggregators[-1]
        seen: list[Any] = []
        rule.register_forward_pre_hook(lambda _, given: seen.append(given))
        pipeline.unet(**call)
        features, condition = seen[0]
        expected = rule.fuse_some({0: features[0], 2: features[2]}, condition).feature
        spoil(pipeline.unet.experts[1].conv_out)
        pipeline.unet.on_nonfinite = "mask"
        assert torch.equal(pipeline.unet(**call)[0], expected)


def test_nothing_changes_where_all_is_finite(pipeline: Any) -> None:
    plain = drawn(pipeline)
    pipeline.unet.on_nonfinite = "mask"
    assert torch.equal(drawn(pipeline), plain)
    assert not pipeline.unet.masked


def test_the_mean_is_of_those_that_are_left(experts: list[Path]) -> None:
    pipeline = afa.load_pipeline(experts)
    spoil(pipeline.unet.experts[2].conv_out)
    pipeline.unet.on_nonfinite = "mask"
    pipeline.set_progress_bar_config(disable=True)
    assert drawn(pipeline).isfinite().all()


def test_a_text_encoder_that_overflows(pipeline: Any) -> None:
    encoder = pipeline.text_encoder.encoders[1]
    spoil(encoder.final_layer_norm, float("inf"))
    with refusal("AFA-ENSEMBLE-033", "'expert1'"):
        drawn(pipeline)
    pipeline.unet.on_nonfinite = "mask"
    assert drawn(pipeline).isfinite().all()
    assert {place for _, place in pipeline.unet.masked} == {"text encoder"}


def test_experts_that_a_plan_leaves_out_do_not_step_in(pipeline: Any) -> None:
    """Their features are not there; a plan's others go on, or nobody does."""
    spoil(PLACES["mid"](pipeline.unet.experts[1]))
    pipeline.unet.on_nonfinite = "mask"
    pipeline.unet.plan = plan_of(pipeline.unet, {"mid": [0, 1]})
    assert drawn(pipeline).isfinite().all()
    assert pipeline.unet.masked == {("expert1", "mid"): 3}
    pipeline.unet.plan = plan_of(pipeline.unet, {"mid": [1]})
    with refusal("AFA-ENSEMBLE-034", "'mid'"):
        drawn(pipeline)


def test_all_of_them(pipeline: Any) -> None:
    for expert in pipeline.unet.experts:
        spoil(expert.conv_in)
    pipeline.unet.on_nonfinite = "mask"
    with refusal("AFA-ENSEMBLE-034", "'conv_in'"):
        drawn(pipeline)


def test_an_aggregator_with_damaged_weights(pipeline: Any) -> None:
    spoil(pipeline.unet.aggregators[3].conv_out)
    site = pipeline.unet.sites[3].name
    with refusal("AFA-ENSEMBLE-031", f"'{site}'"):
        drawn(pipeline)


def test_a_latent_that_is_not_finite(pipeline: Any) -> None:
    latents = torch.full((1, 4, 8, 8), torch.nan)
    with refusal("AFA-ENSEMBLE-030"):
        drawn(pipeline, latents=latents)


@pytest.mark.fault(
    "overflow",
    "generate in float16",
    how="expert weights so large that a feature exceeds 65504",
    holds="the error names the expert and the site, and proposes bfloat16",
)
def test_float16_overflows_in_an_expert(experts: list[Path]) -> None:
    pipeline = afa.load_pipeline(experts, SMALL, torch_dtype=torch.float16)
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pipeline.unet.experts[2].conv_in.weight.fill_(3e4)
    with refusal("AFA-ENSEMBLE-033", "'expert2'", "float16", "65504"):
        drawn(pipeline)


@pytest.mark.fault(
    "overflow",
    "the autoencoder",
    how="infinity while the picture is decoded",
    holds="refused in one line; no black picture is saved",
)
def test_an_autoencoder_that_overflows(pipeline: Any) -> None:
    spoil(pipeline.vae.decoder.conv_out)
    asked = picture_recipe(
        ensemble="x",
        identity="x",
        prompt="a fox",
        seed=0,
        steps=1,
        guidance=1,
        height=16,
        width=16,
    )
    with refusal("AFA-ENSEMBLE-029", "float32"):
        draw(pipeline, asked)


@pytest.mark.fault(
    "non-finite values",
    "train",
    how="NaN in an expert",
    holds="the run stops before the weights are updated; the error names the expert and the site",
)
def test_training_names_them_too(experts: list[Path], tmp_path: Path) -> None:
    copy = Path(shutil.copytree(experts[1], tmp_path / "wrong"))
    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["mid_block.resnets.0.conv1.bias"][0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    asked = recipe([experts[0], copy], num_steps=2)
    with refusal("AFA-TRAIN-051", "'wrong'", "'mid'"):
        list(steps_of(asked, tmp_path / "run"))


def test_the_option_of_the_command(
    experts: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.cli.test_cli import run, write_recipe

    assert run("train", write_recipe(tmp_path, experts), "--output", tmp_path / "run") == 0
    asked = ["generate", tmp_path / "run", "a fox", "--steps", "2", "--on-nonfinite"]
    assert run(*asked, "nothing", "--output", tmp_path / "a") == 2
    assert "--on-nonfinite must be one of stop, mask" in capsys.readouterr().err
    assert run(*asked, "mask", "--output", tmp_path / "b") == 0
    assert "warning" not in capsys.readouterr().out
