"""Single `.safetensors` files of one model, in whatever layout, read without a hub."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from afa.ensemble.references import ExpertReference
from afa.errors import AfaError
from afa.files import parts_of, read_json
from afa.loading.components import loading_model
from afa.loading.expert_source import AnySource, ExpertSource
from afa.loading.prediction import Prediction, decide, evidence_of, scheduler_of
from afa.loading.single_file.accounting import account
from afa.loading.single_file.autoencoder import load_vae
from afa.loading.single_file.identify import (
    Ambiguous,
    config_folder,
    config_of,
    configs,
    described_kind,
    kind_name,
    missing_parts,
    refuse_lora,
)
from afa.loading.single_file.parts import read_parts
from afa.loading.single_file.supplied import (
    fitting_encoders,
    has_autoencoder,
    load_fitting_encoders,
    require_denoiser,
    require_encoders,
)
from afa.loading.sources import locate, refer, require_hash
from afa.loading.trust.folders import check_folder
from afa.loading.weights import (
    hash_pipeline,
    keep_no_words,
    refuse_quantised,
    tensor_shapes,
    weight_files,
)
from afa.machine.hashes import hash_file
from afa.machine.library import library_class

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from diffusers import AutoencoderKL
    from transformers import PreTrainedModel

    from afa.denoisers.kinds import PredictionType
    from afa.loading.single_file.identify import Shapes

#: parts of pipelines that an ensemble does without
_NOT_USED = ("safety_checker", "feature_extractor", "image_encoder")


@dataclass(frozen=True)
class Described:
    """A model before it is loaded: the pipeline folder that describes it, and what it predicts.

    `prediction` is None where that folder's scheduler says it, and nothing else does.
    """

    config: Path
    prediction: Prediction | None = None


@dataclass
class Companions:
    """What single files leave out: their configuration, text encoders, an autoencoder.

    Attributes:
        torch_dtype: of weights.
        config: a diffusers folder that describes the files, whose weights are not read, or the name
            of a shipped one; None tells it from each file's tensors.
        fallback: a folder for files of its kind that no shipped configuration fits.
        parts: that supply the text encoders and the autoencoder.
        references: of the parts, once they were read.
        prediction_type: what the model predicts, see `afa.loading.prediction`; None where its file
            or its configuration says it.
        own_vae: whether a file's own autoencoder is to be used.
        named: the expert as it was named, beside which its `.yaml` is; see `of`.
        is_own: whether `config` is this expert's alone.
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
    _lent: dict[tuple[Path, Path], dict[str, Any]] = field(default_factory=dict)

    def of(self, expert: ExpertSource) -> Companions:
        """The same for one expert, with what a recipe says of it alone."""
        return replace(
            self,
            config=expert.config or self.config,
            prediction_type=expert.prediction_type,
            named=Path(expert.source).expanduser(),
            is_own=expert.config is not None,
        )

    def config_for(self, path: Path, shapes: Shapes) -> Path:
        """The folder that describes a file; see `describe`."""
        return self.describe(path, shapes).config

    def describe(self, path: Path, shapes: Shapes) -> Described:
        """What a file is, from its header, its metadata and a `.yaml` beside it.

        Raises:
            AfaError: a folder that is incomplete; a file of no known kind, with tensors that
                nothing uses, or that contradicts itself.
        """
        is_elsewhere = self.named is not None and self.named.is_file()
        evidence = evidence_of(path, shapes, beside=self.named if is_elsewhere else None)
        said = next((each.type for each in evidence if each.type is not None), None)
        config = self._config(path, shapes, self.prediction_type or said)
        prediction = decide(
            path,
            config,
            evidence,
            asked=self.prediction_type,
            is_named=self.config is not None,
        )
        return Described(config, prediction)

    def _config(self, path: Path, shapes: Shapes, prediction_type: str | None) -> Path:
        """The configuration that is named, that a file's tensors tell, or that is beside."""
        if self.config is not None:
            config = described_by(self.config)
        else:
            try:
                told = config_of(shapes, path, prediction_type, own_vae=self.own_vae)
                return told if isinstance(told, Path) else config_folder(told)
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
        """A text encoder of this name from the first part that has it; None where none does."""
        for path in self._located():
            if (path, config) not in self._lent:
                self._lent[path, config] = load_fitting_encoders(path, config, self.torch_dtype)
            if name in self._lent[path, config]:
                return self._lent[path, config][name]
        return None

    def supplied_encoders(self, config: Path) -> set[str]:
        """The names of the text encoders that the parts have, told without loading them."""
        return {name for place in self._places() for name in fitting_encoders(place, config)}

    def supplies_autoencoder(self, config: Path) -> bool:
        """Whether a part has an autoencoder of the kind, told without loading it."""
        return any(has_autoencoder(place, config) for place in self._places())

    def vae(self, config: Path) -> tuple[AutoencoderKL, ExpertReference] | None:
        """An autoencoder from the first part of the kind that has one; None where none does."""
        for number, path in enumerate(self._located()):
            if has_autoencoder(path, config):
                part = self.parts[number]
                return load_vae(part, config=config, torch_dtype=self.torch_dtype)
        return None

    def require_parts(self) -> None:
        """Refuse parts that are missing or damaged, whether or not a file asks for one of them.

        Raises:
            AfaError: see `afa.loading.weights.weight_files`.
        """
        for place in self._places():
            weight_files(place)

    def _places(self) -> Iterator[Path]:
        """Where the parts are."""
        for part in map(ExpertSource.of, self.parts):
            yield locate(part.source, part.revision, what="Part")

    def _located(self) -> list[Path]:
        """Where the parts are; the first time their hashes are taken and compared."""
        if not self._paths:
            for part, path in zip(map(ExpertSource.of, self.parts), self._places(), strict=True):
                digest = hash_file(path) if path.is_file() else hash_pipeline(path)
                reference = refer(part, path, digest)
                require_hash("Part", reference, part.sha256)
                self._paths.append(path)
                self.references.append(reference)
        return self._paths


