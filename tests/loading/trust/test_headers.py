"""Headers of safetensors files that lie."""

from __future__ import annotations

import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from afa.loading.trust.headers import MAX_HEADER, check_header
from tests.refusal import refusal

ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def written(place: Path, header: Any, data: bytes = b"\0" * 8, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    place.write_bytes(size.to_bytes(8, "little") + text + data)
    return place


def test_what_the_library_writes_is_taken(tmp_path: Path) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool)
    tensors = {str(dtype): torch.zeros(3, 2, dtype=dtype) for dtype in dtypes}
    tensors |= {"empty": torch.zeros(0, 4), "scalar": torch.zeros(())}
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    found = check_header(tmp_path / "a.safetensors")
    assert {name: tuple(entry["shape"]) for name, entry in found.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in tensors.items()
    }


@pytest.mark.fault(
    "a hostile header",
    "safetensors",
    how="24 headers with wrong lengths, types, shapes or offsets",
    holds="refused in one line",
)
@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[]", "not a JSON object"),
        (b"{", "not JSON"),
        (b'{"a": NaN}', "NaN is not a finite number"),
        (b"\xff\xfe{}", "JSON"),
        (b'{"a":' + b"[" * 100_000, "not JSON"),
        (b'{"a": {}, "a": {}}', "duplicate tensor name"),
        ({"a": {}}, "no dtype, shape or data_offsets"),
        ({"a": 3}, "no dtype, shape or data_offsets"),
        ({"a": {**ONE, "dtype": "F31"}}, "unknown dtype F31"),
        ({"a": {**ONE, "dtype": ["F32"]}}, "unknown dtype"),
        ({"a": {**ONE, "shape": [-2]}}, "invalid shape"),
        ({"a": {**ONE, "shape": [2.0]}}, "invalid shape"),
        ({"a": {**ONE, "shape": [True, 2]}}, "invalid shape"),
        ({"a": {**ONE, "shape": [1] * 99}}, "invalid shape"),
        ({"a": {**ONE, "shape": [2**62, 2**62]}}, "wrong number of bytes"),
        ({"a": {**ONE, "shape": [2**64]}}, "invalid shape"),
        ({"a": {**ONE, "data_offsets": [0, 16]}}, "data_offsets outside the 8 bytes"),
        ({"a": {**ONE, "data_offsets": [8, 0]}}, "data_offsets"),
        ({"a": {**ONE, "data_offsets": [-8, 0]}}, "data_offsets"),
        ({"a": {**ONE, "data_offsets": "08"}}, "data_offsets"),
        ({"a": ONE, "b": ONE}, "'b' begins at byte 0, the previous one ends at 8"),
        ({}, "0 bytes, but there are 8"),
        ({"a": ONE, "__metadata__": {"x": 1}}, "metadata"),
        ({"a": ONE, "__metadata__": []}, "metadata"),
    ],
)
def test_headers_that_lie(header: Any, message: str, tmp_path: Path) -> None:
    place = written(tmp_path / "a.safetensors", header)
    with refusal("AFA-LOAD-092", message) as error:
        check_header(place)
    assert "\n" not in str(error.value)
    assert str(place) in str(error.value)


@pytest.mark.fault(
    "a hostile header",
    "safetensors",
    how="headers that claim up to 2^64 bytes",
    holds="refused; less than 0.1 MB is allocated",
)
@pytest.mark.parametrize("length", [9, 1000, 2**32, 2**62, 2**64 - 1])
def test_no_memory_is_taken_for_what_is_only_claimed(length: int, tmp_path: Path) -> None:
    place = written(tmp_path / "a.safetensors", b"{}", b"", length)
    tracemalloc.start()
    with refusal("AFA-LOAD-092", f"{length}", "10"):
        check_header(place)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_a_header_without_end_is_not_read(tmp_path: Path) -> None:
    place = tmp_path / "a.safetensors"
    with place.open("wb") as file:
        file.write((MAX_HEADER + 1).to_bytes(8, "little") + b"{")
        file.truncate(MAX_HEADER + 100)  # a hole, which takes no place on the disk
    tracemalloc.start()
    with refusal("AFA-LOAD-092", f"{MAX_HEADER}"):
        check_header(place)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_pipes_and_devices_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.safetensors")  # opening it would wait for ever
    for place in (tmp_path / "a.safetensors", Path("/dev/zero"), tmp_path):
        with refusal("AFA-LOAD-092"):
            check_header(place)


@pytest.mark.parametrize("size", [0, 1, 7])
def test_files_of_next_to_nothing(size: int, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\0" * size)
    with refusal("AFA-LOAD-092", f"{size}"):
        check_header(tmp_path / "a.safetensors")
