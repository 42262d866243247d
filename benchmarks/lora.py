"""Measure the memory of LoRA experts on one base, relative to one model (Stable Diffusion 1.5).

    python -m benchmarks.lora

Random weights in float16, LoRAs of rank 16 on every attention layer of the U-Net. Each mode loads
in its own process. The memory of the imports is measured and subtracted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.memory import peak, resident
from benchmarks.models import SD15_UNET, SD15_VAE

MODES = ("imports", "one model", "one LoRA", "three LoRAs", "three LoRAs and the base")


def main() -> None:
    """Measure all modes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        mode, folder = arguments.one
        load(mode, Path(folder))
        print(json.dumps({"resident": resident(), "peak": peak()}))  # noqa: T201
        return
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run(
            [sys.executable, "-m", "benchmarks.lora", "--one", "write", scratch], check=True
        )
        seen = {}
        for mode in MODES:
            command = [sys.executable, "-m", "benchmarks.lora", "--one", mode, scratch]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            seen[mode] = json.loads(done.stdout.splitlines()[-1])
    empty, one = seen.pop("imports"), seen["one model"]
    lines = [
        "| loaded | resident, GB | relative to one model | peak, GB | relative to one model |",
        "|---|---|---|---|---|",
    ]
    for mode, figures in seen.items():
        cells = []
        for key in ("resident", "peak"):
            own = figures[key] - empty[key]
            cells += [f"{own / 1e9:.2f}", f"{own / (one[key] - empty[key]):.2f}"]
        lines.append(f"| {mode} | {' | '.join(cells)} |")
    print("\n".join(lines))  # noqa: T201


def load(mode: str, folder: Path) -> None:
    """Load the models of a mode and keep them."""
    import torch

    import afa

    base, loras = folder / "base", [str(folder / f"lora{n}.safetensors") for n in range(3)]
    named = [{"base": str(base), "lora": lora, "scale": 0.8} for lora in loras]
    modes: dict[str, list[Any]] = {
        "imports": [],
        "one model": [str(base)],
        "one LoRA": named[:1],
        "three LoRAs": named,
        "three LoRAs and the base": [str(base), *named],
    }
    if mode == "write":
        write(folder)
    elif modes[mode]:
        pipeline = afa.load_pipeline(modes[mode], torch_dtype=torch.float16)
        kept.append(pipeline)
        # weights are memory-mapped: only the pages that were read are resident
        for part in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
            for parameter in part.parameters():
                parameter.flatten()[::512].sum()


kept: list[object] = []  # keeps the models alive until memory is measured


def write(folder: Path) -> None:
    """Write a base and three LoRAs with random weights."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from diffusers import UNet2DConditionModel as UNet
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    from afa.zoo.models import build_tokenizer

    torch.set_default_dtype(torch.float16)
    unet = UNet(**SD15_UNET)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL(**SD15_VAE),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, vocab_size=49408)
        ),
        tokenizer=build_tokenizer(folder / "tokenizer"),
        unet=unet,
        scheduler=DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "base")
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=16, target_modules=targets))
    for n in range(3):
        state = get_peft_model_state_dict(unet)
        save_file(
            {f"unet.{key}": torch.randn_like(tensor) * 0.01 for key, tensor in state.items()},
            folder / f"lora{n}.safetensors",
        )


if __name__ == "__main__":
    main()
