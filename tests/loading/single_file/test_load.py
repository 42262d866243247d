"""Single files of the original codes: told apart by their tensors, read bit for bit, no network."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import pytest
import torch
from diffusers import ChromaTransformer2DModel, DiffusionPipeline, FluxTransformer2DModel
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

import afa
from afa.cli import main
from afa.denoisers.kinds import build_pipeline, denoiser_of
from afa.errors import AfaError
from afa.loading.inspection import describe
from afa.loading.pipeline import load_single
from afa.loading.single_file.identify import config_folder, config_of, configs, missing_parts
from afa.loading.single_file.load import Companions, describe_expert, load_single_file
from tests.refusal import refusal
from tests.single_file import original_layout
from tests.tiny import tiny_pipeline
from tests.tiny_pipelines import PIPELINES

if TYPE_CHECKING:
    from torch import Tensor, nn

pytestmark = pytest.mark.slow

_KINDS = ("xl", "refiner", "sd3", "z-image")


@pytest.fixture(autouse=True)
def _unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """No name is looked up and no connection made, whatever a library tries."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def load_file_parts(file: Path, companions: Companions) -> dict[str, Any]:
    """The components of a single file."""
    return load_single_file(file, describe_expert(file, companions), companions)


def made(kind: str, root: Path, seed: int = 0) -> DiffusionPipeline:
    """A tiny pipeline in memory, and its folder `root/kind-seed`."""
    torch.manual_seed(seed)
    if kind == "1.5":
        pipeline = tiny_pipeline(root / "tokenizer", seed)
    else:
        pipeline = PIPELINES[kind](root / "tokenizer")
    if kind == "sd3":  # what the library takes the projection for, which these files leave out
        torch.nn.init.eye_(pipeline.text_encoder.text_projection.weight)
    pipeline.save_pretrained(root / f"{kind}-{seed}")
    return pipeline


def exported(pipeline: DiffusionPipeline, file: Path, *without: str) -> Path:
    """Its single file, without the tensors that start like this."""
    tensors = original_layout(pipeline)
    save_file({k: t.clone() for k, t in tensors.items() if not k.startswith(without)}, file)
    return file


def assert_same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    expected, came = ours.state_dict(), theirs.state_dict()
    assert expected.keys() == came.keys()
    for key, tensor in expected.items():
        assert torch.equal(tensor, came[key]), key


# -- round trips ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["1.5", *_KINDS])
def test_a_file_is_read_bit_for_bit(kind: str, tmp_path: Path) -> None:
    pipeline = made(kind, tmp_path)
    file = exported(pipeline, tmp_path / "file.safetensors")
    companions = Companions(torch.float32, config=tmp_path / f"{kind}-0")
    parts = load_file_parts(file, companions)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            assert_same_weights(part, parts[name])
            assert not parts[name].training, name
    assert companions.references == []


@pytest.mark.parametrize("kind", ["1.5", "xl", "sd3", "z-image"])
def test_files_and_folders_make_the_same_ensemble(kind: str, tmp_path: Path) -> None:
    folders = [tmp_path / f"{kind}-{seed}" for seed in range(2)]
    files = [
        exported(made(kind, tmp_path, seed), tmp_path / f"{seed}.safetensors") for seed in range(2)
    ]
    torch.manual_seed(7)
    expected = afa.load_pipeline(folders)
    ours = afa.load_pipeline(files, config=folders[0])
    assert_same_weights(denoiser_of(expected), denoiser_of(ours))
    options: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}
    options |= {"height": 16, "width": 16}
    pictures = [
        pipeline("a fox", generator=torch.Generator().manual_seed(0), **options).images
        for pipeline in (expected, ours)
    ]
    # where a file's bytes lie decides the last bits of a product, not of a weight
    torch.testing.assert_close(*pictures, atol=1e-5, rtol=0)


def wide(kind: str) -> Any:
    """One block of each sort at the published width, 1 GB."""
    config: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 24,
    }
    with torch.device("meta"):
        if kind == "chroma":
            transformer: Any = ChromaTransformer2DModel(**config, approximator_layers=2)
        else:
            config |= {"pooled_projection_dim": 8, "guidance_embeds": True}
            transformer = FluxTransformer2DModel(**config)
    return transformer.bfloat16().to_empty(device="cpu").eval()


