"""What `afa evaluate` reads: which methods draw which prompts, and what is measured."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from afa.aggregators.fusion import AnyFusion
from afa.ensemble.caching.settings import EXACT, Acceleration, acceleration_of
from afa.evaluation.prompts import PromptsRecipe, resolve_file, resolve_prompts
from afa.loading.expert_source import ExpertSource
from afa.merging import MergeRecipe
from afa.metrics import MetricRecipe
from afa.recipe import MAX_SEED, Section, read_recipe, resolve_sources

#: judged by the zoo's object classifier; needs prompts of the zoo
SCENES = "scenes"
#: what it says of a picture; see `afa.zoo.judges.Verdict`
SCENE_SCORES = ("both", "objects", "left", "right")
#: metrics of whole sets, which say nothing of a single picture
_OF_SETS = ("fid", "kid", "is", "cmmd")


#: more than the noise schedules of the supported models have
NumSteps = Annotated[int, Field(ge=1, le=1000)]


def slug(name: str) -> str:
    """A name as a folder: small letters and digits, with dashes between."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "method"


class MethodRecipe(Section):
    """One row of the comparison: a name, and exactly one way to draw.

    `model`: a checkpoint by itself, or a LoRA on one. `ensemble`: a folder of `afa train`, or
    several that differ in the seed of their training and are reported as one method. `merge`: as in
    a recipe of `afa merge`, without experts and base. `fusion`: a rule of `afa.aggregators.fusion`.
    `acceleration`: what is left out while drawing, a preset or settings of `afa.Acceleration`.
    `plan`: of `afa prune`, for the ensembles of this row.
    """

    name: str = Field(min_length=1, max_length=80)
    model: list[ExpertSource] | None = Field(default=None, min_length=1)
    ensemble: list[str] | None = Field(default=None, min_length=1)
    merge: dict[str, Any] | None = None
    fusion: AnyFusion | None = None
    acceleration: Annotated[Acceleration, BeforeValidator(acceleration_of)] = EXACT
    plan: Path | None = None

    @field_validator("model", "ensemble", mode="before")
    @classmethod
    def _one_or_several(cls, given: Any) -> Any:
        return [given] if isinstance(given, (str, Mapping, ExpertSource)) else given

    @model_validator(mode="after")
    def _exactly_one(self) -> MethodRecipe:
        ways = (self.model, self.ensemble, self.merge, self.fusion)
        if sum(way is not None for way in ways) != 1:
            raise ValueError("must have exactly one of model, ensemble, merge and fusion")
        return self

    @property
    def needs_experts(self) -> bool:
        """Whether this row is drawn with the comparison's experts, all in memory."""
        return self.merge is not None or self.fusion is not None

    @property
    def num_replicas(self) -> int:
        """How many models or ensembles stand behind this row."""
        return len(self.model or self.ensemble or [None])


class SamplingRecipe(Section):
    """How pictures are drawn, for every method alike.

    The noise of a picture depends on its prompt's place and its seed alone. `num_threads` fixes
    the processor's threads per process, on which the last bits of a picture may depend.
    """

    num_steps: NumSteps = 50
    guidance: float = Field(default=7.5, ge=0)
    seeds: list[int] = Field(default=[0], min_length=1)
    batch_size: int = Field(default=8, ge=1)
    negative_prompt: str = ""
    height: int | None = Field(default=None, ge=8, multiple_of=8)
    width: int | None = Field(default=None, ge=8, multiple_of=8)
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    device: str = "auto"
    num_threads: int | None = Field(default=None, ge=1)

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds) or not all(0 <= seed <= MAX_SEED for seed in seeds):
            raise ValueError(f"must be different numbers from 0 to {MAX_SEED}")
        return seeds


class CurveRecipe(Section):
    """Quality against time: some methods again at other numbers of steps.

    `methods` None: the subject, and the best expert and the best merge of the main comparison;
    `also` names more. Drawn are the prompts of the first group, with `limit` the first so many.
    """

    num_steps: list[NumSteps] = Field(default=[5, 10, 20, 50], min_length=1)
    methods: list[str] | None = None
    also: list[str] = Field(default=[])
    limit: int | None = Field(default=None, ge=1)

    @field_validator("num_steps")
    @classmethod
    def _each_once(cls, num_steps: list[int]) -> list[int]:
        return list(dict.fromkeys(num_steps))


