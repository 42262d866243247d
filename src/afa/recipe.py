"""Recipes: YAML files that are validated before any work."""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_type_hints

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from afa.errors import AfaError
from afa.files import read_text
from afa.policy import require_within
from afa.recipe_names import hint_for

Model = TypeVar("Model", bound=BaseModel)
#: limits of a recipe: bytes, levels, entries with aliases expanded, and listed errors
_MAX_BYTES, _MAX_DEPTH, _MAX_NODES, _MAX_LISTED = 1_000_000, 32, 100_000, 10
_MAX_SHOWN = 120  # characters of a value in an error
MAX_SEED = 2**32 - 1


class Section(BaseModel):
    """A mapping in a recipe: immutable, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    #: the keys that name files, folders or hub ids
    SOURCES: ClassVar[tuple[str, ...]] = ()
    #: keys of later releases, which are not written while they have their default, so that runs
    #: and folders of earlier releases are still equal to their recipes
    LATER: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _without_unused(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = handler(self)
        fields = type(self).model_fields
        unused = {
            key
            for key in self.LATER
            if getattr(self, key) == fields[key].get_default(call_default_factory=True)
        }
        return {key: value for key, value in written.items() if key not in unused}


class _Loader(yaml.SafeLoader):
    """YAML's safe loader with checks for duplicate keys and for aliases that expand without limit.

    The original silently replaces an earlier key by a later one, and nested aliases can expand to
    more than any memory.
    """

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _require_bounded(node)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        duplicate = next((key for key in keys if keys.count(key) > 1), None)
        if duplicate is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"duplicate key '{duplicate}'", node.start_mark
            )
        return super().construct_mapping(node, deep=deep)


def _require_bounded(root: yaml.Node) -> None:
    """Check the depth and size of a document with aliases expanded.

    Raises:
        yaml.YAMLError: if it is too deep or too large, or contains itself.
    """
    sizes: dict[int, int] = {}
    inside: list[int] = []

    def size_of(node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode):
            return 1
        key = id(node)
        if key in sizes:
            return sizes[key]
        if key in inside:
            raise yaml.YAMLError("it contains itself")
        if len(inside) >= _MAX_DEPTH:
            raise yaml.YAMLError(f"it has more than {_MAX_DEPTH} levels")
        inside.append(key)
        is_mapping = isinstance(node, yaml.MappingNode)
        children = itertools.chain(*node.value) if is_mapping else node.value
        size = 1 + sum(size_of(child) for child in children)
        inside.pop()
        if size > _MAX_NODES:
            raise yaml.YAMLError(f"it has more than {_MAX_NODES} entries with aliases expanded")
        sizes[key] = size
        return size

    size_of(root)


def read_recipe(path: str | Path, model: type[Model]) -> Model:
    """Read a YAML file and validate it with `model`, without resolving paths.

    Raises:
        AfaError: if it is invalid; names every wrong entry, and similar names of unknown keys.
    """
    path = Path(path)
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise AfaError(
            "AFA-RECIPE-001",
            f"The recipe '{path}' must be a mapping with the keys {', '.join(model.model_fields)}.",
        )
    return validated(content, model, path)


def validated(content: Mapping[str, Any], model: type[Model], path: Path) -> Model:
    """Validate the content of a recipe.

    Raises:
        AfaError: see `read_recipe`.
    """
    try:
        return model.model_validate(content)
    except ValidationError as error:
        details = error.errors()
        problems = "; ".join(_explain(detail, model) for detail in details[:_MAX_LISTED])
        more = len(details) - _MAX_LISTED
        raise AfaError(
            "AFA-RECIPE-002",
            f"The recipe '{path}' is invalid: {problems}{f'; and {more} more' if more > 0 else ''}",
        ) from None


def read_yaml(path: Path) -> Any:
    """Read a YAML file with limits of size and depth.

    Raises:
        AfaError: if it cannot be read, or is not YAML within these limits.
    """
    try:
        text = read_text(path, _MAX_BYTES)
    except UnicodeDecodeError as error:
        raise AfaError("AFA-RECIPE-003", f"The recipe '{path}' cannot be read: {error}.") from None
    except ValueError as error:
        raise AfaError(
            "AFA-RECIPE-004", f"'{path}' is not a recipe: {error}. It must be a small YAML file."
        ) from None
    except OSError as error:
        raise AfaError("AFA-RECIPE-005", f"The recipe '{path}' cannot be read: {error}.") from error
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date, a number
        raise AfaError(
            "AFA-RECIPE-006",
            f"The recipe '{path}' is not valid YAML: {' '.join(str(error).split())}.",
        ) from None


def resolve_source(source: str, folder: Path) -> str:
    """Make a local path in a recipe absolute; hub ids and `zoo:` names are not changed.

    Args:
        source: a path, a hub id or a `zoo:` name.

    Raises:
        AfaError: if the recipe may not access the path; see `afa.policy`.
    """
    local = folder / Path(source).expanduser()
    is_local = source.startswith((".", "/", "~")) or local.exists()
    return str(resolve_path(source, folder)) if is_local else source


def resolve_path(path: str | Path, folder: Path) -> Path:
    """Make a path of a recipe in `folder` absolute.

    Raises:
        AfaError: see `resolve_source`.
    """
    # does not resolve links: their targets in a hub's cache have no suffix
    absolute = Path(os.path.abspath(folder / Path(path).expanduser()))
    require_within(absolute, folder, "A recipe")
    return absolute


def resolve_sources(section: Any, folder: Path, *keys: str) -> Any:
    """Resolve the sources under these keys in a section of a recipe in `folder`.

    Each value is a source (see `resolve_source`), a section or dataclass with `SOURCES`, a list of
    these, or None.
    """

    def resolved(value: Any) -> Any:
        if isinstance(value, list):
            return [resolved(item) for item in value]
        if hasattr(value, "SOURCES"):
            return resolve_sources(value, folder, *value.SOURCES)
        return value and resolve_source(value, folder)

    changes = {key: resolved(getattr(section, key)) for key in keys}
    if isinstance(section, BaseModel):
        return section.model_copy(update=changes)
    return replace(section, **changes)


def _explain(detail: ErrorDetails, model: type[BaseModel]) -> str:
    loc = detail["loc"]
    # an unknown or missing key is not in any section
    is_unknown = detail["type"] in ("extra_forbidden", "unexpected_keyword_argument")
    is_key = is_unknown or detail["type"] == "missing"
    place, known = _place(loc[:-1] if is_key else loc, model)
    if is_key:
        place = f"{place}.{loc[-1]}".removeprefix(".")
    if is_unknown:
        if (found := hint_for(str(loc[-1]), known)) is not None:
            return f"unknown key '{place}', {found}"
        close = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.75)
        hint = f"did you mean '{close[0]}'?" if close else f"known keys: {', '.join(known)}"
        return f"unknown key '{place}', {hint}"
    if detail["type"] == "missing":
        return f"the key '{place}' is missing"
    if detail["type"].startswith("union_tag"):
        key = detail["ctx"]["discriminator"].strip("'")
        if detail["type"] == "union_tag_not_found":
            return f"the key '{place}.{key}' is missing"
        tags, tag = detail["ctx"]["expected_tags"], detail["ctx"]["tag"]
        return f"'{place}.{key}': must be one of {tags}, got '{tag}'"
    message = detail["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if detail["type"] in ("model_type", "model_attributes_type", "dataclass_type") and known:
        message = f"must have keys ({', '.join(known[:3])}, ...)"
        if isinstance(detail["input"], str) and known[0] in ("folder", "file"):
            message += f", for example {place}: {{{known[0]}: {_shown(detail['input'])}}}"
    if not place:  # the whole recipe
        return message
    if isinstance(detail["input"], dict):
        return f"'{place}' {message}"
    return f"'{place}': {message}, got {_shown(detail['input'])}"


def _shown(value: Any) -> str:
    """Return the repr of a value, shortened to one line."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."


