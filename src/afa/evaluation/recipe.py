"""The recipe of `afa evaluate`: methods, prompts and metrics."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from afa.aggregators.fusion import AnyFusion
from afa.denoisers.scheduler_names import calls_twice, scheduler_name
from afa.drafting.settings import DraftsRecipe
from afa.ensemble.caching.settings import EXACT, Acceleration, acceleration_of
from afa.ensemble.prompt_syntax import PromptSyntax
from afa.evaluation.prompts import PromptsRecipe, resolve_file, resolve_prompts
from afa.loading.expert_source import ExpertSource
from afa.merging.recipe import WITH_BASE, MergeRecipe
from afa.metrics import MetricRecipe
from afa.recipe import MAX_SEED, Section, read_recipe, resolve_path, resolve_sources

#: the metric of the zoo's object classifier; needs prompts of the zoo
SCENES = "scenes"
#: its scores; see `afa.zoo.judges.Verdict`
SCENE_SCORES = ("both", "objects", "left", "right")
#: metrics of sets, which have no score for a single picture
_OF_SETS = ("fid", "kid", "is", "cmmd")

#: 1000 is the number of timesteps that the supported models were trained with
NumSteps = Annotated[int, Field(ge=1, le=1000)]


#: names that no file or folder can have on Windows
_RESERVED = re.compile(r"con|prn|aux|nul|(com|lpt)\d")


def slug(name: str) -> str:
    """Turn a name into a folder name of lower-case letters, digits and dashes."""
    found = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "method"
    return f"{found}-method" if _RESERVED.fullmatch(found) else found


class SparseRecipe(Section):
    """Sparse fusion of an ensemble.

    Attributes:
        experts: number of experts that are fused, those with the largest weights.
        by: at each pixel, where all experts still run; or by step, where only these experts run.
        every: by step, all experts run at every `every`-th step, to choose among them.
    """

    experts: int = Field(ge=1)
    by: Literal["pixel", "step"] = "pixel"
    every: int = Field(default=5, ge=2)


class MethodRecipe(Section):
    """One method: a name and exactly one of `model`, `ensemble`, `merge`, `fusion` and `pictures`.

    `model`: a single checkpoint, or a LoRA on one. `ensemble`: a folder of `afa train`, or several
    that differ in the training seed and are reported as one method. `merge`: as in a recipe of
    `afa merge`, without experts and base. `fusion`: a rule of `afa.aggregators.fusion`.
    `pictures`: a folder of pictures that another program drew of the same prompts, or several; see
    `afa.evaluation.given`. `acceleration`: a preset or settings of `afa.Acceleration`. `plan`: a
    plan of `afa prune` for the ensembles. `guidance`: guidance scale of this method, for models
    whose prediction is guided already, such as those of `afa distill` with `bake_in`; None uses
    that of `sampling`. `drafts`: settings of drafts, for ensembles and fusions. `sparse`: fuse only
    the leading experts of ensembles.
    """

    LATER: ClassVar[tuple[str, ...]] = ("drafts", "pictures", "sparse")

    name: str = Field(min_length=1, max_length=80)
    model: list[ExpertSource] | None = Field(default=None, min_length=1)
    ensemble: list[str] | None = Field(default=None, min_length=1)
    merge: dict[str, Any] | None = None
    fusion: AnyFusion | None = None
    pictures: list[Path] | None = Field(default=None, min_length=1)
    acceleration: Annotated[Acceleration, BeforeValidator(acceleration_of)] = EXACT
    plan: Path | None = None
    guidance: float | None = Field(default=None, ge=0)
    drafts: DraftsRecipe | None = None
    sparse: SparseRecipe | None = None

    @field_validator("model", "ensemble", "pictures", mode="before")
    @classmethod
    def _one_or_several(cls, given: Any) -> Any:
        return [given] if isinstance(given, (str, Path, Mapping, ExpertSource)) else given

    @model_validator(mode="after")
    def _exactly_one(self) -> MethodRecipe:
        given = (self.model, self.ensemble, self.merge, self.fusion, self.pictures)
        if sum(value is not None for value in given) != 1:
            raise ValueError("must have exactly one of model, ensemble, merge, fusion and pictures")
        if self.pictures is not None:
            others = {"acceleration": EXACT, "plan": None, "guidance": None}
            named = [key for key, unused in others.items() if getattr(self, key) != unused]
            if named:
                raise ValueError(f"must not have {named[0]} with pictures, which are drawn already")
        if self.sparse is not None and self.ensemble is None:
            raise ValueError("must be an ensemble to have sparse, which needs its weights")
        if self.sparse is not None and (self.drafts is not None or self.plan is not None):
            raise ValueError("must not have sparse with drafts or a plan")
        if self.drafts is not None and self.ensemble is None and self.fusion is None:
            raise ValueError("must have drafts only with an ensemble or a fusion")
        if self.drafts is not None and self.fusion is not None and not self.fusion.takes_drafts:
            raise ValueError(f"must not have drafts with the rule {self.fusion.rule}")
        if self.drafts is not None and self.fusion is not None and self.drafts.needs_words:
            raise ValueError(
                "must not have drafts with unknown_words or known_words: a fusion has no training "
                "captions"
            )
        if self.drafts is not None and self.plan is not None:
            raise ValueError("must not have drafts with a plan: each expert drafts at all sites")
        return self

    @property
    def needs_experts(self) -> bool:
        """Whether the method uses the comparison's experts, all in memory."""
        return self.merge is not None or self.fusion is not None

    @property
    def num_replicas(self) -> int:
        """Number of models or ensembles of this method."""
        return len(self.model or self.ensemble or self.pictures or [None])