class EvaluateRecipe(Section):
    """A whole comparison.

    `experts` and `base` are what merges and fusions combine, as in a recipe of `afa train`, with
    its `vae`, `config` and `parts`; `experts` alone count as single experts. `subject` is the
    method that is compared with all others, the first one by default; `primary` the score that
    picks the best expert and the best merge, the first one by default.
    `references` is a folder of real pictures for FID, KID and CMMD; by default the prompts' own.
    """

    experts: list[ExpertSource] = Field(default=[], max_length=64)
    base: str | None = None
    vae: str | None = None
    config: str | None = None
    parts: list[str] = Field(default=[])
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
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"must name every method differently, '{twice}' stands twice")
        folders: dict[str, str] = {}
        for name in names:
            other = folders.setdefault(slug(name), name)
            if other != name:
                raise ValueError(
                    f"must name its methods so that letters and digits tell them apart, came "
                    f"'{other}' and '{name}'"
                )
        asked = [self.subject]
        if self.curve is not None:
            asked += [*(self.curve.methods or []), *self.curve.also]
        unknown = next((name for name in asked if name is not None and name not in names), None)
        if unknown is not None:
            raise ValueError(f"must name one of its methods, came '{unknown}'")
        needs_experts = [
            m.name for m in self.methods if m.merge is not None or m.fusion is not None
        ]
        if needs_experts and not self.experts:
            raise ValueError(f"must have experts for the method '{needs_experts[0]}'")
        for method in self.methods:
            if method.merge is not None:
                self.merge_recipe(method)
            self._check_numbers(method)
        if SCENES in self.metrics and self.prompts.zoo is None:
            raise ValueError("must have prompts of the zoo for the metric 'scenes'")
        scores = list(SCENE_SCORES) if SCENES in self.metrics else []
        chosen = [metric.name for metric in self.metrics if not isinstance(metric, str)]
        scores += [name for name in chosen if name not in _OF_SETS]
        if self.primary is not None and self.primary not in scores:
            raise ValueError(
                f"must have as primary one of its scores {', '.join(scores)}, came '{self.primary}'"
            )
        if self.curve is not None and not scores:
            raise ValueError("must have a metric of single pictures for its curve")
        twice = next((name for name in chosen if chosen.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"must name every metric once, '{twice}' stands twice")
        return self

    def _check_numbers(self, method: MethodRecipe) -> None:
        """Refuse a fusion that names experts which are not there."""
        if method.fusion is not None:
            try:
                method.fusion.check(len(self.experts), self.sampling.guidance)
            except ValueError as error:
                raise ValueError(f"the method '{method.name}' {error}") from None

    def merge_recipe(self, method: MethodRecipe) -> MergeRecipe:
        """The static merge of a method, with this recipe's experts.

        Raises:
            ValueError: it is no complete recipe of a merge.
        """
        settings = dict(method.merge or {})
        refused = sorted({"experts", "base", "dtype", "vae"} & settings.keys())
        if refused:
            raise ValueError(
                f"must leave {', '.join(refused)} out of the merge '{method.name}'; the "
                "comparison's own are used"
            )
        needs_base = settings.get("method") in ("add_difference", "ties", "dare")
        names = [str(expert) for expert in self.experts]  # they are merged in memory
        return MergeRecipe(experts=names, base=self.base if needs_base else None, **settings)

    @property
    def subject_name(self) -> str:
        """The method that is compared with all others."""
        return self.subject or self.methods[0].name


def resolve_metric(metric: MetricRecipe, folder: Path) -> MetricRecipe:
    """The paths of a metric in a recipe in `folder`, made absolute."""
    return resolve_sources(metric, folder, "weights", "processor", "clip")


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
            "methods": [
                resolve_sources(method, folder, "model", "ensemble").model_copy(
                    update={"plan": resolve_file(method.plan, folder)}
                )
                for method in recipe.methods
            ],
            "metrics": [
                metric if isinstance(metric, str) else resolve_metric(metric, folder)
                for metric in recipe.metrics
            ],
        }
    )
