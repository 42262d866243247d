"""The same models in another layout make the same merge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

import afa
from afa.loading.single_file.canonical_names import unet_names
from afa.merging import BlockWeights
from afa.merging.parts import block_keys
from tests.merging.merge_files import UNET, denoiser, merged, model, old_text_encoder
from tests.refusal import refusal
from tests.single_file import original_unet
from tests.tiny import tiny_unet

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

    from tests.merging.merge_files import Tensors


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Tensors]:
    return [model(tmp_path_factory.mktemp("tokenizer"), seed=seed) for seed in range(3)]


def diffusers_unet(tensors: Tensors) -> Tensors:
    """The denoiser as diffusers saves it, without anything before its names."""
    names = unet_names(tensors)
    assert len(names) == sum(name.startswith(UNET) for name in tensors)
    return {new.removeprefix("unet."): tensors[name] for name, new in names.items()}


def equal(ours: Tensors, theirs: Tensors) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


SETTINGS: dict[str, dict[str, Any]] = {
    "weighted": {"weights": [0.7, 0.3]},
    "add_difference": {"weights": [1, 0.5]},
    "block_weights": {"block_weights": {"mid": [0.1, 0.9], "text_encoder": [0.8, 0.2]}},
}


@pytest.mark.parametrize("method", SETTINGS)
def test_old_text_encoders_merge_with_new_ones(
    method: str, models: list[Tensors], tmp_path: Path
) -> None:
    files = {"a": models[0], "b": models[1]}
    if method == "add_difference":
        files["base"] = models[2]
    for folder in ("plain", "mixed"):
        (tmp_path / folder).mkdir()
    expected, _, _ = merged(tmp_path / "plain", files, method, **SETTINGS[method])
    old = {name: old_text_encoder(t) if name != "a" else t for name, t in files.items()}
    ours, said, _ = merged(tmp_path / "mixed", old, method, **SETTINGS[method])
    assert equal(ours, expected)
    assert "text" not in said


def test_the_first_expert_decides_the_names(models: list[Tensors], tmp_path: Path) -> None:
    ours, _, _ = merged(tmp_path, {"a": old_text_encoder(models[0]), "b": models[1]})
    assert ours.keys() == old_text_encoder(models[0]).keys()


@pytest.mark.parametrize("short", ["", "diffusion_model."])
def test_bare_denoisers_merge_with_whole_files(
    short: str, models: list[Tensors], tmp_path: Path
) -> None:
    bare = {f"{short}{name}": tensor for name, tensor in denoiser(models[1]).items()}
    ours, said, _ = merged(tmp_path, {"whole": models[0], "bare": bare})
    for name, tensor in models[0].items():
        expected = (tensor + models[1][name]) / 2 if name.startswith(UNET) else tensor
        torch.testing.assert_close(ours[name], expected)
    assert "Not merged, copied from '/whole.safetensors': text encoder (" in said
    assert "Autoencoder copied from '/whole.safetensors' (vae: first)" in said


def test_a_bare_first_expert_makes_a_bare_denoiser(models: list[Tensors], tmp_path: Path) -> None:
    ours, said, _ = merged(tmp_path, {"bare": denoiser(models[0]), "whole": models[1]})
    assert ours.keys() == denoiser(models[0]).keys()
    assert "Dropped from '/whole.safetensors', because '/bare.safetensors' lacks it:" in said
    assert "text encoder (" in said
    assert "autoencoder (" in said


@pytest.mark.parametrize("first", ["original", "diffusers"])
@pytest.mark.parametrize("start", ["", "unet."])
def test_u_nets_in_diffusers_layout_merge_with_the_original_one(
    first: str, start: str, models: list[Tensors], tmp_path: Path
) -> None:
    theirs = {f"{start}{name}": t for name, t in diffusers_unet(models[1]).items()}
    files = {"original": models[0], "diffusers": theirs}
    order = ["original", "diffusers"] if first == "original" else ["diffusers", "original"]
    ours, _, _ = merged(tmp_path, {name: files[name] for name in order}, weights=[0.5, 0.5])
    in_original = {name: (models[0][name] + models[1][name]) / 2 for name in unet_names(models[0])}
    if first == "diffusers":
        in_original = {f"{start}{n}": t for n, t in diffusers_unet(in_original).items()}
        assert ours.keys() == in_original.keys()
    for name, tensor in in_original.items():
        torch.testing.assert_close(ours[name], tensor)


def test_names_of_diffusers_are_those_of_its_own_models(tmp_path: Path) -> None:
    for unet in (tiny_unet(), tiny_unet(layers_per_block=2)):
        original = {f"{UNET}{name}": t for name, t in original_unet(unet).items()}
        names = unet_names(original)
        assert set(names.values()) == {f"unet.{name}" for name in unet.state_dict()}
        for name, new in names.items():
            assert torch.equal(original[name], unet.state_dict()[new.removeprefix("unet.")])


def test_transformers_need_one_layout(tmp_path: Path) -> None:
    flux = denoiser(model(tmp_path, "flux"))
    theirs = {
        "transformer_blocks.0.attn.to_q.weight": torch.ones(2, 2),
        "single_transformer_blocks.0.proj_out.weight": torch.ones(2, 2),
    }
    if any(name.startswith("guidance_in.") for name in flux):
        theirs["time_text_embed.guidance_embedder.linear_1.weight"] = torch.ones(2, 2)
    with refusal("AFA-MERGE-008", "b.safetensors", "diffusers"):
        merged(tmp_path, {"a": flux, "b": theirs})


@pytest.mark.parametrize("kind", ["xl", "sd3", "flux", "chroma", "z-image"])
def test_bare_denoisers_of_every_family(kind: str, tmp_path: Path) -> None:
    whole = model(tmp_path, kind)
    bare = {name: tensor + 1 for name, tensor in denoiser(whole).items()}
    ours, said, _ = merged(tmp_path, {"a": whole, "b": bare})
    assert ours.keys() == whole.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(ours[name], tensor + 0.5 * name.startswith(UNET))
    assert "unknown" not in said.lower()


def test_a_merge_of_layouts_draws(
    models: list[Tensors], experts: list[Path], tmp_path: Path
) -> None:
    _, _, file = merged(tmp_path, {"a": models[0], "b": old_text_encoder(models[1])})
    ours = afa.load_pipeline([file], config=experts[0]).unet.experts[0].state_dict()
    folders = [StableDiffusionPipeline.from_pretrained(folder).unet for folder in experts[:2]]
    first, second = (unet.state_dict() for unet in folders)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2)


# -- block weights ----------------------------------------------------------------------------


def stable_diffusion() -> dict[str, list[str]]:
    """The names of Stable Diffusion 1.x, layout by layout, in one order."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
        original = [f"{UNET}{name}" for name in original_unet(unet)]
    diffusers = [unet_names(original)[name].removeprefix("unet.") for name in original]
    text = "cond_stage_model.transformer.{}encoder.layers.0.layer_norm1.bias"
    bare = [name.removeprefix(UNET) for name in original]
    averaged = ["model_ema.diffusion_model" + name.replace(".", "") for name in bare]
    return {
        "original": [*original, text.format("text_model."), "first_stage_model.quant_conv.bias"],
        "old": [*original, text.format(""), "first_stage_model.quant_conv.bias"],
        "bare": [*bare, text.format(""), "vae.quant_conv.bias"],
        "bare, short prefix": [*(f"diffusion_model.{n}" for n in bare), text.format(""), "vae.x"],
        "diffusers": [*diffusers, text.format(""), "first_stage_model.quant_conv.bias"],
        "folder": [*(f"unet.{n}" for n in diffusers), "text_encoder.encoder.x", "vae.x"],
        "averaged": [*original, text.format(""), "vae.x", *averaged],
    }


