"""The control that asks whether an ensemble is needed: the base, tuned on the same data."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from afa.errors import AfaError
from afa.files import is_unused, read_json, write_atomic
from afa.pipeline import check_text_to_image, load_single
from afa.training.loop import CHECKPOINT, optimizer_steps, pick_device
from afa.weights import loading

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffusers import StableDiffusionPipeline

    from afa.recipe import TrainingRecipe
    from afa.training.data import CaptionedImages
    from afa.training.loop import TrainStep


def tune_base(
    source: str,
    data: CaptionedImages,
    settings: TrainingRecipe,
    output: Path,
    *,
    config: Path | None = None,
) -> Iterator[TrainStep]:
    """Fine-tune a model's U-Net and text encoder in the way that aggregators are trained.

    Same objective, data, batches, noise and schedule as `train_aggregators` with the same settings;
    only what learns is another. `output` becomes a stock pipeline folder; the same call goes on
    where an earlier one was stopped.

    Args:
        source: the base; see `afa.experts.locate`.
        data: pictures and captions; a run that goes on must have data of the same `repr`.
        settings: see `train_aggregators`; `expert_dtype` must be float32.
        output: a new folder, or one of an earlier run with the same settings.
        config: for a single file, a folder with its configuration.

    Raises:
        AfaError: the model cannot be had, settings that do not fit, a folder that holds another
            run, or what `train_aggregators` raises.
    """
    if settings.expert_dtype != "float32":
        raise AfaError("A tuned base must be trained in float32, came another expert_dtype.")
    device = pick_device(settings.device)
    pipeline, reference = load_single(source, config=config)
    pipeline = pipeline.to(device)
    check_text_to_image(pipeline)
    pipeline.vae.requires_grad_(False)
    run = {
        "base": reference.sha256,
        "data": repr(data),
        "training": settings.model_dump(mode="json"),
    }
    if not is_unused(output):
        written = output / "run.json"
        if not written.is_file() or read_json(written) != run:
            raise AfaError(
                "The output folder must be new or of the same base, data and settings; "
                f"'{output}' is neither. Name another one."
            )
    modules: list[Any] = [pipeline.unet, pipeline.text_encoder]
    parameters = [p for module in modules for p in module.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    checkpoint = output / CHECKPOINT
    first = _resume(checkpoint, modules, optimizer) if checkpoint.exists() else 0
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(output / "run.json", json.dumps(run, indent=2) + "\n")

    def save(step: int) -> None:
        state = {
            "step": step,
            "models": [module.state_dict() for module in modules],
            "optimizer": optimizer.state_dict(),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        write_atomic(checkpoint, buffer.getvalue())

    yield from optimizer_steps(
        pipeline, data, settings, optimizer, modules=modules, first=first, save=save
    )
    _save_pipeline(pipeline, output)


def _resume(path: Path, modules: list[Any], optimizer: torch.optim.Optimizer) -> int:
    """Put a checkpoint into models and optimizer; returns the number of steps it has done."""
    with loading(f"The checkpoint '{path}' must be complete", "Delete it to begin again."):
        state = torch.load(path, weights_only=True, map_location="cpu")
        for module, weights in zip(modules, state["models"], strict=True):
            module.load_state_dict(weights)
        optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])


def _save_pipeline(pipeline: StableDiffusionPipeline, output: Path) -> None:
    """Write the pipeline's parts into `output`; its index comes last and makes it one."""
    with tempfile.TemporaryDirectory(dir=output, prefix=".saving.") as scratch:
        pipeline.save_pretrained(scratch)
        parts = sorted(Path(scratch).iterdir(), key=lambda path: path.name == "model_index.json")
        for part in parts:
            target = output / part.name
            if target.is_dir():
                shutil.rmtree(target)
            part.rename(target)
