"""Captioned pictures: a folder on disk, or emoji scenes made on the fly."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from afa.errors import AfaError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from afa.recipe import DataRecipe
    from afa.zoo.scenes import Kind
    from afa.zoo.sprites import Sprites


_DECODING_ERRORS = (
    UnidentifiedImageError,
    OSError,
    ValueError,
    SyntaxError,  # what Pillow calls a broken PNG
    Image.DecompressionBombError,
)


class CaptionedImages(Protocol):
    """A data set of pictures and captions, by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, str]: ...


class FolderImages:
    """A folder of pictures with `metadata.jsonl`, the Hugging Face `imagefolder` convention.

    Each line of the file is an object with `file_name`, relative to the folder, and `text`.

    Raises:
        AfaError: no folder, no or an empty metadata file, a broken line, a picture that is not
            there; on access, a picture that cannot be decoded.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        metadata = folder / "metadata.jsonl"
        if not folder.is_dir():
            raise AfaError(f"The data folder '{folder}' does not exist.")
        if not metadata.is_file():
            raise AfaError(
                f"The data folder '{folder}' must hold pictures and a metadata.jsonl with lines "
                'such as {"file_name": "0001.png", "text": "a fox"}; it has no metadata.jsonl.'
            )
        self.rows: list[tuple[Path, str]] = []
        try:
            text = metadata.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise AfaError(f"'{metadata}' must be UTF-8 text, but reading it: {error}.") from error
        # not splitlines: a caption may hold a line separator of Unicode
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                path, caption = folder / row["file_name"], row["text"]
                valid = isinstance(caption, str)
            except (json.JSONDecodeError, KeyError, TypeError):
                valid = False
            if not valid:
                raise AfaError(
                    f"Line {number} of '{metadata}' must be an object with the strings file_name "
                    f"and text, came {line[:80]!r}."
                )
            if not path.is_file():
                raise AfaError(f"Line {number} of '{metadata}' names '{path}', which is missing.")
            self.rows.append((path, caption))
        if not self.rows:
            raise AfaError(f"The data folder '{folder}' must hold pictures; its list is empty.")

    def __repr__(self) -> str:
        return f"FolderImages({str(self._folder)!r}, {len(self.rows)} pictures)"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        path, text = self.rows[index]
        return read_picture(path, "Replace it or take its line out of metadata.jsonl."), text


def read_picture(path: Path, remedy: str = "Replace it or take it out.") -> Image.Image:
    """A picture from a file, turned upright, RGB.

    Raises:
        AfaError: it is missing or cannot be decoded to its end.
    """
    try:
        with Image.open(path) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")
    except _DECODING_ERRORS as error:
        said = " ".join(str(error).split())
        raise AfaError(
            f"'{path}' must be a complete picture, but reading it says: {said}. {remedy}"
        ) from error


class SceneImages:
    """The first `num_samples` emoji scenes of a stream; see `afa.zoo.scenes.scene`."""

    def __init__(
        self,
        num_samples: int,
        *,
        seed: int = 0,
        kind: Kind = "any",
        sprites: Sprites | None = None,
    ) -> None:
        self._num_samples, self._seed, self._kind = num_samples, seed, kind
        self._sprites = sprites

    def __repr__(self) -> str:
        return f"SceneImages({self._num_samples}, seed={self._seed}, kind={self._kind!r})"

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, index: int) -> tuple[Image.Image, str]:
        from afa.zoo.scenes import scene

        shown = scene(index, kind=self._kind, seed=self._seed)
        return Image.fromarray(shown.render(self._sprites)), shown.caption


def open_data(recipe: DataRecipe) -> CaptionedImages:
    """The data set that a recipe's `data` section names.

    Raises:
        AfaError: see `FolderImages`.
    """
    if recipe.folder is not None:
        return FolderImages(recipe.folder)
    scenes = recipe.scenes
    assert scenes is not None, "a recipe has exactly one kind of data"
    return SceneImages(scenes.num_samples, seed=scenes.seed, kind=scenes.kind)


def to_pixels(picture: Image.Image, resolution: int, generator: torch.Generator) -> Tensor:
    """Scale the shorter side to `resolution`, crop a square anywhere: [3, R, R] in -1..1.

    As in the published training, but scaled with Lanczos's filter. A square picture draws nothing
    from the generator.
    """
    scale = resolution / min(picture.size)
    width, height = (max(resolution, round(side * scale)) for side in picture.size)
    if (width, height) != picture.size:
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    left, top = (
        int(torch.randint(side - resolution + 1, (), generator=generator))
        if side > resolution
        else 0
        for side in (width, height)
    )
    picture = picture.crop((left, top, left + resolution, top + resolution))
    array = np.asarray(picture, dtype=np.float32) / 127.5 - 1.0
    return torch.from_numpy(array).permute(2, 0, 1)


def batch_indices(num_samples: int, batch_size: int, step: int, seed: int) -> list[int]:
    """The samples of one training step: epochs of all samples, each in its own random order.

    A pure function of its arguments, so a resumed run sees what it would have seen.
    """
    places = range(step * batch_size, (step + 1) * batch_size)
    orders = {
        epoch: np.random.default_rng([seed, epoch]).permutation(num_samples)
        for epoch in {place // num_samples for place in places}
    }
    return [int(orders[place // num_samples][place % num_samples]) for place in places]
