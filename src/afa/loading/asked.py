"""How a recipe names an expert: a source, one with a description, or a LoRA on one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

from pydantic import Discriminator, Field, Tag, model_validator

from afa.denoisers.kinds import PredictionType
from afa.ensemble.references import ExpertReference
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


class LoraExpert(Description):
    """An expert that is a LoRA on a base, as it stands in a recipe; a description is the base's.

    Attributes:
        base: as any expert: a folder, a file, a hub id or `zoo:base`.
        lora: a local `.safetensors` file for the denoiser, the text encoders or both; see
            `afa.lora.names` for the layouts.
        scale: of what it adds.
        sha256: that the LoRA's file must have, see `afa.loading.lora.hash_lora`; None takes any.
    """

    SOURCES: ClassVar[tuple[str, ...]] = ("base", "lora", "config")

    base: str
    lora: str
    scale: float = Field(default=1.0, ge=-10, le=10)
    sha256: str | None = None


def _kind(given: Any) -> str:
    if isinstance(given, DescribedExpert) or (isinstance(given, Mapping) and "model" in given):
        return "DescribedExpert"
    return "LoraExpert" if isinstance(given, (Mapping, LoraExpert)) else "source"


#: an expert as recipes name it: a source, one with a description, or a LoRA on one
AnyExpert = Annotated[
    Annotated[str, Tag("source")]
    | Annotated[DescribedExpert, Tag("DescribedExpert")]
    | Annotated[LoraExpert, Tag("LoraExpert")],
    Discriminator(_kind),
]
#: the same once it is read, or a path
Asked = str | Path | DescribedExpert | LoraExpert


def as_expert(given: str | Path | Description | Mapping[str, Any]) -> Asked:
    """An expert as Python names it, where a mapping stands for a section of a recipe."""
    if isinstance(given, Mapping):
        is_model = _kind(given) == "DescribedExpert"
        return (DescribedExpert if is_model else LoraExpert).model_validate(given)
    return cast("Asked", given)


def moved_expert(expert: Asked | Mapping[str, Any], saved: Asked) -> Asked:
    """An expert where it is now; what was saved of its description stays."""
    asked = as_expert(expert)
    if isinstance(saved, DescribedExpert) and not isinstance(asked, Description):
        return saved.model_copy(update={"model": str(asked)})
    return asked


def base_of(expert: Asked) -> str | Path:
    """Where an expert, or the base of its LoRA, comes from."""
    if isinstance(expert, DescribedExpert):
        return expert.model
    return expert.base if isinstance(expert, LoraExpert) else expert


def description_of(expert: Asked) -> tuple[str | None, PredictionType | None]:
    """The configuration and the prediction type that an expert is named with."""
    return expert.description if isinstance(expert, Description) else (None, None)


def refer_description(reference: ExpertReference, expert: Asked) -> ExpertReference:
    """A reference with the configuration that an expert is named with; local ones absolute."""
    config, _ = description_of(expert)
    return replace(reference, config=config and absolute_config(config))


def absolute_config(config: str | Path) -> str:
    """A configuration as it is found from anywhere: a local folder, or a shipped one's name."""
    place = Path(config).expanduser()
    return os.path.abspath(place) if place.exists() else str(config)