@pytest.mark.nightly
@pytest.mark.parametrize("kind", ["flux", "chroma"])
def test_a_flux_file_is_read_bit_for_bit(kind: str, tmp_path: Path) -> None:
    # the library reads this layout at the published width alone
    transformer = wide(kind)
    for n, parameter in enumerate(transformer.parameters()):
        parameter.data.uniform_(-0.02, 0.02, generator=torch.Generator().manual_seed(n))
    torch.manual_seed(0)
    pipeline = PIPELINES[kind](tmp_path / "tokenizer")
    pipeline.register_modules(transformer=transformer)
    pipeline.save_pretrained(tmp_path / "folder")
    file = exported(pipeline, tmp_path / "file.safetensors")
    companions = Companions(torch.bfloat16, config=tmp_path / "folder")
    parts = load_file_parts(file, companions)
    assert_same_weights(transformer, parts["transformer"])
    assert_same_weights(pipeline.vae.bfloat16(), parts["vae"])
    encoders = [name for name in pipeline.components if name.startswith("text_encoder")]
    for name in encoders:
        assert_same_weights(getattr(pipeline, name).bfloat16(), parts[name])
    # and as it is usually shared: the transformer alone, the rest in files of their own
    alone = exported(
        pipeline, tmp_path / "alone.safetensors", "vae.", "text_encoders.clip_l", "text_encoders.t5"
    )
    del parts
    for name in encoders:
        save_file(_bare(getattr(pipeline, name)), tmp_path / f"{name}.safetensors")
    lent = Companions(
        torch.bfloat16,
        config=tmp_path / "folder",
        parts=[tmp_path / f"{name}.safetensors" for name in encoders],
    )
    parts = load_file_parts(alone, lent)
    for name in encoders:
        assert_same_weights(getattr(pipeline, name), parts[name])


def _bare(encoder: Any) -> dict[str, Tensor]:
    """A text encoder's file of its own, as web UIs keep it: CLIP-L's without a projection."""
    state: dict[str, Tensor] = encoder.state_dict()
    if isinstance(encoder, T5EncoderModel):
        left_out = "encoder.embed_tokens.weight"
    else:
        is_large = encoder.config.projection_dim == encoder.config.hidden_size
        left_out = "text_projection.weight" if is_large else ""
        state = {k if k.startswith("text_") else f"text_model.{k}": t for k, t in state.items()}
    return {key: tensor.contiguous() for key, tensor in state.items() if key != left_out}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_numbers_of_less_precision_are_widened(dtype: torch.dtype, tmp_path: Path) -> None:
    pipeline = made("1.5", tmp_path)
    tensors = {key: tensor.to(dtype) for key, tensor in original_layout(pipeline).items()}
    save_file(tensors, tmp_path / "file.safetensors")
    parts = load_file_parts(
        tmp_path / "file.safetensors", Companions(torch.float32, config=tmp_path / "1.5-0")
    )
    expected = pipeline.unet.conv_in.weight.to(dtype).float()
    assert torch.equal(parts["unet"].conv_in.weight, expected)


# -- what files leave out ---------------------------------------------------------------------


def test_text_encoders_that_a_file_leaves_out_are_lent(tmp_path: Path) -> None:
    pipeline = made("xl", tmp_path)
    whole = exported(pipeline, tmp_path / "whole.safetensors")
    bare = exported(pipeline, tmp_path / "bare.safetensors", "conditioner.", "first_stage_model.")
    folder = tmp_path / "xl-0"
    with refusal("AFA-LOAD-077", "text_encoder_2", "parts"):
        afa.load_pipeline([bare], config=folder)
    for part in (folder, whole):
        loaded = afa.load_pipeline([bare], config=folder, parts=[part])
        for name in ("text_encoder", "text_encoder_2"):
            assert_same_weights(getattr(pipeline, name), getattr(loaded, name).encoders[0])
        assert_same_weights(pipeline.vae, loaded.vae)
    # each in a file of its own; the autoencoder is named by itself
    save_file(_bare(pipeline.text_encoder), tmp_path / "clip_l.safetensors")
    save_file(_bare(pipeline.text_encoder_2), tmp_path / "clip_g.safetensors")
    files = [tmp_path / "clip_l.safetensors", tmp_path / "clip_g.safetensors"]
    with refusal("AFA-LOAD-078", "vae"):
        afa.load_pipeline([bare], config=folder, parts=files)
    loaded = afa.load_pipeline([bare], config=folder, parts=files, vae=folder)
    for name in ("text_encoder", "text_encoder_2"):
        assert_same_weights(getattr(pipeline, name), getattr(loaded, name).encoders[0])


