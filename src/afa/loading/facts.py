"""What matters of an expert beside others: read from its files, or off what is loaded."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import transformers

from afa.denoisers.architecture import unknown_entries, with_defaults
from afa.denoisers.kinds import kind_of
from afa.files import parts_of, read_json
from afa.loading.components import loading_model
from afa.loading.distilled import distilled_of
from afa.loading.loaded import latents_of
from afa.loading.prediction import predicted_by, scheduler_of
from afa.machine.hashes import hash_file
from afa.machine.library import library_class

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from afa.denoisers import PipelineKind
    from afa.loading.distilled import Distilled
    from afa.loading.loaded import Expert
    from afa.loading.prediction import Prediction
    from afa.loading.single_file.load import Described

#: what of a scheduler experts must share
SCHEDULE = (
    *("prediction_type", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end"),
    *("trained_betas", "rescale_betas_zero_snr", "noise_levels"),
)
# of EDM schedulers, which have no betas
_NOISE_LEVELS = ("sigma_min", "sigma_max", "sigma_data")


@dataclass(frozen=True)
class Facts:
    """Of one expert.

    Attributes:
        name: as messages call it: its source.
        short: the same without its folder.
        kind: of its pipeline.
        denoiser: its denoiser's configuration, defaults filled in.
        latents: what its autoencoder's configuration says of them; empty where there is none.
        encoders: the width of each of its text encoders, by name.
        unsure: those that a single file may have lent to it, which only loading tells.
        vocabularies: a digest of each of its tokenizers' vocabularies, by name.
        settings: of each tokenizer that cuts and pads texts by itself, by name; see `_settings`.
        positions: the most tokens that each text encoder takes, by the name of its tokenizer.
        schedule: of its scheduler, see `SCHEDULE`.
        spacing: of its scheduler's timesteps, where it says.
        identity: what decides its weights; None where no hash was taken.
        prediction: what it predicts and who says so; None where its own folder does.
        distilled: how it was distilled for few steps, and what says so; None where nothing does.
        unknown: entries of its denoiser's configuration that the installed library ignores.
    """

    name: str
    short: str
    kind: PipelineKind
    denoiser: Mapping[str, Any]
    latents: Mapping[str, Any] = field(default_factory=dict)
    encoders: Mapping[str, int | None] = field(default_factory=dict)
    unsure: frozenset[str] = frozenset()
    vocabularies: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    positions: Mapping[str, int] = field(default_factory=dict)
    schedule: Mapping[str, Any] = field(default_factory=dict)
    spacing: str | None = None
    identity: str | None = None
    prediction: Prediction | None = None
    distilled: Distilled | None = None
    unknown: tuple[str, ...] = ()


def facts_of(expert: Expert) -> Facts:
    """Of an expert that is loaded."""
    config = expert.scheduler.config
    return Facts(
        name=expert.reference.source,
        short=expert.reference.name,
        kind=expert.kind,
        denoiser=expert.denoiser.config,
        latents=expert.latents,
        encoders={n: _width(part.config.to_dict()) for n, part in expert.text_encoders.items()},
        vocabularies={n: _digest(part.get_vocab()) for n, part in expert.tokenizers.items()},
        settings={
            name: _settings(tokenizer)
            for name, tokenizer in expert.tokenizers.items()
            if _cuts(expert.kind, name, type(tokenizer).__name__)
        },
        positions=_positions(
            {name: part.config.to_dict() for name, part in expert.text_encoders.items()}
        ),
        schedule=_schedule(expert.scheduler),
        spacing=config.get("timestep_spacing"),
        identity=expert.reference.identity,
    )


def _schedule(scheduler: Any) -> dict[str, Any]:
    """What of a scheduler experts must share, in one form for all of its classes."""
    config, name = scheduler.config, type(scheduler).__name__
    found = {key: config.get(key) for key in SCHEDULE}
    predicts = predicted_by(name, config)
    # the flow is a straight line, whatever betas a scheduler names besides
    kept = ("num_train_timesteps",) if predicts == "flow_prediction" else SCHEDULE
    found = {key: found[key] if key in kept else None for key in SCHEDULE}
    if name.startswith("EDM"):
        found["noise_levels"] = tuple(config.get(key) for key in _NOISE_LEVELS)
    return {**found, "prediction_type": predicts}


def read_facts(source: str, described: Described, *, path: Path | None = None) -> Facts:
    """Of an expert that is not: no weights are read.

    Args:
        source: as it was named.
        described: the pipeline's folder that describes it (its own, where it is a folder), and what
            it predicts.
        path: where it is; a single file may leave parts out.

    Raises:
        AfaError: a folder that is incomplete, damaged or of no known kind.
    """
    folder, is_file = described.config, path is not None and path.is_file()
    index = read_json(folder / "model_index.json")
    kind, classes = kind_of(str(index.get("_class_name")), source), parts_of(index)
    encoders = [name for name in classes if name.startswith("text_encoder")]
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in encoders]
    files = kind.single_files
    with loading_model(source):
        scheduler = scheduler_of(folder, described.prediction)
        model_class = kind.family.model_class
        config = read_json(folder / kind.denoiser / "config.json")
        described_encoders = {n: read_json(folder / n / "config.json") for n in encoders}
        read = {
            name: _read_tokenizer(classes[name], _Tokenizer.of(folder / name))
            for name in tokenizers
            if name in classes
        }
        return Facts(
            name=source,
            short=source.rstrip("/").rpartition("/")[2].removeprefix("zoo:"),
            kind=kind,
            denoiser=with_defaults(model_class, config),
            latents=latents_of(folder / "vae" / "config.json"),
            encoders={name: _width(settings) for name, settings in described_encoders.items()},
            unsure=frozenset(encoders) & files.optional if is_file and files else frozenset(),
            vocabularies={name: vocabulary for name, (vocabulary, _) in read.items()},
            settings={
                name: settings
                for name, (_, settings) in read.items()
                if _cuts(kind, name, classes[name])
            },
            positions=_positions(described_encoders),
            schedule=_schedule(scheduler),
            spacing=scheduler.config.get("timestep_spacing"),
            prediction=described.prediction,
            distilled=distilled_of(source, folder, is_file=is_file, path=path),
            unknown=tuple(unknown_entries(model_class, config)),
        )


def _width(settings: Mapping[str, Any]) -> int | None:
    return settings.get("hidden_size", settings.get("d_model"))


def _positions(encoders: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """The most tokens of text encoders, of those that have a limit, by their tokenizers' names."""
    found = {
        name.replace("text_encoder", "tokenizer"): settings.get("max_position_embeddings")
        for name, settings in encoders.items()
    }
    return {name: most for name, most in found.items() if most is not None}


