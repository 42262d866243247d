"""The training loop, a generator: whoever runs it owns the progress bar, the log and the stop."""

from __future__ import annotations

import io
import json
import math
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
)
from afa.errors import AfaError
from afa.files import read_json, write_atomic
from afa.pipeline import check_text_to_image, load_pipeline, native_resolution
from afa.training.data import CaptionedImages, batch_indices, open_data, to_pixels
from afa.training.objective import denoising_loss, training_scheduler
from afa.weights import loading

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from diffusers import StableDiffusionPipeline
    from torch import Tensor, nn

    from afa.ensemble import EnsembleDenoiser
    from afa.recipe import Recipe, TrainingRecipe

CHECKPOINT = "checkpoint.pt"
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
    `training.num_steps` may be raised meanwhile if the learning rate is constant.

    Args:
        recipe: experts, data, aggregator, training.
        output: a new folder, or one of an earlier run of this recipe.

    Raises:
        AfaError: the folder holds something else, or anything in the recipe cannot be had. Then
            nothing has been written. Or one of what `train_aggregators` raises while it runs.
    """
    asked = recipe.model_dump(mode="json")
    written = output / "recipe.json"
    is_new = not output.exists() or (output.is_dir() and not any(output.iterdir()))
    if not is_new and not (written.is_file() and _same_run(read_json(written), asked)):
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
    steps = train_aggregators(pipeline, data, settings, checkpoint=output / CHECKPOINT)
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(written, json.dumps(asked, indent=2) + "\n")
    yield from steps
    save_ensemble(pipeline, output, exist_ok=True)


def train_aggregators(
    pipeline: StableDiffusionPipeline,
    data: CaptionedImages,
    settings: TrainingRecipe,
    *,
    checkpoint: Path | None = None,
) -> Iterator[TrainStep]:
    """Train the aggregators of a pipeline in place, everything else frozen.

    Batches, timesteps, noise, crops and dropped captions of a step depend on the seed and the step
    alone. All is checked before the first step is asked for.

    Args:
        pipeline: from `load_pipeline`, with an `EnsembleDenoiser` as its `unet`.
        data: pictures and captions.
        settings: steps, batch size, learning rate and so on.
        checkpoint: file to continue from and to write to; None keeps nothing.

    Raises:
        AfaError: there is nothing to train, the experts need more than a prompt, the checkpoint is
            damaged, of other experts or further than asked for; later, a picture that cannot be
            read, or a loss that is no longer finite.
    """
    check_text_to_image(pipeline)
    ensemble = pipeline.unet
    parameters = [p for p in ensemble.aggregators.parameters() if p.requires_grad]
    if not parameters:
        raise AfaError("The ensemble has no aggregators to train. Pass a SABWConfig.")
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    first = 0
    if checkpoint is not None and checkpoint.exists():
        first = _resume(checkpoint, ensemble, optimizer)
    if first > settings.num_steps:
        raise AfaError(
            f"training.num_steps must be at least {first}, which this run has done already, came "
            f"{settings.num_steps}. Raise it, or name another folder."
        )
    if settings.gradient_checkpointing:
        ensemble.enable_gradient_checkpointing()

    def save(step: int) -> None:
        if checkpoint is not None:
            _write_checkpoint(checkpoint, step, ensemble, optimizer)

    def steps() -> Iterator[TrainStep]:
        try:
            yield from optimizer_steps(
                pipeline, data, settings, optimizer, modules=[ensemble], first=first, save=save
            )
        finally:
            if settings.gradient_checkpointing:
                ensemble.disable_gradient_checkpointing()

    return steps()


def optimizer_steps(
    pipeline: StableDiffusionPipeline,
    data: CaptionedImages,
    settings: TrainingRecipe,
    optimizer: torch.optim.Optimizer,
    *,
    modules: Sequence[nn.Module],
    first: int = 0,
    save: Callable[[int], None],
) -> Iterator[TrainStep]:
    """The steps of any training with the experts' objective: of aggregators, or of one model.

    Batches, timesteps, noise, crops and dropped captions of a step depend on the seed and the step
    alone, so two trainings with the same settings see the very same data.

    Args:
        pipeline: stock parts around the denoiser that is called.
        data: pictures and captions.
        settings: steps, batch size, learning rate and so on.
        optimizer: of the parameters that are trained.
        modules: what is in training mode meanwhile. Text embeddings carry gradients where the text
            encoder is among them.
        first: the number of steps that were done before.
        save: called with the number of steps done, every so often and before a bad picture's error.

    Raises:
        AfaError: see `train_aggregators`.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    scheduler = training_scheduler(pipeline.scheduler)
    resolution = settings.resolution or min(native_resolution(pipeline))
    trains_text = any(module is pipeline.text_encoder for module in modules)
    for module in modules:
        module.train()
    try:
        for step in range(first, settings.num_steps):
            started = time.perf_counter()
            generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, settings)
            indices = batch_indices(len(data), settings.batch_size, step, settings.seed)
            try:
                samples = [data[index] for index in indices]
            except AfaError:
                save(step)  # one bad picture shall not cost the steps before it
                raise
            pixels = torch.stack([to_pixels(p, resolution, generator) for p, _ in samples])
            clean = encode_pictures(pipeline, pixels, generator)
            dropped = torch.rand(len(samples), generator=generator) < settings.caption_dropout
            captions = ["" if d else text for d, (_, text) in zip(dropped, samples, strict=True)]
            with torch.set_grad_enabled(trains_text):
                text = encode_captions(pipeline, captions)
            loss = denoising_loss(pipeline.unet, scheduler, clean, text, generator)
            if not torch.isfinite(loss):
                raise AfaError(
                    f"The loss must be finite, at step {step + 1} it is {loss.item()}. Lower the "
                    "learning rate, or keep the experts in float32."
                )
            loss.backward()
            if settings.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done = step + 1
            if done % settings.checkpoint_every == 0 or done == settings.num_steps:
                save(done)
            yield TrainStep(done, settings.num_steps, loss.item(), time.perf_counter() - started)
    finally:
        for module in modules:
            module.eval()