def test_what_was_lent_is_found_again_and_must_be_the_same(tmp_path: Path) -> None:
    pipeline = made("xl", tmp_path)
    bare = exported(pipeline, tmp_path / "bare.safetensors", "conditioner.", "first_stage_model.")
    whole = exported(pipeline, tmp_path / "whole.safetensors")
    loaded = afa.load_pipeline([bare], config=tmp_path / "xl-0", parts=[whole])
    saved = afa.save_ensemble(loaded, tmp_path / "ensemble")
    assert describe(saved)["parts"] == ["./../whole.safetensors"]
    again = afa.load_ensemble(saved)
    assert_same_weights(loaded.text_encoder, again.text_encoder)
    assert again.unet.provenance.vae == loaded.unet.provenance.vae
    whole.rename(tmp_path / "moved.safetensors")
    with refusal("AFA-LOAD-079", r"whole\.safetensors"):
        afa.load_ensemble(saved)
    afa.load_ensemble(saved, parts=[tmp_path / "moved.safetensors"])
    with refusal("AFA-LOAD-025", "1", "2"):
        afa.load_ensemble(saved, parts=[tmp_path / "moved.safetensors"] * 2)
    exported(made("xl", tmp_path, 1), whole)
    with refusal("AFA-LOAD-082", "SHA-256"):
        afa.load_ensemble(saved)


def test_parts_of_z_image_in_files_of_their_own(tmp_path: Path) -> None:
    """As they are published, the denoiser alone and Qwen3 with its output layer."""
    pipeline = made("z-image", tmp_path)
    bare = exported(pipeline, tmp_path / "bare.safetensors", "text_encoders.", "vae.")
    qwen = {f"model.{name}": t for name, t in pipeline.text_encoder.state_dict().items()}
    qwen["lm_head.weight"] = qwen["model.embed_tokens.weight"].clone()
    save_file(qwen, tmp_path / "qwen.safetensors")
    with refusal("AFA-MODEL-024", "config=FOLDER"):
        afa.load_pipeline([bare])
    with refusal("AFA-LOAD-077", "Qwen3-4B"):
        afa.load_pipeline([bare], config=tmp_path / "z-image-0")
    parts = [tmp_path / "qwen.safetensors", tmp_path / "z-image-0"]
    loaded = afa.load_pipeline([bare], config=tmp_path / "z-image-0", parts=parts)
    assert_same_weights(pipeline.transformer, loaded.transformer.experts[0])
    assert_same_weights(pipeline.text_encoder, loaded.text_encoder.encoders[0])


@pytest.mark.parametrize(
    ("kind", "code", "encoder"),
    [
        ("qwen-image", "AFA-MODEL-026", r"Qwen2\.5-VL-7B"),
        ("klein", "AFA-MODEL-029", "Qwen3"),
    ],
)
def test_files_of_the_transformer_alone(kind: str, code: str, encoder: str, tmp_path: Path) -> None:
    pipeline, folder = made(kind, tmp_path), tmp_path / f"{kind}-0"
    file = exported(pipeline, tmp_path / "file.safetensors")
    with refusal(code, "config=FOLDER"):
        afa.load_pipeline([file])
    with refusal("AFA-LOAD-077", encoder):
        afa.load_pipeline([file], config=folder)
    loaded = afa.load_pipeline([file], config=folder, parts=[folder])
    assert_same_weights(pipeline.transformer, loaded.transformer.experts[0])
    assert_same_weights(pipeline.text_encoder, loaded.text_encoder.encoders[0])
    assert_same_weights(pipeline.vae, loaded.vae)
    save_file(pipeline.vae.state_dict(), tmp_path / "vae.safetensors")
    loaded = afa.load_pipeline([folder], vae=tmp_path / "vae.safetensors")
    assert_same_weights(pipeline.vae, loaded.vae)


def test_lent_encoders_are_one_for_all(tmp_path: Path) -> None:
    files = [
        exported(made("xl", tmp_path, seed), tmp_path / f"{seed}.safetensors", "conditioner.")
        for seed in range(2)
    ]
    loaded = afa.load_pipeline(files, config=tmp_path / "xl-0", parts=[tmp_path / "xl-0"])
    assert len(loaded.text_encoder.encoders) == 1


