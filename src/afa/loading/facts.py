"""Facts about an expert that are compared with other experts: from files, or from loaded parts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from afa.denoisers.architecture import unknown_entries, with_defaults
from afa.denoisers.kinds import kind_of
from afa.denoisers.objective import predicted_by
from afa.files import parts_of, read_json
from afa.loading.components import encoder_width, load_tokenizer, loading_model
from afa.loading.distilled import distilled_of
from afa.loading.loaded import latents_of
from afa.loading.prediction import scheduler_of
from afa.machine.hashes import hash_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from afa.denoisers import PipelineKind
    from afa.loading.distilled import Distilled
    from afa.loading.loaded import Expert
    from afa.loading.prediction import Prediction
    from afa.loading.single_file.load import Described

#: the scheduler settings that experts must share
SCHEDULE = (
    *("prediction_type", "num_train_timesteps", "beta_schedule", "beta_start", "beta_end"),
    *("trained_betas", "rescale_betas_zero_snr", "noise_levels", "timesteps"),
)
# settings of EDM schedulers, which have no betas
_NOISE_LEVELS = ("sigma_min", "sigma_max", "sigma_data")


@dataclass(frozen=True)
class Facts:
    """Facts about one expert.

    Attributes:
        name: its source, for messages.
        short: the same without the folder.
        kind: of its pipeline.
        denoiser: configuration of its denoiser, with defaults.
        latents: latent settings of its autoencoder's configuration; empty without one.
        encoders: the embedding size of each text encoder, by name.
        unsure: text encoders that a single file may lack, which is known only after loading.
        vocabularies: a digest of each tokenizer's vocabulary, by name.
        settings: of each tokenizer that truncates and pads prompts, by name.
        positions: the maximum number of tokens of each text encoder, by the name of its tokenizer.
        schedule: of its scheduler, see `SCHEDULE`.
        spacing: timestep spacing of its scheduler, if set.
        identity: identifies its weights; None if they were not hashed.
        prediction: what it predicts and the source of that; None if its own folder says so.
        distilled: how it was distilled for few steps, and the evidence; None without evidence.
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
    """Return the facts about a loaded expert."""
    encoders = {name: part.config.to_dict() for name, part in expert.text_encoders.items()}
    tokenizers = {
        name: _of_tokenizer(type(part).__name__, part) for name, part in expert.tokenizers.items()
    }
    return Facts(
        name=expert.reference.source,
        short=expert.reference.name,
        kind=expert.kind,
        denoiser=expert.denoiser.config,
        latents=expert.latents,
        identity=expert.reference.identity,
        **_of_parts(expert.kind, expert.scheduler, encoders, tokenizers),
    )


def _of_parts(
    kind: PipelineKind,
    scheduler: Any,
    encoders: Mapping[str, Mapping[str, Any]],
    tokenizers: Mapping[str, tuple[str, str, dict[str, Any]]],
) -> dict[str, Any]:
    """Return the facts about a scheduler, configurations of text encoders, and tokenizers."""
    positions = {
        name.replace("text_encoder", "tokenizer"): config.get("max_position_embeddings")
        for name, config in encoders.items()
    }
    return {
        "encoders": {name: encoder_width(config) for name, config in encoders.items()},
        "vocabularies": {name: vocabulary for name, (_, vocabulary, _) in tokenizers.items()},
        "settings": {
            name: settings
            for name, (class_name, _, settings) in tokenizers.items()
            if _truncates(kind, name, class_name)
        },
        "positions": {name: most for name, most in positions.items() if most is not None},
        "schedule": _schedule(scheduler),
        "spacing": scheduler.config.get("timestep_spacing"),
    }


def _schedule(scheduler: Any) -> dict[str, Any]:
    """Return the scheduler settings that experts must share, in one form for all classes."""
    config, name = scheduler.config, type(scheduler).__name__
    found = {key: config.get(key) for key in SCHEDULE}
    predicts = predicted_by(name, config)
    # flow matching does not use betas, even if the configuration has some
    kept = ("num_train_timesteps",) if predicts == "flow_prediction" else SCHEDULE
    found = {key: found[key] if key in kept else None for key in SCHEDULE}
    if config.get("invert_sigmas") or config.get("timestep_type") == "continuous":
        found["timesteps"] = "inverted" if config.get("invert_sigmas") else "continuous"
    if name.startswith("EDM"):
        found["noise_levels"] = tuple(config.get(key) for key in _NOISE_LEVELS)
    return {**found, "prediction_type": predicts}


def read_facts(source: str, described: Described, *, path: Path | None = None) -> Facts:
    """Return the facts about an expert from its files, without reading weights.

    Args:
        source: as named by the user.
        described: the pipeline folder that describes it, and what it predicts.
        path: of the expert; a single file may lack parts.

    Raises:
        AfaError: if the folder is incomplete, damaged or of an unknown kind.
    """
    folder, is_file = described.config, path is not None and path.is_file()
    index = read_json(folder / "model_index.json")
    kind, classes = kind_of(str(index.get("_class_name")), source), parts_of(index)
    encoders = [name for name in classes if name.startswith("text_encoder")]
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in encoders]
    files = kind.single_files
    with loading_model(source):
        model_class = kind.family.model_class
        scheduler = scheduler_of(folder, described.prediction)
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
            unsure=frozenset(encoders) & files.optional if is_file and files else frozenset(),
            prediction=described.prediction,
            distilled=distilled_of(source, folder, is_file=is_file, path=path),
            unknown=tuple(unknown_entries(model_class, config)),
            **_of_parts(kind, scheduler, described_encoders, read),
        )


def _truncates(kind: PipelineKind, name: str, class_name: str) -> bool:
    """Whether a pipeline truncates and pads prompts by this tokenizer's own settings.

    For T5, pipelines use their own `max_sequence_length`.
    """
    if class_name.startswith("T5"):
        return False
    return name == "tokenizer" or not kind.shares_length


def _of_tokenizer(class_name: str, tokenizer: Any) -> tuple[str, str, dict[str, Any]]:
    """Return a tokenizer's class, a digest of its vocabulary, and what else affects its tokens."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    settings = {key: getattr(tokenizer, key) for key in ("model_max_length", "pad_token")}
    return class_name, hashlib.sha256(vocabulary.encode()).hexdigest(), settings


@dataclass(frozen=True)
class _Tokenizer:
    """A tokenizer's folder, identified by its files, so that equal ones are loaded once."""

    folder: Path = field(compare=False)
    content: str

    @classmethod
    def of(cls, folder: Path) -> _Tokenizer:
        files = sorted(file for file in folder.iterdir() if file.is_file())
        return cls(folder, "\n".join(f"{file.name} {hash_file(file)}" for file in files))


@lru_cache(maxsize=16)
def _read_tokenizer(class_name: str, files: _Tokenizer) -> tuple[str, str, dict[str, Any]]:
    return _of_tokenizer(class_name, load_tokenizer(files.folder, class_name))
