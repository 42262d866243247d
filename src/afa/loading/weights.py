"""Weight files: which ones belong to a model, their headers and their hashes."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING, TypeVar

from safetensors import SafetensorError, safe_open

from afa.denoisers.kinds import component_in
from afa.errors import AfaError
from afa.files import FileCache, parts_of, read_json
from afa.loading.trust.folders import check_folder, check_part
from afa.loading.trust.gguf import check_gguf, is_gguf
from afa.loading.trust.headers import Header, check_header
from afa.machine.damaged import loading as loading
from afa.machine.hashes import hash_file

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

#: the shapes of all tensors of a file, by name
Shapes = Mapping[str, tuple[int, ...]]

T = TypeVar("T")

header_cache = FileCache()
#: separate, so that a GGUF file is never taken for a safetensors file
gguf_cache = FileCache()

# endings of tensor names that belong to quantised weights
_SCALES = (
    *(".scale_weight", ".scale_input", ".weight_scale", ".input_scale", ".weight_scale_inv"),
    *(".weight_scale_2", "scaled_fp8", ".comfy_quant", "._scale", "._data", ".SCB", ".absmax"),
    *(".quant_map", ".qweight", ".qzeros"),
)
#: suffixes of safetensors files, in lower case; the second is common among ComfyUI's users
SAFETENSORS = frozenset({".safetensors", ".sft"})
GGUF_SUFFIX = ".gguf"


def weights_in(folder: Path) -> tuple[str | None, list[Path]]:
    """Return the variant and the safetensors files of one component.

    If there are several variants of the same weights, such as `fp16`, the main one (None) is used.

    Raises:
        AfaError: if there are none, or other files in the folder are refused; see `check_part`.
    """
    check_part(folder)
    variants: dict[str | None, list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        _, *middle, _ = file.name.split(".")
        variants.setdefault(middle[0].split("-")[0] if middle else None, []).append(file)
    if not variants:
        raise AfaError(
            "AFA-LOAD-101",
            f"'{folder}' has no safetensors files; an expert's weights must be safetensors. Save "
            "the model again with safe_serialization=True.",
        )
    variant = None if None in variants else sorted(map(str, variants))[0]
    return variant, variants[variant]


def weight_files(path: Path) -> list[Path]:
    """Return the weight files of an expert: the file itself, or denoiser and text encoders.

    Raises:
        AfaError: if it is not a diffusers folder or is refused (see `check_folder`), or if
            files are missing or damaged.
    """
    if path.is_file():
        files = [path]
    elif (path / "model_index.json").is_file():
        check_folder(path)
        named = parts_of(read_json(path / "model_index.json"))
        parts: list[str] = [component_in(named)]
        parts += sorted(name for name in named if name.startswith("text_encoder"))
        files = [file for part in parts for file in weights_in(path / part)[1]]
    else:
        raise AfaError(
            "AFA-LOAD-102",
            f"'{path}' has no model_index.json; an expert's folder must be a diffusers pipeline. "
            "Save it with pipeline.save_pretrained(folder).",
        )
    for file in files:
        check_weights(file)
    return files


def check_weights(file: Path) -> Header:
    """Read and check the header of a safetensors or GGUF file; it is cached as below.

    Raises:
        AfaError: if the file is truncated, or of another format.
    """
    if is_gguf(file):
        return Header(*gguf_cache.get(file, lambda: tuple(check_gguf(file))))
    return check_safetensors(file)


def check_safetensors(file: Path) -> Header:
    """Read and check a safetensors file's header; it is cached until the file changes.

    Raises:
        AfaError: if the file is truncated or not a safetensors file.
    """
    return Header(*header_cache.get(file, lambda: tuple(_read_header(file))))


def _read_header(file: Path) -> Header:
    header = check_header(file)
    try:
        with safe_open(file, framework="pt") as opened:
            opened.keys()  # the library must accept the file, too
    except (SafetensorError, OSError) as error:
        raise AfaError(
            "AFA-LOAD-103",
            f"'{file}' is not a complete safetensors file: {error}. Download or copy it again.",
        ) from error
    return header


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a file's tensors by name, from its header alone.

    Raises:
        AfaError: see `check_weights`.
    """
    return {name: tuple(entry["shape"]) for name, entry in check_weights(file).tensors.items()}


def count_elements(files: Iterable[Path]) -> Counter[str]:
    """Count elements by data type (such as `F16`), from the files' headers.

    Raises:
        AfaError: see `check_weights`.
    """
    counts: Counter[str] = Counter()
    for file in files:
        for entry in check_weights(file).tensors.values():
            counts[entry["dtype"]] += prod(entry["shape"])
    return counts


def file_metadata(file: Path) -> dict[str, str]:
    """Return the metadata in the header of a weight file.

    Raises:
        AfaError: see `check_weights`.
    """
    return check_weights(file).metadata


def is_quantised(name: str, *, is_float: bool) -> bool:
    """Whether a tensor is a scale of quantised weights, or consists of integer weights."""
    is_scale = name.endswith(_SCALES)
    return is_scale or (name.endswith(".weight") and not is_float)


def hash_files(path: Path, files: Iterable[Path]) -> str:
    """SHA-256 of a single file; for a folder, of the lines `<sha256>  <relative path>`.

    The lines are sorted by path and have the format of `sha256sum`.
    """
    if path.is_file():
        return hash_file(path)
    lines = {file.relative_to(path).as_posix(): hash_file(file) for file in files}
    text = "".join(f"{digest}  {name}\n" for name, digest in sorted(lines.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def hash_expert(path: Path) -> str:
    """SHA-256 of an expert: of a file, or of a folder's denoiser and text encoders."""
    return hash_files(path, weight_files(path))


def hash_pipeline(path: Path) -> str:
    """SHA-256 of all files that affect a model's pictures: a single file, or parts of a folder.

    Unlike `hash_expert`, it includes the autoencoder, the tokenizer and the scheduler.
    """
    weights = weight_files(path)
    folders = [path / "vae", path / "scheduler", *sorted(path.glob("tokenizer*"))]
    return hash_files(path, [*weights, *(file for part in folders for file in _files_in(part))])


def hash_vae(path: Path) -> str:
    """SHA-256 of an autoencoder, in any layout that `load_vae` reads."""
    folder = path / "vae" if (path / "vae").is_dir() else path
    return hash_files(path, [] if path.is_file() else weights_in(folder)[1])


def _files_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*") if file.is_file())


def keep_no_words(tokenizer: T) -> T:
    """Disable the word cache of a transformers tokenizer.

    tokenizers 0.23 leaks that cache when a tokenizer is deleted: some kilobytes each, more than a
    megabyte after ten thousand words. The cache saves only microseconds per caption.
    """
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    resize = getattr(model, "_resize_cache", None)
    if resize is not None:
        resize(0)
    return tokenizer