def test_stable_diffusion_3_works_without_t5(tmp_path: Path) -> None:
    pipeline = made("sd3", tmp_path)
    file = exported(pipeline, tmp_path / "file.safetensors", "text_encoders.t5xxl")
    loaded = afa.load_pipeline([file], config=tmp_path / "sd3-0")
    assert loaded.text_encoder_3 is None
    assert loaded.tokenizer_3 is None
    assert loaded("a fox", num_inference_steps=1, output_type="pt").images.isfinite().all()
    lent = afa.load_pipeline([file], config=tmp_path / "sd3-0", parts=[tmp_path / "sd3-0"])
    assert_same_weights(pipeline.text_encoder_3, lent.text_encoder_3.encoders[0])
    # a folder that has left out T5, but not its tokenizer
    shutil.copytree(tmp_path / "sd3-0", tmp_path / "small")
    index = json.loads((tmp_path / "small" / "model_index.json").read_text())
    content = json.dumps(index | {"text_encoder_3": [None, None]})
    (tmp_path / "small" / "model_index.json").write_text(content)
    afa.load_pipeline([file, tmp_path / "small"], config=tmp_path / "sd3-0", allow_duplicates=True)
    gone = exported(pipeline, tmp_path / "gone.safetensors", "text_encoders.")
    with refusal("AFA-LOAD-077", "text_encoder_2"):
        afa.load_pipeline([gone], config=tmp_path / "sd3-0")


def test_parts_of_another_family_lend_nothing(tmp_path: Path) -> None:
    pipeline = made("xl", tmp_path)
    made("1.5", tmp_path)
    made("sd3", tmp_path)
    file = exported(pipeline, tmp_path / "file.safetensors", "conditioner.")
    for other in ("1.5-0", "sd3-0"):
        with refusal("AFA-LOAD-077"):
            afa.load_pipeline([file], config=tmp_path / "xl-0", parts=[tmp_path / other])


def test_a_file_without_a_denoiser_says_so(tmp_path: Path) -> None:
    pipeline = made("1.5", tmp_path)
    file = exported(pipeline, tmp_path / "file.safetensors", "model.diffusion_model.")
    whole = exported(pipeline, tmp_path / "whole.safetensors")
    for parts in ([], [whole], [tmp_path / "1.5-0"]):
        with refusal("AFA-LOAD-076"):
            afa.load_pipeline([file], config=tmp_path / "1.5-0", parts=parts)


def test_an_autoencoder_is_lent_to_files_of_its_kind_alone(tmp_path: Path) -> None:
    made("1.5", tmp_path)
    other = exported(made("1.5", tmp_path, 1), tmp_path / "other.safetensors")
    file = exported(made("xl", tmp_path), tmp_path / "file.safetensors", "first_stage_model.")
    for part in (other, tmp_path / "1.5-0"):
        with refusal("AFA-LOAD-078"):
            afa.load_pipeline([file], config=tmp_path / "xl-0", parts=[part])
    # and a folder keeps its own
    folder = tmp_path / "1.5-0"
    own = afa.load_pipeline([folder]).vae
    assert_same_weights(own, afa.load_pipeline([folder], parts=[other]).vae)
    companions = Companions(torch.float32, parts=[other])
    assert_same_weights(own, load_single(folder, companions=companions)[0].vae)


def test_encoders_of_another_width_are_not_lent(tmp_path: Path) -> None:
    file = exported(made("1.5", tmp_path), tmp_path / "file.safetensors", "cond_stage_model.")
    wide = made("1.5", tmp_path, 1)
    config = CLIPTextConfig(**{**wide.text_encoder.config.to_dict(), "hidden_size": 24})
    wide.register_modules(text_encoder=CLIPTextModel(config))
    wide.save_pretrained(tmp_path / "wide")
    with refusal("AFA-LOAD-077"):
        afa.load_pipeline([file], config=tmp_path / "1.5-0", parts=[tmp_path / "wide"])


def test_a_file_says_what_it_is_before_a_folder_beside_it_does(tmp_path: Path) -> None:
    folder = tmp_path / "xl-0"
    made("xl", tmp_path)
    companions = Companions(torch.float32, fallback=folder)
    shapes = {key: tuple(t.shape) for key, t in original_layout(described("flux-dev")).items()}
    assert companions.config_for(tmp_path / "x", shapes, None) == config_folder("flux-dev")
    shapes = {
        key: tuple(t.shape) for key, t in original_layout(described("stable-diffusion-2")).items()
    }
    with refusal("AFA-MODEL-011"):
        companions.config_for(tmp_path / "x", shapes, None)
    # what no published model is like is taken for one of the folder's, if it is of that kind
    odd = {key: tuple(t.shape) for key, t in original_layout(made("xl", tmp_path)).items()}
    assert companions.config_for(tmp_path / "x", odd, None) == folder
    odd = {key: tuple(t.shape) for key, t in original_layout(made("1.5", tmp_path)).items()}
    with refusal("AFA-MODEL-012"):
        companions.config_for(tmp_path / "x", odd, None)