def _place(loc: tuple[int | str, ...], model: type) -> tuple[str, list[str]]:
    """Return the dotted key of a location in a recipe, and the keys of the section there."""
    sections, parts = [model], []
    for part in loc:
        if isinstance(part, str):
            keys = next((keys for s in sections if part in (keys := _keys(s))), None)
            if keys is None:  # pydantic's name of a union member, not a key
                sections = [s for s in sections if part in _tags(s)]
                continue
            sections = list(_sections_in(keys[part].annotation))
        parts.append(str(part))
    return ".".join(parts), list(_keys(sections[0])) if sections else []


def _keys(section: Any) -> dict[str, FieldInfo]:
    """Return the keys of a section, which is a model or a dataclass."""
    if is_dataclass(section):
        return {
            key: FieldInfo.from_annotation(hint) for key, hint in get_type_hints(section).items()
        }
    return section.model_fields


def _tags(section: type) -> list[Any]:
    """Return the possible tags of a section in a union: its name, or one of its defaults."""
    return [section.__name__, *(field.default for field in _keys(section).values())]


def _sections_in(annotation: Any) -> Iterator[type]:
    """Yield the sections in an annotation such as `list[Section] | None`."""
    if hasattr(annotation, "SECTIONS"):  # its forms in recipes differ from the class
        yield from annotation.SECTIONS
    elif isinstance(annotation, type) and (
        issubclass(annotation, BaseModel) or is_dataclass(annotation)
    ):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _sections_in(argument)


def differing(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the dotted keys in which two recipes differ."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differing(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}")
    return found
