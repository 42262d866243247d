"""The summary of a data set: sizes, crops, captions, duplicates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from afa.reading.size import stated_size
from afa.training.data import FolderImages, Joined, SceneImages
from afa.training.data.duplicates import alike, look_of
from afa.training.data.sizes import opened_sizes
from afa.training.data.summary import frame_of, summarise
from afa.training.data.survey import survey
from afa.training.listing import Listing, rows_of
from afa.training.transform import Transform
from afa.zoo.scenes import scene

TRANSFORM = Transform(32, "center", num_variants=1)


def scenes(count: int) -> list[Image.Image]:
    return [Image.fromarray(scene(n).render()) for n in range(count)]


def folder_of(place: Path, pictures: dict[str, Image.Image], captions: dict[str, str]) -> Any:
    for name, picture in pictures.items():
        picture.save(place / name)
        (place / name).with_suffix(".txt").write_text(captions.get(name, f"caption of {name}"))
    return FolderImages(place)


def hashes_of(data: Any) -> list[tuple[bytes, bytes]]:
    rows = [row for chunk in rows_of(data, range(len(data))) for row in chunk]
    return Listing.of(rows).hashes()


# -- duplicates -----------------------------------------------------------------------------------


def test_a_copy_is_found_and_other_scenes_are_not(tmp_path: Path) -> None:
    pictures = [each.resize((256, 256), Image.Resampling.LANCZOS) for each in scenes(60)]
    looks = {n: look_of(each) for n, each in enumerate(pictures)}
    assert alike(looks) == []
    pictures[5].resize((150, 150)).save(tmp_path / "small.jpg", quality=80)
    looks[60] = look_of(Image.open(tmp_path / "small.jpg").convert("RGB"))
    looks[61] = look_of(ImageEnhance.Brightness(pictures[7]).enhance(1.01))
    assert alike(looks) == [(5, 60), (7, 61)]
    looks[62] = looks[60]
    assert alike(looks) == [(5, 60), (7, 61), (5, 62)]


def test_plain_pictures_of_other_colours_are_no_copies() -> None:
    """A perceptual hash does not see colour."""
    colours: list[Any] = ["red", "green", "blue", "white", "black", (253, 2, 2)]
    looks = {n: look_of(Image.new("RGB", (64, 64), each)) for n, each in enumerate(colours)}
    assert alike(looks) == [(0, 5)]


def test_many_pictures_are_compared_quickly() -> None:
    rng = np.random.default_rng(0)
    content = rng.integers(0, 256, (30_000, 8 + 48), dtype=np.uint8)
    content[20_000] = content[3]
    content[20_000, 0] ^= 1
    assert alike({n: row.tobytes().hex() for n, row in enumerate(content)}) == [(3, 20_000)]


def test_rows_of_one_picture_with_other_captions_are_no_duplicates(tmp_path: Path) -> None:
    first, second, *_ = scenes(3)
    pictures = {"a.png": first, "b.png": first, "c.png": first, "d.png": second}
    data = folder_of(tmp_path, pictures, {"a.png": "a fox", "b.png": "a fox", "c.png": "an owl"})
    found = survey(data, hashes=hashes_of(data)).details
    assert found is not None
    assert found.same == [(0, 1)]
    assert found.alike == []
    (warning,) = found.warnings()
    assert "1 picture (" in warning
    assert "b.png' like '" in warning


def test_generated_scenes_are_no_duplicates(tmp_path: Path) -> None:
    data = Joined(SceneImages(300), folder_of(tmp_path, {"a.png": scenes(1)[0]}, {}))
    hashes = hashes_of(data)
    assert len({caption for _, caption in hashes}) < len(hashes)
    assert summarise(data, data, sizes={}, captions={}, hashes=hashes).same == []


# -- sizes and crops ------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", ["center", "random"])
@pytest.mark.parametrize("size", [(64, 64), (100, 40), (30, 90), (20, 20), (20000, 3)])
def test_a_frame_is_what_the_transform_shows(crop: Any, size: tuple[int, int]) -> None:
    transform = Transform(32, crop, num_variants=3)
    ramp = np.linspace(0, 255, size[0])[None, :].repeat(size[1], 0)
    picture = Image.fromarray(np.stack([ramp] * 3, -1).astype(np.uint8))
    for variant in range(3):
        frame = frame_of(transform, size, 4, variant)
        shown = (transform(picture, 4, variant)[0].mean(0) + 1) / 2 * (size[0] - 1)
        left, top, right, bottom = frame.box
        slack = 1 + 1.5 / frame.scale
        assert abs(float(shown[0]) - left) < slack + size[0] / 255
        assert abs(float(shown[-1]) - right) < slack + size[0] / 255
        assert 0 <= top < bottom <= size[1] + 1e-6
        assert frame.target == (32, 32)
    lost = 1 - min(size) / max(size)
    assert frame_of(transform, size).lost(size) == pytest.approx(lost, abs=0.02)


def test_sizes_are_those_of_upright_pictures(tmp_path: Path) -> None:
    turned = Image.new("RGB", (8, 4))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    (tmp_path / "broken.png").write_bytes(b"x")
    assert stated_size(tmp_path / "turned.jpg") == stated_size(
        (tmp_path / "turned.jpg").read_bytes()
    )
    assert stated_size(tmp_path / "turned.jpg") == (4, 8)
    assert stated_size(tmp_path / "broken.png") is None
    for name in ("turned.txt", "broken.txt"):
        (tmp_path / name).write_text("x")
    assert dict(opened_sizes(FolderImages(tmp_path))) == {1: (4, 8)}


def test_only_some_of_many_pictures_are_opened(tmp_path: Path) -> None:
    data = folder_of(tmp_path, {f"{n}.png": Image.new("RGB", (8, 8)) for n in range(9)}, {})
    assert [n for n, _ in opened_sizes(data, 4)] == [0, 3, 6]


def test_everything_is_said(tmp_path: Path) -> None:
    pictures = {f"{n}.png": each for n, each in enumerate(scenes(4))}
    pictures["tiny.png"] = scenes(6)[5].resize((10, 12))
    pictures["wide.png"] = scenes(7)[6].resize((200, 40))
    data = folder_of(tmp_path, pictures, {"2.png": "", "3.png": " \n"})
    found = survey(data, resolution=32, transform=TRANSFORM, hashes=hashes_of(data)).details
    assert found is not None
    assert list(found.lines()) == [
        f"Pictures: 6 in '{tmp_path}', captions beside pictures",
        "Sizes: 10x12 to 200x40, median 64x64; width:height 0.83 to 5.00; crops of 32x32 cut off "
        "16% on average, 80% at most",
        "Captions: 6, 5 different; 2 empty",
        "Duplicates: 0 pictures with the same file as another, 0 more that look like another",
    ]
    empty, tiny, wide = found.warnings()
    parent = tmp_path.name
    assert f"Empty captions: 2 pictures ('{parent}/2.png', '{parent}/3.png')" in empty
    assert "tiny.png' 10x12" in tiny
    assert "wide.png' 200x40" in wide
    assert found.as_json()["lost_by_crops"]["max"] == pytest.approx(0.8)
    assert found.as_json()["captions"]["empty"] == 2
    assert found.as_json()["duplicates"] == {"same_file": 0, "look_alike": 0}
