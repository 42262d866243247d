"""Parts that other files and folders supply to a single file that leaves them out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa.errors import AfaError
from afa.files import parts_of, read_json
from afa.loading.components import load_text_encoder, loading_model
from afa.loading.single_file.accounting import account, account_part
from afa.loading.single_file.conversion import converted
from afa.loading.single_file.identify import described_kind, kind_name, missing_parts
from afa.loading.single_file.layout import harmless, layout_of
from afa.loading.single_file.parts import encoder_from, read_parts, read_tensors, vae_names
from afa.loading.weights import refuse_quantised, tensor_shapes

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from afa.denoisers import PipelineKind
    from afa.loading.single_file.identify import Shapes


def fitting_encoders(path: Path, config: Path) -> list[str]:
    """The names of the text encoders that a part has, and that fit what a folder describes.

    Headers and configurations alone are read.

    Args:
        path: of the part, a folder or a file.
        config: the pipeline folder that describes the file that needs them.
    """
    named = parts_of(read_json(config / "model_index.json"))
    wanted = [name for name in named if name.startswith("text_encoder")]
    widths = {name: _width(read_json(config / name / "config.json")) for name in wanted}
    if path.is_dir():
        theirs = parts_of(read_json(path / "model_index.json"))
        return [
            name
            for name in wanted
            if theirs.get(name) == named[name]
            and _width(read_json(path / name / "config.json")) == widths[name]
        ]
    refuse_quantised(path)
    shapes = tensor_shapes(path)
    missing = missing_parts(shapes, config)
    inside = [name for name in wanted if name not in missing]
    return inside or [n for n in wanted if _bare_width(shapes, named[n]) == widths[n]]


def load_fitting_encoders(path: Path, config: Path, dtype: torch.dtype) -> dict[str, Any]:
    """These text encoders, by name."""
    names = fitting_encoders(path, config)
    if path.is_dir():
        theirs = parts_of(read_json(path / "model_index.json"))
        with loading_model(path):
            return {name: load_text_encoder(path / name, theirs[name], dtype) for name in names}
    shapes = tensor_shapes(path)
    if set(names) & set(missing_parts(shapes, config)):  # a file of one text encoder
        with loading_model(path):
            return {name: _bare_encoder(path, name, config, dtype) for name in names}
    if names:
        account(shapes, config, path, parts=names)
    with loading_model(path):
        return read_parts(path, names, config, dtype) if names else {}


def _width(settings: dict[str, Any]) -> Any:
    """Of a text encoder, by its configuration."""
    return settings.get("hidden_size", settings.get("d_model"))


def _bare_width(shapes: Shapes, class_name: str) -> int | None:
    """The width of the text encoder that a file of its own holds, in transformers' layout."""
    is_t5 = class_name.startswith("T5")
    key = "shared.weight" if is_t5 else "text_model.embeddings.token_embedding.weight"
    return shapes[key][1] if len(shapes.get(key, ())) == 2 else None


def _bare_encoder(path: Path, part: str, config: Path, dtype: torch.dtype) -> Any:
    """A text encoder from a file of its own, every tensor of which is accounted for."""
    shapes, class_name = tensor_shapes(path), parts_of(read_json(config / "model_index.json"))[part]
    names = {name: name for name in shapes if harmless(name) is None}
    account_part(part, names, shapes, config, path)
    state = converted(part, read_tensors(path, names), config)
    return encoder_from(state, class_name, config / part, path, dtype)


def has_autoencoder(path: Path, config: Path) -> bool:
    """Whether a part has an autoencoder of the kind that a folder describes."""
    kind = described_kind(config).name
    if path.is_dir():
        return (path / "vae").is_dir() and described_kind(path).name == kind
    shapes = tensor_shapes(path)
    return kind_name(shapes) in (None, kind) and bool(vae_names(shapes))


def require_denoiser(path: Path, missing: Sequence[str], kind: PipelineKind) -> None:
    """Refuse a file without a denoiser.

    Args:
        path: of the file.
        missing: the parts that it lacks.
        kind: of its pipeline.

    Raises:
        AfaError: the denoiser is among them.
    """
    if kind.denoiser in missing:
        raise AfaError(
            "AFA-LOAD-076",
            f"A single file must hold a denoiser; '{path}' has none in the layout of {kind.name}. "
            "Is it a text encoder or an autoencoder? Name it under parts or vae.",
        )


def require_encoders(path: Path, kind: PipelineKind, absent: Sequence[str]) -> None:
    """Refuse a file without its text encoders, but for optional ones.

    Args:
        path: of the file.
        kind: of its pipeline.
        absent: the text encoders that neither it nor a part has.

    Raises:
        AfaError: names those that are needed.
    """
    files = layout_of(kind, path)
    wanted = [name for name in absent if name not in files.optional]
    if wanted:
        common = [files.common_names.get(name) for name in wanted]
        named = [
            name if known is None else f"{name} ({known})"
            for name, known in zip(wanted, common, strict=True)
        ]
        raise AfaError(
            "AFA-LOAD-077",
            f"An expert must have its text encoders; '{path}' lacks {', '.join(named)}. Name "
            "files or a diffusers folder that have them: parts=[...].",
        )


def require_autoencoder(source: str | Path, *, is_there: bool) -> None:
    """Refuse a file whose pictures nothing decodes.

    Args:
        source: of the file, as it was named.
        is_there: whether it, or a part, has an autoencoder.

    Raises:
        AfaError: there is none.
    """
    if not is_there:
        raise AfaError(
            "AFA-LOAD-078",
            f"An ensemble must have an autoencoder; '{source}' leaves it out. Name one: "
            "vae=FOLDER or FILE.",
        )
