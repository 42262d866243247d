"""Prompts from text files, COCO captions, DrawBench, picture folders or the zoo."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from pydantic import Field, PositiveInt, model_validator

from afa.errors import AfaError
from afa.files import irregular, is_unicode, read_json, read_text, write_atomic
from afa.reading import counted
from afa.recipe import MAX_SEED, Section, resolve_path
from afa.zoo.scenes import Kind

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

#: bytes; the COCO captions of 2017 have 92 MB
_MAX_PROMPTS = 500_000_000


class ZooPrompts(Section):
    """Captions of emoji scenes; `kinds` gives the number of each kind, and kinds are the groups.

    Mixed pairs are not in any training set, or with `held_out: false` only in training sets, so
    that settings can be tuned on them.
    """

    kinds: dict[Kind, PositiveInt] = Field(min_length=1)
    held_out: bool = True
    seed: int = Field(default=1_000_000, ge=0, le=MAX_SEED)


class CocoPrompts(Section):
    """A COCO caption file, and the folder of its pictures for metrics that need references."""

    captions: Path
    pictures: Path | None = None


class PromptsRecipe(Section):
    """Exactly one source of prompts; `limit` is the maximum number of prompts per group.

    `text`: a UTF-8 file with one prompt per line. `coco`: a COCO caption JSON; uses the caption
    with the lowest id of each picture. `drawbench`: a CSV with the columns Prompts and Category;
    categories are the groups. `folder`: captioned pictures, as for training; the pictures are the
    references.
    """

    text: Path | None = None
    coco: CocoPrompts | None = None
    drawbench: Path | None = None
    folder: Path | None = None
    zoo: ZooPrompts | None = None
    limit: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _exactly_one(self) -> PromptsRecipe:
        sources = (self.text, self.coco, self.drawbench, self.folder, self.zoo)
        if sum(source is not None for source in sources) != 1:
            raise ValueError("must have exactly one of text, coco, drawbench, folder and zoo")
        return self


@dataclass(frozen=True)
class Prompt:
    """A prompt, its group in the report, and the real picture that it describes."""

    text: str
    group: str = "all"
    reference: Path | None = None


def load_prompts(recipe: PromptsRecipe, scratch: Path | None = None) -> list[Prompt]:
    """Load all prompts of a recipe in a fixed order.

    Args:
        recipe: source of the prompts, with paths absolute or relative to the working directory.
        scratch: folder in which the zoo's reference pictures are rendered; None loads the zoo's
            prompts without references.

    Raises:
        AfaError: if a file cannot be read or has another format, a prompt is empty or repeated, or
            there is no prompt.
    """
    if recipe.text is not None:
        prompts = _from_text(recipe.text)
    elif recipe.coco is not None:
        prompts = _from_coco(recipe.coco)
    elif recipe.drawbench is not None:
        prompts = _from_drawbench(recipe.drawbench)
    elif recipe.folder is not None:
        prompts = _from_folder(recipe.folder)
    else:
        assert recipe.zoo is not None, "a recipe has exactly one source"
        prompts = _from_zoo(recipe.zoo, scratch)
    if recipe.limit is not None:
        kept = [n for places in groups_of(prompts).values() for n in places[: recipe.limit]]
        prompts = [prompts[n] for n in sorted(kept)]
    return prompts


def _read_text(path: Path) -> str:
    try:
        return read_text(path, _MAX_PROMPTS)
    except (OSError, ValueError) as error:
        raise AfaError(
            "AFA-EVAL-001", f"The prompts '{path}' cannot be read as UTF-8 text: {error}."
        ) from error


def _checked(
    path: Path, places: Iterable[tuple[str, Prompt]], *, may_repeat: bool = False
) -> list[Prompt]:
    """Check prompts for empty and repeated ones.

    Args:
        path: path of the file, for messages.
        places: each prompt with its position in the file, such as "line 3".
        may_repeat: whether prompts may repeat.
    """
    seen: dict[str, str] = {}
    prompts = []
    for place, prompt in places:
        if not prompt.text.strip():
            raise AfaError(
                "AFA-EVAL-002",
                f"The prompt in {place} of '{path}' is empty. Remove it.",
            )
        if not is_unicode(prompt.text):
            raise AfaError(
                "AFA-EVAL-003",
                f"The prompt in {place} of '{path}' contains an unpaired surrogate: "
                f"{prompt.text[:80]!a}. Replace it by a valid character.",
            )
        if prompt.text in seen and not may_repeat:
            raise AfaError(
                "AFA-EVAL-004",
                f"The prompt in {place} of '{path}' repeats {seen[prompt.text]}: "
                f"{prompt.text[:80]!r}. Remove one; use several seeds for several pictures of a "
                "prompt.",
            )
        seen[prompt.text] = place
        prompts.append(prompt)
    if not prompts:
        raise AfaError(
            "AFA-EVAL-005", f"'{path}' contains no prompts. It must contain at least one."
        )
    return prompts


def source_warnings(recipe: PromptsRecipe) -> list[str]:
    """Warnings of data in a recipe's sources that is not used, one line each.

    Raises:
        AfaError: see `load_prompts`.
    """
    if recipe.folder is not None:
        from afa.training.data import FolderImages

        return FolderImages(recipe.folder).warnings
    if recipe.drawbench is not None:
        rows = _drawbench_rows(recipe.drawbench)
        repeated = len(rows) - len({text for _, text, _ in rows})
        if repeated:
            return [
                f"{counted(repeated, 'row')} of '{recipe.drawbench}' repeat a prompt of an earlier "
                "row and are skipped; each prompt belongs to the group of its first row."
            ]
    return []


def _from_text(path: Path) -> list[Prompt]:
    lines = _read_text(path).removesuffix("\n").split("\n")
    return _checked(
        path, ((f"line {n}", Prompt(line.strip())) for n, line in enumerate(lines, start=1))
    )


def _from_coco(recipe: CocoPrompts) -> list[Prompt]:
    content = read_json(recipe.captions)
    try:
        pictures = [(_id(entry["id"]), _text(entry["file_name"])) for entry in content["images"]]
        captions = sorted(
            (_id(entry["id"]), _id(entry["image_id"]), _text(entry["caption"]).strip())
            for entry in content["annotations"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise AfaError(
            "AFA-EVAL-006",
            f"'{recipe.captions}' is not a COCO caption file ({type(error).__name__}: {error}). It "
            "must have 'images' (id, file_name) and 'annotations' (id, image_id, caption).",
        ) from error
    names: dict[int, str] = {}
    for image, name in pictures:
        if names.setdefault(image, name) != name:
            raise AfaError(
                "AFA-EVAL-007",
                f"'{recipe.captions}' has two pictures with the id {image}, '{names[image][:80]}' "
                f"and '{name[:80]}'. Ids must be unique. Correct the file.",
            )
    first: dict[int, str] = {}
    for _, image, caption in captions:
        if image not in names:
            raise AfaError(
                "AFA-EVAL-008",
                f"'{recipe.captions}' has a caption of the picture {image}, which is not in "
                "'images'. Add the picture or remove the caption.",
            )
        first.setdefault(image, caption)
    prompts = []
    by_base: dict[str, str] = {}
    for image, caption in sorted(first.items()):
        reference = None
        if recipe.pictures is not None:
            base = Path(names[image]).name  # prevents paths outside the folder
            if by_base.setdefault(base, names[image]) != names[image]:
                raise AfaError(
                    "AFA-EVAL-009",
                    f"'{recipe.captions}' has the pictures '{by_base[base][:80]}' and "
                    f"'{names[image][:80]}', which have the same name in '{recipe.pictures}'. File "
                    "names must be unique. Rename one in both places.",
                )
            reference = recipe.pictures / base
            _require_file(reference, recipe.captions)
        prompts.append((f"picture {image}", Prompt(caption, reference=reference)))
    # two pictures may have the same caption
    return _checked(recipe.captions, prompts, may_repeat=True)


def _id(value: Any) -> int:
    """Convert an id, which some programs write as text, to an integer without rounding.

    Raises:
        ValueError: if it is not an integer.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"an id must be an integer; got {value!r}")
    return int(value)


