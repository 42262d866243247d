"""Parts that other files and folders supply to a single file that lacks them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from afa.files import parts_of, read_json
from afa.loading.components import encoder_width, load_text_encoder, loading_model
from afa.loading.single_file.accounting import account, account_part
from afa.loading.single_file.conversion import converted
from afa.loading.single_file.identify import missing_parts
from afa.loading.single_file.layout import described_kind, harmless, kind_name
from afa.loading.single_file.packed.layout import model_shapes
from afa.loading.single_file.packed.read import read_tensors
from afa.loading.single_file.parts import encoder_from, read_parts, vae_names
from afa.loading.weights import check_safetensors

if TYPE_CHECKING:
    import torch

    from afa.loading.weights import Shapes

#: the embedding of CLIP in a separate file
_OF_CLIP = "text_model.embeddings.token_embedding.weight"


def fitting_encoders(path: Path, config: Path) -> list[str]:
    """Return the names of the text encoders in a part that fit a configuration.

    Only headers and configurations are read.

    Args:
        path: of the part, a folder or a file.
        config: the pipeline folder that describes the file that needs them.
    """
    named = parts_of(read_json(config / "model_index.json"))
    wanted = [name for name in named if name.startswith("text_encoder")]
    widths = {name: encoder_width(read_json(config / name / "config.json")) for name in wanted}
    if path.is_dir():
        theirs = parts_of(read_json(path / "model_index.json"))
        return [
            name
            for name in wanted
            if theirs.get(name) == named[name]
            and encoder_width(read_json(path / name / "config.json")) == widths[name]
        ]
    check_safetensors(path)  # GGUF files hold text encoders under other names
    shapes = model_shapes(path)
    missing = missing_parts(shapes, config)
    inside = [name for name in wanted if name not in missing]
    return inside or [n for n in wanted if _bare_width(shapes, named[n]) == widths[n]]


def load_fitting_encoders(path: Path, config: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Load the text encoders of `fitting_encoders`, by name."""
    names = fitting_encoders(path, config)
    if path.is_dir():
        theirs = parts_of(read_json(path / "model_index.json"))
        with loading_model(path):
            return {name: load_text_encoder(path / name, theirs[name], dtype) for name in names}
    shapes = model_shapes(path)
    if set(names) & set(missing_parts(shapes, config)):  # a file of one text encoder
        with loading_model(path):
            return {name: _bare_encoder(path, name, config, dtype) for name in names}
    if names:
        account(shapes, config, path, parts=names)
    with loading_model(path):
        return read_parts(path, names, config, dtype) if names else {}


def _bare_width(shapes: Shapes, class_name: str) -> int | None:
    """Return the embedding size of a text encoder in a separate file, in transformers' layout."""
    keys = {"T5": "shared.weight", "Qwen3Model": "model.embed_tokens.weight"}
    key = next((key for start, key in keys.items() if class_name.startswith(start)), _OF_CLIP)
    return shapes[key][1] if len(shapes.get(key, ())) == 2 else None


def _bare_encoder(path: Path, part: str, config: Path, dtype: torch.dtype) -> Any:
    """Load a text encoder from a separate file, whose tensors must all be used."""
    shapes, class_name = model_shapes(path), parts_of(read_json(config / "model_index.json"))[part]
    names = {name: name for name in shapes if harmless(name) is None}
    account_part(part, names, shapes, config, path)
    state = converted(part, read_tensors(path, names), config)
    return encoder_from(state, class_name, config / part, path, dtype)


def has_autoencoder(path: Path, config: Path) -> bool:
    """Whether a part has an autoencoder of the kind of a configuration folder."""
    kind = described_kind(config).name
    if path.is_dir():
        return (path / "vae").is_dir() and described_kind(path).name == kind
    shapes = model_shapes(path)
    return kind_name(shapes) in (None, kind) and bool(vae_names(shapes))
