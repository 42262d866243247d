"""The objects of the emoji scenes, and their sprites from the Noto Color Emoji font.

The package contains the sprites, not the font: `assets/sprites.png` is an atlas with one row per
domain. Noto Color Emoji is copyright Google Inc., SIL Open Font License 1.1.
"""

from __future__ import annotations

import hashlib
import io
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
from PIL import Image

from afa.errors import AfaError

if TYPE_CHECKING:
    from numpy.typing import NDArray

SPRITE_SIZE = 28  # pixels, both sides

#: each expert is fine-tuned on one domain
Domain = Literal["animals", "food", "things"]

#: what an object of a domain is called in general
CATEGORY: dict[Domain, str] = {"animals": "animal", "food": "food", "things": "thing"}

#: domain -> (object, its emoji); every object is one lower-case word.
DOMAINS: dict[Domain, tuple[tuple[str, str], ...]] = {
    "animals": (
        ("fox", "🦊"), ("cat", "🐱"), ("panda", "🐼"), ("frog", "🐸"),
        ("pig", "🐷"), ("lion", "🦁"), ("koala", "🐨"), ("penguin", "🐧"),
        ("owl", "🦉"), ("elephant", "🐘"), ("whale", "🐳"), ("turtle", "🐢"),
        ("butterfly", "🦋"), ("bee", "🐝"), ("octopus", "🐙"), ("parrot", "🦜"),
    ),
    "food": (
        ("pizza", "🍕"), ("burger", "🍔"), ("apple", "🍎"), ("banana", "🍌"),
        ("strawberry", "🍓"), ("watermelon", "🍉"), ("carrot", "🥕"), ("corn", "🌽"),
        ("donut", "🍩"), ("cookie", "🍪"), ("cake", "🍰"), ("grapes", "🍇"),
        ("cheese", "🧀"), ("avocado", "🥑"), ("pineapple", "🍍"), ("lemon", "🍋"),
    ),
    "things": (
        ("car", "🚗"), ("bus", "🚌"), ("rocket", "🚀"), ("clock", "⏰"),
        ("key", "🔑"), ("bulb", "💡"), ("umbrella", "☂"), ("guitar", "🎸"),
        ("drum", "🥁"), ("book", "📕"), ("phone", "📱"), ("camera", "📷"),
        ("ball", "⚽"), ("crown", "👑"), ("balloon", "🎈"), ("gift", "🎁"),
    ),
}  # fmt: skip

#: every object, domain by domain; the index is the judge's class.
OBJECTS: tuple[str, ...] = tuple(name for objects in DOMAINS.values() for name, _ in objects)
#: object -> RGBA [28, 28, 4] in 0..1
Sprites: TypeAlias = "dict[str, NDArray[np.float32]]"

DOMAIN_OF: dict[str, Domain] = {name: d for d, objects in DOMAINS.items() for name, _ in objects}


def extract_sprites(font: Path) -> Image.Image:
    """Make the atlas of RGBA sprites, one row per domain, from a Noto Color Emoji font file.

    Args:
        font: `NotoColorEmoji.ttf` with bitmap glyphs (table CBDT, 136x128 pixels each).

    Raises:
        AfaError: if fonttools is missing, the file is not such a font, or an emoji is missing.
    """
    try:
        from fontTools.ttLib import TTFont, TTLibError
    except ImportError as error:
        raise AfaError(
            "AFA-ZOO-009",
            "fonttools is not installed; it is needed to read sprites from the font. Install it: "
            "pip install 'afa[zoo]'.",
        ) from error
    try:
        tables = TTFont(font)
        glyph_names = tables.getBestCmap()
        bitmaps = tables["CBDT"].strikeData[0]
    except (TTLibError, KeyError, OSError) as error:
        raise AfaError(
            "AFA-ZOO-010",
            f"'{font}' is not Noto Color Emoji with bitmap glyphs (CBDT): {error}. Install "
            "Debian's package fonts-noto-color-emoji.",
        ) from error
    columns = max(len(objects) for objects in DOMAINS.values())
    atlas = Image.new("RGBA", (columns * SPRITE_SIZE, len(DOMAINS) * SPRITE_SIZE))
    for row, objects in enumerate(DOMAINS.values()):
        for column, (name, emoji) in enumerate(objects):
            if ord(emoji) not in glyph_names:
                raise AfaError(
                    "AFA-ZOO-011",
                    f"The font '{font}' has no glyph {emoji} for '{name}'. Use a newer version.",
                )
            png = bitmaps[glyph_names[ord(emoji)]].imageData
            bitmap = Image.open(io.BytesIO(png)).convert("RGBA")
            atlas.paste(_fit(bitmap), (column * SPRITE_SIZE, row * SPRITE_SIZE))
    return atlas


def _fit(bitmap: Image.Image) -> Image.Image:
    """Crop a glyph to its visible pixels, and fit it into a sprite with its aspect ratio."""
    bitmap = bitmap.crop(bitmap.getbbox())
    scale = SPRITE_SIZE / max(bitmap.size)
    size = (max(1, round(bitmap.width * scale)), max(1, round(bitmap.height * scale)))
    # premultiplied alpha; otherwise transparent black bleeds into the edges
    small = bitmap.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    sprite = Image.new("RGBA", (SPRITE_SIZE, SPRITE_SIZE))
    sprite.paste(small, ((SPRITE_SIZE - size[0]) // 2, (SPRITE_SIZE - size[1]) // 2))
    return sprite


@cache
def load_sprites() -> Sprites:
    """The bundled sprites."""
    with resources.files("afa.zoo").joinpath("assets/sprites.png").open("rb") as file:
        return cut_atlas(Image.open(file))


def hash_sprites(sprites: Sprites) -> str:
    """SHA-256 of all sprites and their names."""
    digest = hashlib.sha256()
    for name, sprite in sprites.items():
        digest.update(name.encode() + sprite.tobytes())
    return digest.hexdigest()


def cut_atlas(picture: Image.Image) -> Sprites:
    """Cut the sprites from an atlas that `extract_sprites` made."""
    atlas = np.asarray(picture.convert("RGBA"), dtype=np.float32) / 255.0
    size = SPRITE_SIZE
    return {
        name: atlas[row * size : (row + 1) * size, column * size : (column + 1) * size]
        for row, objects in enumerate(DOMAINS.values())
        for column, (name, _) in enumerate(objects)
    }