def _cuts(kind: PipelineKind, name: str, class_name: str) -> bool:
    """Whether a pipeline cuts and pads texts by this tokenizer's own settings.

    T5's texts have the pipeline's `max_sequence_length`.
    """
    if class_name.startswith("T5"):
        return False
    return name == "tokenizer" or not kind.shares_length


def _settings(tokenizer: Any) -> dict[str, Any]:
    """What decides a prompt's tokens besides the vocabulary: its length, and what fills it up."""
    return {
        "model_max_length": tokenizer.model_max_length,
        "pad_token": tokenizer.pad_token,
    }


def _digest(vocabulary: Mapping[str, int]) -> str:
    return hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode()).hexdigest()


@dataclass(frozen=True)
class _Tokenizer:
    """A tokenizer's folder, known by its files, so that equal ones are opened once."""

    folder: Path
    content: str

    @classmethod
    def of(cls, folder: Path) -> _Tokenizer:
        files = sorted(file for file in folder.iterdir() if file.is_file())
        return cls(folder, "\n".join(f"{file.name} {hash_file(file)}" for file in files))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Tokenizer) and self.content == other.content

    def __hash__(self) -> int:
        return hash(self.content)


@lru_cache(maxsize=16)
def _read_tokenizer(class_name: str, place: _Tokenizer) -> tuple[str, dict[str, Any]]:
    """A digest of a tokenizer's vocabulary, and its settings."""
    tokenizer_class = library_class(transformers, class_name, transformers.PreTrainedTokenizerBase)
    tokenizer = tokenizer_class.from_pretrained(place.folder)
    return _digest(tokenizer.get_vocab()), _settings(tokenizer)
