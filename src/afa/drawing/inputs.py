"""Pictures from which a picture is drawn: an initial picture, a mask, and a first, smaller one."""

from __future__ import annotations

import hashlib
import inspect
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from afa.denoisers.kinds import build_pipeline, kind_of_pipeline
from afa.errors import AfaError
from afa.files import irregular
from afa.loading.task import size_multiple
from afa.loading.trust.unchanged import watch_as
from afa.reading import Conversion, conversions_of, read_picture, scale_and_crop

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from afa.drawing.recorded import InputPicture, PictureRecipe

#: a mask's grey values from here on are drawn again
_HALF = 128
_SIZE = ("height", "width")


def hash_input(path: Path) -> str:
    """Return the SHA-256 of an input picture's file.

    Raises:
        AfaError: if it cannot be read.
    """
    return hashlib.sha256(_content(path)).hexdigest()


def open_input(given: InputPicture) -> Image.Image:
    """Read an input picture; see `afa.reading.read_picture`.

    Raises:
        AfaError: if the file is missing or broken, or is not the recorded one.
    """
    content = _content(Path(given.path))
    if hashlib.sha256(content).hexdigest() != given.sha256:
        raise AfaError(
            "AFA-DRAW-034",
            f"'{given.path}' has changed since the picture was drawn from it: its SHA-256 is not "
            f"{given.sha256[:12]}... Restore that file.",
        )
    return read_picture(content, given.path)


def open_mask(given: InputPicture, size: tuple[int, int]) -> Image.Image:
    """Read a mask: white is drawn again, black is kept.

    Args:
        given: the file.
        size: width and height of the initial picture.

    Raises:
        AfaError: see `open_input`; or if it has another size or transparency, or is black.
    """
    mask = open_input(given)
    grey, what = mask.convert("L"), None
    if mask.size != size:
        what = f"has {mask.width} x {mask.height} pixels and the picture {size[0]} x {size[1]}"
    elif Conversion.ALPHA in conversions_of(mask):
        what = "is partly transparent"
    elif not any(grey.histogram()[_HALF:]):
        what = "is black everywhere, so that nothing would be drawn"
    if what is None:
        return grey
    raise AfaError(
        "AFA-DRAW-031",
        f"The mask '{given.path}' {what}. A mask must be opaque, have the size of the picture, and "
        "be white where the picture is drawn again and black where it is kept.",
    )


def fitted(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scale a picture to cover a size [width, height], and crop its centre."""
    if picture.size == size:
        return picture
    scale = max(size[0] / picture.width, size[1] / picture.height)
    scaled = (
        max(round(picture.width * scale), size[0]),
        max(round(picture.height * scale), size[1]),
    )
    left, top = (scaled[0] - size[0]) // 2, (scaled[1] - size[1]) // 2
    crop = (left, top, left + size[0], top + size[1])
    return scale_and_crop(picture, scaled, crop, Image.Resampling.BICUBIC)


def size_of_input(path: str | Path, multiple: int) -> tuple[int, int]:
    """Height and width for a picture drawn from a file: its own, rounded down to `multiple`.

    Raises:
        AfaError: if it cannot be read.
    """
    width, height = read_picture(_content(Path(path)), str(path)).size
    return (
        max(height // multiple, 1) * multiple,
        max(width // multiple, 1) * multiple,
    )


def taking_picture(pipeline: DiffusionPipeline, *, masked: bool) -> DiffusionPipeline:
    """Return the stock pipeline that draws from a picture with the components of another one.

    Args:
        pipeline: any pipeline; it is not changed.
        masked: whether it draws only where a mask is white.

    Raises:
        AfaError: if there is none for this kind of models.
    """
    kind, word = kind_of_pipeline(pipeline), "Inpaint" if masked else "Img2Img"
    name = next((each for each in kind.others if word in each and each not in kind.unusable), None)
    if name is None:
        what = "inpainting (--mask)" if masked else "image to image (--image, --hires)"
        raise AfaError(
            "AFA-DRAW-033",
            f"diffusers has no working pipeline for {what} with {kind.name}. Draw from the prompt "
            "alone, or use experts of another family.",
        )
    other = build_pipeline(name, pipeline.components, pipeline.config)
    other.set_progress_bar_config(disable=True)
    watch_as(other, pipeline)
    return other


def require_passes(recipe: PictureRecipe, multiple: int = 1) -> None:
    """Check that every pass from a picture has a step, and that hires enlarges.

    Args:
        recipe: of the picture.
        multiple: number of pixels of which height and width must be multiples.

    Raises:
        AfaError: if the number of steps times a strength is below 1, or the size of the second pass
            is rounded down to that of the first.
    """
    passes = {"strength": recipe.image and recipe.strength}
    passes["hires_strength"] = recipe.hires and recipe.hires_strength
    wrong = None
    for name, strength in passes.items():
        if strength and int(recipe.steps * strength) < 1:
            wrong = (
                f"{recipe.steps} steps at {name} {strength:g} are none: steps times strength must "
                f"be at least 1. Set more steps, or --{name.replace('_', '-')} to at least "
                f"{1 / recipe.steps:.2g}."
            )
    size = (recipe.height, recipe.width)
    if recipe.hires is not None and hires_size(*size, recipe.hires, multiple) == size:
        wrong = (
            f"hires {recipe.hires:g} does not enlarge {recipe.width} x {recipe.height} pixels, "
            f"which must be multiples of {multiple}. Set a larger factor."
        )
    if wrong is not None:
        raise AfaError("AFA-DRAW-029", wrong)


def arguments_of(recipe: PictureRecipe) -> dict[str, Any]:
    """The arguments of a pipeline's call with the initial picture and the mask of a recipe.

    Raises:
        AfaError: see `open_input` and `open_mask`.
    """
    assert recipe.image is not None, "only for pictures from others"
    picture, size = open_input(recipe.image), (recipe.width, recipe.height)
    found: dict[str, Any] = {"image": fitted(picture, size), "strength": recipe.strength}
    if recipe.mask is not None:
        found["mask_image"] = fitted(open_mask(recipe.mask, picture.size), size)
    return found


def accepted(pipeline: DiffusionPipeline, call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a pipeline's call; some pipelines take the size of the initial picture."""
    taken = inspect.signature(type(pipeline).__call__).parameters
    return {key: value for key, value in call.items() if key in taken or key not in _SIZE}


def enlarged(
    pipeline: DiffusionPipeline, recipe: PictureRecipe, picture: Image.Image
) -> Image.Image:
    """Scale a first picture to the size of the second pass, with Lanczos."""
    height, width = hires_size(recipe.height, recipe.width, recipe.hires, size_multiple(pipeline))
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def hires_size(height: int, width: int, factor: float | None, multiple: int) -> tuple[int, int]:
    """Height and width of the second pass, rounded down to `multiple`; None has no such pass."""
    scale = factor or 1
    return int(height * scale) // multiple * multiple, int(width * scale) // multiple * multiple


def _content(path: Path) -> bytes:
    """The content of a picture file.

    Raises:
        BrokenPicture: if it is missing, not a regular file, or cannot be read.
    """
    with suppress(OSError, ValueError):
        if irregular(path) is None:
            return path.read_bytes()
    read_picture(path, remedy="Pass another picture.")
    return path.read_bytes()  # it has become readable since