@pytest.mark.parametrize(
    "entry", [5, {"a": 1}, ["transformers"], [None, None], ["transformers", 7]]
)
def test_indexes_that_are_no_indexes_are_one_line(entry: Any, tmp_path: Path) -> None:
    made("1.5", tmp_path)
    folder = tmp_path / "1.5-0"
    index = json.loads((folder / "model_index.json").read_text())
    for changes in ({"unet": entry}, {"scheduler": entry}, {"text_encoder/../../x": ["a", "b"]}):
        (folder / "model_index.json").write_text(json.dumps(index | changes))
        if "text_encoder/../../x" in changes:
            afa.load_pipeline([folder])  # a name that is a path names nothing
            continue
        with pytest.raises(AfaError) as raised:
            afa.load_pipeline([folder])
        assert "\n" not in str(raised.value)


def test_quantised_files_are_refused(tmp_path: Path) -> None:
    tensors = original_layout(made("1.5", tmp_path))
    name = "model.diffusion_model.time_embed.0.weight"
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, tmp_path / "file.safetensors")
    with refusal("AFA-LOAD-104", "time_embed", "I8"):
        afa.load_pipeline([tmp_path / "file.safetensors"], config=tmp_path / "1.5-0")


# -- what ships -------------------------------------------------------------------------------

_ENCODERS: dict[str, Any] = {
    "CLIPTextModel": (CLIPTextConfig, CLIPTextModel),
    "CLIPTextModelWithProjection": (CLIPTextConfig, CLIPTextModelWithProjection),
    "T5EncoderModel": (T5Config, T5EncoderModel),
}


def described(name: str) -> DiffusionPipeline:
    """The whole pipeline of a shipped configuration, at its real size, without memory."""
    folder = config_folder(name)
    index = json.loads((folder / "model_index.json").read_text())
    parts: dict[str, Any] = {}
    for part, entry in index.items():
        if not isinstance(entry, list):
            continue
        if entry[0] is None or part.startswith("tokenizer"):
            parts[part] = None
            continue
        if part == "scheduler":
            parts[part] = getattr(diffusers, entry[1]).from_pretrained(folder / part)
            continue
        settings = json.loads((folder / part / "config.json").read_text())
        with torch.device("meta"):
            if part.startswith("text_encoder"):
                config_class, model_class = _ENCODERS[entry[1]]
                parts[part] = model_class(config_class(**settings))
            else:
                parts[part] = getattr(diffusers, entry[1]).from_config(settings)
    return build_pipeline(index["_class_name"], parts, {})


@pytest.mark.parametrize("name", configs())
def test_every_shipped_configuration_is_told_from_its_own_file(name: str) -> None:
    shapes = {key: tuple(t.shape) for key, t in original_layout(described(name)).items()}
    if name in ("stable-diffusion-2", "stable-diffusion-2-base"):
        with refusal("AFA-MODEL-011"):
            config_of(shapes, "file")
        return
    if name == "stable-diffusion-xl-v":
        assert config_of(shapes, "file") == "stable-diffusion-xl"
        shapes["v_pred"] = ()  # another scheduler: tests/loading/test_prediction.py
        assert config_of(shapes, "file") == "stable-diffusion-xl"
        shapes["ztsnr"] = ()
    assert config_of(shapes, "file") == name
    assert missing_parts(shapes, config_folder(name)) == []


# parameters of the denoiser in millions, as published or as the original code's settings give them
_SIZES = {
    "stable-diffusion-1.5": 859.5,
    "stable-diffusion-1.5-inpainting": 859.5,
    "stable-diffusion-2": 865.9,
    "stable-diffusion-2-base": 865.9,
    "stable-diffusion-2-inpainting": 865.9,
    "stable-diffusion-xl": 2567.5,
    "stable-diffusion-xl-v": 2567.5,
    "stable-diffusion-xl-inpainting": 2567.5,
    "stable-diffusion-xl-refiner": 2259.5,
    "stable-diffusion-3-medium": 2028.3,
    "stable-diffusion-3.5-medium": 2243.2,
    "stable-diffusion-3.5-large": 8056.6,
    "chroma": 8900.0,
    "flux-dev": 11901.4,
    "flux-schnell": 11890.9,
}


