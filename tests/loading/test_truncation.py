"""What text encoders do not read is counted as the pipelines cut it, and said."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from afa.cli import main
from afa.loading.truncation import (
    cuts_of,
    limits_of,
    limits_of_folder,
    prompt_warnings,
    warnings_for,
)
from tests.refusal import refusal
from tests.tiny_pipelines import PIPELINES

#: by kind of pipeline, the tokenizers that are spoken of together and what they read
LIMITS = {
    "xl": {("tokenizer", "tokenizer_2"): 24},
    "refiner": {("tokenizer_2",): 24},
    "sd3": {("tokenizer", "tokenizer_2"): 24, ("tokenizer_3",): 256},
    "sd3 without t5": {("tokenizer", "tokenizer_2"): 24},
    "flux": {("tokenizer",): 24, ("tokenizer_2",): 512},
    "chroma": {("tokenizer",): 512},
    "z-image": {("tokenizer",): 512},
    "qwen-image": {("tokenizer",): 512},
    "klein": {("tokenizer",): 512},
    "pixart": {("tokenizer",): 300},
    "dit": {},
}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    torch.manual_seed(0)
    return {kind: PIPELINES[kind](tmp_path_factory.mktemp("tokens")) for kind in LIMITS}


@pytest.mark.parametrize("kind", LIMITS)
def test_every_tokenizer_has_its_own_limit(pipelines: dict[str, Any], kind: str) -> None:
    found = {limit.names: limit.num_tokens for limit in limits_of(pipelines[kind])}
    assert found == LIMITS[kind]


@pytest.mark.parametrize("kind", [kind for kind in LIMITS if kind not in ("refiner", "dit")])
def test_folders_have_the_limits_of_their_pipelines(
    pipelines: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    pipeline = pipelines[kind]
    pipeline.save_pretrained(tmp_path)
    limits, _ = limits_of_folder(tmp_path)
    assert {limit.names: limit.num_tokens for limit in limits} == LIMITS[kind]


@pytest.mark.parametrize("kind", ["xl", "sd3", "flux", "chroma", "z-image", "pixart"])
def test_what_is_cut_is_what_the_pipeline_does_not_see(
    pipelines: dict[str, Any], kind: str
) -> None:
    """Prompts that differ beyond the limit alone have one embedding."""
    pipeline = pipelines[kind]
    names = inspect.signature(pipeline.encode_prompt).parameters
    more = {
        name: False for name in ("do_classifier_free_guidance", "clean_caption") if name in names
    }
    texts = [name for name in ("prompt_2", "prompt_3") if name in names]

    def encoded(prompt: str) -> list[torch.Tensor]:
        with torch.no_grad():
            given = pipeline.encode_prompt(prompt, **dict.fromkeys(texts, prompt), **more)
        parts = (part if isinstance(part, list) else [part] for part in given)
        return [part for several in parts for part in several if part is not None]

    limit = max(limits_of(pipeline), key=lambda limit: limit.num_tokens)
    words = ("fox pizza " * limit.num_tokens).strip()
    read = words.removesuffix(limit.unread(words)).strip()
    assert limit.count([read]) == [limit.num_tokens]
    assert limit.unread(read) == ""
    whole, same = encoded(f"{read} a"), encoded(f"{read} pizza fox")
    assert all(torch.equal(*pair) for pair in zip(whole, same, strict=True))
    fewer = read[: len(read) // 2]
    assert any(not torch.equal(*pair) for pair in zip(whole, encoded(fewer), strict=True))


def test_lines_have_numbers_and_what_is_lost(pipelines: dict[str, Any]) -> None:
    limits = limits_of(pipelines["xl"])
    long = "a fox on the left " * 6 + "and a pizza"
    (line,) = prompt_warnings(limits, [long])
    (count,) = limits[0].count([long])
    assert line.startswith(f"The prompt has {count} tokens")
    assert "24" in line
    assert long.endswith(limits[0].unread(long))
    assert limits[0].unread(long)[:40] in line
    (line,) = prompt_warnings(limits, ["a fox", long, long])
    assert line.startswith(f"2 of 3 prompts have up to {count} tokens")
    assert "limit of 24 " in line
    assert prompt_warnings(limits, ["a fox"]) == []
    (cut,) = cuts_of(limits, ["a fox", long])
    assert (cut.num_texts, cut.num_cut, cut.most, cut.example) == (2, 1, count, long)


def test_negative_prompts_are_cut_and_left_out_too(pipelines: dict[str, Any]) -> None:
    long = "a fox on the left " * 6
    (line,) = warnings_for(pipelines["xl"], ["a fox"], long, 5.0)
    assert line.startswith("The negative prompt has ")
    (line,) = warnings_for(pipelines["xl"], ["a fox"], "a pizza", 1.0)
    assert line == "The negative prompt is ignored because guidance is 1; it must be above 1."
    (line,) = warnings_for(pipelines["flux"], ["a fox"], "a pizza", 5.0)
    assert line.startswith("The negative prompt is ignored: Flux")
    assert warnings_for(pipelines["xl"], ["a fox"], "", 1.0) == []


def test_weights_in_plain_text_are_warned_of(pipelines: dict[str, Any]) -> None:
    prompts = ["a fox", "a (red:1.3) fox"]
    (line,) = warnings_for(pipelines["xl"], prompts, syntax="plain")
    assert "'(red:1.3)'" in line
    assert "--prompt-syntax weighted" in line
    for kind, syntax in (("flux", "plain"), ("xl", None)):  # where it cannot be chosen
        (line,) = warnings_for(pipelines[kind], prompts, syntax=syntax)  # type: ignore[arg-type]
        assert "'(red:1.3)'" in line
        assert "--prompt-syntax" not in line


def test_weighted_prompts_are_not_truncated(pipelines: dict[str, Any]) -> None:
    long = "a (red:1.3) fox on the left " * 6
    assert warnings_for(pipelines["xl"], [long], long, 5.0, "weighted") == []
    (line,) = warnings_for(pipelines["xl"], [long], long, 1.0, "weighted")
    assert line.startswith("The negative prompt is ignored")
    with refusal("AFA-DRAW-036"):
        warnings_for(pipelines["xl"], ["a fox"], "a (pizza", 5.0, "weighted")
    with refusal("AFA-ENSEMBLE-074", "Flux"):
        warnings_for(pipelines["flux"], ["a fox"], syntax="weighted")


def test_generate_says_what_is_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = "a fox on the left and a pizza on the right, blue background " * 3
    options = ["--steps", "1", "--no-check", "--output", str(tmp_path / "new")]
    with pytest.raises(SystemExit) as stop:
        main(["generate", "zoo:ensemble", "a fox", long, "--negative-prompt", long, *options])
    assert stop.value.code == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert [line.split(":")[1].split(" ")[1:5] for line in said] == [
        ["1", "of", "2", "prompts"],
        ["The", "negative", "prompt", "has"],
    ]
