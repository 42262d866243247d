"""Measure step time and peak memory of each training setting.

    python -m benchmarks.training                    # the zoo's models
    python -m benchmarks.training --size sd15        # widths of Stable Diffusion 1.5, 32x32 latents
    python -m benchmarks.training --offloading       # memory on the device, calculated

Each mode runs in its own process, so that peaks are separate. The modes alternate for several
rounds, and ratios are computed within a round. The first mode is a standard training loop around
the same ensemble, without afa.training. Weights are random, except those of the zoo.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.memory import peak, resident
from benchmarks.models import SD15_UNET, SD15_VAE
from benchmarks.rounds import ratio

if TYPE_CHECKING:
    from collections.abc import Iterator

MODES: dict[str, dict[str, Any]] = {
    "plain loop": {"plain": True},
    "afa, not cached": {},
    "cached": {"cache": True},
    "cached, checkpointing": {"cache": True, "gradient_checkpointing": True},
    "cached, bfloat16 experts": {"cache": True, "expert_dtype": "bfloat16"},
    "cached, checkpointing, bfloat16 experts": {
        "cache": True,
        "gradient_checkpointing": True,
        "expert_dtype": "bfloat16",
    },
}
SIZES: dict[str, dict[str, Any]] = {
    "zoo": {"batch_size": 16, "num_steps": 16, "num_samples": 96, "resolution": 64},
    "sd15": {"batch_size": 2, "num_steps": 4, "num_samples": 8, "resolution": 256},
}


def main() -> None:
    """Measure all modes of one size and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="zoo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--modes", nargs="*", choices=MODES, default=list(MODES))
    parser.add_argument("--offloading", action="store_true")
    parser.add_argument("--json", action="store_true", help="print figures instead of a table")
    parser.add_argument("--one", choices=MODES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.offloading:
        print(offloading_table())  # noqa: T201
        return
    if arguments.one is not None:
        print(json.dumps(measure(arguments.size, MODES[arguments.one])))  # noqa: T201
        return
    command = [sys.executable, "-m", "benchmarks.training", "--size", arguments.size, "--one"]
    rounds = []
    for number in range(arguments.rounds):
        seen = {}
        for mode in arguments.modes:
            done = subprocess.run([*command, mode], check=True, capture_output=True, text=True)
            seen[mode] = json.loads(done.stdout.splitlines()[-1])
            sys.stderr.write(f"round {number + 1}, {mode}: {seen[mode]}\n")
        rounds.append(seen)
    if arguments.json:
        print(json.dumps(figures(rounds), indent=1))  # noqa: T201
        return
    print(table(arguments.size, rounds))  # noqa: T201


def figures(rounds: list[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """Compute the medians of every mode, and its time relative to the first mode."""
    first = next(iter(rounds[0]))
    key = "seconds_per_step"
    seconds = {mode: [seen[mode][key] for seen in rounds] for mode in rounds[0]}
    return [
        {
            "mode": mode,
            "num_rounds": len(rounds),
            "ratio": ratio(seconds, mode, first).as_json(),
            **{
                name: statistics.median(seen[mode][name] for seen in rounds)
                for name in rounds[0][mode]
            },
        }
        for mode in rounds[0]
    ]


def table(size: str, rounds: list[dict[str, dict[str, float]]]) -> str:
    """Format the medians over the rounds, and the times relative to the first mode."""
    modes = list(rounds[0])
    settings = SIZES[size]
    lines = [
        f"{size}: batches of {settings['batch_size']} of {settings['num_samples']} pictures of "
        f"{settings['resolution']} px, {len(rounds)} rounds.",
        "",
        "| mode | seconds per step | relative | seconds per epoch of 1,000 | encoding, s "
        "| peak memory, GB | peak minus loaded models, GB |",
        "|---|---|---|---|---|---|---|",
    ]

    def median(mode: str, key: str) -> float:
        return statistics.median(seen[mode][key] for seen in rounds)

    for mode in modes:
        ratio = statistics.median(
            seen[mode]["seconds_per_step"] / seen[modes[0]]["seconds_per_step"] for seen in rounds
        )
        step = median(mode, "seconds_per_step")
        encoding = median(mode, "seconds_encoding")
        lines.append(
            f"| {mode} | {step:.3g} | {ratio:.2f} | {step * 1000 / settings['batch_size']:.0f} "
            f"| {encoding:.2g} | {median(mode, 'peak') / 1e9:.2f} "
            f"| {median(mode, 'above_loaded') / 1e9:.2f} |"
        )
    return "\n".join(lines)


def measure(size: str, changes: dict[str, Any]) -> dict[str, float]:
    """Train for a few steps in this process."""
    import torch

    from afa.training import Recipe
    from afa.training.engine import Engine
    from afa.training.prepare import prepare_examples
    from afa.training.trained import Aggregators
    from afa.training.trainer import Trainer

    settings = dict(SIZES[size])
    num_samples, resolution = settings.pop("num_samples"), settings.pop("resolution")
    changes = dict(changes)
    is_plain = changes.pop("plain", False)
    cache = changes.pop("cache", False)
    with tempfile.TemporaryDirectory() as scratch:
        recipe = Recipe.model_validate(
            {
                "experts": ["zoo:animals", "zoo:food", "zoo:things"],
                "data": {
                    "scenes": {"num_samples": num_samples},
                    "resolution": resolution,
                    "cache": cache,
                    "cache_folder": scratch,
                },
                "training": {**settings, "trackers": [], "device": "cpu", **changes},
            }
        )
        dtype = getattr(torch, recipe.training.expert_dtype)
        pipeline = zoo_pipeline(dtype) if size == "zoo" else random_pipeline(dtype)
        data = scenes(num_samples)
        encoding = 0.0
        if is_plain:
            loaded = resident()
            seconds = list(plain_loop(pipeline, data, recipe.training, resolution))
        else:
            engine = Engine("cpu")
            aggregators = Aggregators(pipeline, engine.device)
            trainer = Trainer(pipeline, aggregators, recipe.training, engine)
            began = time.perf_counter()
            preparing = prepare_examples(recipe, pipeline, data, engine)
            while True:
                try:
                    next(preparing)
                except StopIteration as stop:
                    examples = stop.value.training
                    break
            if cache:
                encoding = time.perf_counter() - began
            loaded = resident()
            seconds = [step.seconds for step in trainer.steps(examples)]
    return {
        "seconds_per_step": statistics.median(seconds[1:]),  # the first step allocates
        "seconds_encoding": encoding,
        "peak": peak(),
        "above_loaded": peak() - loaded,
    }


def plain_loop(pipeline: Any, data: Any, settings: Any, resolution: int) -> Iterator[float]:
    """Train with a standard loop that encodes every batch; return the seconds of each step."""
    import numpy as np
    import torch
    from diffusers import DDPMScheduler

    unet, vae = pipeline.unet, pipeline.vae
    unet.train()
    parameters = list(unet.aggregators.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    size = settings.batch_size
    for step in range(settings.num_steps):
        began = time.perf_counter()
        samples = [data[n % len(data)] for n in range(step * size, (step + 1) * size)]
        pictures = [
            np.asarray(picture.resize((resolution, resolution)), dtype=np.float32)
            for picture, _ in samples
        ]
        pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 127.5 - 1
        with torch.no_grad():
            latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
            captions = [caption for _, caption in samples]
            text = pipeline.encode_prompt(captions, vae.device, 1, False)[0]
        noise = torch.randn_like(latents)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (size,))
        noisy = scheduler.add_noise(latents, noise, timesteps)
        predicted = unet(noisy, timesteps, text).sample
        torch.nn.functional.mse_loss(predicted, noise).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield time.perf_counter() - began


def scenes(num_samples: int) -> Any:
    """Return pictures and captions."""
    from afa.training import SceneImages

    return SceneImages(num_samples)


def zoo_pipeline(dtype: Any) -> Any:
    """Load the bundled experts with untrained aggregators."""
    import afa
    from afa.zoo.models import AGGREGATOR

    experts = ["zoo:animals", "zoo:food", "zoo:things"]
    return afa.load_pipeline(experts, AGGREGATOR, torch_dtype=dtype)


def random_pipeline(dtype: Any) -> Any:
    """Build three random experts of Stable Diffusion 1.5's size with the paper's aggregators."""
    import torch
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    import afa
    from afa.ensemble.text import EnsembleTextEncoder
    from afa.zoo.models import build_tokenizer

    tokenizer = build_tokenizer(Path(tempfile.mkdtemp()))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        unets = [UNet2DConditionModel(**SD15_UNET) for _ in range(3)]
        config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, vocab_size=49408)
        encoders = [CLIPTextModel(config) for _ in range(3)]
        vae = AutoencoderKL(**SD15_VAE)
    finally:
        torch.set_default_dtype(before)
    return StableDiffusionPipeline(
        unet=afa.EnsembleDenoiser(unets, afa.SABWConfig()),
        text_encoder=EnsembleTextEncoder(encoders),
        vae=vae,
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def offloading_table() -> str:
    """Format the memory of three bfloat16 experts on a device, and the bytes transferred to it."""
    whole, largest, streamed = offloaded_bytes(SD15_UNET)
    return (
        "| U-Nets in bfloat16 | on the device | with `offload_experts` | transferred per pass |\n"
        "|---|---|---|---|\n"
        f"| 3 x Stable Diffusion 1.5 | {3 * whole / 1e9:.2f} GB "
        f"| {(3 * (whole - streamed) + largest) / 1e9:.2f} GB | {3 * streamed / 1e9:.2f} GB |"
    )


def offloaded_bytes(config: dict[str, Any]) -> tuple[int, int, int]:
    """Return the bytes of a bfloat16 U-Net, of its largest segment, and of its movable layers."""
    import torch
    from diffusers import UNet2DConditionModel

    from afa.denoisers import family_of

    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)

    def count(*modules: Any) -> int:
        return 2 * sum(p.numel() for m in modules if m is not None for p in m.parameters())

    streamed = family_of(unet).layers(unet)
    largest = count(unet.mid_block)
    for block in (*unet.down_blocks, *unet.up_blocks):
        attentions = getattr(block, "attentions", None) or []
        pairs = itertools.zip_longest(block.resnets, attentions)
        largest = max([largest, *(count(*pair) for pair in pairs)])
    return count(unet), largest, count(*streamed)


if __name__ == "__main__":
    main()
