"""Sections of recipes that name captioned pictures: generated scenes, data sets and folders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, field_validator

from afa.errors import AfaError
from afa.recipe import MAX_SEED, Section, resolve_path, resolve_source

_ADDRESS = re.compile(r"(https?|hf|s3|gs|az|abfs|zip|gzip|tar)://")


def _as_path(given: Any) -> Any:
    """A path, which would lose a slash of an address."""
    return Path(given) if isinstance(given, str) and "://" not in given else given


#: a path, or an address
Place = Annotated[Path | str, BeforeValidator(_as_path)]


class ScenesRecipe(Section):
    """Generated emoji scenes, `without` some objects; see `afa.zoo.scenes`.

    `hold_out` is the share of the pairs of objects of two domains that are not shown.
    """

    LATER: ClassVar[tuple[str, ...]] = ("without", "hold_out")

    num_samples: int = Field(default=10_000, ge=1)
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    kind: Literal["animals", "food", "things", "any", "mixed"] = "any"
    without: list[str] = Field(default_factory=list)
    hold_out: Literal["tenth", "fifth"] = "tenth"


class DatasetRecipe(Section):
    """A data set that `datasets.load_dataset` can load.

    `path` is a hub id, a local folder, or the name of a format (`parquet`, `webdataset`, `arrow`,
    `json`, `csv`) with `data_files`. Dots name nested columns: `json.caption`. Columns that are not
    named are found if they have a usual name, such as `prompt`. `caption_column` may be a list.
    With `streaming` the data set is not downloaded first: its samples are read once and cached.
    """

    path: str
    name: str | None = None
    data_files: list[str] | None = None
    split: str = "train"
    revision: str | None = None
    image_column: str = "image"
    caption_column: str | list[str] = Field(default="text", min_length=1)
    streaming: bool = False

    @property
    def caption_columns(self) -> tuple[str, ...]:
        """The columns of captions."""
        given = self.caption_column
        return (given,) if isinstance(given, str) else tuple(given)

    @field_validator("data_files", mode="before")
    @classmethod
    def _one_or_several(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given


def resolve_pictures(section: Any, folder: Path) -> dict[str, Any]:
    """Return the folder and the data set of a section of a recipe in `folder`, absolute."""
    changes: dict[str, Any] = {}
    if isinstance(section.folder, Path):
        changes["folder"] = resolve_path(section.folder, folder)
    if section.dataset is not None:
        changes["dataset"] = _resolve_dataset(section.dataset, folder)
    return changes


def _resolve_dataset(dataset: DatasetRecipe, folder: Path) -> DatasetRecipe:
    """Resolve local paths relative to the recipe; URLs and hub ids stay."""

    def resolved(file: str) -> str:
        if "://" not in file:
            return str(resolve_path(file, folder))
        for part in file.split("::"):  # fsspec's syntax for a file in an archive
            if not _ADDRESS.match(part):
                raise AfaError(
                    "AFA-TRAIN-043",
                    f"The data file '{file}' must be a local path, or a URL of https, hf, s3, gs, "
                    "az or abfs. Write a local path without '://'.",
                )
        return file

    files = dataset.data_files
    return dataset.model_copy(
        update={
            "path": resolve_source(dataset.path, folder),
            "data_files": None if files is None else [resolved(file) for file in files],
        }
    )
