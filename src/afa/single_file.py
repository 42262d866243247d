"""Single `.safetensors` files in the layout of the original codes, read without a hub."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from afa.components import (
    library_class,
    load_text_encoder,
    load_vae,
    loading_model,
    require_complete,
)
from afa.errors import AfaError
from afa.files import parts_of, read_json
from afa.kinds import kind_of
from afa.layouts import (
    COMMON_NAMES,
    PARTS,
    Ambiguous,
    config_folder,
    config_of,
    configs,
    kind_name,
    missing_parts,
    refuse_lora,
)
from afa.sources import ExpertReference, locate, refer, require_hash
from afa.trust.folders import check_folder
from afa.weights import hash_file, hash_pipeline, refuse_quantised, tensor_shapes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffusers import AutoencoderKL
    from transformers import PreTrainedModel

    from afa.kinds import Kind
    from afa.layouts import Shapes

#: left out of many files of that kind, which then draw without it
OPTIONAL = {("Stable Diffusion 3", "text_encoder_3")}
#: parts of pipelines that an ensemble does without
_NOT_USED = ("safety_checker", "feature_extractor", "image_encoder")
_PROJECTION = "text_projection.weight"


@dataclass
class Companions:
    """What single files leave out: their configuration, text encoders, an autoencoder.

    Attributes:
        torch_dtype: of weights.
        config: a diffusers folder that describes the files, whose weights are not read, or the name
            of a shipped one; None tells it from each file's tensors.
        fallback: a folder for files of its kind that no shipped configuration fits.
        parts: folders, files or hub ids that lend the text encoders and the autoencoder.
        revisions: of hub ids, one for each of the parts.
        hashes: that the parts must have; None takes any.
        references: of the parts, once they were read.
    """

    torch_dtype: torch.dtype
    config: str | Path | None = None
    fallback: Path | None = None
    parts: Sequence[str | Path] = ()
    revisions: Sequence[str | None] = ()
    hashes: Sequence[str | None] = ()
    references: list[ExpertReference] = field(default_factory=list)
    _paths: list[Path] = field(default_factory=list)
    _lent: dict[tuple[Path, Path], dict[str, Any]] = field(default_factory=dict)

    def config_for(self, path: Path, shapes: Shapes) -> Path:
        """The folder that describes a file.

        Raises:
            AfaError: a folder that is incomplete, or a file of no known kind.
        """
        if self.config is not None:
            return described_by(self.config)
        try:
            return config_folder(config_of(shapes, path))
        except Ambiguous:
            raise
        except AfaError:
            kind = kind_name(shapes)
            if self.fallback is None or kind not in (None, _kind(self.fallback).name):
                raise
            return described_by(self.fallback)

    def text_encoder(self, name: str, config: Path) -> PreTrainedModel | None:
        """A text encoder of this name from the first part that has it; None where none does."""
        for path in self._located():
            if (path, config) not in self._lent:
                self._lent[path, config] = _text_encoders(path, config, self.torch_dtype)
            if name in self._lent[path, config]:
                return self._lent[path, config][name]
        return None

    def vae(self, config: Path) -> tuple[AutoencoderKL, ExpertReference] | None:
        """An autoencoder from the first part of the kind that has one; None where none does."""
        for number, path in enumerate(self._located()):
            if _has_vae(path, config):
                revision = self.revisions[number] if self.revisions else None
                return load_vae(
                    self.parts[number],
                    revision=revision,
                    config=config,
                    torch_dtype=self.torch_dtype,
                )
        return None

    def _located(self) -> list[Path]:
        """Where the parts are; the first time their hashes are taken and compared."""
        if not self._paths and self.parts:
            nothing: Sequence[None] = [None] * len(self.parts)
            rows = zip(self.parts, self.revisions or nothing, self.hashes or nothing, strict=True)
            for source, revision, sha256 in rows:
                path = locate(source, revision)
                digest = hash_file(path) if path.is_file() else hash_pipeline(path)
                reference = refer(source, path, digest, revision)
                require_hash("Part", reference, sha256)
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
            f"The configuration folder '{folder}' must be a diffusers pipeline (weights are not "
            f"needed), or named as one of {', '.join(configs())}; it lacks {', '.join(missing)}."
        )
    _kind(folder)
    return folder


def _kind(folder: Path) -> Kind:
    """Of the pipeline that a folder describes."""
    index = read_json(folder / "model_index.json")
    return kind_of(str(index.get("_class_name")), folder)


def config_of_expert(path: Path, companions: Companions) -> Path:
    """The pipeline's folder that describes an expert: itself, or what a file's tensors tell.

    Raises:
        AfaError: a file that is a LoRA, quantised, or of no known kind.
    """
    if path.is_dir():
        return path
    refuse_quantised(path)
    shapes = tensor_shapes(path)
    refuse_lora(shapes, path)
    return companions.config_for(path, shapes)


def load_single_file(
    path: Path, companions: Companions, *, with_vae: bool = True
) -> tuple[Path, dict[str, Any]]:
    """Load a single file's pipeline, with what others lend; an autoencoder may still be missing.

    Args:
        path: of the file.
        companions: what it may leave out.
        with_vae: whether the file's autoencoder is read.

    Returns: the folder that describes it, and its components by name.

    Raises:
        AfaError: a LoRA; a file of no known kind, damaged or quantised; or parts that nobody
            lends.
    """
    refuse_quantised(path)
    shapes = tensor_shapes(path)
    refuse_lora(shapes, path)
    config = companions.config_for(path, shapes)
    kind = _kind(config)
    if kind.name not in PARTS:
        raise AfaError(
            f"Single files are read of {', '.join(PARTS)}; '{path}' is described as a {kind.name} "
            "model. Save it as a diffusers folder."
        )
    missing = missing_parts(shapes, config)
    if kind.denoiser in missing:
        raise AfaError(
            f"A single file must hold a denoiser; '{path}' has none in the layout of {kind.name}. "
            "Is it a text encoder or an autoencoder? Name it under parts or vae."
        )
    given = _lent_encoders(path, missing, config, companions)
    if "vae" in missing or not with_vae:
        given["vae"] = None
    with loading_model(path, f"Is it a whole checkpoint of the family that '{config}' describes?"):
        return config, _read(path, config, given, companions.torch_dtype)


def _lent_encoders(
    path: Path, missing: Sequence[str], config: Path, companions: Companions
) -> dict[str, Any]:
    """The text encoders that a file leaves out; None, with its tokenizer, for an optional one.

    Raises:
        AfaError: one that is needed and that nobody lends.
    """
    kind, given, wanted = _kind(config).name, {}, []
    for name in [name for name in missing if name.startswith("text_encoder")]:
        given[name] = companions.text_encoder(name, config)
        if given[name] is None and (kind, name) in OPTIONAL:
            given[name.replace("text_encoder", "tokenizer")] = None
        elif given[name] is None:
            common = COMMON_NAMES.get((kind, name))
            wanted.append(name if common is None else f"{name} ({common})")
    if wanted:
        raise AfaError(
            f"An expert must have its text encoders; '{path}' lacks {', '.join(wanted)}. Name "
            "files or a diffusers folder that have them: parts=[...]."
        )
    return given


def _read(
    path: Path, config: Path, given: dict[str, Any], torch_dtype: torch.dtype
) -> dict[str, Any]:
    """The components of a file as the library reads it, without a hub; `given` ones as they are.

    Raises:
        AfaError: parameters that the file lacks.
    """
    index = read_json(config / "model_index.json")
    pipeline_class = getattr(diffusers, str(index["_class_name"]))
    taken = inspect.signature(pipeline_class.__init__).parameters
    off = {**dict.fromkeys(_NOT_USED), "requires_safety_checker": False}
    parts = pipeline_class.from_single_file(
        str(path),
        config=str(config),
        torch_dtype=torch_dtype,
        local_files_only=True,
        **{name: value for name, value in off.items() if name in taken},
        **given,
    ).components
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            empty = [f"{name}.{key}" for key, p in part.named_parameters() if p.is_meta]
            require_complete(empty, path)
            part.eval()  # the library leaves T5's dropout on
    return parts


# -- what others lend -------------------------------------------------------------------------


def _text_encoders(path: Path, config: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The text encoders that a part has, and that fit what a folder describes, by name."""
    named = parts_of(read_json(config / "model_index.json"))
    wanted = [name for name in named if name.startswith("text_encoder")]
    widths = {name: _width(read_json(config / name / "config.json")) for name in wanted}
    if path.is_dir():
        theirs = parts_of(read_json(path / "model_index.json"))
        with loading_model(path):
            return {
                name: load_text_encoder(path / name, theirs[name], dtype)
                for name in wanted
                if theirs.get(name) == named[name]
                and _width(read_json(path / name / "config.json")) == widths[name]
            }
    refuse_quantised(path)
    shapes = tensor_shapes(path)
    missing = missing_parts(shapes, config)
    inside = [name for name in wanted if name not in missing]
    with loading_model(path):
        if inside:
            others = [name for name in PARTS[_kind(config).name] if name not in inside]
            read = _read(path, config, dict.fromkeys(others), dtype)
            return {name: read[name] for name in inside}
        return {
            name: _bare_encoder(path, named[name], config / name, dtype)
            for name in wanted
            if _bare_width(shapes, named[name]) == widths[name]
        }


