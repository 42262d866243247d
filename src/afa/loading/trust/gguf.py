"""Read and check the header of a GGUF file before it is used.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3: counts,
metadata as typed values, then name, dimensions (innermost first), type and offset of every tensor.
The tensors' bytes follow, each at a multiple of the alignment.
"""

from __future__ import annotations

import json
import math
import re
import stat
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

from afa.errors import AfaError
from afa.loading.trust.headers import GGUF, MAX_HEADER, MAX_TENSORS, Header

if TYPE_CHECKING:
    from pathlib import Path


class Blocks(NamedTuple):
    """A GGUF type: its name, and the number of elements and of bytes in a block."""

    name: str
    elements: int
    num_bytes: int


#: the types that can be read, by number; names and sizes are those of ggml
TYPES = {
    0: Blocks("F32", 1, 4),
    1: Blocks("F16", 1, 2),
    2: Blocks("Q4_0", 32, 18),
    3: Blocks("Q4_1", 32, 20),
    6: Blocks("Q5_0", 32, 22),
    7: Blocks("Q5_1", 32, 24),
    8: Blocks("Q8_0", 32, 34),
    10: Blocks("Q2_K", 256, 84),
    11: Blocks("Q3_K", 256, 110),
    12: Blocks("Q4_K", 256, 144),
    13: Blocks("Q5_K", 256, 176),
    14: Blocks("Q6_K", 256, 210),
    20: Blocks("IQ4_NL", 32, 18),
    23: Blocks("IQ4_XS", 256, 136),
    30: Blocks("BF16", 1, 2),
}
#: types without blocks, which other formats have as well
PLAIN = frozenset({"F32", "F16", "BF16"})
BY_NAME = {each.name: each for each in TYPES.values()}
#: names of types that cannot be read, for messages
_OTHERS = {
    **{9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"},
    **{21: "IQ3_S", 22: "IQ2_S", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64"},
    **{29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4"},
}
#: the key of a tensor's shape before it was flattened into whole blocks, with the tensor's name
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
_SCALARS = dict(enumerate(("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?")))
_SCALARS |= {10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS, _MAX_KEYS = 4, 10_000
#: longer arrays, such as the vocabulary of a tokenizer, are not kept
_MAX_ARRAY = 16
_ALIGNMENT = 32


def is_gguf(file: Path) -> bool:
    """Whether a regular file begins like a GGUF file."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            return False
        with file.open("rb") as stream:
            return stream.read(4) == GGUF
    except OSError:
        return False


def check_gguf(file: Path) -> Header:
    """Read the header of a GGUF file and check it against the file's length.

    Returns: the header like that of a safetensors file: `dtype` is the name of the type, `shape`
        has the outermost dimension first, or is the one before the tensor was flattened. Metadata
        other than short values are omitted.

    Raises:
        AfaError: if the file is truncated, damaged, or has a tensor of an unsupported type.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            reader = _Reader(stream.read(min(size, MAX_HEADER)))
        reader.take(4)
        version = reader.number("<I")
        if version not in (2, 3):
            raise _Wrong(f"its version is {version}, 2 and 3 are supported")
        num_tensors, num_keys = reader.number("<Q"), reader.number("<Q")
        if num_tensors > MAX_TENSORS or num_keys > _MAX_KEYS:
            raise _Wrong(f"its header has {num_tensors} tensors and {num_keys} keys")
        metadata = dict(_entry(reader) for _ in range(num_keys))
        found = [_tensor(reader, metadata) for _ in range(num_tensors)]
        alignment = _alignment(metadata)
        start = _aligned(reader.place, alignment)
        tensors = _checked(found, size - start, alignment)
    except (_Wrong, OSError) as error:
        raise AfaError(
            "AFA-LOAD-116",
            f"'{file}' is not a complete GGUF file: {error}. Download or copy it again.",
        ) from None
    except _Unsupported as error:
        supported = ", ".join(BY_NAME)
        raise AfaError(
            "AFA-LOAD-117",
            f"'{error.name}' in '{file}' has the GGUF type {error.kind}; supported are {supported}."
            " Use a file of the same model in one of these, such as Q8_0 or Q4_K.",
        ) from None
    return Header(tensors, metadata, start)


class _Wrong(Exception):
    """An error in a header, described by a clause."""


class _Unsupported(Exception):
    """A tensor of a type that cannot be read."""

    def __init__(self, name: str, kind: str) -> None:
        super().__init__(name)
        self.name, self.kind = name, kind


class _Reader:
    """Reads values from the start of a file, and never beyond it."""

    def __init__(self, content: bytes) -> None:
        self._content, self.place = content, 0

    def take(self, count: int) -> bytes:
        end = self.place + count
        if end > len(self._content):
            limit = " or its header is too long" if len(self._content) == MAX_HEADER else ""
            raise _Wrong(f"its header ends after {len(self._content)} bytes (truncated{limit})")
        taken, self.place = self._content[self.place : end], end
        return taken

    def number(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def text(self) -> str:
        try:
            return self.take(self.number("<Q")).decode()
        except UnicodeDecodeError:
            raise _Wrong("it has a name that is not UTF-8") from None


def _entry(reader: _Reader) -> tuple[str, str]:
    """Read a key and its value as text; arrays as JSON, long ones as the empty text."""
    key, kind = reader.text(), reader.number("<I")
    if kind == _STRING:
        return key, reader.text()
    if kind in _SCALARS:
        return key, str(reader.number(_SCALARS[kind]))
    if kind != _ARRAY:
        raise _Wrong(f"'{_short(key)}' has the unknown type {kind}")
    inner, count = reader.number("<I"), reader.number("<Q")
    if inner == _STRING:
        if count > MAX_HEADER:
            raise _Wrong(f"'{_short(key)}' has {count} entries")
        for _ in range(count):
            reader.take(reader.number("<Q"))
        return key, ""
    if inner not in _SCALARS:
        raise _Wrong(f"'{_short(key)}' is an array of the unsupported type {inner}")
    code = _SCALARS[inner]
    if count > _MAX_ARRAY:
        reader.take(count * struct.calcsize(code))
        return key, ""
    return key, json.dumps([reader.number(code) for _ in range(count)])


def _tensor(reader: _Reader, metadata: dict[str, str]) -> tuple[str, Blocks, tuple[int, ...], int]:
    """Read a tensor's name, type, shape and offset."""
    name, dimensions = reader.text(), reader.number("<I")
    if dimensions > _MAX_DIMENSIONS:
        raise _Wrong(f"'{_short(name)}' has {dimensions} dimensions")
    shape = tuple(reader.number("<Q") for _ in range(dimensions))[::-1]
    kind, offset = reader.number("<I"), reader.number("<Q")
    if kind not in TYPES:
        raise _Unsupported(_short(name), _OTHERS.get(kind, f"number {kind}"))
    blocks = TYPES[kind]
    if (shape[-1] if shape else 1) % blocks.elements:
        raise _Wrong(f"'{_short(name)}' of shape {shape} does not consist of {blocks.name} blocks")
    stored = metadata.get(f"{ORIGINAL_SHAPE}{name}")
    if stored is not None:
        original = tuple(map(int, re.findall(r"\d+", stored)))
        if math.prod(original) != math.prod(shape) or len(original) > _MAX_DIMENSIONS:
            raise _Wrong(f"'{_short(name)}' of shape {shape} was {original} before")
        shape = original
    elif name.rpartition(".")[2] == "pos_embed" and len(shape) == 2:
        shape = (1, *shape)  # ggml drops outer dimensions of size 1
    return name, blocks, shape, offset


def _alignment(metadata: dict[str, str]) -> int:
    text = metadata.get("general.alignment", str(_ALIGNMENT))
    if not text.isdecimal() or not 0 < int(text) <= 1 << 20 or int(text) % 8:
        raise _Wrong(f"its alignment is {_short(text)}")
    return int(text)


def _aligned(place: int, alignment: int) -> int:
    return -(-place // alignment) * alignment


def _checked(
    found: list[tuple[str, Blocks, tuple[int, ...], int]], size: int, alignment: int
) -> dict[str, Any]:
    """Check that the tensors' bytes fill the file without gaps except for the alignment."""
    tensors: dict[str, Any] = {}
    end = 0
    for name, blocks, shape, offset in sorted(found, key=lambda each: each[3]):
        if name in tensors:
            raise _Wrong(f"it has two tensors '{_short(name)}'")
        if offset != _aligned(end, alignment):
            raise _Wrong(
                f"'{_short(name)}' begins at byte {offset}, the previous one ends at {end}"
            )
        end = offset + math.prod(shape) // blocks.elements * blocks.num_bytes
        tensors[name] = {
            "dtype": blocks.name,
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
    if not end <= size <= _aligned(end, alignment):
        raise _Wrong(f"its tensors should have {end} bytes, but there are {max(size, 0)}")
    return tensors


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
