"""The commands that write something, on tiny models, and whether what they left is whole."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from afa.loading.trust.headers import check_header
from tests import warm
from tests.cli.test_cli import AGGREGATOR
from tests.distilling.students import as_written


@dataclass(frozen=True)
class Command:
    """A command line, and where it writes.

    Attributes:
        arguments: of afa.
        output: its folder or file.
        settled: files by their names whose bytes tell whether the result is the same.
    """

    arguments: list[str]
    output: Path
    settled: tuple[str, ...]

    def start(self) -> warm.Running:
        """A process of its own, at the head of a group."""
        return warm.Running(self.arguments)

    def run(self) -> tuple[int, str]:
        """Its exit code, and what it said on standard error."""
        code, _, said = warm.run(self.arguments)
        return code, said

    def result(self) -> dict[str, str]:
        """The SHA-256 of all that decides what came out; nothing where it is not there."""
        files = [self.output] if self.output.is_file() else sorted(self.output.rglob("*"))
        return {
            file.name: hashlib.sha256(_content(file)).hexdigest()
            for file in files
            if file.is_file() and file.name.endswith(self.settled)
        }

    def require_whole(self) -> None:
        """Everything that has its final name is complete."""
        for file in [self.output, *self.output.rglob("*")]:
            if not file.is_file() or file.name.startswith(".") or "/." in str(file):
                continue
            if file.suffix == ".safetensors":
                check_header(file)
            elif file.suffix == ".json":
                json.loads(file.read_text())
            elif file.suffix == ".png":
                Image.open(file).load()

    def left_over(self) -> list[str]:
        """What lies about beside the output and in it that no one has finished."""
        around = [self.output.parent, *self.output.rglob("*")]
        hidden = {file.name for folder in around if folder.is_dir() for file in folder.glob(".*")}
        return sorted(hidden - {".lock"})


def _content(file: Path) -> bytes:
    return Image.open(file).tobytes() if file.suffix == ".png" else file.read_bytes()


def training(folder: Path, experts: list[Path], **changes: Any) -> Command:
    """Of aggregators, from a cache of its own, with checkpoints."""
    recipe: dict[str, Any] = {
        "experts": [str(expert) for expert in experts],
        "data": {"scenes": {"num_samples": 12}, "cache_folder": str(folder / "cache")},
        "aggregator": {**AGGREGATOR, "sites": "conv_out"},  # it is run hundreds of times
        "training": {
            "num_steps": 4,
            "batch_size": 4,
            "device": "cpu",
            "checkpoint_every": 2,
            "trackers": [],
            **changes,
        },
    }
    place = folder / "train.yaml"
    place.write_text(yaml.safe_dump(recipe))
    output = folder / "ensemble"
    arguments = ["train", str(place), "--output", str(output)]
    return Command(arguments, output, ("aggregators.safetensors", "config.json"))


def distilling(folder: Path, experts: list[Path], **changes: Any) -> Command:
    """Of a fusion of experts into a complete model, with checkpoints."""
    recipe = as_written(
        experts,
        folder / "prompts.txt",
        **{"trajectories": {"number": 4, "num_steps": 2}, **changes},
    )
    place = folder / "distill.yaml"
    place.write_text(yaml.safe_dump(recipe))
    output = folder / "student"
    arguments = ["distill", str(place), "--output", str(output)]
    settled = (".safetensors", "model_index.json", "README.md", "tokenizer.json", "distill.json")
    return Command(arguments, output, settled)


def generating(folder: Path, ensemble: Path, num_images: int = 2, steps: int = 2) -> Command:
    """Of some pictures with their weights."""
    output = folder / "pictures"
    options = ["--num-images", str(num_images), "--steps", str(steps), "--weights"]
    arguments = ["generate", str(ensemble), "a fox", "--output", str(output), *options]
    return Command(arguments, output, ("0.png", "1.png", "2.png", "3.png", "4.png", "5.png"))


def merging(folder: Path, experts: list[Path]) -> Command:
    """Of whole folders."""
    recipe = {"method": "weighted", "experts": [str(expert) for expert in experts]}
    place = folder / "merge.yaml"
    place.write_text(yaml.safe_dump(recipe))
    output = folder / "merged"
    arguments = ["merge", str(place), "--output", str(output)]
    return Command(arguments, output, (".safetensors",))


def evaluating(folder: Path, experts: list[Path]) -> Command:
    """Of an expert, by the zoo's judge."""
    recipe = {
        "prompts": {"zoo": {"kinds": {"mixed": 1}}},
        "methods": [{"name": "one", "model": str(experts[0])}],
        # the judge's own size
        "sampling": {"num_steps": 1, "device": "cpu", "batch_size": 1, "height": 64, "width": 64},
        "metrics": ["scenes"],
        "num_resamples": 100,
    }
    place = folder / "evaluate.yaml"
    place.write_text(yaml.safe_dump(recipe))
    output = folder / "comparison"
    arguments = ["evaluate", str(place), "--output", str(output)]
    return Command(arguments, output, (".png",))


def pruning(folder: Path, ensemble: Path) -> Command:
    """Of an ensemble, into one file."""
    output, prompts = folder / "plan.json", folder / "prompts.txt"
    prompts.write_text("a fox\n")
    options = ["--steps", "2", "--ranges", "2", "--prompts", str(prompts)]
    arguments = ["prune", str(ensemble), "--output", str(output), *options]
    return Command(arguments, output, ("plan.json",))
