"""Pictures of every kind become the same 8-bit sRGB; what cannot is named."""

from __future__ import annotations

import ast
import io
import os
import socket
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

import afa
from afa.reading import (
    BrokenPicture,
    Conversion,
    as_rgb,
    conversions_of,
    is_picture_file,
    parse_colour,
    read_picture,
)
from afa.training.data import Stored
from afa.training.listing import row_of
from tests.reading.icc import ADOBE_RGB, cmyk_profile, grey_profile
from tests.refusal import refusal

RAMP = np.linspace(0, 1, 4096).reshape(64, 64)
EIGHT = np.rint(RAMP * 255)


def stored(picture: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()


def pixels(picture: Image.Image) -> np.ndarray:
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


def grey(values: np.ndarray, dtype: str) -> Image.Image:
    return Image.fromarray(values.astype(dtype))


# -- more than 8 bits -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(stored(grey(RAMP * 65535, "uint16")), id="16-bit PNG"),
        pytest.param(stored(grey(RAMP * 65535, "uint16"), "TIFF"), id="16-bit TIFF"),
        pytest.param(stored(grey(RAMP * 65535, ">u2"), "TIFF"), id="big-endian TIFF"),
        pytest.param(stored(grey(RAMP * 65535, "uint16"), "PPM"), id="16-bit PGM"),
        pytest.param(stored(grey(RAMP * (2**31 - 1), "int32"), "TIFF"), id="32-bit TIFF"),
        pytest.param(stored(grey(RAMP * 65535, "int32"), "TIFF"), id="16 bits in 32"),
        pytest.param(stored(grey(EIGHT, "int32"), "TIFF"), id="8 bits in 32"),
        pytest.param(stored(grey(RAMP, "float32"), "TIFF"), id="float TIFF"),
        pytest.param(stored(grey(RAMP, "float32"), "PPM"), id="PFM"),
    ],
)
def test_deep_greys_are_scaled(content: bytes) -> None:
    picture = read_picture(content)
    assert np.abs(pixels(picture) - EIGHT[..., None]).max() <= 1
    assert conversions_of(picture) == {Conversion.DEPTH}


def test_a_dark_16_bit_picture_stays_dark() -> None:
    dark = np.full((4, 4), 200)
    assert pixels(read_picture(stored(grey(dark, "uint16")))).max() == 1
    assert pixels(read_picture(stored(grey(dark, "uint16"), "PPM"))).max() == 1


def tagged(content: bytes, tag: int, value: int) -> bytes:
    """A little-endian TIFF with another value of a tag that it has."""
    data, (start,) = bytearray(content), struct.unpack("<I", content[4:8])
    (count,) = struct.unpack("<H", content[start : start + 2])
    for n in range(count):
        place = start + 2 + 12 * n
        if struct.unpack("<H", data[place : place + 2])[0] == tag:
            data[place + 8 : place + 12] = struct.pack("<HH", value, 0)
            return bytes(data)
    raise AssertionError(f"no tag {tag}")


def test_a_tiff_in_which_white_is_0() -> None:
    content = stored(grey(RAMP * 65535, "uint16"), "TIFF")
    inverted = pixels(read_picture(tagged(content, 262, 0)))
    assert np.abs(inverted - (255 - EIGHT[..., None])).max() <= 1


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        (grey(RAMP * 3.5, "float32"), "it has floating-point values from 0 to 3.5, but they must"),
        (grey(RAMP - 0.5, "float32"), "values from -0.5 to 0.5"),
        (grey(np.full((2, 2), np.nan), "float32"), "values from nan to nan"),
        (grey(RAMP * 100 - 50, "int32"), "values from -50 to 50, but black must be 0"),
    ],
)
def test_values_whose_white_is_unknown_are_broken(picture: Image.Image, said: str) -> None:
    with refusal("AFA-PICTURE-004", said, kind=BrokenPicture):
        read_picture(stored(picture, "TIFF"), "a.tif")
    with refusal("AFA-PICTURE-003", f"{picture.mode}", f"{said}", kind=BrokenPicture):
        as_rgb(picture)


def test_what_rounds_to_black_or_white_is_no_error() -> None:
    almost = np.array([[-0.001, 1.001]])
    assert pixels(as_rgb(grey(almost, "float32")))[0, :, 0].tolist() == [0, 255]


