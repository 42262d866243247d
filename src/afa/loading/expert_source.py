"""How somebody names an expert, or a part: a source, a description, a LoRA on it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_args

from pydantic import Discriminator, Field, Tag, TypeAdapter, model_validator
from pydantic_core import core_schema

from afa.denoisers.kinds import PredictionType
from afa.errors import AfaError
from afa.recipe import Section

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler

_MAX_SCALE = 10


class _Described(Section):
    """An expert that is a whole model, as a recipe describes it."""

    config: str | None = None
    prediction_type: PredictionType | None = None
    model: str

    @model_validator(mode="after")
    def _says_something(self) -> _Described:
        if self.config is None and self.prediction_type is None:
            raise ValueError("must have config or prediction_type; else name the model alone")
        return self


class _Lora(Section):
    """An expert that is a LoRA on a base, as a recipe describes it; a description is the base's."""

    config: str | None = None
    prediction_type: PredictionType | None = None
    base: str
    lora: str
    scale: float = Field(default=1.0, ge=-_MAX_SCALE, le=_MAX_SCALE)
    sha256: str | None = None


def _kind(given: Any) -> str:
    if isinstance(given, ExpertSource):
        return "ready"
    if isinstance(given, Mapping):
        return "_Described" if "model" in given else "_Lora"
    return "source"


@dataclass(frozen=True)
class ExpertSource:
    """One expert, or an autoencoder or another part, as somebody names it.

    Recipes name it by its source alone, as `{model: SOURCE, config: ..., prediction_type: ...}`, or
    as `{base: SOURCE, lora: FILE, scale: ..., sha256: ...}`, where `sha256` is the LoRA's. Python
    takes the same, see `of`.

    Attributes:
        source: a diffusers folder, a `.safetensors` file, a hub id or `zoo:animals`; of a LoRA, its
            base.
        revision: of a hub id.
        sha256: that the weights must have, as `afa inspect` shows it; None takes any.
        lora: a local `.safetensors` file for the denoiser, the text encoders or both; see
            `afa.lora.names` for the layouts.
        scale: of what the LoRA adds, from -10 to 10.
        lora_sha256: that the LoRA must have, see `afa.loading.lora.hash_lora`; None takes any.
        config: of a single file: a diffusers folder that describes it, or a shipped configuration.
        prediction_type: what the model predicts; overrides the file and every configuration.

    Raises:
        AfaError: a scale or a prediction type that there is not.
    """

    source: str
    revision: str | None = None
    sha256: str | None = None
    lora: str | None = None
    scale: float = 1.0
    lora_sha256: str | None = None
    config: str | None = None
    prediction_type: PredictionType | None = None

    #: the keys that name files, folders or hub ids; and how recipes write it
    SOURCES: ClassVar = ("source", "lora", "config")
    SECTIONS: ClassVar = (_Described, _Lora)

    def __post_init__(self) -> None:
        for key in self.SOURCES:
            value = getattr(self, key)
            object.__setattr__(self, key, value if value is None else str(value))  # of a path
        if not abs(self.scale) <= _MAX_SCALE:
            raise AfaError(
                "AFA-LOAD-027", f"The scale of a LoRA must be from -10 to 10, came {self.scale}."
            )
        if self.prediction_type not in (None, *get_args(PredictionType)):
            raise AfaError(
                "AFA-LOAD-028",
                f"prediction_type must be one of {', '.join(get_args(PredictionType))}, came "
                f"'{self.prediction_type}'.",
            )

    @classmethod
    def of(cls, given: AnySource) -> ExpertSource:
        """What is named by a text, a path, a mapping as in recipes, or this."""
        if isinstance(given, Mapping):
            found: ExpertSource = TypeAdapter(cls).validate_python(given)
            return found
        return given if isinstance(given, cls) else cls(str(given))

    @property
    def base(self) -> ExpertSource:
        """The whole model by itself: without its LoRA, and whatever its hash."""
        return replace(self, sha256=None, lora=None, scale=1.0, lora_sha256=None)

    def moved_to(self, place: AnySource) -> ExpertSource:
        """The same expert where it is now; what is known of it stays."""
        given = ExpertSource.of(place)
        if given == ExpertSource(given.source) and self.lora is None:
            return replace(self, source=given.source)
        return replace(given, revision=self.revision, sha256=self.sha256)

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        """In recipes; a mistake is told at its own place."""
        written: Any = Annotated[
            Annotated[str, Tag("source")]
            | Annotated[_Described, Tag("_Described")]
            | Annotated[_Lora, Tag("_Lora")]
            | Annotated[Any, Tag("ready")],
            Discriminator(_kind),
        ]
        return core_schema.no_info_after_validator_function(
            _from_recipe,
            handler.generate_schema(written),
            serialization=core_schema.plain_serializer_function_ser_schema(_as_in_recipes),
        )


#: how Python names an expert
AnySource = str | Path | Mapping[str, Any] | ExpertSource


def _from_recipe(given: Any) -> ExpertSource:
    if isinstance(given, _Described):
        return ExpertSource(given.model, config=given.config, prediction_type=given.prediction_type)
    if isinstance(given, _Lora):
        settings = given.model_dump(exclude={"base", "sha256"})
        return ExpertSource(given.base, lora_sha256=given.sha256, **settings)
    return ExpertSource.of(given)


def _as_in_recipes(expert: ExpertSource) -> str | dict[str, Any]:
    """What a recipe that is written out says of an expert."""
    described = {"config": expert.config, "prediction_type": expert.prediction_type}
    if expert.lora is not None:
        lora = {"base": expert.source, "lora": expert.lora, "scale": expert.scale}
        return {**described, **lora, "sha256": expert.lora_sha256}
    return {**described, "model": expert.source} if any(described.values()) else expert.source


def absolute_config(config: str | Path) -> str:
    """A configuration as it is found from anywhere: a local folder, or a shipped one's name."""
    place = Path(config).expanduser()
    return os.path.abspath(place) if place.exists() else str(config)


def first_folder(experts: Iterable[AnySource]) -> Path | None:
    """The first local folder among experts, which describes files of its kind."""
    paths = (Path(ExpertSource.of(expert).source).expanduser() for expert in experts)
    return next((path for path in paths if path.is_dir()), None)
