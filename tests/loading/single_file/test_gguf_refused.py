"""GGUF files that are damaged, of another family, or of a type that cannot be read."""

from __future__ import annotations

import random
import struct
import sys
from pathlib import Path

import pytest
import torch

import afa
from afa.loading.inspection import describe
from afa.loading.trust.gguf import TYPES, check_gguf
from tests.loading.single_file.test_gguf import denoiser_tensors, wide
from tests.quantised import quantised_rows, write_gguf
from tests.refusal import refusal

gguf = pytest.importorskip("gguf")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A denoiser in Q4_0, and the folder of its pipeline."""
    root = tmp_path_factory.mktemp("models")
    pipeline, folder = wide(root, 32)
    write_gguf(denoiser_tensors(pipeline), root / "q4.gguf", "sd3", "Q4_0")
    return root / "q4.gguf", folder


def test_changed_headers_are_refused_in_one_line(model: tuple[Path, Path], tmp_path: Path) -> None:
    """Whatever bytes of a header say, the reader takes it or raises its own error."""
    content, draw = model[0].read_bytes(), random.Random(0)
    length = check_gguf(model[0]).start
    outcomes = set()
    for _ in range(400):
        changed = bytearray(content[: draw.choice((len(content), draw.randrange(length)))])
        for _ in range(draw.randrange(1, 4)):
            if changed:
                changed[draw.randrange(min(length, len(changed)))] = draw.randrange(256)
        (tmp_path / "a.gguf").write_bytes(b"GGUF" + changed[4:])
        try:
            check_gguf(tmp_path / "a.gguf")
            outcomes.add("read")
        except afa.AfaError as error:
            outcomes.add(error.code if "\n" not in str(error) else "two lines")
    assert "two lines" not in outcomes
    assert {"AFA-LOAD-116", "AFA-LOAD-117"} <= outcomes


def test_the_table_of_types_is_that_of_the_package() -> None:
    for number, blocks in TYPES.items():
        kind = gguf.GGMLQuantizationType(number)
        assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (blocks.name, tuple(blocks[1:]))


def test_unknown_types_are_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "a.gguf"), "flux")
    raw = quantised_rows(torch.zeros(2, 256).numpy(), "Q4_K")
    writer.add_tensor("double_blocks.0.weight", raw, raw_dtype=gguf.GGMLQuantizationType.Q4_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    content = (tmp_path / "a.gguf").read_bytes()
    place = content.index(b"double_blocks.0.weight") + len("double_blocks.0.weight") + 4 + 16
    for number, name in ((16, "IQ2_XXS"), (40, "NVFP4"), (99, "number 99")):
        changed = content[:place] + struct.pack("<I", number) + content[place + 4 :]
        (tmp_path / "b.gguf").write_bytes(changed)
        with refusal("AFA-LOAD-117", name, "double_blocks", "Q8_0"):
            afa.load_pipeline([tmp_path / "b.gguf"])


@pytest.mark.parametrize("stated", ["flux", "sdxl", "wan", "llama"])
def test_another_family_is_named(stated: str, model: tuple[Path, Path], tmp_path: Path) -> None:
    write_gguf(denoiser_tensors(wide(tmp_path, 32)[0]), tmp_path / "a.gguf", stated, "Q8_0")
    with refusal("AFA-LOAD-118", f"'{stated}'", "Stable Diffusion 3"):
        afa.load_pipeline([tmp_path / "a.gguf"], config=model[1], parts=[model[1]])


def test_truncated_and_changed_files(model: tuple[Path, Path], tmp_path: Path) -> None:
    content = model[0].read_bytes()
    key = struct.pack("<Q", len("general.architecture")) + b"general.architecture"
    shape = content.index(b"pos_embed") + len("pos_embed") + 4
    for number, changed in enumerate(
        (
            content[:5],
            content[:300],
            content[:-4000],
            content + bytes(64),
            content[:4] + struct.pack("<I", 1) + content[8:],
            content[:8] + struct.pack("<Q", 1 << 40) + content[16:],
            content.replace(key, struct.pack("<Q", 1 << 50) + key[8:]),
            content[:shape] + struct.pack("<Q", 1 << 62) + content[shape + 8 :],
        )
    ):
        file = tmp_path / f"{number}.gguf"
        file.write_bytes(changed)
        with refusal("AFA-LOAD-116", f"{number}.gguf"):
            afa.load_pipeline([file], config=model[1], parts=[model[1]])


def test_the_package_is_named_if_it_is_missing(
    model: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert describe(model[0])["kind"] == "GGUF file"  # headers need no package
    with refusal("AFA-LOAD-119", r"afa\[gguf\]"):
        afa.load_pipeline([model[0]], config=model[1], parts=[model[1]])


def test_a_missing_file_is_no_name_on_the_hub() -> None:
    with refusal("AFA-LOAD-079", "models/none.gguf"):
        afa.load_pipeline(["models/none.gguf"])
