"""Check the header of a safetensors file before it is used.

Format: https://huggingface.co/docs/safetensors, "Format": eight bytes with the header's length,
the header as JSON, then the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import stat
from typing import TYPE_CHECKING, Any, NamedTuple

from afa.errors import AfaError

if TYPE_CHECKING:
    from pathlib import Path

#: bytes; headers of large published models have 0.5 MB (Stable Diffusion XL) to 3 MB
MAX_HEADER = 16_000_000
#: a LoRA of every layer of Flux has some 3,000
MAX_TENSORS = 100_000
_MAX_DIMENSIONS = 16
#: bits per element of the format's data types
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
    """The header of a safetensors file.

    Attributes:
        tensors: `dtype`, `shape` and `data_offsets` of every tensor, by name.
        metadata: strings by key.
        start: the byte of the file at offset 0.
    """

    tensors: dict[str, Any]
    metadata: dict[str, str]
    start: int


def check_header(file: Path) -> Header:
    """Read the header of a safetensors file and check it against the file's length.

    Allocates memory only for the header, after checking its declared length against the file's
    length and `MAX_HEADER`.

    Raises:
        AfaError: if the file is GGUF, truncated, or not a safetensors file.
    """
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            raise _Wrong("it is not a regular file")
        with file.open("rb") as stream:
            length = _header_length(stream.read(8), found.st_size)
            content = stream.read(length)
        if len(content) < length:
            raise _Wrong("it was truncated while it was read")
        tensors, metadata = _parse(content)
        return Header(_tensors(tensors, found.st_size - 8 - length), metadata, 8 + length)
    except _IsGguf:
        raise AfaError(
            "AFA-LOAD-091",
            f"'{file}' is a GGUF file; only the denoiser of an expert can be one, everything else "
            "must be safetensors. Use the float16 or bfloat16 .safetensors file of the same model.",
        ) from None
    except (_Wrong, OSError) as error:
        raise AfaError(
            "AFA-LOAD-092",
            f"'{file}' is not a complete safetensors file: {error}. Download or copy it again.",
        ) from None


class _IsGguf(Exception):
    """The file is a GGUF file."""


class _Wrong(Exception):
    """An error in a header, described by a clause."""


def _header_length(start: bytes, size: int) -> int:
    if len(start) < 8:
        raise _Wrong(f"it has {size} bytes")
    if start.startswith(GGUF):
        raise _IsGguf
    length = int.from_bytes(start, "little")
    if length > size - 8:
        raise _Wrong(
            f"its header should have {length} bytes, but the file has {size} (truncated, or of "
            "another format)"
        )
    if length > MAX_HEADER:
        raise _Wrong(f"its header has {length} bytes, the maximum is {MAX_HEADER}")
    return length


def _parse(content: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    if content[:1] != b"{":
        raise _Wrong("its header is not a JSON object")
    try:
        header = json.loads(content.decode(), object_pairs_hook=_unique, parse_constant=_non_finite)
    except (ValueError, RecursionError) as error:
        raise _Wrong(f"its header is not JSON ({str(error)[:100]})") from None
    if len(header) > MAX_TENSORS:
        raise _Wrong(f"its header has {len(header)} tensors, the maximum is {MAX_TENSORS}")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _Wrong("its metadata are not strings")
    return header, metadata


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise _Wrong("it has a duplicate tensor name")
    return content


def _non_finite(text: str) -> Any:
    raise ValueError(f"{text} is not a finite number")


def _tensors(header: dict[str, Any], size: int) -> dict[str, Any]:
    """Check that the tensors' bytes match their shapes and fill the file without gaps."""
    spans = sorted(_span(name, entry, size) for name, entry in header.items())
    end = 0
    for start, stop, name in spans:
        if start != end:
            raise _Wrong(f"'{_short(name)}' begins at byte {start}, the previous one ends at {end}")
        end = stop
    if end != size:
        raise _Wrong(f"its tensors should have {end} bytes, but there are {size}")
    return header


def _span(name: str, entry: Any, size: int) -> tuple[int, int, str]:
    """Return the first byte and the end of a tensor, after checks, and its name."""
    if not isinstance(entry, dict) or not entry.keys() >= {"dtype", "shape", "data_offsets"}:
        raise _Wrong(f"'{_short(name)}' has no dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _Wrong(f"'{_short(name)}' has the unknown dtype {_short(str(dtype))}")
    if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise _Wrong(f"'{_short(name)}' has an invalid shape")
    if not _are_counts(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size:
        raise _Wrong(f"'{_short(name)}' has data_offsets outside the {size} bytes of data")
    if 8 * (offsets[1] - offsets[0]) != BITS[dtype] * math.prod(shape):
        raise _Wrong(f"'{_short(name)}' of shape {_short(str(shape))} has a wrong number of bytes")
    return (*offsets, name)


def _are_counts(values: Any) -> bool:
    """Whether it is a list of non-negative 64-bit integers."""
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
