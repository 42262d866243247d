"""List and detect picture files, and detect formats that Pillow does not read."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Iterator

#: files that file managers create
_OF_SYSTEMS = ("thumbs.db", "desktop.ini")
#: Pillow reads EPS by running Ghostscript on a possibly untrusted file
_REFUSED_FORMATS = {"EPS"}
#: suffixes registered by Pillow that it can only write, or that are not raster pictures
_NO_PICTURES = {".pdf", ".ps", ".eps", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr", ".iim"}
#: picture formats that cannot be read; such files are reported instead of ignored
_UNREADABLE = {
    *(".heic", ".heif", ".hif", ".jxl", ".exr", ".hdr", ".svg"),
    *(".dng", ".nef", ".cr2", ".cr3", ".arw", ".orf", ".raf", ".rw2"),
}

_TO_PNG = "Convert it to PNG or JPEG first"
_DEVELOP = "Develop it to TIFF, PNG or JPEG first."
_HEIC = "a HEIC picture", f"{_TO_PNG}, for example with `heif-convert IN.heic OUT.png`."
_JXL = "a JPEG XL picture", f"{_TO_PNG}, for example with `djxl IN.jxl OUT.png`."
_AVIF = "an AVIF picture", f"{_TO_PNG}, or install a Pillow that has AVIF."
_VIDEO = "a video", "Extract its frames as pictures first."
#: the first bytes of a file, what it is, and what to do
_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"\xff\x0a", *_JXL),
    (b"\x00\x00\x00\x0cJXL \r\n\x87\n", *_JXL),
    (b"\x76\x2f\x31\x01", "an OpenEXR picture", f"{_TO_PNG}, tone-mapped to 8 bits."),
    (b"#?RADIANCE", "a Radiance HDR picture", f"{_TO_PNG}, tone-mapped to 8 bits."),
    (b"FUJIFILMCCD-RAW", "a camera's raw file (RAF)", _DEVELOP),
    (b"IIRO", "a camera's raw file (ORF)", _DEVELOP),
    (b"IIU\x00", "a camera's raw file (RW2)", _DEVELOP),
    (b"%!PS", "PostScript", f"{_TO_PNG}."),
    (b"\xc5\xd0\xd3\xc6", "PostScript", f"{_TO_PNG}."),
    (b"%PDF", "a PDF document", f"{_TO_PNG}."),
    (b"<svg", "an SVG drawing", f"{_TO_PNG}."),
    (b"<?xml", "an XML file, perhaps an SVG drawing", f"{_TO_PNG}."),
    (b"<!DOCTYPE", "a web page, perhaps an error page of a download", "Download it again."),
    (b"<html", "a web page, perhaps an error page of a download", "Download it again."),
    (b"\x1aE\xdf\xa3", *_VIDEO),
    (b"version https://git-lfs", "a Git LFS pointer", "Fetch the picture: git lfs pull."),
)
#: the brand of an ISO base media file (ISO/IEC 14496-12, `ftyp`)
_BRANDS: dict[bytes, tuple[str, str]] = {
    **dict.fromkeys(
        (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"), _HEIC
    ),
    **dict.fromkeys((b"avif", b"avis"), _AVIF),
    b"crx ": ("a camera's raw file (CR3)", _DEVELOP),
}
#: number of bytes for `foreign_format`
NUM_HEAD = 64


def readable_formats() -> list[str]:
    """Return the supported formats by Pillow's names, including registered plugins."""
    Image.init()
    return [name for name in Image.ID if name not in _REFUSED_FORMATS]


def files_in(folder: Path) -> Iterator[Path]:
    """Yield all files in a folder and its subfolders, sorted, with links but no hidden files."""
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        resolved = os.path.realpath(parent)
        if resolved in seen:  # a link to a parent folder would never end
            folders.clear()
            continue
        seen.add(resolved)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith(".") and not is_system_file(name):
                yield Path(parent) / name


def is_system_file(name: str) -> bool:
    """Whether a file name is one that file managers create."""
    return name.lower() in _OF_SYSTEMS


def is_picture_file(path: Path) -> bool:
    """Whether a file is a picture by its suffix, in upper or lower case.

    Also True for formats that cannot be read, such as HEIC: reading them raises an error. False for
    hidden files, such as `._1.jpg`, which macOS writes into archives.
    """
    return path.suffix.lower() in _suffixes() and not path.name.startswith(".")


@cache
def _suffixes() -> frozenset[str]:
    Image.init()
    return frozenset((Image.registered_extensions().keys() - _NO_PICTURES) | _UNREADABLE)


def foreign_format(head: bytes) -> tuple[str, str] | None:
    """Return the format of a file that Pillow does not read, and a remedy; None if unknown.

    Args:
        head: the file's first `NUM_HEAD` bytes.
    """
    if not head:
        return "an empty file", "Download or export it again."
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12], _VIDEO)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    for signature, name, remedy in _SIGNATURES:
        if text.lower().startswith(signature.lower()) or head.startswith(signature):
            return name, remedy
    return None


def raw_photograph(picture: Image.Image, head: bytes) -> bool:
    """Whether an opened TIFF is the preview in a camera's raw file.

    NewSubfileType (tag 254) has bit 0 set for a reduced picture (TIFF 6.0); DNG has tag 50706; CR2
    has a signature in bytes 8 and 9.
    """
    tags = getattr(picture, "tag_v2", None)
    if tags is None:
        return False
    return bool(tags.get(254, 0) & 1) or 50706 in tags or head[8:10] == b"CR"