Method = TypeVar("Method", bound=MethodRecipe)


class SamplingRecipe(Section):
    """Sampling settings of all methods.

    A picture's initial noise depends only on the index of its prompt and on the seed.
    `num_threads` fixes the CPU threads per process, which can change the last bits of a picture.
    `scheduler` is a name of `afa.denoisers.scheduler_names`, for the models of all methods; None
    uses each model's own. `prompt_syntax` is `weighted` if the prompts have weights in brackets;
    metrics see the words alone.
    """

    LATER: ClassVar[tuple[str, ...]] = ("scheduler", "prompt_syntax")

    num_steps: NumSteps = 50
    guidance: float = Field(default=7.5, ge=0)
    seeds: list[int] = Field(default=[0], min_length=1)
    batch_size: int = Field(default=8, ge=1)
    negative_prompt: str = ""
    prompt_syntax: PromptSyntax = "plain"
    height: int | None = Field(default=None, ge=8, multiple_of=8)
    width: int | None = Field(default=None, ge=8, multiple_of=8)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    num_threads: int | None = Field(default=None, ge=1)
    scheduler: Annotated[str | None, AfterValidator(scheduler_name)] = None

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds) or not all(0 <= seed <= MAX_SEED for seed in seeds):
            raise ValueError(f"must be distinct numbers from 0 to {MAX_SEED}; got {seeds}")
        return seeds


class CurveRecipe(Section):
    """Quality against time: some methods at several numbers of steps.

    `methods` defaults to the subject, the best expert and the best merge of the main comparison;
    `also` adds methods. The curve uses the prompts of the first group, at most `limit` of them.
    """

    num_steps: list[NumSteps] = Field(default=[5, 10, 20, 50], min_length=1)
    methods: list[str] | None = None
    also: list[str] = Field(default=[])
    limit: int | None = Field(default=None, ge=1)

    @field_validator("num_steps")
    @classmethod
    def _each_once(cls, num_steps: list[int]) -> list[int]:
        return list(dict.fromkeys(num_steps))


class ModelsRecipe(Section):
    """The models that merges and fusions combine: `experts` and `base`.

    `vae`, `config` and `parts` are as in a recipe of `afa train`.
    """

    experts: list[ExpertSource] = Field(default=[], max_length=64)
    base: str | None = None
    vae: str | None = None
    config: str | None = None
    parts: list[str] = Field(default=[])

    def merge_recipe(self, method: MethodRecipe) -> MergeRecipe:
        """The static merge of a method, with this recipe's experts.

        Raises:
            ValueError: if it is not a valid recipe of a merge.
        """
        settings = dict(method.merge or {})
        refused = sorted({"experts", "base", "dtype", "vae"} & settings.keys())
        if refused:
            raise ValueError(
                f"must not have {', '.join(refused)} in the merge '{method.name}', which uses the "
                "comparison's own"
            )
        needs_base = settings.get("method") in WITH_BASE
        names = [str(expert) for expert in self.experts]  # they are merged in memory
        return MergeRecipe(experts=names, base=self.base if needs_base else None, **settings)

    def check_method(self, method: MethodRecipe, guidance: float) -> None:
        """Check that a method fits the experts and the guidance.

        Raises:
            ValueError: if it does not.
        """
        if method.needs_experts and not self.experts:
            raise ValueError(f"must have experts for the method '{method.name}'")
        if method.merge is not None:
            self.merge_recipe(method)
        if method.fusion is not None and method.fusion.with_base and self.base is None:
            raise ValueError(f"must have a base for the method '{method.name}'")
        if method.fusion is not None:
            try:
                method.fusion.check(len(self.experts), guidance)
            except ValueError as error:
                raise ValueError(f"the method '{method.name}' {error}") from None


