"""The `parameters` text of A1111 (and Forge): written beside afa's recipe, and read.

Its form is that of `create_infotext` and `parse_generation_parameters` in A1111: the prompt, a line
`Negative prompt: ...`, and a line of `key: value` pairs in which values with commas, colons or line
breaks are JSON strings. Other programs and sites for pictures read it, too.
"""

from __future__ import annotations

import json
import re
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import ExifTags, Image, UnidentifiedImageError

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from afa.ensemble.prompt_syntax import PromptSyntax

KEY = "parameters"
#: of the text, and of its line of settings, whose search takes the square of its length
_MAX_TEXT, _MAX_LINE = 100_000, 10_000
_PAIR = re.compile(r'\s*(\w[\w \-/]*):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_NEGATIVE = "Negative prompt:"
#: the fewest pairs in a line of settings; other last lines belong to the prompt
_FEWEST = 3
_USER_COMMENT = 0x9286
_CODED = {b"UNICODE\0": "utf-16-be", b"ASCII\0\0\0": "ascii", b"\0" * 8: "utf-8"}
#: keys that name the model and the program, without an effect of their own
_OF_MODEL = ("Model hash", "Model", "Version", "VAE", "VAE hash", "Hashes")
#: errors of Pillow's readers of damaged files and EXIF data
_DAMAGED = (
    *(OSError, UnidentifiedImageError, ValueError, SyntaxError, LookupError, TypeError),
    *(EOFError, OverflowError, struct.error, zlib.error),
)
_TAG = re.compile(r"<\s*(\w+)\s*:[^<>]*>")
_SYNTAX = {
    r"(?<!\\)\([^()]*:\s*[\d.]+\s*\)": "(word:1.3)",
    r"(?<!\\)\((?![^()]*:)": "(word)",
    r"(?<!\\)\[": "[word]",
    r"\bBREAK\b": "BREAK",
    r"\bAND\b": "AND",
    r"\\[()\[\]]": r"\(",
}


@dataclass(frozen=True)
class Parameters:
    """What a `parameters` text says, None where it says nothing.

    Attributes:
        prompt: the prompt, without tags such as `<lora:...>`.
        negative_prompt: likewise.
        sampler: A1111's name of the sampler, with its spacing.
        steps: number of steps.
        guidance: the CFG scale.
        seed: the seed.
        width: in pixels.
        height: in pixels.
        notes: what was not understood, one sentence each.
    """

    prompt: str
    negative_prompt: str
    sampler: str | None
    steps: int | None
    guidance: float | None
    seed: int | None
    width: int | None
    height: int | None
    notes: tuple[str, ...]

    @property
    def given(self) -> dict[str, Any]:
        """The settings that the text has, by the names of `PictureRecipe`."""
        names = ("negative_prompt", "steps", "guidance", "seed", "width", "height")
        found = {name: getattr(self, name) for name in names}
        return {name: value for name, value in found.items() if value is not None}


def text_of(prompt: str, negative_prompt: str, pairs: Mapping[str, object]) -> str:
    """Write a `parameters` text.

    Args:
        prompt: the prompt.
        negative_prompt: the negative prompt; its line is there even if it is empty.
        pairs: the settings by A1111's keys, in order.
    """
    line = ", ".join(f"{key}: {_quoted(value)}" for key, value in pairs.items())
    return f"{prompt}\n{_NEGATIVE} {negative_prompt}\n{line}"


def read_parameters(path: Path, syntax: PromptSyntax = "plain") -> Parameters | None:
    """Read the `parameters` text in a PNG, or in the EXIF data of a JPEG or WebP.

    Args:
        path: the file.
        syntax: how the prompts will be read.

    Returns: None if it has none, or cannot be read.

    Raises:
        AfaError: if a value is not as A1111 writes it.
    """
    try:
        with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as picture:
            text = picture.info.get(KEY)
            if not isinstance(text, str):
                exif = picture.getexif().get_ifd(ExifTags.IFD.Exif)
                text = _decoded(exif.get(_USER_COMMENT))
    except _DAMAGED:
        return None
    return None if not text or len(text) > _MAX_TEXT else parse_parameters(text, str(path), syntax)


def parse_parameters(text: str, name: str, syntax: PromptSyntax = "plain") -> Parameters:
    """Parse a `parameters` text.

    Args:
        text: the text.
        name: of the file, for errors.
        syntax: how the prompts will be read; weights are noted if they are drawn as words.

    Raises:
        AfaError: if a value is not as A1111 writes it.
    """
    *lines, last = text.strip().split("\n")
    if len(last) > _MAX_LINE or len(_PAIR.findall(last)) < _FEWEST:
        lines, last = [*lines, last], ""
    parts: list[list[str]] = [[], []]
    for line in lines:
        if line.strip().startswith(_NEGATIVE) and not parts[1]:
            parts[1].append(line.strip().removeprefix(_NEGATIVE).strip())
        else:
            parts[bool(parts[1])].append(line.strip())
    pairs = {key.strip(): _unquoted(value.strip()) for key, value in _PAIR.findall(last)}
    notes: list[str] = []
    prompt, negative = (_without_tags("\n".join(part).strip(), notes) for part in parts)
    if syntax == "plain":
        notes += filter(None, map(_drawn_as_words, (prompt, negative)))
    size = _value(pairs, "Size", r"(\d+)x(\d+)", name)
    steps, seed = (_value(pairs, key, r"(\d+)", name) for key in ("Steps", "Seed"))
    guidance = _value(pairs, "CFG scale", r"(\d+(?:\.\d+)?)", name)
    sampler = _sampler(pairs.pop("Sampler", None), pairs.pop("Schedule type", None))
    model = pairs.get("Model", pairs.get("Model hash"))
    if model is not None:
        notes.insert(0, f"It was drawn by the model '{model}', not by this ensemble.")
    ignored = [f"{key}: {value}" for key, value in pairs.items() if key not in _OF_MODEL]
    if ignored:
        notes.append(f"Not understood, and ignored: {', '.join(ignored)}.")
    return Parameters(
        prompt=prompt,
        negative_prompt=negative,
        sampler=sampler,
        steps=steps and int(steps[1]),
        guidance=guidance and float(guidance[1]),
        seed=seed and int(seed[1]),
        width=size and int(size[1]),
        height=size and int(size[2]),
        notes=tuple(dict.fromkeys(notes)),
    )


def _value(pairs: dict[str, str], key: str, form: str, name: str) -> re.Match[str] | None:
    """Take a value out of the pairs; None if it is missing."""
    if key not in pairs:
        return None
    found = re.fullmatch(form, pairs[key])
    if found is None:
        raise AfaError(
            "AFA-CLI-041",
            f"The parameters in '{name}' have {key}: {pairs[key][:80]}, which is not as A1111 "
            "writes it. Pass the settings as options instead.",
        )
    del pairs[key]
    return found


def _sampler(name: str | None, spacing: str | None) -> str | None:
    """A1111's full name of a sampler; `Automatic` is the spacing that A1111 itself uses."""
    if name is None or spacing is None:
        return name
    if spacing == "Automatic":
        spacing = _AUTOMATIC.get(name, "")
    return f"{name} {spacing}".strip()


#: the spacings that A1111 uses if none is chosen, where they are not its plain one
_AUTOMATIC = {
    **dict.fromkeys(("DPM++ 2M", "DPM++ SDE", "DPM++ 2S a", "DPM2", "DPM2 a"), "Karras"),
    **dict.fromkeys(("DPM++ 2M SDE", "DPM++ 2M SDE Heun", "DPM++ 3M SDE"), "Exponential"),
}


def _without_tags(text: str, notes: list[str]) -> str:
    """Remove tags from a prompt, and note them."""
    for tag in _TAG.finditer(text):
        notes.append(f"'{tag[0]}' is not understood, and was removed from the prompt.")
    if _TAG.search(text):
        lines = _TAG.sub("", text).split("\n")
        text = "\n".join(
            ", ".join(filter(None, (" ".join(part.split()) for part in line.split(","))))
            for line in lines
        )
    return text.strip()


def _drawn_as_words(text: str) -> str | None:
    """Say which of A1111's syntax in a prompt is drawn as words; None without any."""
    shown = [example for form, example in _SYNTAX.items() if re.search(form, text)]
    if not shown:
        return None
    return (
        f"{', '.join(shown)} in the prompt is read as plain text. To read weights, pass "
        "--prompt-syntax weighted."
    )


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,:\n]", text) else text


def _unquoted(text: str) -> str:
    if len(text) < 2 or text[0] != '"' or text[-1] != '"':
        return text
    try:
        return str(json.loads(text))
    except ValueError:
        return text


def _decoded(comment: object) -> str | None:
    """The text of an EXIF user comment, which begins with the name of its encoding."""
    if not isinstance(comment, bytes):
        return None if comment is None else str(comment)
    encoding, content = _CODED.get(comment[:8]), comment[8:]
    if encoding is None:
        encoding, content = "utf-8", comment
    text = content.decode(encoding, errors="replace")
    if encoding.startswith("utf-16") and "Steps:" not in text:
        other = content.decode("utf-16-le", errors="replace")
        text = other if "Steps:" in other else text
    return text.strip("\0")
