"""Inputs for all rounds, created once: LoRAs, pictures, tiny experts, broken files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from afa.loading.expert import load_expert
from afa.training import SceneImages
from afa.zoo import expert_folder
from tests.tiny_pipelines import saved_experts

if TYPE_CHECKING:
    from torch import nn

KINDS = ("xl", "sd3")
NUM_PICTURES = 12


@dataclass(frozen=True)
class Fixtures:
    """Input files, which are only read.

    Attributes:
        loras: LoRAs of `zoo:base`.
        pictures: A folder with captions; one of its pictures is broken.
        experts: Tiny experts, by pipeline kind.
        cut: A truncated file of weights.
    """

    loras: list[Path]
    pictures: Path
    experts: dict[str, list[Path]]
    cut: Path


@dataclass(frozen=True)
class Round:
    """One round: its number (from 0), its own folder, and the inputs."""

    number: int
    folder: Path
    fixtures: Fixtures

    def new(self, name: str) -> Path:
        """Create a new folder."""
        folder = self.folder / name
        folder.mkdir()
        return folder


def make_fixtures(folder: Path) -> Fixtures:
    """Write all input files."""
    folder.mkdir(parents=True)
    weights = expert_folder("base") / "unet" / "diffusion_pytorch_model.safetensors"
    cut = folder / "cut.safetensors"
    cut.write_bytes(weights.read_bytes()[:50_000])
    return Fixtures(
        _loras(folder),
        _pictures(folder / "pictures"),
        {kind: saved_experts(kind, folder / kind, count=2) for kind in KINDS},
        cut,
    )


def _pictures(folder: Path) -> Path:
    folder.mkdir()
    data, lines = SceneImages(NUM_PICTURES), []
    for n in range(NUM_PICTURES):
        picture, caption = data[n]
        picture.save(folder / f"{n}.png")
        lines.append(json.dumps({"file_name": f"{n}.png", "text": caption}))
    (folder / "3.png").write_bytes((folder / "3.png").read_bytes()[:100])
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def _loras(folder: Path) -> list[Path]:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    def tensors(model: nn.Module, prefix: str, targets: list[str]) -> dict[str, torch.Tensor]:
        loaded = model
        loaded.add_adapter(LoraConfig(r=2, target_modules=targets))  # type: ignore[operator]
        state = get_peft_model_state_dict(loaded)
        return {f"{prefix}.{key}": 0.1 * torch.randn_like(value) for key, value in state.items()}

    files = []
    for n in range(2):
        base = load_expert("zoo:base")
        content = tensors(base.denoiser, "unet", ["to_q", "to_k"])
        content |= tensors(base.text_encoders["text_encoder"], "text_encoder", ["q_proj"])
        files.append(folder / f"lora{n}.safetensors")
        save_file(content, files[-1])
    return files
