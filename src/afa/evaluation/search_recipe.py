"""The recipe of `afa search`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from afa.evaluation.prompts import PromptsRecipe, resolve_prompts
from afa.evaluation.recipe import SamplingRecipe, resolve_metric
from afa.metrics import MetricRecipe
from afa.recipe import MAX_SEED, Section, read_recipe, resolve_sources


class SearchRecipe(Section):
    """A search of block weights that maximizes the mean `metric` over all prompts and seeds.

    `scenes` is the fraction of scenes with the right object on each side; all prompts must be
    captions of scenes.
    """

    experts: list[str] = Field(min_length=2)
    vae: str | None = None
    config: str | None = None
    parts: list[str] = Field(default=[])
    prompts: PromptsRecipe
    sampling: SamplingRecipe = SamplingRecipe()
    metric: MetricRecipe | Literal["scenes"]
    num_trials: int = Field(default=100, ge=1)
    seed: int = Field(default=0, ge=0, le=MAX_SEED)

    @model_validator(mode="after")
    def _judges_single_pictures(self) -> SearchRecipe:
        singles = ("clip_t", "aes", "pickscore", "hpsv2", "imagereward")
        if isinstance(self.metric, MetricRecipe) and self.metric.name not in singles:
            raise ValueError(
                f"must have scenes, {', '.join(singles)} as metric; got {self.metric.name}"
            )
        return self


def load_search_recipe(path: str | Path) -> SearchRecipe:
    """Read and check a recipe; paths in it are relative to its own folder.

    Raises:
        AfaError: see `afa.recipe.read_recipe`.
    """
    recipe, folder = read_recipe(path, SearchRecipe), Path(path).parent
    return resolve_sources(recipe, folder, "experts", "vae", "config", "parts").model_copy(
        update={
            "prompts": resolve_prompts(recipe.prompts, folder),
            "metric": resolve_metric(recipe.metric, folder),
        }
    )