@pytest.mark.parametrize("name", configs())
def test_shipped_configurations_have_the_published_sizes(name: str) -> None:
    parts = described(name).components
    denoiser = parts.get("unet") or parts["transformer"]
    millions = sum(p.numel() for p in denoiser.parameters()) / 1e6
    assert millions == pytest.approx(_SIZES[name], rel=2e-4)


def test_shipped_tokenizers_are_the_published_ones() -> None:
    folder = config_folder("stable-diffusion-3-medium")
    clip = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    ids = clip("a photo of a cat", padding="max_length", max_length=10).input_ids
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407, 49407, 49407, 49407]
    second = CLIPTokenizer.from_pretrained(folder / "tokenizer_2")
    assert second("cat", padding="max_length", max_length=5).input_ids == [49406, 2368, 49407, 0, 0]
    assert (len(clip), clip.model_max_length) == (49408, 77)
    t5 = T5Tokenizer.from_pretrained(folder / "tokenizer_3")
    assert t5("a photo of a cat").input_ids == [3, 9, 1202, 13, 3, 9, 1712, 1]
    assert (len(t5), t5.pad_token_id) == (32100, 0)


def test_unknown_files_say_what_is_known(tmp_path: Path) -> None:
    with refusal("AFA-LOAD-069", "'none'"):
        config_of({}, "file")
    with refusal("AFA-LOAD-069"):
        config_of({"blocks.0.weight": (1, 1)}, "file")
    with refusal("AFA-MODEL-005", "384", "64"):
        config_of(
            {
                "double_blocks.0.img_attn.norm.key_norm.scale": (128,),
                "guidance_in.in_layer.weight": (3072, 256),
                "img_in.weight": (3072, 384),
            },
            "file",
        )
    with refusal("AFA-MODEL-012", "8"):
        config_of({"model.diffusion_model.input_blocks.0.0.weight": (320, 8, 3, 3)}, "file")
    with refusal("AFA-MODEL-008", "2", "144"):
        config_of(
            {
                "joint_blocks.0.context_block.adaLN_modulation.1.bias": (96,),
                "joint_blocks.1.context_block.adaLN_modulation.1.bias": (96,),
                "pos_embed": (1, 144, 16),
            },
            "file",
        )
    for odd in ("model.diffusion_model.input_blocks.0.0.weight", "joint_blocks.0.x", "pos_embed"):
        with pytest.raises(AfaError):
            config_of({odd: (3,)}, "file")
    with refusal("AFA-MODEL-021", "0 input channels", "64"):
        config_of({"double_blocks.0.x": (1,), "distilled_guidance_layer.x": (1,)}, "file")
    with refusal("AFA-LOAD-068"):
        config_folder("sd4")
    save_file(original_layout(made("1.5", tmp_path)), tmp_path / "file.safetensors")
    with refusal("AFA-LOAD-073", "'sd4'"):
        afa.load_pipeline([tmp_path / "file.safetensors"], config="sd4")


def test_inspect_says_what_a_file_is_and_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(
        {
            "double_blocks.0.img_attn.norm.key_norm.scale": torch.ones(128),
            "img_in.weight": torch.ones(1, 64),
        },
        tmp_path / "flux.safetensors",
    )
    facts = describe(str(tmp_path / "flux.safetensors"))
    assert "does not fit the configuration 'flux-schnell'" in facts["configuration"]
    pipeline = made("xl", tmp_path)
    exported(pipeline, tmp_path / "xl.safetensors", "conditioner.embedders.1", "first_stage_model.")
    monkeypatch.setattr(
        "afa.loading.single_file.load.config_of", lambda *_, **__: "stable-diffusion-xl"
    )
    monkeypatch.setattr("afa.loading.single_file.load.config_folder", lambda _: tmp_path / "xl-0")
    facts = describe(str(tmp_path / "xl.safetensors"))
    assert facts["layout"] == "Stable Diffusion XL, original layout"
    assert facts["configuration"] == "xl-0"
    assert facts["predicts"] == "epsilon (assumed: the configuration 'xl-0')"
    assert facts["leaves_out"] == ["text_encoder_2", "vae"]
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(tmp_path / "xl.safetensors")])
    assert not stop.value.code
    assert "leaves out" in capsys.readouterr().out
