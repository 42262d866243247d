"""Data sets of captioned pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
from afa.training.data.remote import located
from afa.training.data.rows import CaptionOptions
from afa.training.data.scenes import SceneImages

if TYPE_CHECKING:
    from afa.training.recipe import DataRecipe, Recipe

__all__ = [
    "BrokenPicture",
    "BrokenSample",
    "CaptionOptions",
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
    "open_validation",
    "read_picture",
]


def open_data(recipe: DataRecipe) -> CaptionedImages | StreamedImages | None:
    """Open the real pictures of a recipe's `data` section; None if it has only prompts.

    Raises:
        AfaError: see `FolderImages`, `located` and `open_dataset`.
    """
    background = parse_colour(recipe.background)
    several = recipe.captions == "random"
    if recipe.dataset is not None:
        return open_dataset(recipe.dataset, recipe.limit, background, several)
    data: CaptionedImages
    if recipe.folder is not None:
        options = CaptionOptions(
            several=several,
            columns=recipe.caption_columns,
            file_column=recipe.file_column,
            from_folders=recipe.folder_captions,
            repeats=recipe.repeats,
        )
        data = FolderImages(located(recipe.folder), background, options, named=recipe.folder)
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


def open_validation(recipe: Recipe) -> CaptionedImages | None:
    """Open the pictures that are only validated on; None if the recipe names none.

    They are read as those of the training: background, captions and columns are the same.

    Raises:
        AfaError: see `open_data`.
    """
    asked = recipe.validation
    if asked is None or (asked.folder is None and asked.dataset is None):
        return None
    changes = {"folder": asked.folder, "dataset": asked.dataset}
    nothing: dict[str, Any] = {"scenes": None, "prompts": None, "limit": None, "repeats": False}
    data = open_data(recipe.data.model_copy(update={**nothing, **changes}))
    assert data is not None, "it has a folder or a data set"
    assert not isinstance(data, StreamedImages), "the recipe refuses it"
    return data
