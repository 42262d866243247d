"""Finished models of a world in half precision, so that nobody has to train them again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from afa.errors import AfaError
from afa.files import read_json, staged, write_atomic
from afa.studies.worlds.recipe import BASE, WorldRecipe
from afa.studies.zoo_build.workshop import require_same_recipe
from afa.zoo import assets, copy_as

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

RECIPE, SCORES = "recipe.json", "scores"
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
        AfaError: if the world has no base yet.
    """
    if not (world / BASE).is_dir():
        raise AfaError("AFA-STUDY-027", f"'{world}' has no base yet. Build the world first.")
    recipe = WorldRecipe.model_validate(read_json(world / RECIPE))
    names = [name for name in (BASE, *recipe.experts) if (world / name).is_dir()]
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
        AfaError: if there is no pack, or the folder belongs to another recipe.
    """
    if not (packed / RECIPE).is_file():
        raise AfaError(
            "AFA-STUDY-028", f"'{packed}' has no packed world. Pass a folder of afa zoo pack."
        )
    folder.mkdir(parents=True, exist_ok=True)
    require_same_recipe(folder / RECIPE, read_json(packed / RECIPE))
    names = sorted(place.parent.name for place in packed.glob("*/unet"))
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


def _copy(source: Path, target: Path, dtype: torch.dtype) -> None:
    if source.is_dir():
        copy_as(source, target, dtype)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
