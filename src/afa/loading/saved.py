"""Read `config.json` of an ensemble folder, and the sources in it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from afa.aggregators import SABWConfig, SABWSettings
from afa.denoisers import FAMILIES
from afa.denoisers.objective import PredictionType
from afa.ensemble.references import ExpertReference, LoraReference
from afa.errors import AfaError
from afa.files import read_json
from afa.loading.expert_source import ExpertSource, Fuse
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


#: values of settings that a file omits: those of the release that wrote it
ABSENT: dict[str, Any] = {
    **{field.name: field.default for field in fields(SABWSettings)},
    "hidden_ratio": None,
    "min_scale": 1,
}


@dataclass(frozen=True, kw_only=True)
class _Rules(SABWSettings):
    """The fusion rules: SABW with these settings, or the mean."""

    type: Literal["sabw", "mean"]


class _SavedEnsemble(_Saved):
    """The content of `config.json` in an ensemble folder."""

    format: Literal["afa-ensemble"]
    version: Literal[1]
    family: str
    fuse: Fuse = "blocks"
    objectives: list[dict[str, Any]] | None = None
    experts: list[_Reference] = Field(min_length=1)
    vae: _Reference | None
    config: str | None
    parts: list[_Reference] = Field(default=[])
    judge: _Reference | None = None
    drafts: dict[str, Any] | None = None
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
        AfaError: if it is missing, or of another format or version.
    """
    path = folder / "config.json"
    if not path.is_file():
        remedy = "Create the folder with `afa train` or afa.save_ensemble."
        run, at, step = str(folder).rpartition("@step-")
        if at and not folder.exists():
            remedy = (
                f"The ensemble of a checkpoint: afa export-checkpoint {run} --step {step} --output "
                "NEW_FOLDER."
            )
        elif (folder / "checkpoints").is_dir():
            remedy = (
                "Its training has not finished; for the ensemble of its newest checkpoint: afa "
                f"export-checkpoint {folder} --output NEW_FOLDER."
            )
        raise AfaError(
            "AFA-LOAD-061",
            f"'{folder}' has no config.json; an ensemble folder must have one. {remedy}",
        )
    config = read_json(path)
    version = (config.get("format"), config.get("version"))
    if version != (FORMAT, 1):
        raise AfaError(
            "AFA-LOAD-062",
            f"'{path}' has format and version {version}; they must be {(FORMAT, 1)}. Pass an "
            "ensemble folder.",
        )
    try:
        saved = _SavedEnsemble.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise AfaError(
            "AFA-LOAD-063",
            f"'{path}' is not as afa.save_ensemble writes it: '{key}': {first['msg']}. Save the "
            "ensemble again.",
        ) from None
    written = _written(config["aggregator"])
    return {**saved.model_dump(), "aggregator": {k: getattr(saved.aggregator, k) for k in written}}


def _written(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if value is not None}


def saved_aggregators(saved: dict[str, Any]) -> SABWConfig | None:
    """Return the aggregator settings of a configuration from `read_config`; None for the mean.

    Settings that an older release did not write get the values that it used.
    """
    settings = dict(saved["aggregator"])
    is_sabw = settings.pop("type") == "sabw"
    return SABWConfig(**{**ABSENT, **settings}) if is_sabw else None


def sources_in(
    saved: dict[str, Any], folder: Path
) -> tuple[list[ExpertSource], str | None, list[ExpertSource]]:
    """Return experts, their configuration and parts of a configuration from `read_config`."""
    config = saved["config"] and absolute_source(saved["config"], folder)
    experts, parts = (
        [source_of(reference, folder) for reference in saved[key]] for key in ("experts", "parts")
    )
    return experts, config, parts


def referred(reference: dict[str, Any], folder: Path) -> ExpertReference:
    """Convert a saved reference to the one that was saved."""
    source, lora = source_of(reference, folder), reference["lora"]
    named = None
    if lora is not None:
        named = LoraReference(str(source.lora), lora["sha256"], lora["scale"])
    kept = ("sha256", "revision", "prediction_type")
    return ExpertReference(
        source.source, lora=named, config=source.config, **{key: reference[key] for key in kept}
    )


def source_of(reference: dict[str, Any], folder: Path) -> ExpertSource:
    """Convert a saved reference for `load_pipeline`."""
    lora, config = reference["lora"], reference["config"]
    of_lora = {} if lora is None else {"scale": lora["scale"], "lora_sha256": lora["sha256"]}
    return ExpertSource(
        absolute_source(reference["source"], folder),
        reference["revision"],
        reference["sha256"],
        lora and absolute_source(lora["source"], folder),
        config=config and absolute_source(config, folder),
        prediction_type=reference["prediction_type"],
        **of_lora,
    )
