"""Build a zoo with the scenes, the autoencoder and the judges of the bundled one.

So results of both are comparable. The package does not include such zoos.
"""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from afa.files import staged, write_atomic
from afa.studies.zoo_build.evaluate import grade
from afa.studies.zoo_build.workshop import train_models
from afa.zoo import expert_folder
from afa.zoo.judges import load_classifier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from afa.studies.zoo_build.fit import FitStep
    from afa.studies.zoo_build.workshop import TextToImage, Workshop

#: file of the models' scores
REPORT = "report.json"


def train_other_zoo(
    shop: Workshop[Any],
    build: Callable[[], TextToImage],
    num_graded: int,
    made_from: str = "",
) -> Iterator[FitStep]:
    """Train a base and its experts, write them as pipeline folders, and score them.

    Args:
        shop: the recipe and the folder, which gets `base`, `animals`, `food`, `things` and
            `report.json`.
        build: builds the base with random weights.
        num_graded: prompts of each kind for each model.
        made_from: a hash of what `build` uses besides the recipe.

    Yields:
        The progress.

    Raises:
        AfaError: if a checkpoint in the folder is damaged or was made from other inputs.
    """
    vae = AutoencoderKL.from_pretrained(expert_folder("base") / "vae").requires_grad_(False)
    models = yield from train_models(shop, vae, build, made_from)
    folders = {name: shop.folder / name for name in models}
    for name, path in folders.items():
        if path.exists() and not _has_weights_of(models[name], path):
            shutil.rmtree(path)
        if not path.exists():
            with staged(path) as partial:
                models[name].pipeline(shop.tokenizer, vae).save_pretrained(partial)
    report = yield from grade(folders, load_classifier(), num_prompts=num_graded)
    write_atomic(shop.folder / REPORT, json.dumps(report, indent=2) + "\n")


def _has_weights_of(model: TextToImage, folder: Path) -> bool:
    """Whether the pipeline in a folder has the weights of this model's denoiser."""
    name, denoiser = next(model.named_children())
    saved = load_file(folder / name / "diffusion_pytorch_model.safetensors")
    own = denoiser.state_dict()
    return saved.keys() == own.keys() and all(torch.equal(saved[key], own[key]) for key in saved)
