"""Captioned pictures from folders, data sets of all kinds, and the endless scenes."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from afa.training.data import (
    BrokenPicture,
    DatasetStream,
    FolderImages,
    Part,
    SceneImages,
    open_dataset,
)
from afa.training.recipe import DatasetRecipe
from tests.refusal import refusal


def write(folder: Path, rows: Sequence[object]) -> Path:
    folder.mkdir(exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def picture(folder: Path, name: str, colour: str = "red", size: tuple[int, int] = (8, 8)) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(folder / name)
    return {"file_name": name, "text": f"a {colour} square"}


def test_a_folder(tmp_path: Path) -> None:
    rows = [picture(tmp_path, "1.png"), picture(tmp_path, "ü.jpg", "blue")]
    data = FolderImages(write(tmp_path, [*rows, ""]))
    assert len(data) == 2
    shown, text = data[1]
    assert (text, shown.mode, shown.size) == ("a blue square", "RGB", (8, 8))


def test_transparent_gray_and_turned_pictures_become_upright_rgb(tmp_path: Path) -> None:
    Image.new("LA", (8, 8)).save(tmp_path / "gray.png")
    turned = Image.new("RGB", (8, 4))
    exif = turned.getexif()
    exif[0x0112] = 6  # a phone held upright
    turned.save(tmp_path / "turned.jpg", exif=exif)
    data = FolderImages(
        write(tmp_path, [{"file_name": n, "text": ""} for n in ("gray.png", "turned.jpg")])
    )
    assert (data[0][0].mode, data[1][0].size) == ("RGB", (4, 8))


@pytest.mark.parametrize(
    ("rows", "code", "said"),
    [
        ([], "AFA-TRAIN-012", "metadata.jsonl"),
        (["{"], "AFA-TRAIN-008", "Line 1 of "),
        (["[1]"], "AFA-TRAIN-008", "Line 1 of "),
        ([{"text": "a"}], "AFA-TRAIN-062", "file_name"),
        ([{"file_name": "1.png", "text": 3}], "AFA-TRAIN-008", "Line 1 of "),
        ([{"file_name": "2.png", "text": "a"}], "AFA-TRAIN-011", r"Line 1 of .*2\.png'"),
    ],
)
def test_broken_lists(tmp_path: Path, rows: list[object], code: str, said: str) -> None:
    picture(tmp_path, "1.png")
    with refusal(code, said):
        FolderImages(write(tmp_path, rows))


def test_no_folder_and_an_empty_one(tmp_path: Path) -> None:
    with refusal("AFA-TRAIN-013"):
        FolderImages(tmp_path / "none")
    with refusal("AFA-TRAIN-014"):
        FolderImages(tmp_path)


def test_any_unicode_in_captions(tmp_path: Path) -> None:
    caption = "a fox\u2028and a\x85pizza \N{FOX FACE}"
    row = {**picture(tmp_path, "1.png"), "text": caption}
    line = json.dumps(row, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n")
    assert FolderImages(tmp_path)[0][1] == caption
    (tmp_path / "metadata.jsonl").write_bytes(line.encode("utf-16"))
    with refusal("AFA-TRAIN-007", "UTF-8"):
        FolderImages(tmp_path)


def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = FolderImages(write(tmp_path, [picture(tmp_path, "1.png", size=(64, 64))]))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with refusal("AFA-PICTURE-005", r"1\.png", "4,096", "200", kind=BrokenPicture):
        data[0]


def test_a_truncated_picture_is_named(tmp_path: Path) -> None:
    row = picture(tmp_path, "1.jpg", size=(64, 64))
    file = tmp_path / "1.jpg"
    file.write_bytes(file.read_bytes()[:-40])
    with refusal("AFA-PICTURE-004", r"1\.jpg"):
        FolderImages(write(tmp_path, [row]))[0]


def test_scenes_are_pictures_with_their_captions() -> None:
    data = SceneImages(10, seed=3)
    (first, text), (again, _) = data[4], data[4]
    assert len(data) == 10
    assert first.size == (64, 64)
    assert " on the left and " in text
    assert np.array_equal(np.asarray(first), np.asarray(again))


def test_a_part_has_the_wholes_names(tmp_path: Path) -> None:
    rows = [picture(tmp_path, f"{n}.png") for n in range(4)]
    data = FolderImages(write(tmp_path, rows))
    part = Part(data, range(1, 3))
    assert (len(part), part.name(0), part[1][1]) == (2, str(tmp_path / "1.png"), "a red square")
    assert part.fingerprint != Part(data, range(2)).fingerprint


def test_a_folders_fingerprint_sees_pictures_and_captions(tmp_path: Path) -> None:
    rows = [picture(tmp_path, "1.png"), picture(tmp_path, "2.png", "blue")]
    first = FolderImages(write(tmp_path, rows)).fingerprint
    assert FolderImages(tmp_path).fingerprint == first
    picture(tmp_path, "1.png", "white", (9, 9))
    second = FolderImages(tmp_path).fingerprint
    rows[0]["text"] = "another"
    assert len({first, second, FolderImages(write(tmp_path, rows)).fingerprint}) == 3


# -- data sets of the `datasets` library ------------------------------------------------------


def as_bytes(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 8), colour).save(buffer, format="PNG")
    return buffer.getvalue()


COLOURS = ("red", "green", "blue", "white", "black")


def parquet(folder: Path) -> dict[str, Any]:
    """As people keep pictures in parquet: a struct of bytes and path."""
    rows = {
        "picture": [{"bytes": as_bytes(c), "path": f"{c}.png"} for c in COLOURS],
        "words": [f"a {c} square" for c in COLOURS],
    }
    pyarrow.parquet.write_table(pyarrow.table(rows), folder / "rows.parquet")
    return {
        "path": "parquet",
        "data_files": str(folder / "rows.parquet"),
        "image_column": "picture",
        "caption_column": "words",
    }


def webdataset(folder: Path) -> dict[str, Any]:
    for shard in range(2):
        with tarfile.open(folder / f"{shard:03d}.tar", "w") as tar:
            for n, colour in list(enumerate(COLOURS))[shard::2]:
                parts = {
                    "png": as_bytes(colour),
                    "json": json.dumps({"caption": f"a {colour} square"}).encode(),
                }
                for suffix, content in parts.items():
                    entry = tarfile.TarInfo(f"{n:05d}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return {
        "path": "webdataset",
        "data_files": str(folder / "*.tar"),
        "image_column": "png",
        "caption_column": "json.caption",
    }


def imagefolder(folder: Path) -> dict[str, Any]:
    rows = [picture(folder / "train", f"{c}.png", c) for c in COLOURS]
    write(folder / "train", [*rows])
    return {"path": str(folder)}


def saved(folder: Path) -> dict[str, Any]:
    """Features that say themselves that they are pictures."""
    rows = {
        "image": [{"bytes": as_bytes(c), "path": None} for c in COLOURS],
        "text": [[f"a {c} square", "another caption"] for c in COLOURS],
    }
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Sequence(datasets.Value("string"))}
    )
    table = datasets.Dataset.from_dict(rows, features=features)
    table.to_parquet(folder / "rows.parquet")
    return {"path": "parquet", "data_files": str(folder / "rows.parquet")}


FORMATS = [parquet, webdataset, imagefolder, saved]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("streaming", [False, True])
def test_data_sets(tmp_path: Path, kind: Any, streaming: bool) -> None:
    recipe = DatasetRecipe.model_validate({**kind(tmp_path), "streaming": streaming})
    data = open_dataset(recipe, None)
    if isinstance(data, DatasetStream):
        samples = [read() for read in data]
    else:
        samples = [data[n] for n in range(len(data))]
        assert data.name(0).startswith("row 0")
    assert {caption for _, caption in samples} == {f"a {c} square" for c in COLOURS}
    for shown, caption in samples:
        colour = Image.new("RGB", (1, 1), caption.split()[1]).getpixel((0, 0))
        assert (shown.mode, shown.getpixel((3, 3))) == ("RGB", colour)
    again = open_dataset(recipe, None)
    assert again.fingerprint == data.fingerprint
    some = open_dataset(recipe, 2)
    count = sum(1 for _ in some) if isinstance(some, DatasetStream) else len(some)
    assert count == 2
    assert some.fingerprint != data.fingerprint


@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_row_is_named(tmp_path: Path, streaming: bool) -> None:
    pictures = [as_bytes("red"), as_bytes("red")[:50]]
    table = pyarrow.table({"image": pictures, "text": ["a", "b"]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    recipe = DatasetRecipe(
        path="parquet", data_files=[str(tmp_path / "rows.parquet")], streaming=streaming
    )
    data = open_dataset(recipe, None)
    readers = list(data) if isinstance(data, DatasetStream) else [lambda: data[0], lambda: data[1]]
    assert readers[0]()[1] == "a"
    with refusal("AFA-PICTURE-004", "'row 1'", kind=BrokenPicture):
        readers[1]()


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"image_column": "picture"}, "AFA-TRAIN-018", "'picture'.*image, text.*image_column"),
        ({"caption_column": "words"}, "AFA-TRAIN-018", "'words'.*caption_column"),
        ({"split": "test"}, "AFA-TRAIN-017", "ValueError"),
        ({"data_files": ["none.parquet"]}, "AFA-TRAIN-017", "'parquet'"),
    ],
)
def test_data_sets_that_cannot_be_had(
    tmp_path: Path, changes: dict[str, Any], code: str, said: str
) -> None:
    table = pyarrow.table({"image": [as_bytes("red")], "text": ["a"]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    files = [str(tmp_path / "rows.parquet")]
    recipe = DatasetRecipe.model_validate({"path": "parquet", "data_files": files, **changes})
    with refusal(code, said) as caught:
        open_dataset(recipe, None)
    assert "\n" not in str(caught.value)


def test_rows_without_a_picture_or_a_text(tmp_path: Path) -> None:
    table = pyarrow.table({"image": [as_bytes("red"), None], "text": [3, 4]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    recipe = DatasetRecipe(path="parquet", data_files=[str(tmp_path / "rows.parquet")])
    data = open_dataset(recipe, None)
    assert not isinstance(data, DatasetStream)
    with refusal("AFA-TRAIN-020", "0", "3"):
        data[0]


def test_a_streams_fingerprint_sees_all_files_that_a_pattern_finds(tmp_path: Path) -> None:
    """Patterns may be in folders' names, and find new files."""

    def rows(name: str, colour: str) -> None:
        place = tmp_path / name / "rows.parquet"
        place.parent.mkdir(exist_ok=True)
        table = pyarrow.table({"image": [as_bytes(colour)], "text": ["a"]})
        pyarrow.parquet.write_table(table, place)

    def fingerprint() -> str:
        files = [str(tmp_path / "part-*" / "*.parquet")]
        recipe = DatasetRecipe(path="parquet", data_files=files, streaming=True)
        return open_dataset(recipe, None).fingerprint

    rows("part-1", "red")
    seen = [fingerprint(), fingerprint()]
    assert seen[0] == seen[1]
    rows("part-2", "blue")
    seen.append(fingerprint())
    rows("part-1", "green")
    seen.append(fingerprint())
    assert len(set(seen)) == 3


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("streaming", [False, True])
def test_samples_as_they_are_kept(tmp_path: Path, kind: Any, streaming: bool) -> None:
    """The bytes of the very picture that is decoded, and its caption."""
    recipe = DatasetRecipe.model_validate({**kind(tmp_path), "streaming": streaming})
    data = open_dataset(recipe, None)
    if isinstance(data, DatasetStream):
        pairs = [(reader(), reader.stored()) for reader in data]
    else:
        pairs = [(data[n], data.stored(n)) for n in range(len(data))]
    for (shown, caption), stored in pairs:
        kept = stored.picture if isinstance(stored.picture, bytes) else stored.picture.read_bytes()
        assert stored.caption == caption
        with Image.open(io.BytesIO(kept)) as opened:
            assert opened.convert("RGB").tobytes() == shown.tobytes()