# -- transparency -----------------------------------------------------------------------------

CLEAR = np.zeros((4, 4, 4), np.uint8)
CLEAR[..., 0] = 255  # a red that nobody sees


def transparent() -> dict[str, bytes]:
    red, palette = Image.fromarray(CLEAR, "RGBA"), Image.new("P", (4, 4))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    opaque = Image.new("RGB", (4, 4), "red")
    return {
        "RGBA": stored(red),
        "WebP": stored(red, "WEBP", lossless=True, exact=True),
        "TIFF": stored(red, "TIFF"),
        "LA": stored(Image.new("LA", (4, 4), (90, 0))),
        "palette": stored(palette, transparency=0),
        "palette of bytes": stored(palette, transparency=b"\0\xff"),
        "GIF": stored(palette, "GIF", transparency=0),
        "colour key": stored(opaque, transparency=(255, 0, 0)),
        "grey key": stored(Image.new("L", (4, 4), 7), transparency=7),
        "16-bit grey key": stored(grey(np.full((4, 4), 700), "uint16"), transparency=700),
    }


@pytest.mark.parametrize("kind", transparent())
def test_nothing_transparent_shows_its_hidden_colour(kind: str) -> None:
    content = transparent()[kind]
    for colour in ((255, 255, 255), (10, 20, 30)):
        picture = read_picture(content, background=colour)
        assert picture.getcolors() == [(16, colour)]
        assert Conversion.ALPHA in conversions_of(picture)


def test_half_transparent_is_mixed_and_opaque_is_kept() -> None:
    values = np.array([[[100, 50, 0, 128], [100, 50, 0, 255]]], np.uint8)
    mixed, kept = pixels(read_picture(stored(Image.fromarray(values, "RGBA"))))[0].tolist()
    assert np.abs(np.subtract(mixed, [177, 152, 127])).max() <= 1
    assert kept == [100, 50, 0]
    opaque = read_picture(stored(Image.new("RGBA", (4, 4), (1, 2, 3, 255))))
    assert (opaque.getpixel((0, 0)), conversions_of(opaque)) == ((1, 2, 3), frozenset())


def test_colours_of_backgrounds() -> None:
    assert parse_colour("white") == parse_colour("#FFF") == (255, 255, 255)
    for wrong in ("nocolour", "#11223344"):
        with pytest.raises(ValueError, match=wrong):
            parse_colour(wrong)


# -- colours ----------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", [(0, 255, 0), (200, 30, 60), (128, 128, 128), (10, 0, 80)])
def test_a_profile_is_converted_to_srgb(colour: tuple[int, int, int]) -> None:
    wide = Image.new("RGB", (4, 4), colour)
    opened = ImageCms.ImageCmsProfile(io.BytesIO(ADOBE_RGB))
    converted = ImageCms.profileToProfile(wide, opened, ImageCms.createProfile("sRGB"))
    assert converted is not None
    for file_format in ("PNG", "JPEG", "TIFF", "WEBP"):
        options = {"quality": 100} if file_format in ("JPEG", "WEBP") else {}
        content = stored(wide, file_format, icc_profile=ADOBE_RGB, **options)
        picture = read_picture(content)
        assert np.abs(pixels(picture)[0, 0] - converted.getpixel((0, 0))).max() <= 4
        assert conversions_of(picture) == {Conversion.PROFILE}


def test_a_profile_of_a_transparent_picture_applies_to_its_colours_alone() -> None:
    wide = Image.new("RGBA", (4, 4), (200, 30, 60, 255))
    wide.putpixel((0, 0), (200, 30, 60, 0))
    picture = read_picture(stored(wide, icc_profile=ADOBE_RGB), background=(1, 2, 3))
    opaque = read_picture(stored(wide.convert("RGB"), icc_profile=ADOBE_RGB))
    assert picture.getpixel((0, 0)) == (1, 2, 3)
    assert picture.getpixel((1, 1)) == opaque.getpixel((1, 1)) != (200, 30, 60)


def test_srgb_profiles_change_nothing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = read_picture(stored(Image.fromarray(noise), icc_profile=srgb))
    assert (pixels(picture) == noise).all()
    assert conversions_of(picture) == frozenset()
    on_grey = read_picture(stored(Image.fromarray(noise[..., 0]), icc_profile=srgb))
    assert (pixels(on_grey) == noise[..., :1]).all()


