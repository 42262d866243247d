"""Fine-tune a single base model on an ensemble's training data, as a baseline."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from afa.denoisers.kinds import denoiser_of
from afa.ensemble.text import hash_weights
from afa.errors import AfaError
from afa.files import is_unused, read_json, write_atomic
from afa.loading.pipeline import load_single
from afa.loading.single_file.load import Companions
from afa.loading.task import check_text_to_image, native_resolution
from afa.lora.adapters import add_adapters, merge_adapters
from afa.recipe import differing
from afa.training.checkpoints import (
    Checkpoint,
    Checkpoints,
    load_optimizer_tensors,
    optimizer_tensors,
)
from afa.training.continuing import configurations
from afa.training.early_stopping import refuse_early_stopping
from afa.training.engine import Engine
from afa.training.examples import LiveExamples
from afa.training.listing import digest_of
from afa.training.loop import optimizer_steps, seeded
from afa.training.run import CHECKPOINTS
from afa.training.transform import Transform

if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffusers import DiffusionPipeline

    from afa.training.data import CaptionedImages
    from afa.training.loop import TrainStep
    from afa.training.recipe import TrainingRecipe


def tune_base(
    source: str,
    data: CaptionedImages,
    settings: TrainingRecipe,
    output: Path,
    *,
    config: str | Path | None = None,
    lora_rank: int | None = None,
) -> Iterator[TrainStep]:
    """Fine-tune a model's denoiser and text encoders with the objective of `train_aggregators`.

    With the same settings, data, batches, noise and schedule are the same as well; only the trained
    parameters differ. `output` becomes a diffusers pipeline folder. The same call resumes an
    interrupted run.

    Args:
        source: the base; see `afa.loading.sources.locate`.
        data: pictures and captions, the same when a run is resumed.
        settings: see `train_aggregators`; `expert_dtype` must be float32.
        output: a new folder, or one of an earlier run with the same settings.
        config: folder with the configuration of a single file.
        lora_rank: rank of a LoRA, which alone is trained and then merged into the weights; None
            trains all weights.

    Raises:
        AfaError: if the model cannot be loaded, `expert_dtype` is not float32, early stopping is
            set, or the folder has another run; and as `train_aggregators`.
    """
    if settings.expert_dtype != "float32":
        raise AfaError(
            "AFA-TRAIN-054",
            f"expert_dtype must be float32 to tune a base; got {settings.expert_dtype}.",
        )
    refuse_early_stopping(settings)
    engine = Engine(settings.device)
    companions = Companions(torch.float32, config=config)
    pipeline, reference = load_single(source, companions=companions, dequantise=True)
    pipeline = pipeline.to(engine.device)
    check_text_to_image(pipeline)
    pipeline.vae.requires_grad_(False)
    run = {
        **_inputs(data, settings, lora_rank),
        "base": [reference.sha256, hash_weights(pipeline.vae), configurations(pipeline)],
    }
    if not is_unused(output):
        _require_same(output, run)
    parts = pipeline.components.items()
    encoders = [part for name, part in parts if name.startswith("text_encoder") and part]
    modules: list[Any] = [denoiser_of(pipeline), *encoders]
    if lora_rank is not None:
        with seeded(settings.seed):
            for module in modules:
                module.requires_grad_(False)
                add_adapters(module, lora_rank, "lora", is_text=module in encoders)
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    checkpoints = Checkpoints(output / CHECKPOINTS, keep=1)
    first = _resume(checkpoints, modules, optimizer)
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(output / "run.json", json.dumps(run, indent=2) + "\n")

    def save(step: int) -> None:
        states = {f"models.{n}": module.state_dict() for n, module in enumerate(modules)}
        states["optimizer"] = optimizer_tensors(optimizer)
        tensors = {f"{part}.{k}": t for part, state in states.items() for k, t in state.items()}
        checkpoints.write(Checkpoint(step, tensors))

    examples = LiveExamples(
        pipeline,
        data,
        Transform(min(native_resolution(pipeline)), seed=settings.seed),
        seed=settings.seed,
        caption_dropout=settings.caption_dropout,
        device=engine.device,
        trains_text=True,
    )
    yield from optimizer_steps(
        pipeline,
        examples,
        settings,
        optimizer,
        engine=engine,
        modules=modules,
        first=first,
        save=save,
    )
    if lora_rank is not None:
        for module in modules:
            merge_adapters(module)
    save_pipeline(pipeline, output)


def require_same_run(
    data: CaptionedImages, settings: TrainingRecipe, output: Path, *, lora_rank: int | None = None
) -> None:
    """Check that a finished folder was tuned on the same data with the same settings.

    Raises:
        AfaError: if it was not; names what differs.
    """
    _require_same(output, _inputs(data, settings, lora_rank))


def _inputs(
    data: CaptionedImages, settings: TrainingRecipe, lora_rank: int | None
) -> dict[str, Any]:
    inputs = {"data": digest_of(data), "training": settings.model_dump(mode="json")}
    return inputs if lora_rank is None else {**inputs, "lora_rank": lora_rank}


def _require_same(output: Path, run: dict[str, Any]) -> None:
    place = output / "run.json"
    written = read_json(place) if place.is_file() else None
    if written is not None:
        compared = {*run, "lora_rank"}  # absent for a run without
        written = {key: value for key, value in written.items() if key in compared}
    if written != run:
        found = "is not empty and has no tuned base"
        if written is not None:
            found = f"has a tuned base with another {', '.join(differing(written, run))}"
        raise AfaError(
            "AFA-TRAIN-055", f"The output folder '{output}' {found}. Pass another output folder."
        )


def _resume(checkpoints: Checkpoints, modules: list[Any], optimizer: torch.optim.Optimizer) -> int:
    """Load the newest checkpoint; returns its number of steps, 0 without one."""
    found = checkpoints.read()
    if found is None:
        return 0
    for n, module in enumerate(modules):
        module.load_state_dict(found.part(f"models.{n}"))
    load_optimizer_tensors(optimizer, found.part("optimizer"))
    return found.step


def save_pipeline(pipeline: DiffusionPipeline, output: Path) -> None:
    """Write the pipeline into `output`; model_index.json last, so that it marks completion."""
    with tempfile.TemporaryDirectory(dir=output, prefix=".saving.") as scratch:
        pipeline.save_pretrained(scratch)
        parts = sorted(Path(scratch).iterdir(), key=lambda path: path.name == "model_index.json")
        for part in parts:
            target = output / part.name
            if target.is_dir():
                shutil.rmtree(target)
            part.replace(target)
