"""What `afa train` reads: experts, data, aggregator, training, and what is watched meanwhile."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from afa.aggregators import SABWSettings
from afa.errors import AfaError
from afa.loading.expert_source import ExpertSource
from afa.reading import parse_colour
from afa.recipe import MAX_SEED, Section, read_recipe, resolve_path, resolve_source, resolve_sources

_ADDRESS = re.compile(r"(https?|hf|s3|gs|az|abfs|zip|gzip|tar)://")


class ScenesRecipe(Section):
    """Emoji scenes made on the fly; see `afa.zoo.scenes`."""

    num_samples: int = Field(default=10_000, ge=1)
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    kind: Literal["animals", "food", "things", "any", "mixed"] = "any"


class DatasetRecipe(Section):
    """Whatever `datasets.load_dataset` reads: a hub id, a folder, parquet, WebDataset shards, ...

    `path` is a hub id, a local folder, or the name of a format (`parquet`, `webdataset`, `arrow`,
    `json`, `csv`) with `data_files`. Columns may be nested, with dots: `json.caption`. A streamed
    data set is never downloaded as a whole: it is read once, into the cache.
    """

    path: str
    name: str | None = None
    data_files: list[str] | None = None
    split: str = "train"
    revision: str | None = None
    image_column: str = "image"
    caption_column: str = "text"
    streaming: bool = False

    @field_validator("data_files", mode="before")
    @classmethod
    def _one_or_several(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given


class DataRecipe(Section):
    """Exactly one source of captioned pictures, and what becomes of a picture.

    Attributes:
        folder: pictures with a `metadata.jsonl`, or with a `.txt` beside each.
        dataset: see `DatasetRecipe`.
        scenes: see `ScenesRecipe`.
        limit: keeps the first so many samples.
        background: colour that transparent pictures are composited on, as a name or `#rrggbb`.
        resolution: side of the square crop in pixels; None is what the experts were made for. The
            shorter side is scaled to it.
        crop: a square anywhere, or the middle one.
        flip: whether a picture may be mirrored; leave it off where captions name sides.
        num_variants: how many crops and flips of a picture there are; those that differ are
            encoded once.
        cache: whether latents and text embeddings are computed once and kept on disk. None: where
            the training goes over the data more than once.
        cache_folder: where; by default the user's cache.
        num_workers: processes that decode pictures where nothing is cached.
        max_broken: the share of samples that may be broken, in their picture or by a missing
            caption; they are skipped and named.
    """

    folder: Path | None = None
    dataset: DatasetRecipe | None = None
    scenes: ScenesRecipe | None = None
    limit: int | None = Field(default=None, ge=1)
    background: str = "#ffffff"
    resolution: int | None = Field(default=None, ge=8)
    crop: Literal["random", "center"] = "random"
    flip: bool = False
    num_variants: int = Field(default=4, ge=1, le=64)
    cache: bool | None = None
    cache_folder: Path | None = None
    num_workers: int = Field(default=0, ge=0)
    max_broken: float = Field(default=0.01, ge=0, le=1)

    @field_validator("background")
    @classmethod
    def _as_hex(cls, given: str) -> str:
        """One spelling of each colour: it is compared when a run continues."""
        return "#{:02x}{:02x}{:02x}".format(*parse_colour(given))

    @model_validator(mode="after")
    def _exactly_one(self) -> DataRecipe:
        if sum(source is not None for source in (self.folder, self.dataset, self.scenes)) != 1:
            raise ValueError("must have exactly one of folder, dataset and scenes")
        if self.dataset is not None and self.dataset.streaming and self.cache is False:
            raise ValueError("must be cached where it is streamed; leave cache out, or streaming")
        return self


class TrainingRecipe(Section):
    """How the aggregators are trained; defaults are the paper's (AFA, section 4.1).

    One is not: the published code does not clip gradients, which is `max_grad_norm: null` here.

    Attributes:
        num_steps: optimizer steps.
        batch_size: samples at a time, in each process.
        gradient_accumulation_steps: batches of each process that make one step.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        num_warmup_steps: steps over which the learning rate rises from zero.
        learning_rate_schedule: `cosine` falls to zero at num_steps: a short run ends well, a longer
            one is another run.
        max_grad_norm: gradients are scaled down to this norm; None leaves them.
        caption_dropout: the share of captions that are dropped, one by one, for guidance.
        min_snr_gamma: weights timesteps by min(SNR, gamma) (Hang et al., 2023); 5 is theirs.
        ema_decay: keep a moving average of the aggregators, which is what is saved at the end.
        entropy_weight: of the regulariser against weights that are all with one expert.
        balance_weight: of the regulariser against experts that are never used.
        expert_dtype: of the frozen parts; aggregators, optimizer and loss are in float32.
        gradient_checkpointing: keep nothing between sites but the features; compute it again.
        offload_experts: keep the experts on the CPU and bring one layer at a time.
        checkpoint_every: in steps.
        keep_checkpoints: how many of the newest.
        log_every: in steps, a line in metrics.jsonl and to the trackers.
        trackers: of accelerate, by name.
        device: `auto`, or as torch names it.
        seed: of the aggregators' first weights, and of all that is drawn.
    """

    num_steps: int = Field(ge=1)
    batch_size: int = Field(default=8, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    num_warmup_steps: int = Field(default=100, ge=0)
    learning_rate_schedule: Literal["constant", "cosine"] = "constant"
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    min_snr_gamma: float | None = Field(default=None, gt=0)
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    entropy_weight: float = Field(default=0, ge=0)
    balance_weight: float = Field(default=0, ge=0)
    expert_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    gradient_checkpointing: bool = False
    offload_experts: bool = False
    checkpoint_every: int = Field(default=500, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    log_every: int = Field(default=50, ge=1)
    trackers: list[str] = Field(default=["tensorboard"])
    device: str = "auto"
    seed: int = Field(default=0, ge=0, le=MAX_SEED)


class ValidationRecipe(Section):
    """The loss on samples that are never trained on, always with the same noise and timesteps.

    Pictures are held out as a whole, with all their captions, until they have `num_samples`; which
    ones depends on the pictures' content alone.
    """

    num_samples: int = Field(default=64, ge=1)
    every: int = Field(default=500, ge=1)


class PreviewRecipe(Section):
    """Pictures that are drawn while training, always of the same prompts from the same noise."""

    prompts: list[str] = Field(min_length=1, max_length=64)
    every: int = Field(default=500, ge=1)
    num_steps: int = Field(default=20, ge=1, le=1000)
    guidance: float = Field(default=7.5, ge=0)
    seed: int = Field(default=0, ge=0, le=MAX_SEED)


class Recipe(Section):
    """A whole training run.

    `experts` are diffusers folders, single `.safetensors` files, hub ids or `zoo:animals`, or LoRAs
    on one, `{base: ./base, lora: ./ink.safetensors, scale: 0.8}`; the autoencoder is the first
    expert's unless `vae` names another source. For single files, `config` is a diffusers folder of
    their family or the name of a shipped one (by default it is told from the file), and `parts` are
    sources of the text encoders that they leave out. `previews` are pictures drawn meanwhile.
    `allow_duplicates` lets one expert be named twice.
    """

    experts: list[ExpertSource] = Field(min_length=1)
    vae: str | None = None
    config: str | None = None
    parts: list[str] = Field(default=[])
    allow_duplicates: bool = False
    data: DataRecipe
    aggregator: SABWSettings = SABWSettings()
    training: TrainingRecipe
    validation: ValidationRecipe | None = None
    previews: PreviewRecipe | None = None


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a training recipe; paths in it are relative to its own folder.

    Raises:
        AfaError: see `afa.recipe.read_recipe`.
    """
    recipe, folder = read_recipe(path, Recipe), Path(path).parent
    data = recipe.data
    changes: dict[str, Any] = {}
    for key in ("folder", "cache_folder"):
        place = getattr(data, key)
        if place is not None:
            changes[key] = resolve_path(place, folder)
    if data.dataset is not None:
        changes["dataset"] = _resolve_dataset(data.dataset, folder)
    recipe = resolve_sources(recipe, folder, "experts", "vae", "config", "parts")
    return recipe.model_copy(update={"data": data.model_copy(update=changes)})


def _resolve_dataset(dataset: DatasetRecipe, folder: Path) -> DatasetRecipe:
    """Local files are relative to the recipe; addresses and hub ids stay."""

    def resolved(file: str) -> str:
        if "://" not in file:
            return str(resolve_path(file, folder))
        for part in file.split("::"):  # a file in an archive somewhere, as fsspec writes it
            if not _ADDRESS.match(part):
                raise AfaError(
                    "AFA-TRAIN-043",
                    f"A data file must be a local path or an address (https, hf, s3, gs, az, "
                    f"abfs), came '{file}'. Name a local file by its path alone.",
                )
        return file

    files = dataset.data_files
    return dataset.model_copy(
        update={
            "path": resolve_source(dataset.path, folder),
            "data_files": None if files is None else [resolved(file) for file in files],
        }
    )
