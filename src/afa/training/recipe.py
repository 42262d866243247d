"""The recipe of `afa train`: experts, data, aggregator, training, validation and previews."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from afa.aggregators import SABWSettings
from afa.denoisers.scheduler_names import scheduler_name
from afa.drafting.settings import DraftsRecipe, OwnDrafts
from afa.ensemble.prompt_syntax import PromptSyntax
from afa.loading.expert_source import ExpertSource, Fuse
from afa.reading import parse_colour
from afa.recipe import MAX_SEED, Section, read_recipe, resolve_path, resolve_sources
from afa.training.buckets import BucketsRecipe
from afa.training.sources import DatasetRecipe, Place, ScenesRecipe, resolve_pictures


class PromptedPictures(Section):
    """Pictures that the experts draw themselves from prompts; see `afa.training.drawn`.

    The prompts should name what the experts are known for, alone and together.

    Attributes:
        file: a UTF-8 text file with one prompt per line.
        drafts: see `DraftsRecipe`; they decide which expert draws which region.
        number: number of pictures; prompts are used in turn, in a random order.
        num_steps: denoising steps of a picture.
        guidance: guidance scale.
        negative_prompt: the negative prompt.
        seed: seed of the order and of the initial noise.
        batch_size: pictures at once.
    """

    file: Path
    drafts: DraftsRecipe
    number: int = Field(ge=1, le=1_000_000)
    num_steps: int = Field(default=20, ge=1, le=1000)
    guidance: float = Field(default=7.5, ge=0)
    negative_prompt: str = ""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    batch_size: int = Field(default=8, ge=1)

    @field_validator("drafts")
    @classmethod
    def _of_all_prompts(cls, drafts: DraftsRecipe) -> DraftsRecipe:
        if drafts.needs_words:
            raise ValueError(
                "must not have unknown_words or known_words, since no caption is known yet"
            )
        return drafts


class DataRecipe(Section):
    """Sources of captioned pictures, and how pictures are prepared.

    There is one source of real pictures (folder, dataset or scenes), or prompts, or both together.

    Attributes:
        folder: folder with pictures and a `metadata.jsonl`, `.csv` or `.parquet`, or a `.txt`
            beside each picture; a `.zip` of it; a list of pictures (CSV, JSON, parquet); or one of
            these on the hub, `hf://datasets/user/name/path`.
        dataset: see `DatasetRecipe`.
        scenes: see `ScenesRecipe`.
        prompts: see `PromptedPictures`.
        caption_column: column of captions in a list of the folder, or several; None finds it.
        file_column: column of the pictures' paths in a list of the folder; None finds it.
        captions: of several captions of a picture, the first, or one at random in each use.
        repeats: whether the numbers of kohya's folders (`10_fox`) are honoured; only their ratios
            matter.
        folder_captions: whether a picture without a caption file has the name of its kohya folder
            as caption: `sks dog` in `10_sks dog`.
        limit: use only the first `limit` samples.
        background: colour on which transparent pictures are composited, a name or `#rrggbb`.
        resolution: side of the square crop in pixels, to which the shorter side is scaled; None
            uses the experts' native resolution.
        buckets: see `BucketsRecipe`, or True; None or False crops squares.
        crop: a random part of the scaled picture, or the central one.
        flip: whether pictures may be mirrored; leave it off if captions mention left or right.
        num_variants: number of crops and flips per picture; equal ones are encoded once.
        cache: whether latents and text embeddings are cached on disk; None caches them if the
            training uses samples more than once.
        cache_folder: folder of the cache; None uses the user's cache.
        num_workers: number of processes that decode pictures, without a cache.
        max_broken: maximum fraction of samples with a broken picture or without a caption; these
            are skipped and named.
    """

    LATER: ClassVar[tuple[str, ...]] = (
        "prompts",
        "buckets",
        "caption_column",
        "file_column",
        "captions",
        "repeats",
        "folder_captions",
    )

    folder: Place | None = None
    dataset: DatasetRecipe | None = None
    scenes: ScenesRecipe | None = None
    prompts: PromptedPictures | None = None
    caption_column: str | list[str] | None = Field(default=None, min_length=1)
    file_column: str | None = None
    captions: Literal["first", "random"] = "first"
    repeats: bool = False
    folder_captions: bool = False
    limit: int | None = Field(default=None, ge=1)
    background: str = "#ffffff"
    resolution: int | None = Field(default=None, ge=8)
    buckets: BucketsRecipe | None = None
    crop: Literal["random", "center"] = "random"
    flip: bool = False
    num_variants: int = Field(default=4, ge=1, le=64)
    cache: bool | None = None
    cache_folder: Path | None = None
    num_workers: int = Field(default=0, ge=0)
    max_broken: float = Field(default=0.01, ge=0, le=1)

    @field_validator("buckets", mode="before")
    @classmethod
    def _as_section(cls, given: Any) -> Any:
        if isinstance(given, bool):
            return {} if given else None
        return given

    @property
    def caption_columns(self) -> tuple[str, ...]:
        """The columns of captions in a list of the folder; empty if they are found by name."""
        given = self.caption_column
        return (given,) if isinstance(given, str) else tuple(given or ())

    @field_validator("background")
    @classmethod
    def _as_hex(cls, given: str) -> str:
        """Normalise the colour, because it is compared when a run is resumed."""
        return "#{:02x}{:02x}{:02x}".format(*parse_colour(given))

    @model_validator(mode="after")
    def _exactly_one(self) -> DataRecipe:
        count = sum(source is not None for source in (self.folder, self.dataset, self.scenes))
        if count > 1 or (count == 0 and self.prompts is None):
            raise ValueError("must have exactly one of folder, dataset and scenes, or prompts")
        if self.prompts is not None and self.dataset is not None and self.dataset.streaming:
            raise ValueError("must not have prompts with a streamed data set")
        if self.prompts is not None and count == 0 and self.limit is not None:
            raise ValueError("must not have a limit with prompts alone; set prompts.number")
        if self.dataset is not None and self.dataset.streaming and self.cache is False:
            raise ValueError("cannot be streamed with cache: false; remove cache or streaming")
        for key in ("caption_column", "file_column", "repeats", "folder_captions"):
            if getattr(self, key) and self.folder is None:
                where = "; set dataset.caption_column" if key == "caption_column" else ""
                raise ValueError(f"must not have {key} without a folder{where}")
        if self.captions == "random" and self.folder is None and self.dataset is None:
            raise ValueError("must have a folder or a dataset with captions: random")
        return self


class EarlyStoppingRecipe(Section):
    """When a training ends early; see `afa.training.early_stopping`.

    The ensemble gets the weights with the lowest validation loss, also if the training does not end
    early.

    Attributes:
        patience: number of validations without improvement after which the training ends.
        min_improvement: amount by which a validation loss must be lower than the one that was the
            last improvement, to count as an improvement.
    """

    patience: int = Field(ge=1)
    min_improvement: float = Field(default=0, ge=0)


class TrainingRecipe(Section):
    """Settings of the training; the defaults are those of the paper (AFA, section 4.1).

    The exception is `max_grad_norm`: the published code does not clip gradients (`null` here).

    Attributes:
        num_steps: optimizer steps.
        batch_size: samples per batch and process.
        gradient_accumulation_steps: batches per process and optimizer step.
        learning_rate: learning rate of AdamW.
        weight_decay: weight decay of AdamW.
        num_warmup_steps: steps in which the learning rate rises linearly from zero.
        learning_rate_schedule: `constant`, or `cosine`, which falls to zero at `num_steps`; a run
            with `cosine` cannot be extended.
        max_grad_norm: maximum norm of the gradients, which are clipped to it; None does not clip.
        caption_dropout: fraction of captions that are dropped, for classifier-free guidance.
        prompt_noise: standard deviation of noise on the text embeddings that aggregators see, by
            that of the embeddings; for prompts with words that the training data lack.
        min_snr_gamma: gamma of Min-SNR loss weights (Hang et al., 2023, who use 5); None uses none.
        velocity_loss: weigh the loss by noise level as if the experts predicted velocity, so that
            high noise, where the content is decided, counts more for experts that predict noise.
        ema_decay: decay of a moving average (EMA) of the aggregators, which is saved at the end.
        entropy_weight: weight of the regulariser that makes each pixel use several experts.
        balance_weight: weight of the regulariser that makes each expert used.
        expert_dtype: dtype of the frozen parts; aggregators, optimizer and loss are in float32.
        gradient_checkpointing: store only the features at sites, and recompute the rest.
        offload_experts: keep the experts on the CPU and move one layer at a time to the device.
        early_stopping: see `EarlyStoppingRecipe`; None trains for all steps.
        checkpoint_every: interval of checkpoints in steps.
        keep_checkpoints: number of checkpoints to keep.
        log_every: interval in steps of lines in metrics.jsonl and the trackers.
        trackers: names of accelerate's trackers.
        device: `auto`, or torch's name.
        seed: seed of the aggregators' initial weights and of all random draws.
    """

    LATER: ClassVar[tuple[str, ...]] = ("prompt_noise", "early_stopping", "velocity_loss")

    num_steps: int = Field(ge=1)
    batch_size: int = Field(default=8, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    num_warmup_steps: int = Field(default=100, ge=0)
    learning_rate_schedule: Literal["constant", "cosine"] = "constant"
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    caption_dropout: float = Field(default=0.1, ge=0, le=1)
    prompt_noise: float = Field(default=0, ge=0)
    min_snr_gamma: float | None = Field(default=None, gt=0)
    velocity_loss: bool = False
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    entropy_weight: float = Field(default=0, ge=0)
    balance_weight: float = Field(default=0, ge=0)
    expert_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    gradient_checkpointing: bool = False
    offload_experts: bool = False
    early_stopping: EarlyStoppingRecipe | None = None
    checkpoint_every: int = Field(default=500, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    log_every: int = Field(default=50, ge=1)
    trackers: list[str] = Field(default=["tensorboard"])
    device: str = "auto"
    seed: int = Field(default=0, ge=0, le=MAX_SEED)

    @model_validator(mode="after")
    def _one_weighting(self) -> TrainingRecipe:
        if self.velocity_loss and self.min_snr_gamma is not None:
            raise ValueError("must not have both min_snr_gamma and velocity_loss; remove one")
        return self


class ValidationRecipe(Section):
    """Validation: the loss on held-out samples, with fixed noise and timesteps.

    Pictures are held out with all their captions until they have `num_samples` samples. The choice
    depends only on the pictures' content. With a `folder` (as `data.folder`) or a `dataset`, at
    most `num_samples` samples of these are used instead, and all other pictures are trained on.
    """

    LATER: ClassVar[tuple[str, ...]] = ("folder", "dataset")

    num_samples: int = Field(default=64, ge=1)
    every: int = Field(default=500, ge=1)
    folder: Place | None = None
    dataset: DatasetRecipe | None = None

    @property
    def has_own_data(self) -> bool:
        """Whether no picture of the training data is held out."""
        return self.folder is not None or self.dataset is not None

    @model_validator(mode="after")
    def _at_most_one(self) -> ValidationRecipe:
        if self.folder is not None and self.dataset is not None:
            raise ValueError("must not have both a folder and a dataset")
        if self.dataset is not None and self.dataset.streaming:
            raise ValueError("must not have a streamed dataset; remove dataset.streaming")
        return self


class PreviewRecipe(Section):
    """Preview pictures during the training, with fixed prompts and noise.

    `scheduler` is a name of `afa.denoisers.scheduler_names`; None uses the experts' own.
    `prompt_syntax` is `weighted` if the prompts have weights in brackets.
    """

    LATER: ClassVar[tuple[str, ...]] = ("scheduler", "prompt_syntax")

    prompts: list[str] = Field(min_length=1, max_length=64)
    every: int = Field(default=500, ge=1)
    num_steps: int = Field(default=20, ge=1, le=1000)
    guidance: float = Field(default=7.5, ge=0)
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    scheduler: Annotated[str | None, AfterValidator(scheduler_name)] = None
    prompt_syntax: PromptSyntax = "plain"


class Recipe(Section):
    """A training run.

    `experts` are diffusers folders, single `.safetensors` files, hub ids or `zoo:animals`, or LoRAs
    on one of these, `{base: ./base, lora: ./ink.safetensors, scale: 0.8}`. The autoencoder is that
    of the first expert or of the source `vae`. For single files, `config` is a diffusers folder of
    their family or the name of a bundled configuration (by default detected from the file), and
    `parts` are sources of the text encoders that they lack. `allow_duplicates` allows duplicate
    experts. `drafts` are those that the ensemble uses by itself, see `OwnDrafts`. `fuse` is
    `predictions` for experts of different architectures, see `afa.loading.predictions`; None as in
    `afa.load_pipeline`.
    """

    LATER: ClassVar[tuple[str, ...]] = ("drafts", "fuse")

    experts: list[ExpertSource] = Field(min_length=1)
    vae: str | None = None
    config: str | None = None
    parts: list[str] = Field(default=[])
    allow_duplicates: bool = False
    fuse: Fuse | None = None
    drafts: OwnDrafts | None = None
    data: DataRecipe
    aggregator: SABWSettings = SABWSettings()
    training: TrainingRecipe
    validation: ValidationRecipe | None = None
    previews: PreviewRecipe | None = None

    @model_validator(mode="after")
    def _validated(self) -> Recipe:
        require_validation(self.training, self.validation)
        is_streamed = self.data.dataset is not None and self.data.dataset.streaming
        if self.validation is not None and self.validation.has_own_data and is_streamed:
            raise ValueError(
                "must not have validation.folder or validation.dataset with a streamed data set; "
                "remove it, or data.dataset.streaming"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _of_predictions(cls, given: Any) -> Any:
        """Fill in the sizes of aggregators of predictions; see `SABWSettings.for_predictions`."""
        if not isinstance(given, dict) or given.get("fuse") != "predictions":
            return given
        aggregator = given.get("aggregator") or {}
        if isinstance(aggregator, SABWSettings):
            return {**given, "aggregator": aggregator.for_predictions()}
        if isinstance(aggregator, dict):
            if aggregator.get("hidden_ratio") is not None:
                raise ValueError(
                    "must have aggregator.hidden_ratio: null with fuse: predictions, because it is "
                    "relative to the channels of features"
                )
            aggregator = {"min_scale": 1, **aggregator, "hidden_ratio": None}
        return {**given, "aggregator": aggregator}


def require_validation(training: TrainingRecipe, validation: ValidationRecipe | None) -> None:
    """Check that a training that may end early is validated.

    Raises:
        ValueError: if it is not.
    """
    if training.early_stopping is not None and validation is None:
        raise ValueError(
            "must have validation with training.early_stopping, for example validation: "
            "{num_samples: 64, every: 500}"
        )


def load_recipe(path: str | Path) -> Recipe:
    """Read and validate a training recipe; its paths are relative to its folder.

    Raises:
        AfaError: see `afa.recipe.read_recipe`.
    """
    recipe, folder = read_recipe(path, Recipe), Path(path).parent
    recipe = resolve_sources(recipe, folder, "experts", "vae", "config", "parts")
    changes: dict[str, Any] = {"data": resolve_data(recipe.data, folder)}
    if (validation := recipe.validation) is not None:
        changes["validation"] = validation.model_copy(update=resolve_pictures(validation, folder))
    if recipe.drafts is not None:
        changes["drafts"] = resolve_sources(recipe.drafts, folder, "judge")
    return recipe.model_copy(update=changes)


def resolve_data(data: DataRecipe, folder: Path) -> DataRecipe:
    """Make the paths of a data section of a recipe in `folder` absolute."""
    changes: dict[str, Any] = {}
    if data.prompts is not None:
        drafts = resolve_sources(data.prompts.drafts, folder, "judge")
        file = resolve_path(data.prompts.file, folder)
        changes["prompts"] = data.prompts.model_copy(update={"drafts": drafts, "file": file})
    if data.cache_folder is not None:
        changes["cache_folder"] = resolve_path(data.cache_folder, folder)
    changes |= resolve_pictures(data, folder)
    return data.model_copy(update=changes)
