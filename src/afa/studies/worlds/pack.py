"""Finished models of a world in half precision, so that nobody has to train them again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from afa.errors import AfaError
from afa.files import read_json, staged, write_atomic
from afa.recipe import validated
from afa.studies.worlds.recipe import BASE, WorldRecipe
from afa.studies.zoo_build.workshop import require_same_recipe
from afa.zoo import assets, copy_as

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

RECIPE, SCORES = "recipe.json", "scores"
#: files of the weights of a model: of its U-Net, and of the text encoder that all share
DENOISER = "unet/diffusion_pytorch_model.safetensors"
TEXT_ENCODER = "text_encoder/model.safetensors"
#: what all models of a world share, besides the autoencoder of the bundled zoo
_SHARED = ("text_encoder", "tokenizer", "scheduler", "model_index.json")


@torch.no_grad()
def round_to_half(pipeline: StableDiffusionPipeline) -> None:
    """Round weights to half precision, in which they are packed, without changing their dtype."""
    for part in (pipeline.unet, pipeline.text_encoder):
        for weight in part.parameters():
            weight.copy_(weight.half())


def pack_world(world: Path, target: Path) -> list[str]:
    """Write base and experts of a world, with their scores, in half precision.

    Args:
        world: folder of `afa.studies.worlds.build.build_world`.
        target: a new folder; gets `shared`, the U-Net of each model, and the recipe.

    Returns: the names of the models.

    Raises:
        AfaError: if the world has no base yet, the folder is no world, or its weights are not
            rounded to half precision.
    """
    if not (world / BASE).is_dir():
        raise AfaError("AFA-STUDY-027", f"'{world}' has no base yet. Build the world first.")
    recipe = validated(read_json(world / RECIPE), WorldRecipe, world / RECIPE)
    names = [name for name in (BASE, *recipe.experts) if (world / name).is_dir()]
    for name in names:
        _require_rounded(world / name)
    with staged(target) as partial:
        for part in _SHARED:
            _copy(world / BASE / part, partial / "shared" / part, torch.float16)
        for name in names:
            copy_as(world / name / "unet", partial / name / "unet", torch.float16)
            scores = world / SCORES / f"{name}.json"
            if scores.exists():
                _copy(scores, partial / SCORES / scores.name, torch.float16)
        write_atomic(partial / RECIPE, (world / RECIPE).read_text(encoding="utf-8"))
    return names


def unpack_world(packed: Path, folder: Path) -> list[str]:
    """Write the models of a pack as pipelines into a world's folder; those it has are kept.

    Args:
        packed: folder of `pack_world`.
        folder: of the world, or a new one.

    Returns: the names of the models.

    Raises:
        AfaError: if there is no pack, or the folder belongs to another recipe or has another base.
    """
    if not (packed / RECIPE).is_file():
        raise AfaError(
            "AFA-STUDY-028", f"'{packed}' has no packed world. Pass a folder of afa zoo pack."
        )
    folder.mkdir(parents=True, exist_ok=True)
    require_same_recipe(folder / RECIPE, read_json(packed / RECIPE))
    names = sorted(place.parent.name for place in packed.glob("*/unet"))
    if (folder / BASE).exists():
        _require_same_base(packed, folder)
    for name in names:
        if (folder / name).exists():
            continue
        with staged(folder / name) as partial:
            for part in _SHARED:
                _copy(packed / "shared" / part, partial / part, torch.float32)
            copy_as(assets() / "shared" / "vae", partial / "vae", torch.float32)
            copy_as(packed / name / "unet", partial / "unet", torch.float32)
        scores = packed / SCORES / f"{name}.json"
        if scores.exists():
            _copy(scores, folder / SCORES / scores.name, torch.float32)
    return names


def _require_rounded(model: Path) -> None:
    """Refuse a model that would be another one in half precision.

    Raises:
        AfaError: if one of its weights is not a number of half precision.
    """
    for part in (DENOISER, TEXT_ENCODER):
        for key, tensor in load_file(model / part).items():
            if not torch.equal(tensor, tensor.half().to(tensor.dtype)):
                raise AfaError(
                    "AFA-STUDY-032",
                    f"'{model / part}' is not rounded to half precision: {key}. It was built by an "
                    "older version. Build the world again in a new folder.",
                )


def _require_same_base(packed: Path, folder: Path) -> None:
    """Refuse a world whose base is another one than that of the packed experts.

    Raises:
        AfaError: if one of its tensors differs.
    """
    for own, other in ((DENOISER, BASE), (TEXT_ENCODER, "shared")):
        ours, theirs = load_file(folder / BASE / own), load_file(packed / other / own)
        if ours.keys() != theirs.keys() or any(
            not torch.equal(tensor, theirs[key].to(tensor.dtype)) for key, tensor in ours.items()
        ):
            raise AfaError(
                "AFA-STUDY-033",
                f"The base in '{folder}' is another one than that of the experts in '{packed}'. "
                "Use a new folder for the world.",
            )


def _copy(source: Path, target: Path, dtype: torch.dtype) -> None:
    if source.is_dir():
        copy_as(source, target, dtype)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