def _text(value: Any) -> str:
    """Return a string unchanged; `str` would convert any type.

    Raises:
        ValueError: if it is not a string.
    """
    if not isinstance(value, str):
        raise ValueError(f"a file name and a caption must be text; got {str(value)[:80]!r}")
    return value


def _require_file(reference: Path, named_by: Path) -> None:
    if (what := irregular(reference)) is not None:
        raise AfaError(
            "AFA-EVAL-010",
            f"The picture '{reference}' of '{named_by}' must be a regular file; it is {what}. Set "
            "prompts.coco.pictures to another folder, or remove it.",
        )
    if not reference.is_file():
        raise AfaError(
            "AFA-EVAL-011",
            f"The picture '{reference}' of '{named_by}' does not exist. Set prompts.coco.pictures "
            "to the folder that contains it, or remove it.",
        )


def _drawbench_rows(path: Path) -> list[tuple[int, str, str]]:
    """The line number, prompt and category of each row."""
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""))
    try:
        fields = reader.fieldnames or []
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise AfaError("AFA-EVAL-012", f"'{path}' is not a valid CSV file: {error}.") from error
    if "Prompts" not in fields:
        raise AfaError(
            "AFA-EVAL-013",
            f"'{path}' must be DrawBench's CSV with the columns Prompts and Category; got the "
            f"columns {', '.join(fields) or 'none'}.",
        )
    for name in ("Prompts", "Category"):
        if fields.count(name) > 1:
            raise AfaError(
                "AFA-EVAL-014",
                f"'{path}' must have one column {name}; got {fields.count(name)}.",
            )
    for line, row in rows:
        if None in row or None in row.values():
            count = sum(value is not None for key, value in row.items() if key is not None)
            count += len(row.get(None) or ())
            raise AfaError(
                "AFA-EVAL-015",
                f"Each row of '{path}' must have {counted(len(fields), 'cell')} like the header; "
                f"the row that ends in line {line} has {count}. Quote texts that contain commas, "
                "and close all quotes.",
            )
    return [
        (line, (row["Prompts"] or "").strip(), (row.get("Category") or "").strip())
        for line, row in rows
    ]


