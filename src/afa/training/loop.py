"""The training loop, a generator: whoever runs it owns the progress bar, the log and the stop."""

from __future__ import annotations

import io
import json
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from afa.aggregators import SABWConfig
from afa.checkpoint import (
    aggregator_tensors,
    load_aggregator_tensors,
    save_ensemble,
    write_atomic,
)
from afa.errors import AfaError
from afa.pipeline import load_pipeline, native_resolution
from afa.training.data import CaptionedImages, batch_indices, open_data, to_pixels
from afa.training.objective import denoising_loss, training_scheduler

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from diffusers import StableDiffusionPipeline
    from torch import Tensor

    from afa.recipe import Recipe, TrainingRecipe

_CHECKPOINT = "checkpoint.pt"
_FREE = ("num_steps", "checkpoint_every", "device")  # may change when a run goes on


@dataclass(frozen=True)
class TrainStep:
    """One optimizer step, seen from outside."""

    step: int
    num_steps: int
    loss: float
    seconds: float


def train(recipe: Recipe, output: Path) -> Iterator[TrainStep]:
    """Train aggregators as a recipe says and write an ensemble folder (AFA, section 4.1).

    The folder gets `recipe.json`, `checkpoint.pt` every so often, and the ensemble at the end. The
    same call on a folder with a checkpoint of the same recipe goes on where that one ended;
    `training.num_steps` may be raised meanwhile.

    Args:
        recipe: experts, data, aggregator, training.
        output: a new folder, or one of an earlier run of this recipe.

    Raises:
        AfaError: the folder holds something else, or anything in the recipe cannot be had. Then
            nothing has been written.
    """
    asked = recipe.model_dump(mode="json")
    written = output / "recipe.json"
    is_new = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    if not is_new and not (written.is_file() and _same_run(json.loads(written.read_text()), asked)):
        raise AfaError(
            f"The output folder must be new or hold an earlier run of this recipe; '{output}' "
            "is neither. Name another one."
        )
    settings = recipe.training
    data = open_data(recipe.data)
    device = pick_device(settings.device)
    with seeded(settings.seed):
        pipeline = load_pipeline(
            recipe.experts,
            SABWConfig(**recipe.aggregator.model_dump()),
            vae=recipe.vae,
            config=recipe.config,
            torch_dtype=getattr(torch, settings.expert_dtype),
            device=device,
        )
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(written, json.dumps(asked, indent=2) + "\n")
    yield from train_aggregators(pipeline, data, settings, checkpoint=output / _CHECKPOINT)
    save_ensemble(pipeline, output, exist_ok=True)


def train_aggregators(
    pipeline: StableDiffusionPipeline,
    data: CaptionedImages,
    settings: TrainingRecipe,
    *,
    checkpoint: Path | None = None,
) -> Iterator[TrainStep]:
    """Train the aggregators of a pipeline in place, everything else frozen.

    Batches, timesteps, noise and dropped captions of a step depend on the seed and the step alone.

    Args:
        pipeline: from `load_pipeline`, with an `EnsembleDenoiser` as its `unet`.
        data: pictures and captions.
        settings: steps, batch size, learning rate and so on.
        checkpoint: file to continue from and to write to; None keeps nothing.

    Raises:
        AfaError: the ensemble has nothing to train, or the loss is no longer finite.
    """
    ensemble = pipeline.unet
    parameters = [p for p in ensemble.aggregators.parameters() if p.requires_grad]
    if not parameters:
        raise AfaError("The ensemble has no aggregators to train. Pass a SABWConfig.")
    scheduler = training_scheduler(pipeline.scheduler)
    resolution = settings.resolution or min(native_resolution(pipeline))
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    first = 0
    if checkpoint is not None and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        load_aggregator_tensors(ensemble, state["aggregators"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    if settings.gradient_checkpointing:
        ensemble.enable_gradient_checkpointing()
    ensemble.train()
    try:
        for step in range(first, settings.num_steps):
            started = time.perf_counter()
            generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
            warmup = min(1.0, (step + 1) / max(1, settings.num_warmup_steps))
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * warmup
            indices = batch_indices(len(data), settings.batch_size, step, settings.seed)
            samples = [data[index] for index in indices]
            clean = encode_pictures(
                pipeline, torch.stack([to_pixels(p, resolution) for p, _ in samples]), generator
            )
            dropped = torch.rand(len(samples), generator=generator) < settings.caption_dropout
            captions = ["" if d else text for d, (_, text) in zip(dropped, samples, strict=True)]
            text = encode_captions(pipeline, captions)
            loss = denoising_loss(ensemble, scheduler, clean, text, generator)
            if not torch.isfinite(loss):
                raise AfaError(
                    f"The loss must be finite, at step {step + 1} it is {loss.item()}. Lower the "
                    "learning rate, or keep the experts in float32 or bfloat16."
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done = step + 1
            if checkpoint is not None and (
                done % settings.checkpoint_every == 0 or done == settings.num_steps
            ):
                _write_checkpoint(
                    checkpoint,
                    {
                        "step": done,
                        "aggregators": aggregator_tensors(ensemble),
                        "optimizer": optimizer.state_dict(),
                    },
                )
            yield TrainStep(done, settings.num_steps, loss.item(), time.perf_counter() - started)
    finally:
        ensemble.eval()
        if settings.gradient_checkpointing:
            ensemble.disable_gradient_checkpointing()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let what is drawn inside, such as fresh aggregators, depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def encode_pictures(
    pipeline: StableDiffusionPipeline, pixels: Tensor, generator: torch.Generator
) -> Tensor:
    """Sampled and scaled latents [B, C, H, W] of pictures [B, 3, H', W'] in -1..1."""
    vae = pipeline.vae
    posterior = vae.encode(pixels.to(device=vae.device, dtype=vae.dtype)).latent_dist
    # drawn on the CPU, so that a seed means the same on every device
    noise = torch.randn(posterior.mean.shape, generator=generator).to(posterior.mean)
    return (posterior.mean + posterior.std * noise) * vae.config.scaling_factor


@torch.no_grad()
def encode_captions(pipeline: StableDiffusionPipeline, captions: list[str]) -> Tensor:
    """Text embeddings [B, L, N * D] or [B, L, D], as the pipeline itself would make them."""
    return pipeline.encode_prompt(captions, pipeline.unet.device, 1, False)[0]


def pick_device(name: str) -> torch.device:
    """`auto` is a GPU where there is one; any other name is taken as it is.

    Raises:
        AfaError: this machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise AfaError(
            f"The device must be auto, cpu, or one that this machine has, such as cuda or cuda:1; "
            f"'{name}' cannot be used: {str(error).splitlines()[0]}"
        ) from error


def _same_run(written: dict, asked: dict) -> bool:
    """Whether two recipes are of one run; only its length and its checkpoints may differ."""

    def essence(recipe: dict) -> dict:
        settings = {k: v for k, v in recipe.get("training", {}).items() if k not in _FREE}
        return {**recipe, "training": settings}

    return essence(written) == essence(asked)


def _write_checkpoint(path: Path, state: dict) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())