def test_grey_profiles() -> None:
    dark = grey_profile(1.0)  # linear: 128 is half the light, which sRGB writes as 188
    for shown in (Image.new("L", (4, 4), 128), Image.new("LA", (4, 4), (128, 255))):
        picture = read_picture(stored(shown, icc_profile=dark))
        assert np.abs(pixels(picture) - 188).max() <= 2
        assert conversions_of(picture) == {Conversion.PROFILE}
    deep = read_picture(stored(grey(np.full((4, 4), 128 * 257), "uint16"), icc_profile=dark))
    assert np.abs(pixels(deep) - 188).max() <= 2


def test_cmyk_with_and_without_a_profile() -> None:
    inked = Image.new("CMYK", (4, 4), (0, 0, 0, 0))
    inked.putpixel((0, 0), (255, 0, 0, 0))
    plain = read_picture(stored(inked, "TIFF"))
    assert plain.getpixel((0, 0)) == (0, 255, 255)
    assert conversions_of(plain) == {Conversion.CMYK}
    managed = read_picture(stored(inked, "TIFF", icc_profile=cmyk_profile()))
    assert max(pixels(managed)[0, 0]) < 10
    assert min(pixels(managed)[2, 2]) > 245
    assert conversions_of(managed) == {Conversion.PROFILE}


def test_lab_is_converted() -> None:
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    shown = Image.new("RGB", (4, 4), (200, 100, 50))
    stored_as = ImageCms.profileToProfile(shown, srgb, lab, outputMode="LAB")
    assert stored_as is not None
    picture = read_picture(stored(stored_as, "TIFF"))
    assert np.abs(pixels(picture)[0, 0] - (200, 100, 50)).max() <= 3


@pytest.mark.parametrize(
    "profile", [b"no profile", ADOBE_RGB[:200], grey_profile(2.2), cmyk_profile()]
)
def test_profiles_that_cannot_be_applied_are_counted(profile: bytes) -> None:
    picture = read_picture(stored(Image.new("RGB", (4, 4), (0, 255, 0)), icc_profile=profile))
    assert picture.getpixel((0, 0)) == (0, 255, 0)
    assert conversions_of(picture) == {Conversion.BAD_PROFILE}


def test_colours_that_are_stated_otherwise_are_counted() -> None:
    linear = PngImagePlugin.PngInfo()
    linear.add(b"gAMA", struct.pack(">I", 100_000))
    usual = PngImagePlugin.PngInfo()
    usual.add(b"gAMA", struct.pack(">I", 45_455))
    shown = Image.new("RGB", (4, 4), "red")
    assert conversions_of(read_picture(stored(shown, pnginfo=linear))) == {
        Conversion.STATED_COLOURS
    }
    assert conversions_of(read_picture(stored(shown, pnginfo=usual))) == frozenset()
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03", 2: b"0100"}
    camera = read_picture(stored(shown, "JPEG", exif=exif))
    assert conversions_of(camera) == {Conversion.STATED_COLOURS}


# -- frames, pages, orientation, metadata ------------------------------------------------------


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "TIFF", "PNG", "AVIF"])
def test_the_first_of_several_frames(file_format: str) -> None:
    first, second = Image.new("RGB", (16, 16), "red"), Image.new("RGB", (16, 16), "blue")
    content = stored(first, file_format, save_all=True, append_images=[second])
    picture = read_picture(content)
    assert np.abs(pixels(picture)[4, 4] - (255, 0, 0)).max() <= 4
    assert conversions_of(picture) == {Conversion.FRAMES}
    assert conversions_of(read_picture(stored(first, file_format))) == frozenset()