def test_presets_hit_the_same_blocks_on_every_layout() -> None:
    numbers = [0.9, *(n / 100 for n in range(25))]
    layouts = stable_diffusion()
    zero, one = torch.zeros(1), torch.ones(1)

    def weights(names: list[str]) -> list[float]:
        method = BlockWeights(numbers).fit(names, 2)
        return [round(method.merge(name, [zero, one], None).item(), 4) for name in names]

    expected = weights(layouts["original"])
    assert set(expected) == {0.9, *(n / 100 for n in range(25))}
    for layout, names in layouts.items():
        count = len(layouts["original"])
        assert weights(names)[:count] == expected, layout
    assert weights(layouts["averaged"])[count:] == expected[: count - 2]


def test_the_refiners_text_encoder_has_its_folders_name() -> None:
    names = ["conditioner.embedders.0.model.ln_final.bias", "conditioner.embedders.0.transformer.x"]
    assert list(block_keys(names).values()) == ["text_encoder_2", "text_encoder"]


def test_block_weights_of_what_is_not_merged_are_named(
    models: list[Tensors], tmp_path: Path
) -> None:
    weights = {"mid": [0.1, 0.9], "vae": [0.5, 0.5], "text_encoder": [0.2, 0.8]}
    files = {"a": models[0], "b": denoiser(models[1])}
    _, said, _ = merged(tmp_path, files, "block_weights", block_weights=weights)
    assert "block_weights without effect, no tensor is merged there: vae, text_enc" in said


# -- bit for bit ------------------------------------------------------------------------------


def signed_zeros(tensors: Tensors) -> Tensors:
    first = next(name for name in tensors if name.startswith(UNET))
    return {**tensors, first: torch.full_like(tensors[first], -0.0)}


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize(
    ("method", "settings", "dtype", "layout"),
    [
        ("weighted", {"weights": [1, 0]}, torch.float32, dict),
        ("weighted", {"weights": [1, 0]}, torch.bfloat16, old_text_encoder),
        (
            "block_weights",
            {"block_weights": {"default": [1, 0]}},
            torch.float16,
            old_text_encoder,
        ),
    ],
)
def test_all_weight_on_the_first_is_the_first(
    method: str,
    settings: Any,
    dtype: torch.dtype,
    layout: Callable[[Tensors], Tensors],
    models: list[Tensors],
    tmp_path: Path,
) -> None:
    optional = {
        "alphas_cumprod": torch.linspace(0.99, 0.004, 1000),
        "cond_stage_model.logit_scale": torch.tensor(4.6),
        "model_ema.decay": torch.tensor(0.5),
        "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
    }
    first = {k: t.to(dtype) for k, t in signed_zeros(models[0]).items()} | optional
    second = layout(models[1]) | {
        "cond_stage_model.logit_scale": torch.tensor(2.0),
        "sigmas": torch.ones(9),
    }
    ours, _, _ = merged(tmp_path, {"a": first, "b": second}, method, **settings)
    assert ours.keys() == first.keys()
    for name, tensor in first.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(bits(ours[name]), bits(tensor)), name
