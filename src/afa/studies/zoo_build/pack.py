"""Pack the trained zoo for the package: half precision, with shared components stored once."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from afa.files import write_atomic
from afa.studies.zoo_build.evaluate import grade
from afa.zoo import MODELS, copy_as, export_zoo
from afa.zoo.judges import load_classifier

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from diffusers import AutoencoderKL
    from transformers import CLIPModel, CLIPTokenizer

    from afa.studies.zoo_build.fit import FitStep
    from afa.studies.zoo_build.workshop import StableDiffusion
    from afa.zoo.models import ObjectClassifier

_OWN = ("unet", "text_encoder")
_COMMON = ("vae", "tokenizer", "scheduler", "model_index.json")


def pack_zoo(
    assets: Path,
    vae: AutoencoderKL,
    tokenizer: CLIPTokenizer,
    models: Mapping[str, StableDiffusion],
    classifier: ObjectClassifier,
    clip: CLIPModel,
) -> None:
    """Write the bundled files: `shared`, one folder per model, and `judges`.

    Args:
        assets: output folder; replaces the folders that it writes, and keeps all others.
        vae: the autoencoder, with its scaling factor in the configuration.
        tokenizer: tokenizer of all models.
        models: `base` and the experts.
        classifier: the judge of objects.
        clip: the judge of whole pictures.
    """
    with tempfile.TemporaryDirectory() as scratch:
        full, half = Path(scratch) / "full", Path(scratch) / "half"
        for name, model in models.items():
            model.pipeline(tokenizer, vae).save_pretrained(full / name)
            for part in _OWN:
                copy_as(full / name / part, half / name / part, torch.float16)
        (half / "shared").mkdir()
        for part in _COMMON:
            source, target = full / "base" / part, half / "shared" / part
            if source.is_dir():
                copy_as(source, target, torch.float16)
            else:
                shutil.copyfile(source, target)
        clip.save_pretrained(full / "clip")
        copy_as(full / "clip", half / "judges" / "clip", torch.float16)
        weights = {
            key: tensor.half().contiguous() for key, tensor in classifier.state_dict().items()
        }
        save_file(weights, half / "judges" / "classifier.safetensors")
        for folder in half.iterdir():
            shutil.rmtree(assets / folder.name, ignore_errors=True)
            shutil.copytree(folder, assets / folder.name)


def grade_zoo(assets: Path, *, num_prompts: int) -> Iterator[FitStep]:
    """Score all packed models, see `evaluate.grade`, and write `report.json`."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = export_zoo(Path(scratch) / "zoo", assets)
        folders = {name: folder / name for name in MODELS}
        report = yield from grade(
            folders, load_classifier(assets / "judges"), num_prompts=num_prompts
        )
    write_atomic(assets / "report.json", json.dumps(report, indent=2) + "\n")
