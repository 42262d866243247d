"""The header of a safetensors file, checked before anything is made of it.

Format: https://huggingface.co/docs/safetensors, "Format": eight bytes with the header's length,
the header as JSON, then the tensors' bytes without holes.
"""

from __future__ import annotations

import json
import math
import stat
from typing import TYPE_CHECKING, Any, NamedTuple

from afa.errors import AfaError

if TYPE_CHECKING:
    from pathlib import Path

#: bytes; the largest models that are published have 0.5 MB (Stable Diffusion XL) to 3 MB
MAX_HEADER = 16_000_000
#: tensors; a LoRA of every layer of Flux has some 3,000
MAX_TENSORS = 100_000
_MAX_DIMENSIONS = 16
#: what the format has, and how many bits one takes
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
_METADATA = "__metadata__"
#: the first bytes of a GGUF file, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
GGUF = b"GGUF"


class Header(NamedTuple):
    """What a safetensors file says of itself.

    Attributes:
        tensors: `dtype`, `shape` and `data_offsets` of every tensor, by name.
        metadata: the texts beside them.
        start: the byte of the file from which the offsets count.
    """

    tensors: dict[str, Any]
    metadata: dict[str, str]
    start: int


def check_header(file: Path) -> Header:
    """Read the header of a safetensors file and hold it against the file's length.

    Memory is taken for the header alone, and only after its declared length was held against the
    file's own and against `MAX_HEADER`.

    Raises:
        AfaError: says what is wrong with it.
    """
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            raise _Wrong("it is no regular file")
        with file.open("rb") as stream:
            length = _header_length(stream.read(8), found.st_size)
            content = stream.read(length)
        if len(content) < length:
            raise _Wrong("it ended while it was read")
        tensors, metadata = _parse(content)
        return Header(_tensors(tensors, found.st_size - 8 - length), metadata, 8 + length)
    except _IsGguf:
        raise AfaError(
            "AFA-LOAD-091",
            f"'{file}' is a GGUF file, whose weights are quantised for other programs. Weights "
            "must be plain numbers in safetensors. Take the float16 or bfloat16 .safetensors of "
            "the same model; to save memory, quantise it here: `--quantize int8`.",
        ) from None
    except (_Wrong, OSError) as error:
        raise AfaError(
            "AFA-LOAD-092",
            f"'{file}' must be a complete safetensors file, but reading its header says: {error}. "
            "Download or copy it again.",
        ) from None


class _IsGguf(Exception):
    """It is a file of another format, which is known."""


class _Wrong(Exception):
    """What is wrong with a header, as the middle of a sentence."""


def _header_length(start: bytes, size: int) -> int:
    if len(start) < 8:
        raise _Wrong(f"it has {size} bytes")
    if start.startswith(GGUF):
        raise _IsGguf
    length = int.from_bytes(start, "little")
    if length > size - 8:
        raise _Wrong(
            f"the header is said to take {length} bytes, the file has {size} (cut short, or of "
            "another format)"
        )
    if length > MAX_HEADER:
        raise _Wrong(f"the header takes {length} bytes, {MAX_HEADER} are the most")
    return length


def _parse(content: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    if content[:1] != b"{":
        raise _Wrong("the header is no JSON object")
    try:
        header = json.loads(content.decode(), object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise _Wrong(f"the header is no JSON ({str(error)[:100]})") from None
    if len(header) > MAX_TENSORS:
        raise _Wrong(f"it is said to hold {len(header)} tensors, {MAX_TENSORS} are the most")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _Wrong("its metadata must be texts")
    return header, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise _Wrong("two of its tensors have one name")
    return content


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _tensors(header: dict[str, Any], size: int) -> dict[str, Any]:
    """The entries, once each was held against its shape and all of them against the bytes."""
    spans = sorted(_span(name, entry, size) for name, entry in header.items())
    end = 0
    for start, stop, name in spans:
        if start != end:
            raise _Wrong(f"'{_short(name)}' begins at byte {start}, the one before ends at {end}")
        end = stop
    if end != size:
        raise _Wrong(f"its tensors take {end} bytes, {size} are there")
    return header


def _span(name: str, entry: Any, size: int) -> tuple[int, int, str]:
    """Where a tensor's bytes begin and end."""
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise _Wrong(f"'{_short(name)}' must have dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _Wrong(f"'{_short(name)}' is of the unknown type {_short(str(dtype))}")
    if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise _Wrong(f"'{_short(name)}' has no shape")
    if not _are_counts(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size:
        raise _Wrong(f"'{_short(name)}' has no place in the file's {size} bytes")
    if 8 * (offsets[1] - offsets[0]) != BITS[dtype] * math.prod(shape):
        raise _Wrong(f"'{_short(name)}' of shape {_short(str(shape))} has another number of bytes")
    return (*offsets, name)


def _are_counts(values: Any) -> bool:
    """Whether it is a list of numbers that a file can have of anything."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
