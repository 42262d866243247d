"""Files of prompts with settings: the lines of A1111's script and of kohya's, JSON Lines and CSV.

- A1111 (Prompts from file): `--prompt "a fox" --negative_prompt "blurry" --width 512 --seed 5`
- kohya (gen_img, sample_prompts): `a fox --n blurry --w 512 --h 768 --d 5 --s 30 --l 7.5`

Both kinds of names work in every line. An empty line, or one that starts with #, is left out.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from afa.cli.wanted import Wanted, parse_seed, parse_size
from afa.errors import AfaError
from afa.files import read_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

_MAX_BYTES = 10_000_000
#: the names of settings in other programs
_NAMES = {
    "prompt": "prompt",
    "text": "prompt",
    "caption": "prompt",
    **dict.fromkeys(("negative_prompt", "negative", "n", "np"), "negative_prompt"),
    **dict.fromkeys(("width", "w"), "width"),
    **dict.fromkeys(("height", "h"), "height"),
    **dict.fromkeys(("seed", "d"), "seed"),
    **dict.fromkeys(("steps", "s", "num_steps", "num_inference_steps"), "steps"),
    **dict.fromkeys(("guidance", "cfg_scale", "l", "scale", "guidance_scale"), "guidance"),
    **dict.fromkeys(("scheduler", "sampler_name", "sampler", "ss"), "scheduler"),
    "size": "size",
}
_KNOWN = "prompt, negative_prompt, width, height, size, seed, steps, guidance and scheduler"
_OPTION = re.compile(r"(?:^|\s)--(?=[A-Za-z])")


def wanted_by(
    defaults: Wanted,
    prompts: Sequence[str] | None,
    path: Path | None,
    num_processes: int = 1,
) -> list[Wanted]:
    """What the prompts of a command, or its file of prompts, ask for.

    Raises:
        AfaError: if there are both; see `read_prompts`.
    """
    if path is None:
        return [replace(defaults, prompt=prompt) for prompt in prompts or ()]
    if prompts:
        raise AfaError(
            "AFA-CLI-036", "--prompts-file excludes prompts in the command. Remove one of them."
        )
    return read_prompts(path, defaults, num_processes)


def read_prompts(path: Path, defaults: Wanted, num_processes: int = 1) -> list[Wanted]:
    """Read a file of prompts.

    Args:
        path: a text file, or `.jsonl` or `.csv`.
        defaults: the settings that a line does not have.
        num_processes: how many processes share the pictures.

    Raises:
        AfaError: if it cannot be read, has no prompt, or a line has an unknown setting or a wrong
            value; names the line.
    """
    try:
        text = read_text(path, _MAX_BYTES)
    except (OSError, ValueError) as error:
        raise AfaError(
            "AFA-CLI-035", f"--prompts-file '{path}' cannot be read as UTF-8 text: {error}."
        ) from None
    kinds = {".jsonl": _of_json, ".csv": _of_csv}
    lines = kinds.get(path.suffix.lower(), _of_text)(text, path)
    found = [
        _wanted(settings, defaults, f"{path}, line {number}", num_processes)
        for number, settings in lines
    ]
    if not found:
        raise _wrong(str(path), "it has no prompt; write one per line")
    return found


def _of_text(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        if line and not line.startswith("#"):
            yield number, _of_line(line, f"{path}, line {number}")


def _of_line(line: str, where: str) -> dict[str, Any]:
    """The settings of one line, by the names that it uses."""
    prompt, *options = _OPTION.split(line)
    found: dict[str, Any] = {"prompt": prompt.strip()} if prompt.strip() else {}
    if not options:
        return found
    if not found:  # A1111's, whose values are quoted as in a shell
        try:
            words = shlex.split(line)
        except ValueError as error:
            raise _wrong(where, f"its quotes do not match ({error})") from None
        options = []
        for word in words:
            if word.startswith("--"):
                options.append(word.removeprefix("--"))
            elif options:
                options[-1] += f" {word}"
    for option in options:
        name, _, value = option.partition(" ")
        name, _, joined = name.partition("=")
        if name in found:
            raise _wrong(where, f"it has --{name} twice")
        found[name] = joined or value.strip()
    return found


def _of_json(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            settings = json.loads(line)
            if not isinstance(settings, dict):
                raise ValueError("it is not an object")
        except (ValueError, RecursionError) as error:
            raise _wrong(f"{path}, line {number}", f"it is not a JSON object ({error})") from None
        yield number, {key: value for key, value in settings.items() if value is not None}


def _of_csv(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = csv.DictReader(io.StringIO(text), strict=True)
    try:
        for row in rows:
            if None in row:
                raise _wrong(f"{path}, line {rows.line_num}", "it has more values than columns")
            yield rows.line_num, {key: value for key, value in row.items() if value}
    except csv.Error as error:
        raise _wrong(f"{path}, line {rows.line_num}", f"it is not CSV ({error})") from None


def _wanted(settings: dict[str, Any], defaults: Wanted, where: str, num_processes: int) -> Wanted:
    """Check the settings of one line, and add the defaults."""
    changes: dict[str, Any] = {}
    for given, value in settings.items():
        name = _NAMES.get(str(given).strip().lower())
        if name is None:
            raise AfaError(
                "AFA-CLI-037",
                f"'{where}' has the unknown setting '{str(given)[:40]}'. Use {_KNOWN}.",
            )
        new = _converted(name, value, f"{given} in '{where}'", num_processes)
        if new.keys() & changes.keys():
            raise _wrong(where, f"it has {name} twice")
        changes |= new
    if not changes.get("prompt"):
        raise _wrong(where, "it has no prompt")
    return replace(defaults, **changes)


def _converted(name: str, value: Any, what: str, num_processes: int) -> dict[str, Any]:
    """The value of one setting.

    Raises:
        AfaError: if it is not valid.
    """
    from afa.denoisers.scheduler_names import canonical_name

    text = str(value).strip()
    if name == "seed":
        return {"seed": parse_seed(text, what, num_processes=num_processes)}
    if name == "size":
        height, width = parse_size(text, what)
        return {"height": height, "width": width}
    if name == "scheduler":
        return {"scheduler": canonical_name(text)}
    if name in ("prompt", "negative_prompt"):
        return {name: text}
    least = {"guidance": 0, "steps": 1}.get(name, 8)
    form = r"\d{1,6}(\.\d+)?" if name == "guidance" else r"\d{1,6}"
    if not re.fullmatch(form, text) or float(text) < least:
        kind = "a number" if name == "guidance" else "a whole number"
        raise AfaError(
            "AFA-CLI-038", f"{what} must be {kind} of at least {least}; got '{text[:40]}'."
        )
    return {name: float(text) if name == "guidance" else int(text)}


def _wrong(where: str, what: str) -> AfaError:
    return AfaError("AFA-CLI-042", f"'{where}' cannot be read: {what}.")
