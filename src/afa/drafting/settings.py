"""The settings of drafts."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from afa.loading.expert_source import ExpertSource
from afa.recipe import Section


class DraftsRecipe(Section):
    """Let a judge decide on drafts of all experts which expert draws which region.

    Attributes:
        judge: the model that judges, as an expert in a recipe of `afa train`: best the base from
            which the experts were fine-tuned, since it knows something of what any of them knows.
        num_steps: steps of a draft.
        num_levels: number of noise levels at which the judge looks at a draft.
        region: standard deviation of the Gaussian over which its judgement is averaged, by the
            shorter side of the picture.
        aggregators: whether the logits of trained aggregators are ignored, or kept and added to the
            judgement. Aggregators are often sure and wrong about what their training data lacks.
        sharpness: factor of the judgement; the larger, the more strictly it is followed.
        prompts: which prompts are drawn by drafts: all, or those with words that no training
            caption of the ensemble has.
    """

    LATER: ClassVar[tuple[str, ...]] = ("prompts",)

    judge: ExpertSource
    num_steps: int = Field(default=5, ge=1, le=1000)
    num_levels: int = Field(default=5, ge=2, le=100)
    region: float = Field(default=0.15, ge=0, le=1)
    sharpness: float = Field(default=3, gt=0, allow_inf_nan=False)
    aggregators: Literal["ignore", "keep"] = "ignore"
    prompts: Literal["all", "unknown_words"] = "all"


class OwnDrafts(DraftsRecipe):
    """Drafts that an ensemble uses by itself, as its folder stores them."""

    LATER: ClassVar[tuple[str, ...]] = ()  # its default is another one than that of `DraftsRecipe`

    prompts: Literal["all", "unknown_words"] = "unknown_words"
