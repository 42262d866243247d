"""The recipe of `afa distill`: teacher, student, recorded predictions and training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from afa.ensemble.caching.settings import EXACT
from afa.errors import AfaError
from afa.evaluation.prompts import PromptsRecipe, resolve_prompts
from afa.evaluation.recipe import (
    MethodRecipe,
    ModelsRecipe,
    NumSteps,
    SamplingRecipe,
    resolve_method,
)
from afa.loading.expert_source import ExpertSource
from afa.loading.memory.budget import parse_size
from afa.recipe import MAX_SEED, Section, read_recipe, resolve_path, resolve_sources
from afa.training.recipe import (
    DataRecipe,
    PreviewRecipe,
    TrainingRecipe,
    ValidationRecipe,
    require_validation,
    resolve_data,
)

if TYPE_CHECKING:
    pass

#: default learning rates of AdamW, by what is trained
_LEARNING_RATES = {"full": 1e-5, "lora": 1e-4}


def _size(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return parse_size(given)
    except AfaError:
        raise ValueError("must be a size such as 20GB or 7.5GiB") from None


Size = Annotated[int, Field(ge=1), BeforeValidator(_size)]


class TeacherRecipe(MethodRecipe):
    """The teacher: exactly one `model`, `ensemble`, `merge` or `fusion`, as in `afa evaluate`."""

    name: str = "teacher"

    @model_validator(mode="after")
    def _alone(self) -> TeacherRecipe:
        if self.num_replicas != 1:
            raise ValueError(f"must be one model or ensemble; got {self.num_replicas}")
        if self.pictures is not None:
            raise ValueError("must be a model that predicts; pictures are drawn already")
        if self.guidance is not None:
            raise ValueError("must not have a guidance; set trajectories.guidance")
        if self.sparse is not None and self.sparse.by == "step":
            raise ValueError("must not have sparse by step, which depends on other steps")
        if self.acceleration != EXACT:
            raise ValueError("must not have an acceleration: its predictions would be approximate")
        return self


class InitialExpert(Section):
    """The name of one of the teacher's experts, as initial weights of the student."""

    expert: str


Init = Literal["merge"] | InitialExpert | ExpertSource


class StudentRecipe(Section):
    """The student.

    Attributes:
        init: initial weights: `merge` for the mean of the teacher's experts, `{expert: NAME}` for
            one of them, or the source of a model with the same architecture.
        what: train all weights of the denoiser (`full`), or low-rank adapters (`lora`).
        rank: rank of the adapters; their alpha is the same.
        text_encoder: whether the text encoders are trained as well.
    """

    init: Init = "merge"
    what: Literal["full", "lora"] = "full"
    rank: int | None = Field(default=None, ge=1, le=1024)
    text_encoder: bool = False

    @field_validator("init", mode="before")
    @classmethod
    def _as_source(cls, given: Any) -> Any:
        if isinstance(given, str) and given != "merge":
            return ExpertSource(given)
        return given

    @model_validator(mode="after")
    def _consistent(self) -> StudentRecipe:
        if self.rank is not None and self.what == "full":
            raise ValueError("must not have a rank without what: lora")
        if self.what == "lora" and self.init == "merge":
            raise ValueError(
                "must not have init: merge with what: lora, because a LoRA only works on the model "
                "that it was trained on; write the merge with afa merge, and set init to its path"
            )
        return self

    @property
    def lora_rank(self) -> int | None:
        """The rank of the adapters; None without adapters."""
        return None if self.what == "full" else self.rank or 16


class TrajectoriesRecipe(Section):
    """Predictions on the noisy latents of pictures that the teacher draws.

    Attributes:
        prompts: see `PromptsRecipe`; used in turn, in a random order.
        number: number of pictures.
        num_steps: steps of a picture; of several numbers, batches use each in turn.
        guidance: guidance scale of the teacher.
        negative_prompt: prompt of the predictions without prompt.
        seed: seed of the initial noise.
        height: of the pictures in pixels; None uses the teacher's.
        width: likewise.
    """

    prompts: PromptsRecipe
    number: int = Field(ge=1)
    num_steps: list[NumSteps] = Field(default=[20], min_length=1)
    guidance: float = Field(default=7.5, ge=0)
    negative_prompt: str = ""
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    height: int | None = Field(default=None, ge=8, multiple_of=8)
    width: int | None = Field(default=None, ge=8, multiple_of=8)

    @field_validator("num_steps", mode="before")
    @classmethod
    def _one_or_several(cls, given: Any) -> Any:
        return [given] if isinstance(given, int) else given


