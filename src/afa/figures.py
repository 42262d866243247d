"""Write figures atomically as PNG or SVG.

The colours are the palette of Okabe and Ito, which is safe for colour blindness. Text in an SVG is
stored as outlines, so it looks the same everywhere.
"""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

from afa.errors import AfaError
from afa.files import write_atomic

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#0072B2", "#D55E00", "#F0E442")


def plain(text: str) -> str:
    """Escape a text so that matplotlib does not typeset it as mathematics."""
    return text.replace("$", r"\$")


def save_figure(figure: Figure, path: Path, dpi: int = 130) -> None:
    """Write a figure atomically as PNG or SVG.

    Raises:
        AfaError: if the suffix is not supported.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise AfaError(
            "AFA-DRAW-012", f"A figure must be {' or '.join(SUFFIXES)}; got '{path.name}'."
        )
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # the font draws boxes for missing glyphs, and there is no better fallback
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, dpi=dpi, format=path.suffix.lower().removeprefix("."))
    write_atomic(path, buffer.getvalue())
