r"""Weighted prompts: read the brackets of AUTOMATIC1111's web UI.

`(word)` multiplies the weight of words by 1.1, `[word]` divides it by 1.1, `(word:1.3)` multiplies
it by 1.3, and brackets can be nested. `BREAK` starts a new chunk of tokens. A backslash before a
punctuation mark makes it a character of the text: `\(`.
https://github.com/AUTOMATIC1111/stable-diffusion-webui/wiki/Features#attentionemphasis

What is written in other ways is refused by name, because it would be drawn as words.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from afa.errors import AfaError

#: `plain` draws every character of a prompt as text, `weighted` reads brackets and BREAK
PromptSyntax = Literal["plain", "weighted"]

_STEP, _MAX_WEIGHT, _SHOWN = 1.1, 5.0, 40
_OPENS = {")": "(", "]": "["}
_TOKEN = re.compile(
    r"\\(?P<escaped>[^\w\s]|_)|\b(?P<end>BREAK)\b|(?P<mark>[()\[\]:|])|.", re.DOTALL
)
_ESCAPED = re.compile(r"\\(?:[^\w\s]|_)")

#: what other programs would read and this syntax does not: a pattern, its name, what to do
_OTHERS = [
    (
        r"<\s*(?:lora|lyco|hypernet)\s*:[^>]*>?",
        "a LoRA in the prompt",
        "Use the LoRA as an expert of its own",
    ),
    (
        r"\bAND\b",
        "a combination of prompts",
        "Write 'and' in lower case",
    ),
    (
        r"\b(?:ADDCOMM|ADDBASE|ADDCOL|ADDROW)\b",
        "a regional prompt",
        "Describe the places in words",
    ),
    (
        r"__[\w/*.-]{0,60}[a-zA-Z0-9*][\w/*.-]{0,60}__",
        "a wildcard of a prompt list",
        "Write the word that is meant",
    ),
    (
        r"[{}]",
        "a choice or weight in braces",
        "Use round brackets for weights",
    ),
    (
        r"\.(?:and|add|blend|swap|attend)\s*\(|\b(?:use|with)Lora\s*\(",
        "a function of compel",
        "Use brackets for weights, and BREAK to join prompts",
    ),
    (
        r"\)(?:[+-]+|\d*\.?\d+)|\"\d*\.\d+|\w{0,30}[^\W_][+-]+(?=[\s,.;:)\]]|$)",
        "a weight of compel",
        "Write (word:1.3)",
    ),
    (
        r"\w{0,30}[^\W_]::\s*-?\d*\.?\d+(?![\d.\]])",
        "a weight of Midjourney",
        "Write (word:1.3)",
    ),
    (
        r"(?<!\S)--[a-zA-Z]\w*",
        "an option of another program",
        "Use the options of the command",
    ),
    (
        r"\bembedding:\S*",
        "a textual inversion of ComfyUI",
        "Load it into the pipeline, and write its token alone",
    ),
    (
        r"(?m:^)\s*#\s.*",
        "a comment",
        "Remove it",
    ),
]
_OTHER = [(re.compile(pattern), name, advice) for pattern, name, advice in _OTHERS]
#: brackets of weights in a prompt that is drawn as plain text
_WEIGHTS = re.compile(
    r"\([^()]*[^\d()]:\s*(?:\d*\.\d+|\d)\s*\)|\(\([^()]+\)\)|\[\[[^\[\]]+\]\]|\bBREAK\b"
    r"|<(?:lora|lyco|hypernet):[^>]*>"
)


@dataclass(frozen=True)
class Fragment:
    """Words of a prompt with one weight; 1 is that of plain text."""

    text: str
    weight: float


@dataclass(frozen=True)
class WeightedPrompt:
    """A prompt with weights.

    Attributes:
        parts: the parts between BREAKs, each of at least one fragment.
    """

    parts: tuple[tuple[Fragment, ...], ...]

    @property
    def words(self) -> str:
        """The prompt as plain text, without weights and BREAKs."""
        texts = ("".join(each.text for each in part).strip() for part in self.parts)
        return " ".join(filter(None, texts))


@dataclass
class _Open:
    """An open bracket: its character, where it is, and what was read before and in it."""

    mark: str
    place: int
    start: int
    colon: int | None = None  # where the last colon is
    kept: int = 0  # how many pieces are before that colon
    marks: set[str] = field(default_factory=set)  # the colons and bars directly in it


def read_weighted(prompt: str) -> WeightedPrompt:
    """Read a prompt with weights.

    Raises:
        AfaError: if brackets do not match or are empty, a weight is no number from 0 to 5, or the
            prompt has syntax of other programs; names it.
    """
    _require_no_other(prompt)
    pieces: list[tuple[str | None, float]] = []  # the text, or None for BREAK, and its weight
    opened: list[_Open] = []
    for token in _TOKEN.finditer(prompt):
        place, mark = token.start(), token["mark"]
        if token["end"]:
            pieces.append((None, 1.0))
        elif mark is None or (mark in ":|" and not opened):
            pieces.append((token["escaped"] or token[0], 1.0))
        elif mark in "([":
            opened.append(_Open(mark, place, len(pieces)))
        elif mark in ":|":
            own = opened[-1]
            own.marks.add(mark)
            if mark == ":":
                own.colon, own.kept = token.end(), len(pieces)
            pieces.append((mark, 1.0))
        else:
            if not opened or opened[-1].mark != _OPENS[mark]:
                raise _unbalanced(prompt, place)
            _close(prompt, opened.pop(), place, pieces)
    if opened:
        raise _unbalanced(prompt, opened[-1].place)
    return WeightedPrompt(_parts(pieces))


def words_of_prompt(prompt: str, syntax: PromptSyntax) -> str:
    """The words of a prompt, as a metric or a person would read them.

    Raises:
        AfaError: see `read_weighted`.
    """
    return prompt if syntax == "plain" else read_weighted(prompt).words


def weights_in(prompt: str) -> str | None:
    """The first part of a prompt that looks like a weight; None if there is none."""
    found = _WEIGHTS.search(_ESCAPED.sub("..", prompt))
    return None if found is None else _shown(prompt[found.start() : found.end()])


def _require_no_other(prompt: str) -> None:
    """Raise AfaError if a prompt has syntax of other programs."""
    plain = _ESCAPED.sub("\0\0", prompt)  # of the same length
    for pattern, name, advice in _OTHER:
        found = pattern.search(plain)
        if found is not None:
            given = _shown(prompt[found.start() : found.end()].strip())
            raise AfaError(
                "AFA-DRAW-035",
                f"The prompt has {name}, '{given}', which is not understood. {advice}, or put a "
                "backslash before a punctuation mark that is text, or use the prompt syntax plain.",
            )


def _close(prompt: str, bracket: _Open, place: int, pieces: list[tuple[str | None, float]]) -> None:
    """Multiply the weights of the pieces in a bracket that ends at `place`."""
    given = _shown(prompt[bracket.place : place + 1])
    weight = _STEP
    if bracket.mark == "[":
        if bracket.marks:
            what = "alternating words" if "|" in bracket.marks else "prompt editing"
            raise AfaError(
                "AFA-DRAW-038",
                f"The prompt has {what}, '{given}', which is not supported: a prompt is the same "
                "in all steps. Write the words that are meant, or a backslash before a ':' or '|' "
                "that is text.",
            )
        weight = 1 / _STEP
    elif bracket.colon is not None:
        weight = _number(prompt[bracket.colon : place], given)
        del pieces[bracket.kept :]
    inside = pieces[bracket.start :]
    if not any(text is not None and text.strip() for text, _ in inside):
        raise AfaError(
            "AFA-DRAW-039",
            f"The brackets '{given}' have no words. Write words in them, or a backslash before "
            r"brackets that are text: \(\).",
        )
    pieces[bracket.start :] = [(text, own * weight) for text, own in inside]


def _number(text: str, given: str) -> float:
    """The weight at the end of a bracket."""
    try:
        weight = float(text) if "_" not in text else math.nan
    except ValueError:
        weight = math.nan
    if not 0 <= weight <= _MAX_WEIGHT:
        raise AfaError(
            "AFA-DRAW-037",
            f"The weight in '{given}' must be a number from 0 to {_MAX_WEIGHT:g}; got "
            f"'{_shown(text.strip())}'. Write (word:1.3), or a backslash before a colon that is "
            r"text: \:.",
        )
    return weight


def _unbalanced(prompt: str, place: int) -> AfaError:
    around = _shown(prompt[max(0, place - _SHOWN // 2) : place + _SHOWN // 2].strip())
    return AfaError(
        "AFA-DRAW-036",
        f"The bracket '{prompt[place]}' at character {place + 1} of the prompt, in '{around}', has "
        "no counterpart. Close it, or write a backslash before a bracket that is text: "
        rf"\{prompt[place]}.",
    )


def _parts(pieces: list[tuple[str | None, float]]) -> tuple[tuple[Fragment, ...], ...]:
    """Join pieces of equal weight; parts and fragments without words do not count."""
    parts: list[list[Fragment]] = [[]]
    for text, weight in pieces:
        if text is None:
            parts.append([])
        elif parts[-1] and parts[-1][-1].weight == weight:
            parts[-1][-1] = Fragment(parts[-1][-1].text + text, weight)
        else:
            parts[-1].append(Fragment(text, weight))
    found = [tuple(part) for part in parts if any(each.text.strip() for each in part)]
    return tuple(found) or ((Fragment("", 1.0),),)


def _shown(text: str) -> str:
    return f"{text[:_SHOWN]}..." if len(text) > _SHOWN else text