@pytest.mark.parametrize("mode", ["RGB", "L", "I;16", "F", "LA"])
def test_orientation_is_applied_in_every_mode(mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a phone held upright
    file_format = "TIFF" if mode == "F" else "PNG"
    assert read_picture(stored(Image.new(mode, (8, 4)), file_format, exif=exif)).size == (4, 8)


def test_damaged_metadata_is_counted_and_warns_nobody() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jpeg = stored(Image.new("RGB", (4, 4)), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\x00")
        assert Conversion.METADATA in conversions_of(read_picture(jpeg))


# -- what cannot be read -----------------------------------------------------------------------

FOREIGN = {
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "JPEG XL": b"\0\0\0\x0cJXL \r\n\x87\n",
    "raw file": b"FUJIFILMCCD-RAW 0201",
    "video": b"\0\0\0\x18ftypisom\0\0\0\0",
    "SVG": b"\xef\xbb\xbf<svg xmlns='x'/>",
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
    "web page": b"\n<!doctype html><html></html>",
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\n",
    "empty file": b"",
}


@pytest.mark.parametrize("what", FOREIGN)
def test_formats_that_are_not_read_are_named(what: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    file.write_bytes(FOREIGN[what])
    with pytest.raises(BrokenPicture) as caught:
        read_picture(file)
    said = str(caught.value)
    assert said.startswith(f"'{file}' is ")
    assert what in said
    assert "which cannot be read." in said


def test_thumbnails_of_camera_raw_files_are_refused() -> None:
    thumbnail = stored(Image.new("RGB", (8, 8)), "TIFF", tiffinfo={254: 1})
    dng = stored(Image.new("RGB", (8, 8)), "TIFF", tiffinfo={50706: b"\1\4\0\0"})
    for content in (thumbnail, dng):
        with refusal("AFA-PICTURE-004", "'a'", "camera's", kind=BrokenPicture):
            read_picture(content, "a")


def test_missing_files_and_folders(tmp_path: Path) -> None:
    for place, said in (
        (tmp_path / "none.png", "No such file"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(BrokenPicture, match=said):
            read_picture(place)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "AVIF", "BMP"])
@pytest.mark.parametrize("part", [0.3, 0.7])
def test_cut_files_are_broken(file_format: str, part: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    content = stored(Image.fromarray(noise), file_format)
    with pytest.raises(BrokenPicture):
        read_picture(content[: int(len(content) * part)])


def test_large_pictures_have_a_line_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    content = stored(Image.new("RGB", (15, 10)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # between once and twice the limit Pillow only warns
        assert conversions_of(read_picture(content)) == frozenset()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with refusal("AFA-PICTURE-005", "'a'", "150", "100", kind=BrokenPicture):
        read_picture(content, "a")


# -- names, and the one reader -----------------------------------------------------------------


def test_names_of_pictures() -> None:
    for name in ("a.PNG", "b.Jpeg", "c.TIFF", "d.avif", "e.gif", "f.webp", "g.HEIC", "h.jxl"):
        assert is_picture_file(Path(name)), name
    for name in ("a.txt", "b.json", "c.pdf", "d.npz", "._e.jpg", "png"):
        assert not is_picture_file(Path(name)), name


def test_every_picture_is_opened_by_the_reader() -> None:
    """Others would clip 16 bits and show hidden colours again."""
    allowed = {
        "reading/picture.py",
        "reading/size.py",  # the header alone
        "drawing/parameters.py",  # what a picture of A1111 says of itself; its pixels are not read
        "drawing/recorded.py",  # what a PNG of ours says of itself; its pixels are not read
        "studies/zoo_build/build.py",  # our own atlas, whose transparency is wanted
        "zoo/sprites.py",
    }
    root = Path(afa.__file__).parent
    found = set()
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "open":
                owner = node.value
                if getattr(owner, "id", getattr(owner, "attr", "")) == "Image":
                    found.add(file.relative_to(root).as_posix())
    assert found == allowed


@pytest.mark.parametrize("kind", ["a named pipe", "a socket", "a device", "a folder"])
@pytest.mark.parametrize("is_link", [False, True])
def test_what_is_no_regular_file(kind: str, is_link: bool, tmp_path: Path) -> None:
    """Reading a pipe or a device would never end."""
    place = tmp_path / "x.png"
    special = tmp_path / "special" if is_link else place
    with socket.socket(socket.AF_UNIX) as listener:
        if kind == "a named pipe":
            os.mkfifo(special)
        elif kind == "a socket":
            listener.bind(os.path.relpath(special))
        elif kind == "a folder":
            special.mkdir()
        else:
            place.symlink_to("/dev/zero")
        if is_link and kind != "a device":
            place.symlink_to(special)
        with refusal("AFA-PICTURE-001", "x.png", f"{kind}", kind=BrokenPicture):
            read_picture(place)
        assert row_of(Stored(place, "a")) == row_of(Stored(place, "a"))
