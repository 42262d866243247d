"""Files of weights: which ones make a model, are they whole, and their hashes."""

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
from afa.loading.trust.headers import Header, check_header
from afa.machine.damaged import loading as loading
from afa.machine.hashes import hash_file

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

#: the shape of every tensor of a file, by name
Shapes = Mapping[str, tuple[int, ...]]

T = TypeVar("T")

_headers = FileCache()

# how programs call what belongs to a quantised weight
_SCALES = (
    *(".scale_weight", ".scale_input", ".weight_scale", ".input_scale", ".weight_scale_inv"),
    *(".weight_scale_2", "scaled_fp8", ".comfy_quant", "._scale", "._data", ".SCB", ".absmax"),
    *(".quant_map", ".qweight", ".qzeros"),
)
#: endings of safetensors files, in small letters; the second is what ComfyUI's users call them
SAFETENSORS = frozenset({".safetensors", ".sft"})


def weights_in(folder: Path) -> tuple[str | None, list[Path]]:
    """The safetensors files of one component, and their variant (`fp16`) where only that is there.

    Several precisions of the same weights may lie side by side; the plain ones are taken.

    Raises:
        AfaError: there are none, or what lies beside them is refused; see `check_part`.
    """
    check_part(folder)
    variants: dict[str | None, list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        _, *middle, _ = file.name.split(".")
        variants.setdefault(middle[0].split("-")[0] if middle else None, []).append(file)
    if not variants:
        raise AfaError(
            "AFA-LOAD-101",
            f"An expert's weights must be safetensors; '{folder}' has none. Save it again with "
            "safe_serialization=True.",
        )
    variant = None if None in variants else sorted(map(str, variants))[0]
    return variant, variants[variant]


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that make an expert: the file itself, or denoiser and text encoders.

    Raises:
        AfaError: not a diffusers folder, or one that is refused, see `check_folder`; no
            safetensors in it, or one that is damaged.
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
            f"An expert's folder must be a diffusers pipeline with a model_index.json; "
            f"'{path}' has none. Save it with pipeline.save_pretrained(folder).",
        )
    for file in files:
        check_safetensors(file)
    return files


def check_safetensors(file: Path) -> Header:
    """Read a safetensors file's header, once for each state of it, and compare it with its length.

    Raises:
        AfaError: the file is no safetensors file, or it is cut short.
    """
    return Header(*_headers.get(file, lambda: tuple(_read_header(file))))


def _read_header(file: Path) -> Header:
    header = check_header(file)
    try:
        with safe_open(file, framework="pt") as opened:
            opened.keys()  # the library that will read it agrees
    except (SafetensorError, OSError) as error:
        raise AfaError(
            "AFA-LOAD-103",
            f"'{file}' must be a complete safetensors file, but reading its header says: {error}. "
            "Download or copy it again.",
        ) from error
    return header


def tensor_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a file's tensors, by name, from its header alone.

    Raises:
        AfaError: see `check_safetensors`.
    """
    return {name: tuple(entry["shape"]) for name, entry in check_safetensors(file).tensors.items()}


def tensor_dtypes(file: Path) -> dict[str, str]:
    """The kinds of a file's numbers as safetensors names them (`F16`, `I8`), by tensor.

    Raises:
        AfaError: see `check_safetensors`.
    """
    return {name: entry["dtype"] for name, entry in check_safetensors(file).tensors.items()}


def count_elements(files: Iterable[Path]) -> Counter[str]:
    """How many numbers files have of each type, as safetensors names it, from their headers.

    Raises:
        AfaError: see `check_safetensors`.
    """
    counts: Counter[str] = Counter()
    for file in files:
        for entry in check_safetensors(file).tensors.values():
            counts[entry["dtype"]] += prod(entry["shape"])
    return counts


def file_metadata(file: Path) -> dict[str, str]:
    """The texts that a safetensors file's header holds beside its tensors.

    Raises:
        AfaError: see `check_safetensors`.
    """
    return check_safetensors(file).metadata


def refuse_quantised(file: Path) -> None:
    """Refuse weights whose numbers mean nothing without a scale; see `is_quantised`.

    Raises:
        AfaError: names the first.
    """
    for name, kind in tensor_dtypes(file).items():
        if is_quantised(name, is_float=kind.startswith(("F", "BF"))):
            raise AfaError(
                "AFA-LOAD-104",
                f"Weights must be plain numbers; '{name}' in '{file}' is quantised ({kind}). Take "
                "the float16 or float32 version.",
            )


def is_quantised(name: str, *, is_float: bool) -> bool:
    """Whether a tensor is a scale of others, or one of integers that a scale belongs to."""
    is_scale = name.endswith(_SCALES)
    return is_scale or (name.endswith(".weight") and not is_float)


def hash_files(path: Path, files: Iterable[Path]) -> str:
    """SHA-256 of a single file as it is; of a folder that of the lines `<sha256>  <relative path>`.

    The lines are sorted by path; they are what `sha256sum` prints.
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
    """SHA-256 of all that decides a model's pictures: of a file, or of a folder's parts.

    Unlike `hash_expert` it sees the autoencoder, the tokenizer and the scheduler, too.
    """
    weights = weight_files(path)
    folders = [path / "vae", path / "scheduler", *sorted(path.glob("tokenizer*"))]
    return hash_files(path, [*weights, *(file for part in folders for file in _files_in(part))])


def hash_vae(path: Path) -> str:
    """SHA-256 of an autoencoder, in any of the places that `load_vae` reads."""
    folder = path / "vae" if (path / "vae").is_dir() else path
    return hash_files(path, [] if path.is_file() else weights_in(folder)[1])


def _files_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*") if file.is_file())


def keep_no_words(tokenizer: T) -> T:
    """A tokenizer of transformers without the cache of words that it has beneath.

    tokenizers 0.23 loses that cache when the tokenizer goes: kilobytes for each that was used,
    over a megabyte after ten thousand words. It saves some microseconds a caption.
    """
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    resize = getattr(model, "_resize_cache", None)
    if resize is not None:
        resize(0)
    return tokenizer
