"""Measure memory and time of streamed experts, at the size of Stable Diffusion 1.5.

    python -m benchmarks.streaming

Random weights in float32, 32x32 latents, guidance, a few steps. Each row runs in its own process,
and its peak excludes the memory of the imports. The streamed experts are created one after another,
as `load_pipeline` loads them. Their file is on this machine's disk and may be in the operating
system's cache, which is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.memory import peak, resident
from benchmarks.models import SD15_VAE, build_unet

ONE, ALL, STREAMED = "one model", "three experts in memory", "three experts streamed"
SIZE = "Stable Diffusion 1.5"
FOLDER = "/var/tmp"  # on a disk; /tmp may be in memory


def main() -> None:
    """Measure all rows, one process each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        print(json.dumps(measure(arguments.one, arguments.threads)))  # noqa: T201
        return
    rounds = []
    for _ in range(arguments.rounds):
        seen = {}
        for way in (ONE, ALL, STREAMED):
            command = [sys.executable, "-m", "benchmarks.streaming", "--one", way]
            command += ["--threads", str(arguments.threads)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            seen[way] = json.loads(done.stdout.splitlines()[-1])
            sys.stderr.write(f"{way}: {seen[way]}\n")
        rounds.append(seen)
    results = [
        {
            "way": way,
            "num_rounds": len(rounds),
            **{key: statistics.median(seen[way][key] for seen in rounds) for key in rounds[0][way]},
            "memory_ratio": statistics.median(
                seen[way]["memory"] / seen[ONE]["memory"] for seen in rounds
            ),
            "time_ratio": statistics.median(
                seen[way]["seconds"] / seen[ALL]["seconds"] for seen in rounds
            ),
        }
        for way in rounds[0]
    ]
    print(json.dumps(results, indent=1))  # noqa: T201


def measure(way: str, num_threads: int, num_steps: int = 4) -> dict[str, float]:
    """Draw pictures in this process."""
    import torch

    torch.set_num_threads(num_threads)
    torch.manual_seed(0)
    pipeline = build(way)
    pipeline.set_progress_bar_config(disable=True)
    seconds = []
    for _ in range(2):  # the first run allocates, and records the order of the layers
        began = time.perf_counter()
        pipeline("a fox", num_inference_steps=num_steps, height=256, width=256)
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds[-1], "memory": peak() - pipeline.imports}


def build(way: str) -> Any:
    """Build a stock pipeline; `imports` is the memory before its models."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    import afa
    from afa.denoisers import family_of
    from afa.ensemble.placement.streaming import LayerStream
    from afa.ensemble.text import EnsembleTextEncoder
    from afa.zoo.models import build_tokenizer

    tokenizer = build_tokenizer(Path(tempfile.mkdtemp()))
    imports = resident()
    text = CLIPTextConfig(hidden_size=768, intermediate_size=3072, vocab_size=49408)
    unet: Any = None
    if way == ONE:
        unet, encoder = build_unet(SIZE), CLIPTextModel(text).eval()
    else:
        stream = LayerStream(folder=Path(FOLDER)) if way == STREAMED else None
        unets = []
        for _ in range(3):
            unets.append(build_unet(SIZE))
            if stream is not None:
                stream.add(family_of(unets[-1]).layers(unets[-1]))
        unet = afa.EnsembleDenoiser(unets, afa.SABWConfig())
        if stream is not None:
            unet.use_stream(stream, "cpu")
        encoder = EnsembleTextEncoder([CLIPTextModel(text).eval() for _ in range(3)])
    pipeline = StableDiffusionPipeline(
        unet=unet,
        text_encoder=encoder,
        vae=AutoencoderKL(**SD15_VAE).eval(),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.imports = imports
    return pipeline


if __name__ == "__main__":
    main()