def _width(settings: dict[str, Any]) -> Any:
    """Of a text encoder, by its configuration."""
    return settings.get("hidden_size", settings.get("d_model"))


def _bare_width(shapes: Shapes, class_name: str) -> int | None:
    """The width of the text encoder that a file of its own holds, in transformers' layout."""
    is_t5 = class_name.startswith("T5")
    key = "shared.weight" if is_t5 else "text_model.embeddings.token_embedding.weight"
    return shapes[key][1] if len(shapes.get(key, ())) == 2 else None


def _bare_encoder(path: Path, class_name: str, config: Path, dtype: torch.dtype) -> Any:
    """A text encoder from a file of its own."""
    encoder_class = library_class(transformers, class_name, transformers.PreTrainedModel)
    settings = encoder_class.config_class.from_pretrained(config)
    state = load_file(path)
    is_projecting = class_name.endswith("WithProjection")
    if is_projecting and settings.projection_dim == settings.hidden_size:
        # the CLIP-L that everyone has with Stable Diffusion 3 leaves it out, as whole files do
        state.setdefault(_PROJECTION, torch.eye(settings.hidden_size))
    encoder, info = encoder_class.from_pretrained(
        None, config=settings, state_dict=state, dtype=dtype, output_loading_info=True
    )
    require_complete(info["missing_keys"], path)
    return encoder.eval()


def _has_vae(path: Path, config: Path) -> bool:
    """Whether a part has an autoencoder of the kind that a folder describes."""
    kind = _kind(config).name
    if path.is_dir():
        return (path / "vae").is_dir() and _kind(path).name == kind
    shapes = tensor_shapes(path)
    bare = ("decoder.conv_in.weight", "encoder.conv_in.weight")
    starts = ("", "vae.", "first_stage_model.")
    return kind_name(shapes) in (None, kind) and any(
        f"{start}{key}" in shapes for start in starts for key in bare
    )