def _from_drawbench(path: Path) -> list[Prompt]:
    first: dict[str, tuple[str, Prompt]] = {}
    for line, text, group in _drawbench_rows(path):
        # a prompt in two categories is drawn once, for the first one
        first.setdefault(text, (f"line {line}", Prompt(text, group or "all")))
    return _checked(path, first.values())


def _from_folder(folder: Path) -> list[Prompt]:
    from afa.training.data import FolderImages

    if folder.is_file():  # its pictures may be in an archive, and references are files
        raise AfaError(
            "AFA-LOAD-124",
            f"prompts.folder '{folder}' is a file; it must be a folder with captioned pictures. "
            "Unpack it, or name the folder.",
        )
    return _checked(
        folder,
        (
            (f"the caption of '{path.relative_to(folder)}'", Prompt(caption or "", reference=path))
            for path, caption in FolderImages(folder).rows
        ),
    )


def _from_zoo(recipe: ZooPrompts, scratch: Path | None) -> list[Prompt]:
    from afa.zoo.scenes import evaluation_prompts, parse_caption

    prompts = [
        Prompt(caption, kind)
        for kind, count in recipe.kinds.items()
        for caption in evaluation_prompts(
            count, kind=kind, seed=recipe.seed, held_out=recipe.held_out
        )
    ]
    if len({prompt.text for prompt in prompts}) < len(prompts):
        raise AfaError(
            "AFA-EVAL-016",
            f"The kinds of prompts.zoo must not overlap; got {', '.join(recipe.kinds)}. Remove "
            "'any', which contains all others, or the others.",
        )
    if scratch is None:
        return prompts
    scratch.mkdir(parents=True, exist_ok=True)
    with_references = []
    for n, prompt in enumerate(prompts):
        path = scratch / f"{n:06d}.png"
        buffer = io.BytesIO()
        Image.fromarray(parse_caption(prompt.text).render()).save(buffer, format="PNG")
        if not path.exists() or path.read_bytes() != buffer.getvalue():
            write_atomic(path, buffer.getvalue())
        with_references.append(Prompt(prompt.text, prompt.group, path))
    return with_references


def resolve_prompts(recipe: PromptsRecipe, folder: Path) -> PromptsRecipe:
    """Make the paths of a recipe in `folder` absolute."""
    coco = recipe.coco and recipe.coco.model_copy(
        update={
            "captions": resolve_file(recipe.coco.captions, folder),
            "pictures": resolve_file(recipe.coco.pictures, folder),
        }
    )
    files = ("text", "drawbench", "folder")
    paths = {key: resolve_file(getattr(recipe, key), folder) for key in files}
    return recipe.model_copy(update={**paths, "coco": coco})


def resolve_file(file: Path | None, folder: Path) -> Path | None:
    """Make a path of a recipe in `folder` absolute; returns None for None."""
    return None if file is None else resolve_path(file, folder)


def groups_of(prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    """The indices of each group's prompts, with groups in order of first appearance."""
    groups: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts):
        groups.setdefault(prompt.group, []).append(place)
    return groups
