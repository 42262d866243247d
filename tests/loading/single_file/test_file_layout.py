"""Every layout of a model file is read alike, and every tensor in it is accounted for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file

import afa
from afa.errors import AfaError
from afa.loading.inspection import describe
from afa.loading.lora.file import open_lora
from afa.loading.single_file.accounting import account
from afa.loading.single_file.autoencoder import load_vae
from afa.loading.single_file.identify import config_of
from afa.loading.single_file.layout import denoiser_in, kind_name
from afa.loading.single_file.load import Companions
from afa.loading.weights import tensor_shapes
from afa.merging.checkpoints import read_checkpoint
from tests.loading.single_file.test_load import (
    assert_same_weights,
    described,
    load_file_parts,
    made,
)
from tests.preflight.test_check import looked
from tests.refusal import refusal
from tests.single_file import original_layout

if TYPE_CHECKING:
    from pathlib import Path

    from diffusers import DiffusionPipeline
    from torch import Tensor

_UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def xl(root: Path) -> DiffusionPipeline:
    return made("xl", root)


@pytest.fixture(scope="module")
def sd3(root: Path) -> DiffusionPipeline:
    return made("sd3", root)


@pytest.fixture(scope="module")
def sd1(root: Path) -> DiffusionPipeline:
    return made("1.5", root)


def written(place: Path, tensors: dict[str, Tensor]) -> Path:
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, place)
    return place


def shapes_of(pipeline: Any) -> dict[str, tuple[int, ...]]:
    return {key: tuple(t.shape) for key, t in original_layout(pipeline).items()}


# -- layouts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "diffusion_model.", _UNET, "diffusers", "unet."])
def test_a_denoiser_alone_is_read_in_every_layout(
    prefix: str, xl: DiffusionPipeline, root: Path, tmp_path: Path
) -> None:
    if prefix in ("diffusers", "unet."):
        start = prefix.removeprefix("diffusers")
        tensors = {start + key: tensor for key, tensor in xl.unet.state_dict().items()}
    else:
        tensors = {
            prefix + key.removeprefix(_UNET): tensor
            for key, tensor in original_layout(xl).items()
            if key.startswith(_UNET)
        }
    file = written(tmp_path / "unet.SAFETENSORS", tensors)
    folder = root / "xl-0"
    parts = load_file_parts(file, Companions(torch.float32, config=folder, parts=[folder]))
    assert_same_weights(xl.unet, parts["unet"])
    loaded = afa.load_pipeline([folder, file], parts=[folder], allow_duplicates=True)
    assert_same_weights(xl.unet, loaded.unet.experts[1])
    assert describe(file)["layout"].startswith("Stable Diffusion XL")
    assert "denoiser alone" in describe(file)["layout"]


def test_a_transformer_alone_is_read_in_diffusers_layout(
    sd3: DiffusionPipeline, root: Path, tmp_path: Path
) -> None:
    file = written(tmp_path / "transformer.sft", sd3.transformer.state_dict())
    folder = root / "sd3-0"
    loaded = afa.load_pipeline([file], config=folder, parts=[folder], vae=folder)
    assert_same_weights(sd3.transformer, loaded.transformer.experts[0])
    flux = described("flux-dev").transformer.state_dict()
    assert kind_name({key: tuple(t.shape) for key, t in flux.items()}) == "Flux"


def test_the_old_layout_of_the_text_encoder_is_read(
    sd1: DiffusionPipeline, root: Path, tmp_path: Path
) -> None:
    old = {
        k.replace("transformer.text_model.", "transformer."): t
        for k, t in original_layout(sd1).items()
    }
    old["cond_stage_model.transformer.embeddings.position_ids"] = torch.arange(24)[None]
    file = written(tmp_path / "nai.safetensors", old)
    loaded = afa.load_pipeline([file], config=root / "1.5-0")
    assert_same_weights(sd1.text_encoder, loaded.text_encoder.encoders[0])


def test_a_projection_in_a_file_is_used(sd3: DiffusionPipeline, root: Path, tmp_path: Path) -> None:
    """Not an identity in its place, which files without one mean."""
    tensors = original_layout(sd3)
    name = "text_encoders.clip_l.transformer.text_projection.weight"
    tensors[name] = torch.randn_like(tensors[name])
    file = written(tmp_path / "a.safetensors", tensors)
    parts = load_file_parts(file, Companions(torch.float32, config=root / "sd3-0"))
    assert torch.equal(parts["text_encoder"].text_projection.weight, tensors[name])


def test_other_endings_and_autoencoders_of_their_own(
    sd1: DiffusionPipeline, root: Path, tmp_path: Path
) -> None:
    whole = written(tmp_path / "whole.sft", original_layout(sd1))
    loaded = afa.load_pipeline([whole], config=root / "1.5-0")
    assert_same_weights(sd1.unet, loaded.unet.experts[0])
    assert_same_weights(sd1.vae, loaded.vae)
    inside = {
        key.removeprefix("first_stage_model."): tensor
        for key, tensor in original_layout(sd1).items()
        if key.startswith("first_stage_model.")
    }
    old = {
        key.replace(".to_q.", ".query.")
        .replace(".to_k.", ".key.")
        .replace(".to_v.", ".value.")
        .replace(".to_out.0.", ".proj_attn."): tensor
        for key, tensor in sd1.vae.state_dict().items()
    }
    for n, tensors in enumerate((inside, old, {**inside, "loss.logvar": torch.zeros(())})):
        file = written(tmp_path / f"vae-{n}.sft", tensors)
        assert_same_weights(sd1.vae, load_vae(file, config=root / "1.5-0")[0])
    with refusal("AFA-LOAD-065", "1"):
        load_vae(
            written(tmp_path / "odd.sft", {**inside, "surprise": torch.zeros(1)}),
            config=root / "1.5-0",
        )
    with refusal("AFA-LOAD-075"):
        load_vae(written(tmp_path / "no.sft", {"a": torch.zeros(1)}), config=root / "1.5-0")


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors"])
def test_gguf_is_named_in_every_command(name: str, root: Path, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes(b"GGUF" + bytes(100))
    for action in (
        lambda: read_checkpoint(str(file)),
        lambda: open_lora(file),
        lambda: load_vae(file),
        lambda: afa.load_pipeline([root / "1.5-0"], parts=[file]),
    ):
        with refusal("AFA-LOAD-091", "float16", "bfloat16"):
            action()
    for action in (lambda: describe(file), lambda: afa.load_pipeline([file])):
        with refusal("AFA-LOAD-116", "version is 0"):
            action()


# -- accounting -------------------------------------------------------------------------------


def test_harmless_tensors_are_counted_and_others_refused(
    sd1: DiffusionPipeline, root: Path, tmp_path: Path
) -> None:
    tensors = original_layout(sd1)
    clip = "cond_stage_model.transformer.text_model.embeddings"
    harmless = {
        "alphas_cumprod": torch.ones(1000),
        "sqrt_recipm1_alphas_cumprod": torch.ones(1000),
        "posterior_mean_coef1": torch.ones(1000),
        "model_ema.decay": torch.ones(()),
        "model_ema.diffusion_modelinput_blocks00weight": torch.ones(1),
        "denoiser.sigmas": torch.ones(1000),
        "cond_stage_model.logit_scale": torch.ones(()),
        f"{clip}.position_ids": torch.arange(24)[None],
        "first_stage_model.loss.logvar": torch.ones(()),
        "global_step": torch.ones(()),
    }
    file = written(tmp_path / "a.safetensors", {**tensors, **harmless})
    folder = root / "1.5-0"
    assert sum(account(tensor_shapes(file), folder, file).values()) == len(harmless)
    loaded = afa.load_pipeline([file], config=folder)
    assert_same_weights(sd1.unet, loaded.unet.experts[0])
    for name in (
        f"{_UNET}input_blocks.1.1.transformer_blocks.0.attn1.to_q.bias",
        f"{_UNET}time_embed.cond_proj.weight",
        "cond_stage_model.transformer.text_model.encoder.layers.9.mlp.fc1.weight",
        "first_stage_model.decoder.up.7.block.0.conv1.weight",
        "control_model.zero_convs.0.0.weight",
        "embedding_manager.embedder.weight",
        "surprise",
    ):
        shapes = {**tensor_shapes(file), name: (3,)}
        with pytest.raises(AfaError, match=f"'{name}'") as refused:
            account(shapes, folder, "x")
        assert refused.value.code in ("AFA-LOAD-065", "AFA-LOAD-066")


def test_a_lent_encoder_is_accounted_for(xl: DiffusionPipeline, root: Path, tmp_path: Path) -> None:
    tensors = original_layout(xl)
    bare = {k: t for k, t in tensors.items() if not k.startswith("conditioner.")}
    file = written(tmp_path / "bare.safetensors", bare)
    clip = {
        key if key.startswith("text_") else f"text_model.{key}": tensor
        for key, tensor in xl.text_encoder.state_dict().items()
    }
    full = {**clip, "vision_model.x": torch.ones(1), "logit_scale": torch.ones(())}
    folder, sound = root / "xl-0", written(tmp_path / "clip.safetensors", full)
    companions = Companions(torch.float32, config=folder, parts=[sound, folder])
    parts = load_file_parts(file, companions)
    assert_same_weights(xl.text_encoder, parts["text_encoder"])
    odd = written(tmp_path / "odd.safetensors", {**clip, "text_model.surprise": torch.ones(1)})
    with refusal("AFA-LOAD-065", "odd.safetensors", "1"):
        load_file_parts(file, Companions(torch.float32, config=folder, parts=[odd, folder]))


def test_check_inspect_and_loading_give_one_answer(
    sd1: DiffusionPipeline, root: Path, tmp_path: Path
) -> None:
    surprise = f"{_UNET}surprise"
    file = written(tmp_path / "a.safetensors", {**original_layout(sd1), surprise: torch.ones(1)})
    message = rf"unet in '{file}' does not fit .*: 1 tensors that fit no layer .*'{surprise}'"
    with refusal("AFA-LOAD-065", message):
        afa.load_pipeline([root / "1.5-0", file])
    with refusal("AFA-LOAD-065", message):
        afa.load_pipeline([file], config=root / "1.5-0")
    assert "unknown: " in describe(file)["configuration"]
    report = looked(tmp_path, [root / "1.5-0", file])
    (error,) = report.errors
    assert (error.check, surprise in error.text) == ("files", True)
    sound = written(tmp_path / "b.safetensors", original_layout(sd1))
    report = looked(
        tmp_path,
        [{"model": str(sound), "config": str(root / "1.5-0"), "prediction_type": "epsilon"}],
    )
    assert not report.errors
    assert not [each for each in report.findings if each.check == "prediction"]


def test_models_with_fewer_or_more_blocks_are_named() -> None:
    flux = shapes_of(described("flux-dev"))
    few = {
        k: v for k, v in flux.items() if not any(f"double_blocks.{i}." in k for i in range(8, 19))
    }
    with refusal("AFA-LOAD-065", "8", "'flux-dev'", "19"):
        config_of(few, "x")
    xl = shapes_of(described("stable-diffusion-xl"))
    # as Segmind's models do: attention with fewer layers, or none in the middle
    for gone in ("input_blocks.8.1.transformer_blocks.9.", "middle_block.1."):
        with refusal("AFA-LOAD-065", r"6\d", "70"):
            config_of({k: v for k, v in xl.items() if gone not in k}, "x")
    more = f"{_UNET}input_blocks.8.1.transformer_blocks.10.attn1.to_q.weight"
    with refusal("AFA-LOAD-065", "71", "70"):
        config_of({**xl, more: (1280, 1280)}, "x")
    wide = {**xl, f"{_UNET}out.2.bias": (9,)}
    with refusal("AFA-LOAD-065", r"\(9,\)", r"\(4,\)"):
        config_of(wide, "x")


def test_a_controlnet_is_no_denoiser() -> None:
    names = (
        "conv_in.weight",
        "time_embedding.linear_1.weight",
        "down_blocks.0.resnets.0.conv1.weight",
    )
    assert denoiser_in(dict.fromkeys(names, (1,))) is None
    with refusal("AFA-LOAD-069"):
        config_of(dict.fromkeys(names, (1,)), "x")
