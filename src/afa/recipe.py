"""Recipes: YAML files that are checked before any work."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from afa.errors import AfaError

Model = TypeVar("Model", bound=BaseModel)
_MAX_BYTES = 1_000_000
MAX_SEED = 2**32 - 1


class Section(BaseModel):
    """A mapping in a recipe: unknown keys are errors, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    #: the keys that name files, folders or hub ids
    SOURCES: ClassVar[tuple[str, ...]] = ()


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, which by itself lets a later key silently replace an earlier one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key '{twice}' stands twice", node.start_mark
            )
        return super().construct_mapping(node, deep=deep)


def read_recipe(path: str | Path, model: type[Model]) -> Model:
    """Read a YAML file and check it against `model`; paths in it stay as they are written.

    Raises:
        AfaError: one line that names the file and every place that is wrong, with the nearest right
            name where a key is unknown.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise AfaError(f"A recipe must be smaller than {_MAX_BYTES} bytes; '{path}' is larger.")
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise AfaError(f"The recipe '{path}' cannot be read: {error}.") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise AfaError(
            f"The recipe '{path}' must be YAML: {' '.join(str(error).split())}."
        ) from None
    if not isinstance(content, dict):
        raise AfaError(
            f"The recipe '{path}' must be a mapping with the keys {', '.join(model.model_fields)}."
        )
    try:
        return model.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(_explain(detail, model) for detail in error.errors())
        raise AfaError(f"The recipe '{path}' is wrong: {problems}") from None


def resolve_source(source: str, folder: Path) -> str:
    """A local path of a recipe in `folder` made absolute; hub ids and `zoo:` names stay."""
    local = folder / Path(source).expanduser()
    is_local = local.exists() or source.startswith((".", "/", "~"))
    # links stay: what a hub's cache links to has no suffix
    return os.path.abspath(local) if is_local else source


def resolve_sources(section: Model, folder: Path, *keys: str) -> Model:
    """A section of a recipe in `folder`, with the sources under these keys resolved.

    Each is a source, see `resolve_source`, a section with some, a list of either, or None.
    """

    def resolved(value: Any) -> Any:
        if isinstance(value, list):
            return [resolved(item) for item in value]
        if isinstance(value, Section):
            return resolve_sources(value, folder, *value.SOURCES)
        return value and resolve_source(value, folder)

    return section.model_copy(update={key: resolved(getattr(section, key)) for key in keys})


def _explain(detail: ErrorDetails, model: type[BaseModel]) -> str:
    loc = detail["loc"]
    # a key that is unknown or missing is itself in no section
    is_key = detail["type"] in ("extra_forbidden", "missing")
    place, known = _place(loc[:-1] if is_key else loc, model)
    if is_key:
        place = f"{place}.{loc[-1]}".removeprefix(".")
    if detail["type"] == "extra_forbidden":
        close = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean '{close[0]}'?" if close else f"known are {', '.join(known)}"
        return f"unknown key '{place}', {hint}"
    if detail["type"] == "missing":
        return f"the key '{place}' is missing"
    if detail["type"].startswith("union_tag"):
        key = detail["ctx"]["discriminator"].strip("'")
        if detail["type"] == "union_tag_not_found":
            return f"the key '{place}.{key}' is missing"
        tags, came = detail["ctx"]["expected_tags"], detail["ctx"]["tag"]
        return f"'{place}.{key}': must be one of {tags}, came '{came}'"
    message = detail["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if not place:  # the recipe as a whole
        return message
    if isinstance(detail["input"], dict):
        return f"'{place}' {message}"
    return f"'{place}': {message}, came {detail['input']!r}"


def _place(loc: tuple[int | str, ...], model: type[BaseModel]) -> tuple[str, list[str]]:
    """A place in a recipe as its writer names it, and the keys of the section there."""
    sections, parts = [model], []
    for part in loc:
        if isinstance(part, str):
            field = next(
                (s.model_fields[part] for s in sections if part in s.model_fields),
                None,
            )
            if field is None:  # which kind of a section it was taken for, not a key
                sections = [s for s in sections if part in _tags(s)]
                continue
            sections = list(_models_in(field.annotation))
        parts.append(str(part))
    return ".".join(parts), list(sections[0].model_fields) if sections else []


def _tags(section: type[BaseModel]) -> list[Any]:
    """What a union may know a section by: one of its defaults, or its name."""
    return [section.__name__, *(field.default for field in section.model_fields.values())]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that an annotation such as `list[Section] | None` allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)
