"""What is known of an expert is read once for each command: headers, configurations, hashes.

Counted are this project's own readers, by the files that they open. The libraries read
configurations of a model and the tensors themselves once more when they build it.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

import afa
from afa import files
from afa.files import FileCache, read_json
from afa.loading import weights
from afa.loading.trust.headers import Header
from afa.machine import hashes
from tests.cli.test_cli import run, write_recipe
from tests.single_file import original_layout

SMALL = afa.SABWConfig(hidden_size=8, num_layers=1, num_heads=2, norm_num_groups=4)


class Reads:
    """How often each file was read, by what was read of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts = {what: Counter[Path]() for what in ("json", "header", "hash")}
        self._count(monkeypatch, files, "read_text", "json")
        self._count(monkeypatch, weights, "check_header", "header")
        self._count(monkeypatch, hashes, "compute_sha256", "hash")
        # as where this process had begun just now, long after all files were written
        monkeypatch.setattr(files, "SETTLED", -1)
        monkeypatch.setattr(files, "json_cache", FileCache())
        monkeypatch.setattr(weights, "header_cache", FileCache())
        monkeypatch.setattr(hashes, "hash_caches", {False: FileCache(), True: FileCache()})

    def _count(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, what: str) -> None:
        function = getattr(module, name)

        def counted(file: Path, *rest: Any) -> Any:
            if what != "json" or file.suffix == ".json":
                self.counts[what][file.absolute()] += 1
            return function(file, *rest)

        monkeypatch.setattr(module, name, counted)

    def require_once(self, *what: str) -> None:
        for name in what:
            counts = self.counts[name]
            assert counts, f"no {name} was read"
            assert [file for file, count in counts.items() if count > 1] == [], name


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Reads:
    return Reads(monkeypatch)


@pytest.fixture
def ensemble(experts: list[Path], tmp_path: Path) -> Path:
    return afa.save_ensemble(afa.load_pipeline(experts, SMALL), tmp_path / "ensemble")


def test_generate(ensemble: Path, reads: Reads, tmp_path: Path) -> None:
    command = ("generate", ensemble, "a fox", "--steps", 1, "--height", 64, "--width", 64)
    assert run(*command, "--output", tmp_path / "pictures") == 0
    reads.require_once("json", "header", "hash")
    assert len(reads.counts["header"]) == 3 * 2 + 2  # U-Nets, text encoders; the rest once


def test_check(experts: list[Path], reads: Reads, tmp_path: Path) -> None:
    assert run("check", write_recipe(tmp_path, experts)) == 0
    reads.require_once("json", "header", "hash")


@pytest.mark.parametrize("as_file", [False, True])
def test_inspect(as_file: bool, experts: list[Path], reads: Reads, tmp_path: Path) -> None:
    place = experts[0]
    if as_file:
        place = tmp_path / "a.safetensors"
        save_file(original_layout(StableDiffusionPipeline.from_pretrained(experts[0])), place)
    assert run("inspect", place) == 0
    reads.require_once("header", "hash", *([] if as_file else ["json"]))


def test_train(experts: list[Path], reads: Reads, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, experts)
    assert run("train", recipe, "--output", tmp_path / "run") == 0
    reads.require_once("json", "header", "hash")


def test_merge(experts: list[Path], reads: Reads, tmp_path: Path) -> None:
    recipe = tmp_path / "merge.yaml"
    content = {"method": "weighted", "experts": [str(expert) for expert in experts]}
    recipe.write_text(yaml.safe_dump(content))
    assert run("merge", recipe, "--output", tmp_path / "merged") == 0
    reads.require_once("json", "header", "hash")


def test_evaluate(experts: list[Path], ensemble: Path, reads: Reads, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\n")
    content = {
        "experts": [str(expert) for expert in experts],
        "methods": [
            {"name": "one", "model": str(experts[0])},
            {"name": "all", "ensemble": str(ensemble)},
            {"name": "merge", "merge": {"method": "weighted"}},
        ],
        "prompts": {"text": str(prompts)},
        "metrics": [{"name": "clip_t", "weights": "zoo:clip"}],
        "sampling": {"num_steps": 1, "height": 64, "width": 64, "device": "cpu"},
    }
    recipe = tmp_path / "evaluate.yaml"
    recipe.write_text(yaml.safe_dump(content))
    assert run("evaluate", recipe, "--output", tmp_path / "evaluation") == 0
    reads.require_once("json", "header", "hash")


def test_a_changed_file_is_read_again(reads: Reads, tmp_path: Path) -> None:
    place = tmp_path / "a.json"
    for content in ({"a": 1}, {"a": 2, "b": []}, {"a": 3, "b": [1]}):
        place.write_text(json.dumps(content))
        assert [read_json(place), read_json(place)] == [content] * 2
    assert reads.counts["json"][place] == 3


def test_a_file_just_written_is_not_kept(
    reads: Reads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SETTLED", 2_000_000_000)
    place = tmp_path / "a.json"
    for number in range(10):  # of one size, and perhaps at one time by the system's clock
        place.write_text(json.dumps({"a": number}))
        assert read_json(place) == {"a": number}


def test_every_caller_has_a_copy_of_its_own(reads: Reads, experts: list[Path]) -> None:
    index = experts[0] / "model_index.json"
    read_json(index)["unet"].append("changed")
    assert len(read_json(index)["unet"]) == 2
    file = experts[0] / "unet" / "diffusion_pytorch_model.safetensors"
    first: Header = weights.check_safetensors(file)
    first.tensors["conv_in.weight"]["shape"].append(1)
    assert len(weights.tensor_shapes(file)["conv_in.weight"]) == 4
    reads.require_once("json", "header")


def test_what_is_too_large_for_one_caller_is_refused_though_another_has_read_it(
    reads: Reads, tmp_path: Path
) -> None:
    place = tmp_path / "a.json"
    place.write_text(json.dumps({"a": "b" * 100}))
    read_json(place)
    with pytest.raises(afa.AfaError, match="maximum is 100"):
        read_json(place, 100)


def test_no_more_is_kept_than_fits(
    reads: Reads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "json_cache", FileCache(max_bytes=10_000))
    places = [tmp_path / f"{number}.json" for number in range(300)]
    for number, place in enumerate(places):
        place.write_text(json.dumps({"a": number, "b": "x" * 1000}))
    for _ in range(2):
        assert [read_json(place)["a"] for place in places] == list(range(300))
    # 10,000 bytes are at most nine of these files
    assert reads.counts["json"].total() >= 600 - 9
