"""Data sets of captioned pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from afa.reading import BrokenPicture, BrokenSample, parse_colour, read_picture
from afa.training.data.datasets import DatasetImages, DatasetStream, open_dataset
from afa.training.data.folder import FolderImages
from afa.training.data.images import (
    CaptionedImages,
    Joined,
    Part,
    SampleReader,
    Stored,
    StreamedImages,
)
from afa.training.data.scenes import SceneImages

if TYPE_CHECKING:
    from afa.training.recipe import DataRecipe

__all__ = [
    "BrokenPicture",
    "BrokenSample",
    "CaptionedImages",
    "DatasetImages",
    "DatasetStream",
    "FolderImages",
    "Joined",
    "Part",
    "SampleReader",
    "SceneImages",
    "Stored",
    "StreamedImages",
    "open_data",
    "open_dataset",
    "read_picture",
]


def open_data(recipe: DataRecipe) -> CaptionedImages | StreamedImages | None:
    """Open the real pictures of a recipe's `data` section; None if it has only prompts.

    Raises:
        AfaError: see `FolderImages` and `open_dataset`.
    """
    background = parse_colour(recipe.background)
    if recipe.dataset is not None:
        return open_dataset(recipe.dataset, recipe.limit, background)
    data: CaptionedImages
    if recipe.folder is not None:
        data = FolderImages(recipe.folder, background)
    elif (scenes := recipe.scenes) is None:
        return None
    else:
        data = SceneImages(
            scenes.num_samples,
            seed=scenes.seed,
            kind=scenes.kind,
            without=scenes.without,
            hold_out=scenes.hold_out,
        )
    if recipe.limit is not None and recipe.limit < len(data):
        return Part(data, range(recipe.limit))
    return data
