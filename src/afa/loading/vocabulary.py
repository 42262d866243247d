"""The words of an ensemble's training captions, and the words that its experts are known for.

Aggregators learn from captions which expert is good at what. For a word that no caption has, they
guess; so users are told before pictures are drawn, and before a training.
"""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from afa.files import read_text, write_atomic
from afa.loading.weights import file_metadata

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from afa.loading.expert_source import ExpertSource

#: file name in the folder of an ensemble
WORDS = "words.json"
_MAX_WORDS, _MAX_BYTES = 100_000, 5_000_000
_SHOWN = 8
_ASCII_WORD = re.compile(r"[a-z]+")
_SHORT = 3  # letters; shorter words mean little
#: scripts that do not separate words by spaces
_WITHOUT_SPACES = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")


def words_in(text: str) -> list[str]:
    """The words of a text in lower case, without short ones and scripts without spaces."""
    text = unicodedata.normalize("NFC", text).lower()
    if text.isascii():
        return [word for word in _ASCII_WORD.findall(text) if len(word) >= _SHORT]
    # letters and the marks that belong to them
    spaced = "".join(c if unicodedata.category(c)[0] in "LM" else " " for c in text)
    return [word for word in spaced.split() if len(word) >= _SHORT and not _is_unspaced(word)]


def _is_unspaced(word: str) -> bool:
    return any(unicodedata.name(c, "").startswith(_WITHOUT_SPACES) for c in word)


def words_of(captions: Iterable[str | None]) -> list[str]:
    """All words of captions, the most frequent ones first."""
    counts = Counter(itertools.chain.from_iterable(words_in(text or "") for text in captions))
    return [word for word, _ in counts.most_common(_MAX_WORDS)]


def write_words(words: Collection[str], folder: Path) -> None:
    """Write the words of the training captions into an ensemble's folder."""
    write_atomic(folder / WORDS, json.dumps(list(words), ensure_ascii=False) + "\n")


def read_words(folder: Path) -> tuple[str, ...] | None:
    """The words in an ensemble's folder; None if it has no readable list of them."""
    try:
        found = json.loads(read_text(folder / WORDS, _MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, list) or not all(isinstance(word, str) for word in found):
        return None
    return tuple(found)


def unknown_words(known: Collection[str], prompts: Iterable[str]) -> list[str]:
    """The words of prompts that are not known, in order; a plural is known with its singular."""
    found = dict.fromkeys(itertools.chain.from_iterable(words_in(prompt) for prompt in prompts))
    known = frozenset(known)
    return [word for word in found if not _forms(word) & known]


def _forms(word: str) -> set[str]:
    ends = ("es", "s")
    return {word, *(f"{word}{e}" for e in ends), *(word.removesuffix(e) for e in ends)}


def word_warnings(folder: Path, prompts: Iterable[str]) -> list[str]:
    """A warning about words of prompts that an ensemble's training captions do not have."""
    known = read_words(folder)
    unknown = [] if known is None else unknown_words(known, prompts)
    if not unknown:
        return []
    return [
        f"No training caption of '{folder}' has {listed(unknown)}; which experts to use for that "
        "is a guess. Use drafts, so that the experts' base decides, or train with such prompts "
        "(data.prompts)."
    ]


def known_for(metadata: Mapping[str, str]) -> list[str]:
    """What a file is known for by its metadata: its trigger phrase, or its most frequent tags.

    Args:
        metadata: of a safetensors file, with the keys of https://github.com/Stability-AI/ModelSpec
            or of kohya's trainers.
    """
    phrase = metadata.get("modelspec.trigger_phrase", "").strip()
    if phrase:
        return [part.strip() for part in phrase.split(",") if part.strip()]
    try:
        listed = json.loads(metadata.get("ss_tag_frequency", "{}"))
        counts: Counter[str] = Counter()
        for tags in listed.values():
            counts.update({str(tag).strip(): int(count) for tag, count in tags.items()})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return []
    return [tag for tag, _ in counts.most_common(_SHOWN) if tag]


def files_of(experts: Iterable[ExpertSource]) -> dict[str, Path]:
    """The single files and LoRA files of experts, by their names."""
    places = [Path(expert.lora or expert.source) for expert in experts]
    return {place.name: place for place in places if place.suffix == ".safetensors"}


def coverage_warnings(files: Mapping[str, Path], captions: Iterable[str | None]) -> list[str]:
    """Warnings about experts for whose known words there are no training captions.

    Args:
        files: the files of experts and LoRAs, by the name for messages.
        captions: the training captions.
    """
    words = None
    warnings = []
    for name, file in files.items():
        known = known_for(file_metadata(file)) if file.is_file() else []
        if not known:
            continue
        words = set(words_of(captions)) if words is None else words
        if all(unknown_words(words, [phrase]) for phrase in known):
            warnings.append(
                f"By its metadata, '{name}' is known for {listed(known)}, but the training "
                "captions do not have these words. The aggregators cannot learn when to use it. "
                "Add such pictures, or such prompts (data.prompts)."
            )
    return warnings


def listed(words: Collection[str]) -> str:
    """The first words in quotes, and how many there are besides."""
    shown = ", ".join(f"'{word}'" for word in itertools.islice(words, _SHOWN))
    more = len(words) - _SHOWN
    return f"{shown} and {more} more words" if more > 0 else shown
