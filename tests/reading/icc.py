"""Small colour profiles, written by the format's definition (ICC.1:2004-10)."""

from __future__ import annotations

import struct

import numpy as np

_D50 = (0.9642, 1.0, 0.8249)
_BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)


def rgb_profile(
    primaries: tuple[tuple[float, float], ...], white: tuple[float, float], gamma: float
) -> bytes:
    """A matrix profile: xy of red, green, blue and white, and an exponent."""

    def xyz(x: float, y: float) -> np.ndarray:
        return np.array([x / y, 1, (1 - x - y) / y])

    columns = np.stack([xyz(*xy) for xy in primaries], axis=1)
    columns = columns * np.linalg.solve(columns, xyz(*white))
    adapt = np.linalg.inv(_BRADFORD) @ np.diag(
        (_BRADFORD @ np.array(_D50)) / (_BRADFORD @ xyz(*white))
    )
    curve = _curve(gamma)
    tags = {b"wtpt": _xyz(*_D50)}
    for letter, column in zip(b"rgb", (adapt @ columns).T, strict=True):
        tags[bytes([letter]) + b"XYZ"] = _xyz(*column)
        tags[bytes([letter]) + b"TRC"] = curve
    return _profile(b"RGB ", b"XYZ ", tags)


def grey_profile(gamma: float) -> bytes:
    """A profile of grey values with an exponent."""
    return _profile(b"GRAY", b"XYZ ", {b"wtpt": _xyz(*_D50), b"kTRC": _curve(gamma)})


def cmyk_profile() -> bytes:
    """A profile whose paper is white, and in which any ink at all is black (`mft1`, 2 points)."""
    grid = b"".join(
        bytes([255 if not inks else 0, 128, 128]) for inks in range(16)
    )  # the last ink varies fastest
    head = struct.pack(">4s4xBBBx", b"mft1", 4, 3, 2)
    matrix = struct.pack(">9i", *(65536 * (n % 4 == 0) for n in range(9)))
    ramp = bytes(range(256))
    table = head + matrix + ramp * 4 + grid + ramp * 3
    return _profile(b"CMYK", b"Lab ", {b"wtpt": _xyz(*_D50), b"A2B0": table}, b"prtr")


def _fixed(value: float) -> int:
    return round(value * 65536)


def _xyz(x: float, y: float, z: float) -> bytes:
    return struct.pack(">4s4x3i", b"XYZ ", _fixed(x), _fixed(y), _fixed(z))


def _curve(gamma: float) -> bytes:
    return struct.pack(">4s4xIH", b"curv", 1, round(gamma * 256))


def _profile(space: bytes, pcs: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr") -> bytes:
    tags = {b"desc": struct.pack(">4s4xI5s", b"desc", 5, b"test\0") + bytes(80), **tags}
    offset = 128 + 4 + 12 * len(tags)
    table, data = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += struct.pack(">4sII", name, offset + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    head = struct.pack(
        ">I4sI4s4s4s12x4s28x3i48x",
        offset + len(data),
        b"lcms",
        0x02400000,
        kind,
        space,
        pcs,
        b"acsp",
        *map(_fixed, _D50),
    )
    return head[:128].ljust(128, b"\0") + table + data


ADOBE_RGB = rgb_profile(((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)), (0.3127, 0.329), 2.19921875)
