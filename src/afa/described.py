"""One expert of a recipe with a description of its own: `{model: FILE, prediction_type: ...}`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import model_validator

from afa.prediction import PredictionType
from afa.recipe import Section


class Description(Section):
    """What a recipe says of one expert, where its file does not.

    Attributes:
        config: of a single file: a diffusers folder that describes it, or a shipped configuration.
        prediction_type: what the model predicts; overrides the file and every configuration.
    """

    config: str | None = None
    prediction_type: PredictionType | None = None

    @property
    def description(self) -> tuple[str | None, PredictionType | None]:
        """What makes two experts of the same weights different."""
        return self.config, self.prediction_type


class DescribedExpert(Description):
    """An expert that is a whole model, as it stands in a recipe.

    Attributes:
        model: as any expert: a folder, a file, a hub id or `zoo:base`.
    """

    SOURCES: ClassVar[tuple[str, ...]] = ("model", "config")

    model: str

    @model_validator(mode="after")
    def _says_something(self) -> DescribedExpert:
        if self.config is None and self.prediction_type is None:
            raise ValueError("must have config or prediction_type; else name the model alone")
        return self
