"""`config.json` of an ensemble folder: what it may hold, and what it names."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from afa.aggregators import SABWConfig, SABWSettings
from afa.denoisers import FAMILIES
from afa.denoisers.kinds import PredictionType
from afa.errors import AfaError
from afa.files import read_json
from afa.loading.expert_source import ExpertSource
from afa.loading.sources import absolute_source

if TYPE_CHECKING:
    from pathlib import Path

FORMAT = "afa-ensemble"


class _Saved(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Lora(_Saved):
    source: str
    sha256: str
    scale: float


class _Reference(_Saved):
    source: str
    sha256: str
    revision: str | None = None
    lora: _Lora | None = None
    config: str | None = None
    prediction_type: PredictionType | None = None


#: what a file means that leaves a setting out: the only way there was when it was written
ABSENT: dict[str, Any] = {
    **{field.name: field.default for field in fields(SABWSettings)},
    "hidden_ratio": None,
    "min_scale": 1,
}


@dataclass(frozen=True, kw_only=True)
class _Rules(SABWSettings):
    """The fusion rules: SABW of these settings, or the mean."""

    type: Literal["sabw", "mean"]


class _SavedEnsemble(_Saved):
    """What `config.json` of an ensemble folder holds."""

    format: Literal["afa-ensemble"]
    version: Literal[1]
    family: str
    experts: list[_Reference] = Field(min_length=1)
    vae: _Reference | None
    config: str | None
    parts: list[_Reference] = Field(default=[])
    aggregator: _Rules
    sites: list[str]

    @field_validator("aggregator", mode="before")
    @classmethod
    def _filled(cls, given: Any) -> Any:
        return {**ABSENT, **_written(given)} if isinstance(given, dict) else given

    @field_validator("family")
    @classmethod
    def _is_known(cls, name: str) -> str:
        known = [family.name for family in FAMILIES]
        if name not in known:
            raise ValueError(f"must be one of {', '.join(known)}")
        return name


def read_config(folder: Path) -> dict[str, Any]:
    """Read and check `config.json` of an ensemble folder.

    Raises:
        AfaError: there is none, or it is of another format or version.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise AfaError(
            "AFA-LOAD-061",
            f"An ensemble folder must hold a config.json; '{folder}' has none. "
            "Make one with `afa train` or afa.save_ensemble.",
        )
    config = read_json(path)
    came = (config.get("format"), config.get("version"))
    if came != (FORMAT, 1):
        raise AfaError(
            "AFA-LOAD-062",
            f"'{path}' must be of format '{FORMAT}', version 1, came {came}. Is it an ensemble?",
        )
    try:
        saved = _SavedEnsemble.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise AfaError(
            "AFA-LOAD-063",
            f"'{path}' must be as afa.save_ensemble writes it, but at '{place}': {first['msg']}.",
        ) from None
    written = _written(config["aggregator"])
    return {**saved.model_dump(), "aggregator": {k: getattr(saved.aggregator, k) for k in written}}


def _written(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}


def saved_aggregators(saved: dict[str, Any]) -> SABWConfig | None:
    """The aggregators that a configuration of `read_config` describes; None for the mean.

    Settings that an older release did not write have the values that it had.
    """
    settings = dict(saved["aggregator"])
    is_sabw = settings.pop("type") == "sabw"
    return SABWConfig(**{**ABSENT, **settings}) if is_sabw else None


def sources_in(
    saved: dict[str, Any], folder: Path
) -> tuple[list[ExpertSource], str | None, list[ExpertSource]]:
    """What a configuration of `read_config` names: experts, their configuration, and parts."""
    config = saved["config"] and absolute_source(saved["config"], folder)
    experts, parts = (
        [source_of(reference, folder) for reference in saved[key]] for key in ("experts", "parts")
    )
    return experts, config, parts


def source_of(reference: dict[str, Any], folder: Path) -> ExpertSource:
    """A saved reference as `load_pipeline` takes it."""
    lora, config = reference["lora"], reference["config"]
    named = {} if lora is None else {"scale": lora["scale"], "lora_sha256": lora["sha256"]}
    return ExpertSource(
        absolute_source(reference["source"], folder),
        reference["revision"],
        reference["sha256"],
        lora and absolute_source(lora["source"], folder),
        config=config and absolute_source(config, folder),
        prediction_type=reference["prediction_type"],
        **named,
    )
