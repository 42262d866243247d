"""Read picture files of any format as 8-bit sRGB.

Training data, reference pictures and metrics all use `read_picture`, so that a file has the same
pixels everywhere.
"""

from afa.reading.broken import BrokenPicture, BrokenSample
from afa.reading.crop import scale_and_crop
from afa.reading.formats import files_in, is_picture_file, is_system_file
from afa.reading.picture import (
    WHITE,
    as_rgb,
    conversions_of,
    parse_colour,
    read_picture,
)
from afa.reading.tally import Conversion, Tally, counted

__all__ = [
    "WHITE",
    "BrokenPicture",
    "BrokenSample",
    "Conversion",
    "Tally",
    "as_rgb",
    "conversions_of",
    "counted",
    "files_in",
    "is_picture_file",
    "is_system_file",
    "parse_colour",
    "read_picture",
    "scale_and_crop",
]