def described_by(config: str | Path) -> Path:
    """The folder of a configuration, local or shipped.

    Raises:
        AfaError: there is none, or it is no pipeline's.
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
            f"The configuration folder '{folder}' must be a diffusers pipeline (weights are not "
            f"needed), or named as one of {', '.join(configs())}; it lacks {', '.join(missing)}.",
        )
    described_kind(folder)
    return folder


def describe_expert(path: Path, companions: Companions) -> Described:
    """The pipeline's folder that describes an expert, and what the expert predicts.

    Args:
        path: of a folder or a file.
        companions: what describes files, and what a recipe says of this expert.

    Raises:
        AfaError: a file that is a LoRA, quantised, or of no known kind, or a folder that a recipe
            describes by another.
    """
    if path.is_dir():
        if companions.is_own:
            raise AfaError(
                "AFA-LOAD-074",
                f"'{companions.named}' has config = {companions.config} in the recipe. A folder "
                "must describe itself; config is for single files. Leave it out, or name a file.",
            )
        asked = companions.prediction_type
        prediction = None if asked is None else decide(path, path, asked=asked, is_named=True)
        return Described(path, prediction)
    refuse_quantised(path)
    shapes = tensor_shapes(path)
    refuse_lora(shapes, path)
    return companions.describe(path, shapes)


def load_single_file(
    path: Path, described: Described, companions: Companions, *, with_vae: bool = True
) -> dict[str, Any]:
    """Load a single file's pipeline, with what others lend; an autoencoder may still be missing.

    Args:
        path: of the file.
        described: what it is; see `describe_expert`.
        companions: what it may leave out.
        with_vae: whether the file's autoencoder is read.

    Returns: its components by name.

    Raises:
        AfaError: a file that is damaged, or parts that nobody supplies.
    """
    config, shapes = described.config, tensor_shapes(path)
    kind = described_kind(config)
    missing = missing_parts(shapes, config)
    require_denoiser(path, missing, kind)
    parts: dict[str, Any] = _lent_encoders(path, missing, config, companions)
    named = parts_of(read_json(config / "model_index.json"))
    inside = [n for n in kind.file_parts if n in named and n not in missing]
    if not with_vae and "vae" in inside:
        inside.remove("vae")
    with loading_model(path, f"Is it a whole checkpoint of the family that '{config}' describes?"):
        parts = {"vae": None, **parts, **read_parts(path, inside, config, companions.torch_dtype)}
        for name, class_name in named.items():
            if name.startswith("tokenizer") and parts.get(name, 0) is not None:
                tokenizer_class = library_class(
                    transformers, class_name, transformers.PreTrainedTokenizerBase
                )
                parts[name] = keep_no_words(tokenizer_class.from_pretrained(config / name))
        parts["scheduler"] = scheduler_of(config, described.prediction)
    return parts


def _lent_encoders(
    path: Path, missing: Sequence[str], config: Path, companions: Companions
) -> dict[str, Any]:
    """The text encoders that a file leaves out; None, with its tokenizer, for an optional one.

    Raises:
        AfaError: one that is needed and that nobody supplies.
    """
    names = [name for name in missing if name.startswith("text_encoder")]
    given = {name: companions.text_encoder(name, config) for name in names}
    absent = [name for name, encoder in given.items() if encoder is None]
    require_encoders(path, described_kind(config), absent)
    return given | {name.replace("text_encoder", "tokenizer"): None for name in absent}
