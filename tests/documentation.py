"""Run the code blocks of the pages, in a folder with tiny models that have the pages' names.

Large numbers are shortened: steps, samples, pixels. Nothing else of a block changes.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file

import afa
from afa.cli import main
from tests.loading.test_lora import lora_of
from tests.metrics.tiny import write_clip
from tests.single_file import original_layout
from tests.tiny import tiny_pipeline
from tests.tiny_pipelines import saved_experts

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PROMPTS = ["a fox in the snow", "a pizza", "an owl and a rocket", "a red car"]
#: settings of recipes that are shortened, and their values
SHORT: dict[str, Any] = {
    "num_steps": 2,
    "num_samples": 2,
    "every": 1,
    "resolution": 32,
    "num_trials": 2,
    "number": 4,
    "batch_size": 2,
    "seeds": [0],
    "limit": 2,
}


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, file name, text and line number."""

    language: str
    title: str | None
    text: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    """Return all fenced blocks of a page, in order."""
    found, lines = [], page.read_text().splitlines()
    number = 0
    while number < len(lines):
        fence = re.fullmatch(r"```(\w*)(?: title=\"(.+)\")?", lines[number])
        number += 1
        if fence is None:
            continue
        begin = number
        while lines[number] != "```":
            number += 1
        found.append(Block(fence[1], fence[2], "\n".join(lines[begin:number]) + "\n", begin + 1))
        number += 1
    return found


def commands_of(text: str) -> Iterator[list[str]]:
    """Split a block into commands, as lists of words."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


# -- running ----------------------------------------------------------------------------------


class Runner:
    """Runs the blocks of one page, in order, in the current folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[str, Any] = {"__name__": "page"}

    def run(self, block: Block) -> None:
        """Run a block; raise if it fails."""
        if block.language == "yaml":
            self._yaml(block)
        elif block.language == "python":
            code = re.sub(r"num_inference_steps=\d+", "num_inference_steps=2", block.text)
            exec(compile("\n" * block.line + code, "page", "exec"), self.names)
        elif block.language == "bash":
            for words in commands_of(block.text):
                self.command(words)
        else:
            assert block.language in ("text", "bibtex"), block.language

    def _yaml(self, block: Block) -> None:
        content = shortened(yaml.safe_load(block.text))
        if block.title is not None:
            (self.folder / block.title).write_text(yaml.safe_dump(content))
        elif isinstance(content, list):  # rows of a comparison
            from afa.evaluation.recipe import MethodRecipe

            for row in content:
                MethodRecipe.model_validate(row)
        else:
            raise AssertionError("a recipe needs a title, the name of its file")

    def command(self, words: list[str]) -> None:
        """Run a command of afa; check only the arguments of make and pip."""
        program, *rest = words
        if program == "make":
            makefile = (ROOT / "Makefile").read_text()
            assert all(f"\n{target}:" in makefile for target in rest if "=" not in target), words
            return
        if program == "pip":
            extras = re.findall(r"afa\[(\w+)\]", " ".join(rest))
            project = (ROOT / "pyproject.toml").read_text()
            assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras)
            return
        if program in ("accelerate", "torchrun"):  # other tests start several processes
            words = rest[rest.index("-m") + 1 :]
            program, *rest = words
        assert program in ("afa", ".venv/bin/afa"), words
        if rest[0] == "app":  # it runs until it is stopped; tests/app tests it with a browser
            rest = [rest[0], "--help"]
        with_help = "--help" in rest
        if rest[0] == "generate" and not with_help and "--from-image" not in rest:
            rest = _with_steps(rest)
        rest = _few_steps(rest)
        with pytest.raises(SystemExit) as stop:
            main(rest)
        if "--quantize" in words and importlib.util.find_spec("torchao") is None:
            assert stop.value.code == 2, "torchao is an extra that is not installed"
            return
        assert not stop.value.code, f"{shlex.join(words)} ended with {stop.value.code}"


def _with_steps(words: list[str]) -> list[str]:
    return words if "--steps" in words else [*words, "--steps", "2"]


def _few_steps(words: list[str]) -> list[str]:
    short = list(words)
    if "--steps" in short:
        short[short.index("--steps") + 1] = "2"
    return short


def shortened(value: Any) -> Any:
    """Return a recipe with shortened numbers."""
    if isinstance(value, list):
        return [shortened(item) for item in value]
    if not isinstance(value, dict):
        return value
    result = {key: shortened(item) for key, item in value.items()}
    for key, short in SHORT.items():
        if key in result:
            result[key] = [1, 2] if isinstance(result[key], list) and key == "num_steps" else short
    return result


# -- the folder -------------------------------------------------------------------------------


def make_world(root: Path) -> dict[str, Path]:
    """Create every file that the pages name; return the configuration folder of each kind."""
    pipelines = [tiny_pipeline(root / "tokenizer", seed) for seed in range(6)]
    pipelines[0].save_pretrained(root / "epicrealism")
    for name, pipeline in zip(("majicmix", "a", "b", "c", "base"), pipelines[1:], strict=True):
        tensors = {k: t.clone() for k, t in original_layout(pipeline).items()}
        save_file(tensors, root / f"{name}.safetensors")
    vae = {
        key: tensor.clone()
        for key, tensor in original_layout(pipelines[2]).items()
        if key.startswith("first_stage_model.")
    }
    save_file(vae, root / "vae.safetensors")
    for number, name in enumerate(("ink", "clay")):
        lora_of(pipelines[0], root / f"{name}.safetensors", number)
    for kind, names in (
        ("xl", ("sdxl-photo", "sdxl-anime")),
        # diffusers reads single files of Flux only at the published width, so folders with the
        # names of the files stand for them
        ("flux", ("flux-photo.safetensors", "flux-anime.safetensors")),
    ):
        for folder, name in zip(saved_experts(kind, root / kind, 2), names, strict=True):
            shutil.move(folder, root / name)
    AutoencoderKL.from_pretrained(root / "flux-photo.safetensors" / "vae").save_pretrained(
        root / "ae.safetensors"
    )
    flux = root / "flux-photo.safetensors"
    for part, name in (("text_encoder", "clip_l"), ("text_encoder_2", "t5xxl")):
        shutil.copy(flux / part / "model.safetensors", root / f"{name}.safetensors")
    (root / "pictures").mkdir()
    random, lines = np.random.default_rng(0), []
    for number in range(12):
        pixels = random.integers(0, 256, (48, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "pictures" / f"{number}.png")
        text = PROMPTS[number % len(PROMPTS)]
        lines.append(f'{{"file_name": "{number}.png", "text": "{text}"}}')
    (root / "pictures" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    Image.new("L", (48, 48), "white").save(root / "mask.png")
    (root / "password.txt").write_text("a long password\n")
    for name in (
        "openai/clip-vit-large-patch14",
        "yuvalkirstain/PickScore_v1",
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    ):
        torch.manual_seed(0)
        write_clip(root / name)
    return {"Stable Diffusion": root / "epicrealism", "Stable Diffusion XL": root / "sdxl-photo"}


def make_ensemble(root: Path, config: Path) -> None:
    """Create `runs/first`, for pages that do not train it."""
    small = afa.SABWConfig(hidden_size=16, num_layers=1, num_heads=2, norm_num_groups=4)
    experts = [root / "epicrealism", root / "majicmix.safetensors"]
    pipeline = afa.load_pipeline(experts, small, config=config)
    for rule in pipeline.unet.aggregators:
        torch.nn.init.normal_(rule.conv_out.weight, std=0.1)
    afa.save_ensemble(pipeline, root / "runs" / "first")