def learning_rate_at(step: int, settings: TrainingRecipe) -> float:
    """The learning rate of a step, counted from 0: linear warm-up, then constant or a cosine."""
    warmup = min(1.0, (step + 1) / max(1, settings.num_warmup_steps))
    if settings.learning_rate_schedule == "constant":
        return settings.learning_rate * warmup
    return (
        settings.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * step / settings.num_steps))
    )


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
    """Sampled and scaled latents [B, C, H, W], float32, of pictures [B, 3, H', W'] in -1..1."""
    vae = pipeline.vae
    posterior = vae.encode(pixels.to(device=vae.device, dtype=vae.dtype)).latent_dist
    mean, std = posterior.mean.float(), posterior.std.float()
    # drawn on the CPU, so that a seed means the same on every device
    noise = torch.randn(mean.shape, generator=generator).to(mean.device)
    return (mean + std * noise) * vae.config.scaling_factor


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
    """Whether two recipes are of one run; only what changes no step may differ."""

    def essence(recipe: dict) -> dict:
        settings = dict(recipe.get("training") or {})
        free = set(_FREE)
        if settings.get("learning_rate_schedule") == "cosine":
            free.remove("num_steps")  # every step's learning rate depends on it
        return {**recipe, "training": {k: v for k, v in settings.items() if k not in free}}

    return essence(written) == essence(asked)


def _write_checkpoint(
    path: Path, step: int, ensemble: EnsembleDenoiser, optimizer: torch.optim.Optimizer
) -> None:
    buffer = io.BytesIO()
    state = {
        "step": step,
        "experts": _hashes(ensemble),
        "aggregators": aggregator_tensors(ensemble),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())


def _resume(path: Path, ensemble: EnsembleDenoiser, optimizer: torch.optim.Optimizer) -> int:
    """Put a checkpoint into ensemble and optimizer; returns the number of steps it has done.

    Raises:
        AfaError: it is damaged, or the experts are not the ones it was trained with.
    """
    with loading(
        f"The checkpoint '{path}' must be complete", "Restore it, or delete it to begin again."
    ):
        # on the CPU: the optimizer moves its state to where the parameters are now
        state = torch.load(path, weights_only=True, map_location="cpu")
        if state["experts"] != _hashes(ensemble):
            raise AfaError(
                f"The checkpoint '{path}' was trained with experts and autoencoder of SHA-256 "
                f"{', '.join(state['experts'])}; now they have {', '.join(_hashes(ensemble))}. "
                "Restore them, or delete it to begin again."
            )
        load_aggregator_tensors(ensemble, state["aggregators"])
        optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])


def _hashes(ensemble: EnsembleDenoiser) -> list[str]:
    references = [*(ensemble.references or ()), ensemble.vae_reference]
    return [reference.sha256 for reference in references if reference is not None]
