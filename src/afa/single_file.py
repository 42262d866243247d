"""Single `.safetensors` files in the layout of the original codes, read without a hub."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
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
from afa.files import read_json
from afa.kinds import kind_of
from afa.layouts import (
    COMMON_NAMES,
    PARTS,
    config_folder,
    config_of,
    configs,
    missing_parts,
    refuse_lora,
)
from afa.sources import ExpertReference, locate, refer, require_hash
from afa.weights import hash_expert, hash_file, refuse_quantised, tensor_shapes

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from diffusers import AutoencoderKL
    from transformers import PreTrainedModel

    from afa.layouts import Shapes

#: files work without it, with a part of the text's meaning
_OPTIONAL = {("Stable Diffusion 3", "text_encoder_3")}
_NO_NEED = ("safety_checker", "feature_extractor", "image_encoder")


@dataclass
class Companions:
    """What single files leave out: their configuration, text encoders, an autoencoder.

    Attributes:
        config: a diffusers folder that describes the files, whose weights are not read, or the name
            of a shipped one; None tells it from each file's tensors.
        fallback: a folder for files that no shipped configuration fits.
        parts: folders, files or hub ids that lend the text encoders and the autoencoder.
        revisions: of hub ids, one for each of the parts.
        hashes: that the parts must have; None takes any.
        torch_dtype: of weights.
        references: of the parts, once they were read.
    """

    torch_dtype: torch.dtype
    config: str | Path | None = None
    fallback: Path | None = None
    parts: Sequence[str | Path] = ()
    revisions: Sequence[str | None] = ()
    hashes: Sequence[str | None] = ()
    references: list[ExpertReference] = field(default_factory=list)
    _lent: dict[tuple[str, Path], Any] = field(default_factory=dict)

    def config_for(self, path: Path, shapes: Shapes) -> Path:
        """The folder that describes a file.

        Raises:
            AfaError: a folder that is incomplete, or a file of no known kind.
        """
        if self.config is not None:
            return described_by(self.config)
        try:
            name = config_of(shapes, path)
        except AfaError:
            if self.fallback is None:
                raise
            return described_by(self.fallback)
        folder = config_folder(name)
        return self.fallback if self.fallback and _fits(self.fallback, folder) else folder

    def text_encoder(self, name: str, config: Path) -> PreTrainedModel | None:
        """A text encoder of this name from the first part that has it; None where none does."""
        if (name, config) not in self._lent:
            self._lent[name, config] = next(
                filter(None, (_lend(path, name, config, self) for path in self._paths())), None
            )
        return self._lent[name, config]

    def vae(self, config: Path) -> tuple[AutoencoderKL, ExpertReference] | None:
        """An autoencoder from the first part that has one; None where none does."""
        for source, path in zip(self.parts, self._paths(), strict=True):
            is_vae = path.is_file() and _has_vae(tensor_shapes(path))
            if is_vae or (path / "vae").is_dir():
                return load_vae(source, config=config, torch_dtype=self.torch_dtype)
        return None

    def _paths(self) -> list[Path]:
        """Where the parts are; their hashes are taken, and compared, the first time."""
        revisions = self.revisions or [None] * len(self.parts)
        paths = [locate(*named) for named in zip(self.parts, revisions, strict=True)]
        if len(self.references) < len(paths):
            hashes = self.hashes or [None] * len(paths)
            for source, path, revision, sha256 in zip(
                self.parts, paths, revisions, hashes, strict=True
            ):
                digest = hash_file(path) if path.is_file() else hash_expert(path)
                reference = refer(source, path, digest, revision)
                require_hash("Part", reference, sha256)
                self.references.append(reference)
        return paths


def described_by(config: str | Path) -> Path:
    """The folder of a configuration, local or shipped.

    Raises:
        AfaError: there is none, or it is no pipeline's.
    """
    if str(config) in configs() and not Path(config).exists():
        return config_folder(str(config))
    folder = Path(config).expanduser()
    place = folder / "model_index.json"
    index = read_json(place) if place.is_file() else {}
    needed = [
        name
        for name, entry in index.items()
        if isinstance(entry, list) and entry[:1] not in ([], [None]) and name not in _NO_NEED
    ]
    missing = [name for name in ("model_index.json", *needed) if not (folder / name).exists()]
    if missing:
        raise AfaError(
            f"The configuration folder '{folder}' must be a diffusers pipeline (weights are not "
            f"needed), or named as one of {', '.join(configs())}; it lacks {', '.join(missing)}."
        )
    return folder


def _fits(ours: Path, shipped: Path) -> bool:
    """Whether two folders describe pipelines of one kind."""
    kinds = [
        kind_of(str(read_json(folder / "model_index.json").get("_class_name")), folder)
        for folder in (ours, shipped)
    ]
    return kinds[0] is kinds[1]


def load_single_file(path: Path, companions: Companions) -> tuple[Path, dict[str, Any]]:
    """Load a single file's pipeline, with what others lend; an autoencoder may still be missing.

    Args:
        path: of the file.
        companions: what it may leave out.

    Returns: the folder that describes it, and its components by name.

    Raises:
        AfaError: a LoRA; a file of no known kind, damaged or quantised; or parts that nobody
            lends.
    """
    refuse_quantised(path)
    shapes = tensor_shapes(path)
    refuse_lora(shapes, path)
    config = companions.config_for(path, shapes)
    index = read_json(config / "model_index.json")
    kind = kind_of(str(index.get("_class_name")), config)
    if kind.name not in PARTS:
        raise AfaError(
            f"Single files are read of {', '.join(PARTS)}; '{path}' is described as a {kind.name} "
            "model. Save it as a diffusers folder."
        )
    lent: dict[str, Any] = {}
    missing = missing_parts(shapes, config)
    for name in missing:
        lent[name] = None if name == "vae" else companions.text_encoder(name, config)
    without = [name for name in missing if lent[name] is None and name != "vae"]
    for name in [name for name in without if (kind.name, name) in _OPTIONAL]:
        without.remove(name)
        lent[name.replace("text_encoder", "tokenizer")] = None
    if kind.denoiser in without:
        raise AfaError(
            f"A single file must hold a denoiser; '{path}' has none in the layout of {kind.name}. "
            "Is it a text encoder or an autoencoder? Name it under parts or vae."
        )
    if without:
        named = [f"{name}{_common_name(kind.name, name)}" for name in without]
        raise AfaError(
            f"An expert must have its text encoders; '{path}' lacks {', '.join(named)}. Name files "
            "or a diffusers folder that have them: parts=[...]."
        )
    with loading_model(path, f"Is it a whole checkpoint of the family that '{config}' describes?"):
        parts = _read(path, config, lent, companions.torch_dtype)
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                _finish(part, name, path)
    return config, parts


def _read(
    path: Path, config: Path, given: dict[str, Any], torch_dtype: torch.dtype
) -> dict[str, Any]:
    """The components of a file as the library reads it, without a hub; `given` ones as they are."""
    index = read_json(config / "model_index.json")
    pipeline_class = getattr(diffusers, str(index["_class_name"]))
    taken = inspect.signature(pipeline_class.__init__).parameters
    off = {"safety_checker": None, "requires_safety_checker": False}
    pipeline = pipeline_class.from_single_file(
        str(path),
        config=str(config),
        torch_dtype=torch_dtype,
        local_files_only=True,
        **{name: value for name, value in off.items() if name in taken},
        **given,
    )
    return pipeline.components


def _finish(part: nn.Module, name: str, path: Path) -> None:
    """Refuse gaps; and switch off the dropout that the library leaves on in T5."""
    empty = [key for key, p in part.named_parameters() if p.is_meta]
    require_complete([f"{name}.{key}" for key in empty], path)
    part.eval()


def _common_name(kind: str, part: str) -> str:
    name = COMMON_NAMES.get((kind, part))
    return "" if name is None else f" ({name})"


# -- what others lend -------------------------------------------------------------------------


def _lend(path: Path, name: str, config: Path, companions: Companions) -> Any:
    """A text encoder from a folder, from a whole single file, or from a file of its own."""
    index = read_json(config / "model_index.json")
    class_name = index[name][1]
    if path.is_dir():
        theirs = read_json(path / "model_index.json")
        if theirs.get(name, [None])[0] is None or not _fits(path, config):
            return None
        with loading_model(path):
            return load_text_encoder(path / name, theirs[name][1], companions.torch_dtype)
    refuse_quantised(path)
    shapes = tensor_shapes(path)
    if name not in missing_parts(shapes, config):
        parts = {other: None for other in PARTS[_kind_name(config)] if other != name}
        with loading_model(path):
            encoder = _read(path, config, parts, companions.torch_dtype)[name]
            _finish(encoder, name, path)
            return encoder
    width = _encoder_width(shapes)
    settings = read_json(config / name / "config.json")
    if width is None or width != settings.get("hidden_size", settings.get("d_model")):
        return None
    if ("shared.weight" in shapes) != class_name.startswith("T5"):
        return None
    with loading_model(path):
        encoder_class = library_class(transformers, class_name, transformers.PreTrainedModel)
        encoder, info = encoder_class.from_pretrained(
            None,
            config=encoder_class.config_class.from_pretrained(config / name),
            state_dict=load_file(path),
            dtype=companions.torch_dtype,
            output_loading_info=True,
        )
        require_complete(info["missing_keys"], path)
        return encoder.eval()


def _kind_name(config: Path) -> str:
    index = read_json(config / "model_index.json")
    return kind_of(str(index.get("_class_name")), config).name


def _encoder_width(shapes: Shapes) -> int | None:
    """The width of the text encoder that a file of its own holds, in transformers' layout."""
    for key in ("text_model.embeddings.token_embedding.weight", "shared.weight"):
        if key in shapes:
            return shapes[key][1]
    return None


def _has_vae(shapes: Shapes) -> bool:
    bare = ("decoder.conv_in.weight", "encoder.conv_in.weight")
    starts = ("", "vae.", "first_stage_model.")
    return any(f"{start}{key}" in shapes for start in starts for key in bare)
