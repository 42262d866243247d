"""`ExpertSource`: names an expert or a part by source, description and LoRA."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from pydantic import Discriminator, Field, Tag, TypeAdapter, model_validator
from pydantic_core import core_schema

from afa.denoisers.objective import PredictionType
from afa.errors import AfaError
from afa.recipe import Section

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler

#: what is fused: features after every block, or predictions alone; see `afa.loading.predictions`
Fuse = Literal["blocks", "predictions"]
_MAX_SCALE = 10


class _Described(Section):
    """A complete model as expert, in a recipe."""

    config: str | None = None
    prediction_type: PredictionType | None = None
    model: str

    @model_validator(mode="after")
    def _has_description(self) -> _Described:
        if self.config is None and self.prediction_type is None:
            raise ValueError("must have config or prediction_type; or write the source alone")
        return self


class _Lora(Section):
    """A LoRA on a base as expert, in a recipe; `config` and `prediction_type` are the base's."""

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
    """The name of an expert, an autoencoder or another part, as given by the user.

    A recipe contains the source alone, `{model: SOURCE, config: ..., prediction_type: ...}`, or
    `{base: SOURCE, lora: FILE, scale: ..., sha256: ...}`, where `sha256` is the LoRA's. Python
    accepts the same, see `of`.

    Attributes:
        source: a diffusers folder, a `.safetensors` file, a hub id or `zoo:animals`; for a LoRA,
            its base.
        revision: of a hub id.
        sha256: required hash of the weights, as shown by `afa inspect`; None accepts any.
        lora: a local `.safetensors` file for the denoiser, the text encoders or both; see
            `afa.lora.names` for the layouts.
        scale: factor of the LoRA's change, from -10 to 10.
        lora_sha256: required hash of the LoRA, see `afa.loading.lora.hash_lora`; None accepts any.
        config: for a single file: a diffusers folder that describes it, or the name of a bundled
            configuration.
        prediction_type: what the model predicts; overrides the file and every configuration.

    Raises:
        AfaError: if the scale is out of range or the prediction type is unknown.
    """

    source: str
    revision: str | None = None
    sha256: str | None = None
    lora: str | None = None
    scale: float = 1.0
    lora_sha256: str | None = None
    config: str | None = None
    prediction_type: PredictionType | None = None

    #: the keys that name files, folders or hub ids; and the forms in recipes
    SOURCES: ClassVar = ("source", "lora", "config")
    SECTIONS: ClassVar = (_Described, _Lora)

    def __post_init__(self) -> None:
        for key in self.SOURCES:
            value = getattr(self, key)
            object.__setattr__(self, key, value if value is None else str(value))  # may be a Path
        if not abs(self.scale) <= _MAX_SCALE:
            raise AfaError(
                "AFA-LOAD-027", f"The scale of a LoRA must be from -10 to 10; got {self.scale}."
            )
        if self.prediction_type not in (None, *get_args(PredictionType)):
            raise AfaError(
                "AFA-LOAD-028",
                f"prediction_type must be one of {', '.join(get_args(PredictionType))}; got "
                f"'{self.prediction_type}'.",
            )

    @classmethod
    def of(cls, given: AnySource) -> ExpertSource:
        """Convert a string, a path or a mapping as in recipes."""
        if isinstance(given, Mapping):
            found: ExpertSource = TypeAdapter(cls).validate_python(given)
            return found
        return given if isinstance(given, cls) else cls(str(given))

    @property
    def base(self) -> ExpertSource:
        """The model without its LoRA and its hash."""
        return replace(self, sha256=None, lora=None, scale=1.0, lora_sha256=None)

    def moved_to(self, place: AnySource) -> ExpertSource:
        """The same expert at a new location; required hashes are kept."""
        given = ExpertSource.of(place)
        if given == ExpertSource(given.source) and self.lora is None:
            return replace(self, source=given.source)
        return replace(given, revision=self.revision, sha256=self.sha256)

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        """Validate the forms in recipes, with errors at the key that is wrong."""
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


#: the forms in which Python accepts an expert
AnySource = str | Path | Mapping[str, Any] | ExpertSource


def _from_recipe(given: Any) -> ExpertSource:
    if isinstance(given, _Described):
        return ExpertSource(given.model, config=given.config, prediction_type=given.prediction_type)
    if isinstance(given, _Lora):
        settings = given.model_dump(exclude={"base", "sha256"})
        return ExpertSource(given.base, lora_sha256=given.sha256, **settings)
    return ExpertSource.of(given)


def _as_in_recipes(expert: ExpertSource) -> str | dict[str, Any]:
    """Convert an expert to its form in a recipe."""
    described = {"config": expert.config, "prediction_type": expert.prediction_type}
    if expert.lora is not None:
        lora = {"base": expert.source, "lora": expert.lora, "scale": expert.scale}
        return {**described, **lora, "sha256": expert.lora_sha256}
    return {**described, "model": expert.source} if any(described.values()) else expert.source


def absolute_config(config: str | Path) -> str:
    """Return the absolute path of a local configuration folder, or a bundled one's name."""
    place = Path(config).expanduser()
    return os.path.abspath(place) if place.exists() else str(config)


def first_folder(experts: Iterable[AnySource]) -> Path | None:
    """Return the first local folder among experts, which can describe single files."""
    paths = (Path(ExpertSource.of(expert).source).expanduser() for expert in experts)
    return next((path for path in paths if path.is_dir()), None)
