"""The settings of drafts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

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
            With `known_words`, which needs `prompts: all`, they are kept for prompts all of whose
            words the training captions of the ensemble have, and ignored for others.
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
    aggregators: Literal["ignore", "keep", "known_words"] = "ignore"
    prompts: Literal["all", "unknown_words"] = "all"

    @model_validator(mode="after")
    def _has_known_prompts(self) -> Self:
        if self.aggregators == "known_words" and self.prompts != "all":
            raise ValueError(
                "must have prompts: all with aggregators: known_words, since prompts with unknown "
                "words always ignore the aggregators"
            )
        return self

    @property
    def needs_words(self) -> bool:
        """Whether a picture depends on the words of the ensemble's training captions."""
        return self.prompts == "unknown_words" or self.aggregators == "known_words"

    def of_prompt(self, *, is_known: bool) -> DraftsRecipe | None:
        """The settings of one prompt, which need no words; None if it is drawn without drafts.

        Args:
            is_known: whether the training captions have all words of the prompt.
        """
        if self.prompts == "unknown_words" and is_known:
            return None
        changes: dict[str, str] = {"prompts": "all"}
        if self.aggregators == "known_words":
            changes["aggregators"] = "keep" if is_known else "ignore"
        return DraftsRecipe(**{**dict(self), **changes})


class OwnDrafts(DraftsRecipe):
    """Drafts that an ensemble uses by itself, as its folder stores them.

    By default, prompts with words that no training caption has are drawn by drafts, and all others
    by the aggregators alone, as without drafts. With `prompts: all`, the aggregators are kept where
    their training captions have all words.
    """

    LATER: ClassVar[tuple[str, ...]] = ()  # its default is another one than that of `DraftsRecipe`

    prompts: Literal["all", "unknown_words"] = "unknown_words"

    @model_validator(mode="before")
    @classmethod
    def _is_about_all_prompts(cls, given: Any) -> Any:
        """Complete settings that only make sense for all prompts."""
        if not isinstance(given, Mapping):
            return given
        if given.get("prompts") == "all":
            return {"aggregators": "known_words", **given}
        if given.get("aggregators", "ignore") != "ignore":
            return {"prompts": "all", **given}
        return given
