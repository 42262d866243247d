"""Load single `.safetensors` files of one model in any layout, without a hub."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa.denoisers.family import Ambiguous
from afa.ensemble.references import ExpertReference
from afa.errors import AfaError
from afa.files import parts_of, read_json
from afa.loading.components import load_tokenizer, loading_model
from afa.loading.expert_source import AnySource, ExpertSource
from afa.loading.prediction import Prediction, decide, evidence_of, scheduler_of
from afa.loading.single_file.accounting import account
from afa.loading.single_file.autoencoder import load_vae
from afa.loading.single_file.identify import (
    config_folder,
    config_of,
    configs,
    missing_parts,
    refuse_lora,
)
from afa.loading.single_file.layout import described_kind, kind_name, layout_of
from afa.loading.single_file.packed.layout import model_shapes, require_family
from afa.loading.single_file.parts import read_parts
from afa.loading.single_file.supplied import (
    fitting_encoders,
    has_autoencoder,
    load_fitting_encoders,
)
from afa.loading.sources import locate, refer, require_hash
from afa.loading.trust.folders import check_folder
from afa.loading.weights import check_safetensors, hash_pipeline, weight_files
from afa.machine.hashes import hash_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from diffusers import AutoencoderKL
    from transformers import PreTrainedModel

    from afa.denoisers.objective import PredictionType
    from afa.loading.weights import Shapes

#: parts of pipelines that an ensemble does not use
_NOT_USED = ("safety_checker", "feature_extractor", "image_encoder")


@dataclass(frozen=True)
class Described:
    """The pipeline folder that describes a model, and what the model predicts.

    `prediction` is None if only that folder's scheduler says so.
    """

    config: Path
    prediction: Prediction | None = None


@dataclass
class Companions:
    """Sources of what single files lack: configuration, text encoders, autoencoder.

    Attributes:
        torch_dtype: of weights.
        config: a diffusers folder that describes the files, whose weights are not read, or the name
            of a bundled configuration; None finds it from each file's tensors.
        fallback: a folder for files of its kind that fit no bundled configuration.
        parts: sources of text encoders and the autoencoder.
        references: of the parts, after they were read.
        prediction_type: what the model predicts, see `afa.loading.prediction`; None if its file or
            its configuration says so.
        own_vae: whether a file's own autoencoder is used.
        named: the path given by the user, beside which its `.yaml` is; see `of`.
        is_own: whether `config` was set for this expert alone.
    """

    torch_dtype: torch.dtype
    config: str | Path | None = None
    fallback: Path | None = None
    parts: Sequence[AnySource] = ()
    references: list[ExpertReference] = field(default_factory=list)
    prediction_type: PredictionType | None = None
    own_vae: bool = True
    named: Path | None = None
    is_own: bool = False
    _paths: list[Path] = field(default_factory=list)
    _supplied: dict[tuple[Path, Path], dict[str, Any]] = field(default_factory=dict)

    def of(self, expert: ExpertSource) -> Companions:
        """Return the same for one expert, with its own settings in the recipe."""
        return replace(
            self,
            config=expert.config or self.config,
            prediction_type=expert.prediction_type,
            named=Path(expert.source).expanduser(),
            is_own=expert.config is not None,
        )

    def config_for(self, path: Path, shapes: Shapes, prediction_type: str | None) -> Path:
        """Return the given configuration, or the one found from tensors, or the fallback."""
        if self.config is not None:
            config = described_by(self.config)
        else:
            try:
                found = config_of(shapes, path, prediction_type, own_vae=self.own_vae)
                return found if isinstance(found, Path) else config_folder(found)
            except Ambiguous:
                raise
            except AfaError:
                kind = kind_name(shapes)
                if self.fallback is None or kind not in (
                    None,
                    described_kind(self.fallback).name,
                ):
                    raise
                config = described_by(self.fallback)
        account(shapes, config, path, own_vae=self.own_vae)
        return config

    def text_encoder(self, name: str, config: Path) -> PreTrainedModel | None:
        """Load a text encoder from the first part that has it; None if there is none."""
        for path in self._located():
            if (path, config) not in self._supplied:
                self._supplied[path, config] = load_fitting_encoders(path, config, self.torch_dtype)
            if name in self._supplied[path, config]:
                return self._supplied[path, config][name]
        return None

    def supplies_autoencoder(self, config: Path) -> bool:
        """Whether a part has an autoencoder of the kind; it is not loaded."""
        return any(has_autoencoder(place, config) for place in self.places())

    def vae(self, config: Path) -> tuple[AutoencoderKL, ExpertReference] | None:
        """Load an autoencoder from the first part that has one of the kind; else None."""
        for number, path in enumerate(self._located()):
            if has_autoencoder(path, config):
                part = self.parts[number]
                return load_vae(part, config=config, torch_dtype=self.torch_dtype)
        return None

    def require_parts(self) -> None:
        """Check that all parts exist and are complete, even if no file needs them.

        Raises:
            AfaError: see `afa.loading.weights.weight_files`.
        """
        for place in self.places():
            if place.is_file():
                check_safetensors(place)
            weight_files(place)

    def places(self) -> Iterator[Path]:
        """Yield the local paths of the parts."""
        for part in map(ExpertSource.of, self.parts):
            yield locate(part.source, part.revision, what="Part")

    def _located(self) -> list[Path]:
        """Return the local paths of the parts; on first use, check their hashes."""
        if not self._paths:
            for part, path in zip(map(ExpertSource.of, self.parts), self.places(), strict=True):
                digest = hash_file(path) if path.is_file() else hash_pipeline(path)
                reference = refer(part, path, digest)
                require_hash("Part", reference, part.sha256)
                self._paths.append(path)
                self.references.append(reference)
        return self._paths


def described_by(config: str | Path) -> Path:
    """Return the folder of a local or bundled configuration.

    Raises:
        AfaError: if it does not exist or is not a pipeline folder.
    """
    if str(config) in configs() and not Path(config).exists():
        return config_folder(str(config))
    folder = Path(config).expanduser()
    place = folder / "model_index.json"
    if place.is_file():
        check_folder(folder)
    index = read_json(place) if place.is_file() else {}
    needed = ["model_index.json", *(name for name in parts_of(index) if name not in _NOT_USED)]
    missing = [name for name in needed if not (folder / name).exists()]
    if missing:
        raise AfaError(
            "AFA-LOAD-073",
            f"The configuration folder '{folder}' lacks {', '.join(missing)}; config must be a "
            f"diffusers pipeline (without weights), or one of {', '.join(configs())}.",
        )
    described_kind(folder)
    return folder


def describe_expert(path: Path, companions: Companions) -> Described:
    """Find the pipeline folder that describes an expert, and what the expert predicts.

    Args:
        companions: the configuration of files, and the recipe's settings of this expert.

    Raises:
        AfaError: if a file is a LoRA, quantised in an unknown way or of an unknown kind, has unused
            tensors or contradictory evidence; if the configuration folder is incomplete; or if the
            recipe sets `config` for a folder.
    """
    if path.is_dir():
        if companions.is_own:
            raise AfaError(
                "AFA-LOAD-074",
                f"The recipe sets config = {companions.config} for the folder "
                f"'{companions.named}'; config is for single files. Remove it, or name a file.",
            )
        asked = companions.prediction_type
        prediction = None if asked is None else decide(path, path, asked=asked, is_named=True)
        return Described(path, prediction)
    shapes = model_shapes(path)
    refuse_lora(shapes, path)
    require_family(path, shapes)
    # a pickle is read from a copy; its `.yaml` is beside the original
    named = companions.named if companions.named and companions.named.is_file() else None
    evidence = evidence_of(path, shapes, beside=named)
    stated = next((each.type for each in evidence if each.type is not None), None)
    asked, is_named = companions.prediction_type, companions.config is not None
    config = companions.config_for(path, shapes, asked or stated)
    return Described(config, decide(path, config, evidence, asked=asked, is_named=is_named))


def require_supplied(path: Path, config: Path, companions: Companions) -> list[str]:
    """Check that a file has a denoiser, and that it or a part has all required text encoders.

    Only headers and configurations are read.

    Returns: all parts that the file lacks.

    Raises:
        AfaError: if the denoiser or a required text encoder is missing.
    """
    kind, missing = described_kind(config), missing_parts(model_shapes(path), config)
    if kind.denoiser in missing:
        raise AfaError(
            "AFA-LOAD-076",
            f"'{path}' has no denoiser in the layout of {kind.name}; a single file must have one. "
            "List text encoders under parts, and set an autoencoder as vae.",
        )
    absent = {name for name in missing if name.startswith("text_encoder")}
    if absent:
        absent -= {n for place in companions.places() for n in fitting_encoders(place, config)}
    files = layout_of(kind, path)
    wanted = [name for name in missing if name in absent - files.optional]
    if wanted:
        common = files.common_names
        named = [f"{name} ({common[name]})" if name in common else name for name in wanted]
        raise AfaError(
            "AFA-LOAD-077",
            f"'{path}' lacks the text encoders {', '.join(named)}. Add files or a diffusers folder "
            "with them under parts.",
        )
    return missing


def load_single_file(
    path: Path, described: Described, companions: Companions, *, with_vae: bool = True
) -> dict[str, Any]:
    """Load a single file's components and supplied ones; the autoencoder may still be missing.

    Returns: its components by name.

    Raises:
        AfaError: if the file is damaged, or a required part is not supplied.
    """
    config = described.config
    missing = require_supplied(path, config, companions)
    encoders = [name for name in missing if name.startswith("text_encoder")]
    parts: dict[str, Any] = {name: companions.text_encoder(name, config) for name in encoders}
    absent = [name for name, encoder in parts.items() if encoder is None]
    parts |= {name.replace("text_encoder", "tokenizer"): None for name in absent}
    named = parts_of(read_json(config / "model_index.json"))
    inside = [n for n in described_kind(config).file_parts if n in named and n not in missing]
    if not with_vae and "vae" in inside:
        inside.remove("vae")
    with loading_model(path, f"Use a complete checkpoint of the family of '{config}'."):
        parts = {"vae": None, **parts, **read_parts(path, inside, config, companions.torch_dtype)}
        for name, class_name in named.items():
            if name.startswith("tokenizer") and parts.get(name, 0) is not None:
                parts[name] = load_tokenizer(config / name, class_name)
        parts["scheduler"] = scheduler_of(config, described.prediction)
    return parts