class EvaluateRecipe(ModelsRecipe):
    """A comparison of methods.

    A method whose `model` is among `experts` counts as a single expert. `subject` is the method
    that is compared with all others (default: the first). `primary` is the score that selects the
    best expert and the best merge (default: the first). `references` is a folder of real pictures
    for FID, KID and CMMD (default: the prompts' own).
    """

    prompts: PromptsRecipe
    methods: list[MethodRecipe] = Field(min_length=1)
    sampling: SamplingRecipe = SamplingRecipe()
    metrics: list[MetricRecipe | Literal["scenes"]] = Field(min_length=1)
    references: Path | None = None
    subject: str | None = None
    primary: str | None = None
    curve: CurveRecipe | None = None
    num_resamples: int = Field(default=10_000, ge=100)

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateRecipe:
        names = [method.name for method in self.methods]
        if (duplicate := _duplicate(names)) is not None:
            raise ValueError(f"must have a distinct name for each method; got '{duplicate}' twice")
        folders: dict[str, str] = {}
        for name in names:
            other = folders.setdefault(slug(name), name)
            if other != name:
                raise ValueError(
                    f"must have method names that differ in letters or digits; got '{other}' and "
                    f"'{name}'"
                )
        named = [self.subject]
        if self.curve is not None:
            chosen = self.curve.methods
            named += [*([self.subject_name] if chosen is None else chosen), *self.curve.also]
        unknown = next((name for name in named if name is not None and name not in names), None)
        if unknown is not None:
            raise ValueError(f"must name one of its methods; got '{unknown}'")
        for method in self.methods:
            self.check_method(method, self.sampling_of(method).guidance)
            scheduler = self.sampling.scheduler
            if scheduler and calls_twice(scheduler) and not method.acceleration.is_exact:
                raise ValueError(
                    f"must not have the scheduler {scheduler}, which calls the experts twice in a "
                    f"step, with the acceleration of '{method.name}'"
                )
        scores = list(SCENE_SCORES) if SCENES in self.metrics else []
        chosen = [metric.name for metric in self.metrics if not isinstance(metric, str)]
        scores += [name for name in chosen if name not in _OF_SETS]
        if self.primary is not None and self.primary not in scores:
            raise ValueError(
                f"must have one of {', '.join(scores)} as primary; got '{self.primary}'"
            )
        given = [method.name for method in self.methods if method.pictures is not None]
        drawn = next((name for name in given if name in named), None)
        if self.curve is not None and drawn is not None:
            raise ValueError(
                f"must not have a curve of '{drawn}', whose pictures have one number of steps"
            )
        if self.curve is not None and not scores:
            raise ValueError("must have a metric of single pictures for the curve")
        if (duplicate := _duplicate(chosen)) is not None:
            raise ValueError(f"must have each metric once; got '{duplicate}' twice")
        return self

    def sampling_of(self, method: MethodRecipe) -> SamplingRecipe:
        """The sampling settings of a method."""
        if method.guidance is None:
            return self.sampling
        return self.sampling.model_copy(update={"guidance": method.guidance})

    @property
    def subject_name(self) -> str:
        """The method that is compared with all others."""
        return self.subject or self.methods[0].name


def _duplicate(names: Sequence[str]) -> str | None:
    return next((name for name in names if names.count(name) > 1), None)


def resolve_metric(metric: Any, folder: Path) -> Any:
    """Make the paths of a metric absolute; they are relative to the recipe's `folder`."""
    if metric == SCENES:
        return metric
    return resolve_sources(metric, folder, "weights", "processor", "clip")


def resolve_method(method: Method, folder: Path) -> Method:
    """Make the paths of a method absolute; they are relative to the recipe's `folder`."""
    resolved: Method = resolve_sources(method, folder, "model", "ensemble")
    changes: dict[str, Any] = {"plan": resolve_file(method.plan, folder)}
    if method.pictures is not None:
        changes["pictures"] = [resolve_path(place, folder) for place in method.pictures]
    if method.drafts is not None:
        changes["drafts"] = resolve_sources(method.drafts, folder, "judge")
    return resolved.model_copy(update=changes)


def load_evaluate_recipe(path: str | Path) -> EvaluateRecipe:
    """Read and check a recipe; paths in it are relative to its own folder.

    Raises:
        AfaError: see `afa.recipe.read_recipe`.
    """
    recipe, folder = read_recipe(path, EvaluateRecipe), Path(path).parent
    return resolve_sources(recipe, folder, "experts", "base", "vae", "config", "parts").model_copy(
        update={
            "references": resolve_file(recipe.references, folder),
            "prompts": resolve_prompts(recipe.prompts, folder),
            "methods": [resolve_method(method, folder) for method in recipe.methods],
            "metrics": [resolve_metric(metric, folder) for metric in recipe.metrics],
        }
    )
