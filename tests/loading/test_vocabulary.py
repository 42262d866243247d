"""Words of captions and prompts: which are not known, and what experts are known for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from afa.loading.expert_source import ExpertSource
from afa.loading.vocabulary import (
    WORDS,
    coverage_warnings,
    files_of,
    known_for,
    read_words,
    unknown_words,
    word_warnings,
    words_of,
    write_words,
)

CAPTIONS = ["A fox, in the Snow!", "two foxes", None, "ein Fuchs über 3 Za\u0308unen", "एक लोमड़ी"]


def test_words_are_of_any_script_and_the_frequent_ones_come_first() -> None:
    found = words_of([*CAPTIONS, "a fox"])
    assert found[0] == "fox"
    assert {"snow", "über", "zäunen", "लोमड़ी"} <= set(found)
    assert not {"a", "in", "3"} & set(found)
    assert words_of(["狐狸在雪地里", "สุนัขจิ้งจอก"]) == [], "words have no spaces between them"


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a FOX", []),
        ("foxes in snow", []),
        ("a neon sign in the snow, neon", ["neon", "sign"]),
        ("", []),
    ],
)
def test_a_plural_is_known_with_its_singular(prompt: str, unknown: list[str]) -> None:
    assert unknown_words(words_of(["a fox in the snow"]), [prompt]) == unknown


def test_prompts_are_compared_with_what_a_folder_lists(tmp_path: Path) -> None:
    assert word_warnings(tmp_path, ["a zebra"]) == [], "nothing is known of its captions"
    write_words(words_of(CAPTIONS), tmp_path)
    assert read_words(tmp_path) == tuple(words_of(CAPTIONS))
    assert word_warnings(tmp_path, ["a fox"]) == []
    (line,) = word_warnings(tmp_path, ["a zebra", "a fox and a zebra"])
    assert "'zebra'" in line
    assert "drafts" in line
    (line,) = word_warnings(tmp_path, [" ".join(f"word{'x' * n}" for n in range(1, 20))])
    assert "11 more words" in line


@pytest.mark.parametrize("content", ["", "[1]", "{}", "[" * 100_000, "\xff"])
def test_a_damaged_list_says_nothing(content: str, tmp_path: Path) -> None:
    (tmp_path / WORDS).write_text(content, encoding="latin-1")
    assert read_words(tmp_path) is None
    assert word_warnings(tmp_path, ["a zebra"]) == []


def test_what_metadata_says_a_file_is_known_for() -> None:
    assert known_for({"modelspec.trigger_phrase": "inkstyle, sks dog "}) == ["inkstyle", "sks dog"]
    tags = {"10_ink": {"inkstyle": 20, "fox": 3}, "5_more": {"fox": 4}}
    assert known_for({"ss_tag_frequency": json.dumps(tags)}) == ["inkstyle", "fox"]
    for damaged in ("", "[]", "{", '{"a": 1}', '{"a": {"b": "c"}}', "null"):
        assert known_for({"ss_tag_frequency": damaged}) == []


def test_an_expert_whose_words_no_caption_has(tmp_path: Path) -> None:
    file = tmp_path / "ink.safetensors"
    metadata = {"modelspec.trigger_phrase": "inkstyle drawing, sks"}
    save_file({"a": torch.zeros(1)}, file, metadata)
    plain = tmp_path / "plain.safetensors"
    save_file({"a": torch.zeros(1)}, plain)
    experts = [
        ExpertSource("base", lora=str(file)),
        ExpertSource(str(plain)),
        ExpertSource("org/name"),
        ExpertSource(str(tmp_path / "gone.safetensors")),
    ]
    files = files_of(experts)
    assert list(files) == ["ink.safetensors", "plain.safetensors", "gone.safetensors"]
    (line,) = coverage_warnings(files, ["a fox", "an inkstyle fox"])
    assert "'inkstyle drawing', 'sks'" in line
    assert coverage_warnings(files, ["an inkstyle drawing of a fox"]) == []
    assert coverage_warnings(files, ["sks"]) == []
