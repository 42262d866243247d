"""Captioned pictures from a folder and from the endless scenes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from afa.errors import AfaError
from afa.training.data import FolderImages, SceneImages, batch_indices, to_pixels


def write(folder: Path, rows: list[object]) -> Path:
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
    ("rows", "message"),
    [
        ([], "its list is empty"),
        (["{"], "Line 1 of .* must be an object"),
        (["[1]"], "Line 1 of .* must be an object"),
        ([{"file_name": "1.png"}], "Line 1 of .* must be an object"),
        ([{"file_name": "1.png", "text": 3}], "Line 1 of .* must be an object"),
        ([{"file_name": "2.png", "text": "a"}], "Line 1 of .*2.png', which is missing"),
    ],
)
def test_broken_lists(tmp_path: Path, rows: list[object], message: str) -> None:
    picture(tmp_path, "1.png")
    with pytest.raises(AfaError, match=message):
        FolderImages(write(tmp_path, rows))


def test_no_folder_and_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(AfaError, match="does not exist"):
        FolderImages(tmp_path / "none")
    with pytest.raises(AfaError, match=r"it has no metadata\.jsonl"):
        FolderImages(tmp_path)


def test_any_unicode_in_captions(tmp_path: Path) -> None:
    caption = "a fox\u2028and a\x85pizza \N{FOX FACE}"
    row = {**picture(tmp_path, "1.png"), "text": caption}
    line = json.dumps(row, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + line.encode() + b"\r\n")
    assert FolderImages(tmp_path)[0][1] == caption
    (tmp_path / "metadata.jsonl").write_bytes(line.encode("utf-16"))
    with pytest.raises(AfaError, match="must be UTF-8"):
        FolderImages(tmp_path)


def test_a_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = FolderImages(write(tmp_path, [picture(tmp_path, "1.png", size=(64, 64))]))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(AfaError, match=r"1\.png' must be a complete picture"):
        data[0]


def test_a_truncated_picture_is_named(tmp_path: Path) -> None:
    row = picture(tmp_path, "1.jpg", size=(64, 64))
    file = tmp_path / "1.jpg"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(AfaError, match=r"1\.jpg' must be a complete picture"):
        FolderImages(write(tmp_path, [row]))[0]


def test_scenes_are_pictures_with_their_captions() -> None:
    data = SceneImages(10, seed=3)
    (first, text), (again, _) = data[4], data[4]
    assert len(data) == 10
    assert first.size == (64, 64)
    assert " on the left and " in text
    assert np.array_equal(np.asarray(first), np.asarray(again))


def test_pixels_are_scaled_cropped_and_signed() -> None:
    wide = Image.fromarray(np.tile(np.arange(30, dtype=np.uint8), (10, 1))).convert("RGB")
    generator = torch.Generator().manual_seed(0)
    crops = [to_pixels(wide, 10, generator) for _ in range(50)]
    assert all(crop.shape == (3, 10, 10) for crop in crops)
    starts = {round(float((crop[0, 0, 0] + 1) * 127.5)) for crop in crops}
    assert min(starts) <= 3 < 17 <= max(starts) <= 20  # anywhere, whole
    assert torch.equal(crops[0][:, 0], crops[0][:, 9])
    assert to_pixels(wide, 20, generator).shape == (3, 20, 20)
    assert to_pixels(wide.resize((31, 100)), 7, generator).shape == (3, 7, 7)


def test_square_pictures_are_whole_and_draw_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    white = to_pixels(Image.new("RGB", (10, 10), "white"), 10, generator)
    assert white.min().item() == white.max().item() == 1.0
    assert to_pixels(Image.new("RGB", (10, 10)), 5, generator).max().item() == -1.0
    assert torch.equal(generator.get_state(), before)


def test_an_epoch_has_every_sample_once_and_the_next_another_order() -> None:
    epochs = [
        [i for step in range(5 * n, 5 * n + 5) for i in batch_indices(15, 3, step, 0)]
        for n in (0, 1)
    ]
    assert all(sorted(epoch) == list(range(15)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_batches_run_over_the_end_of_an_epoch() -> None:
    seen = [i for step in range(7) for i in batch_indices(3, 3 + 4, step, 1)]
    assert set(Counter(seen[:48]).values()) == {16}