class PicturesRecipe(Section):
    """Predictions on noised pictures.

    Attributes:
        data: pictures and captions, as in a recipe of `afa train`.
        number: number of noised pictures; a picture may be used repeatedly, with other noise.
        share: fraction of these in a batch, if there are trajectories as well.
        seed: seed of the order, the noise and the timesteps.
    """

    data: DataRecipe
    number: int = Field(ge=1)
    share: float | None = Field(default=None, gt=0, lt=1)
    seed: int = Field(default=0, ge=0, le=MAX_SEED)

    @model_validator(mode="after")
    def _not_streamed(self) -> PicturesRecipe:
        if self.data.dataset is not None and self.data.dataset.streaming:
            raise ValueError("must not be streamed; remove data.dataset.streaming")
        if self.data.prompts is not None:
            raise ValueError("must not have data.prompts; use trajectories")
        if self.data.buckets is not None:
            raise ValueError(
                "must not have data.buckets, because all recorded predictions have one shape"
            )
        return self


class RecordingRecipe(Section):
    """How the teacher's predictions are recorded.

    Attributes:
        folder: folder of the recorded predictions, which runs with the same teacher may share; None
            uses the run's own.
        batch_size: pictures at once.
        dtype: of the teacher and of the recorded tensors.
        max_disk: maximum size of the recorded predictions: bytes, or a size such as `20GB`.
        num_threads: CPU threads per process, which can change the last bits; None uses torch's.
    """

    folder: Path | None = None
    batch_size: int = Field(default=8, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    max_disk: Size = 20_000_000_000
    num_threads: int | None = Field(default=None, ge=1)


class BakeIn(Section):
    """Train the guided prediction of this scale, for drawing with one call a step."""

    bake_in: float = Field(gt=1)


class FeaturesRecipe(Section):
    """A second loss: the student's features at some sites against the teacher's fused ones.

    Attributes:
        sites: names of sites, as `afa inspect` lists them for an ensemble: `mid`, `up.0.0`.
        weight: factor of the loss, which is the squared error relative to the target's mean square.
    """

    sites: list[str] = Field(min_length=1)
    weight: float = Field(default=0.1, gt=0)


class HeldOutRecipe(ValidationRecipe):
    """Validation: the loss on `num_samples` predictions of pictures that are not trained on."""

    @model_validator(mode="after")
    def _without_pictures(self) -> HeldOutRecipe:
        if self.has_own_data:
            raise ValueError(
                "must not have a folder or a dataset: predictions of pictures are held out"
            )
        return self


class StudentTraining(TrainingRecipe):
    """Settings of the training, as in `afa train` except the settings of frozen experts.

    `learning_rate` is 1e-5 by default, and 1e-4 for a LoRA; `caption_dropout` is the fraction of
    predictions without prompt.
    """

    #: settings of `afa train` that have no meaning here
    REFUSED: ClassVar[tuple[str, ...]] = (
        "prompt_noise",
        "entropy_weight",
        "balance_weight",
        "min_snr_gamma",
        "velocity_loss",
        "expert_dtype",
        "offload_experts",
    )

    batch_size: int = Field(default=32, ge=1)
    caption_dropout: float = Field(default=0.25, ge=0, le=1)
    learning_rate_schedule: Literal["constant", "cosine"] = "cosine"

    @model_validator(mode="before")
    @classmethod
    def _none_refused(cls, given: Any) -> Any:
        refused = [key for key in cls.REFUSED if isinstance(given, dict) and key in given]
        if refused:
            raise ValueError(f"must not have {', '.join(refused)}, which are for afa train")
        return given


class DistillRecipe(ModelsRecipe):
    """A distillation of a teacher into a student.

    `experts`, `base`, `vae`, `config` and `parts` are those of a teacher that is a merge or a
    fusion. `guidance` is `keep`, for a student that is used with any guidance, or `{bake_in: 3}`,
    which trains the teacher's guided prediction of that scale. `features` adds a loss, and its
    recorded tensors are many times larger than the predictions.
    """

    teacher: TeacherRecipe
    student: StudentRecipe = StudentRecipe()
    trajectories: TrajectoriesRecipe | None = None
    pictures: PicturesRecipe | None = None
    recording: RecordingRecipe = RecordingRecipe()
    guidance: Literal["keep"] | BakeIn = "keep"
    features: FeaturesRecipe | None = None
    training: StudentTraining
    validation: HeldOutRecipe | None = None
    previews: PreviewRecipe | None = None

    @model_validator(mode="before")
    @classmethod
    def _learning_rate(cls, given: Any) -> Any:
        """Fill in the default learning rate, so that the saved recipe has it."""
        if isinstance(given, dict) and isinstance(given.get("training"), dict):
            student = given.get("student")
            what = student.get("what", "full") if isinstance(student, dict) else "full"
            rate = _LEARNING_RATES.get(what) if isinstance(what, str) else None
            if rate is not None:
                given = {**given, "training": {"learning_rate": rate, **given["training"]}}
        return given

    @model_validator(mode="after")
    def _consistent(self) -> DistillRecipe:
        require_validation(self.training, self.validation)
        drawn, pictures = self.trajectories, self.pictures
        if drawn is None and pictures is None:
            raise ValueError("must have trajectories, pictures or both")
        if pictures is not None and (pictures.share is not None) != (drawn is not None):
            raise ValueError(
                "must have pictures.share if it has both trajectories and pictures, and only then"
            )
        if isinstance(self.guidance, BakeIn) and drawn is not None and drawn.guidance <= 1:
            raise ValueError(
                "must have trajectories.guidance above 1 for bake_in, which needs predictions with "
                f"and without prompt; got {drawn.guidance:g}"
            )
        if self.features is not None and (pictures is not None or self.guidance != "keep"):
            raise ValueError("must not have features with pictures or bake_in")
        fusion = self.teacher.fusion
        if fusion is not None and fusion.needs_halves and pictures is not None:
            raise ValueError(
                f"must not have pictures with a teacher of the rule {fusion.rule}, which needs "
                "both halves of guidance"
            )
        drafts = self.teacher.drafts
        if drafts is not None and drafts.needs_words:
            raise ValueError(
                "must have a teacher that draws all prompts in the same way, without unknown_words "
                "and known_words in its drafts"
            )
        if drafts is not None and pictures is not None:
            raise ValueError("must not have pictures with drafts, which belong to drawn pictures")
        if drafts is not None and self.features is not None and drafts.aggregators == "ignore":
            raise ValueError("must not have features with drafts that ignore the aggregators")
        if not self.teacher.needs_experts and (self.experts or self.base):
            raise ValueError("must have experts and base only if the teacher is a merge or fusion")
        self.check_method(self.teacher, self.sampling.guidance)
        return self

    @property
    def sampling(self) -> SamplingRecipe:
        """The sampling settings of the teacher."""
        drawn, recording = self.trajectories, self.recording
        given: dict[str, Any] = {} if drawn is None else _drawn(drawn)
        return SamplingRecipe(
            **given,
            batch_size=recording.batch_size,
            dtype=recording.dtype,
            device=self.training.device,
            num_threads=recording.num_threads,
        )

    @property
    def sites(self) -> list[str]:
        """The sites whose features are recorded."""
        return [] if self.features is None else self.features.sites

    @property
    def caption_dropout(self) -> float:
        """The fraction of predictions without prompt; 0 if guidance is baked in."""
        return 0.0 if isinstance(self.guidance, BakeIn) else self.training.caption_dropout


def _drawn(drawn: TrajectoriesRecipe) -> dict[str, Any]:
    return {
        "num_steps": max(drawn.num_steps),
        "guidance": drawn.guidance,
        "negative_prompt": drawn.negative_prompt,
        "seeds": [drawn.seed],
        "height": drawn.height,
        "width": drawn.width,
    }


def load_distill_recipe(path: str | Path) -> DistillRecipe:
    """Read and validate a recipe; its paths are relative to its folder.

    Raises:
        AfaError: see `afa.recipe.read_recipe`.
    """
    recipe, folder = read_recipe(path, DistillRecipe), Path(path).parent
    changes: dict[str, Any] = {
        "teacher": resolve_method(recipe.teacher, folder),
    }
    if isinstance(recipe.student.init, ExpertSource):
        changes["student"] = resolve_sources(recipe.student, folder, "init")
    if recipe.trajectories is not None:
        prompts = resolve_prompts(recipe.trajectories.prompts, folder)
        changes["trajectories"] = recipe.trajectories.model_copy(update={"prompts": prompts})
    if recipe.pictures is not None:
        data = resolve_data(recipe.pictures.data, folder)
        changes["pictures"] = recipe.pictures.model_copy(update={"data": data})
    if recipe.recording.folder is not None:
        place = resolve_path(recipe.recording.folder, folder)
        changes["recording"] = recipe.recording.model_copy(update={"folder": place})
    recipe = resolve_sources(recipe, folder, "experts", "base", "vae", "config", "parts")
    return recipe.model_copy(update=changes)
