"""Measure steps, pictures and streamed experts on a GPU, for the large architectures in bfloat16.

    python -m benchmarks.gpu OUT.json              # everything; keeps existing results
    python -m benchmarks.gpu OUT.json --parts steps --sizes "Stable Diffusion 1.5"

Weights are random. The compared functions alternate in one process, and the device is synchronized
before and after each. `plain`: no CUDA graphs. `graphs`: a step of the ensemble, and of every
expert alone, is a CUDA graph. `compiled`: the blocks of both are compiled. `python -m
benchmarks.run --gpu OUT.json` writes the figures to the page.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from benchmarks.models import SD15_VAE, UNETS, build_unet
from benchmarks.rounds import ratio, take_turns
from benchmarks.step import DEFAULT, EXPERTS, MEAN, SHAPES, count_operations

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

FLUX = "Flux"
FLUX_CONFIG: dict[str, Any] = {
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}
FLUX_VAE: dict[str, Any] = {**SD15_VAE, "latent_channels": 16, "use_quant_conv": False}
#: side of a picture in pixels, and the batch size of a call
PIXELS = {"Stable Diffusion 1.5": 512, "Stable Diffusion XL": 1024, FLUX: 1024}
BATCH = {"Stable Diffusion 1.5": 2, "Stable Diffusion XL": 2, FLUX: 1}
MODES = ("plain", "graphs", "compiled", "compiled, graphs")
ONE, ENSEMBLE = "one model", "ensemble"
PARTS = ("steps", "pictures", "streaming")


def build(size: str) -> Any:
    """Build a denoiser with random weights, on the device in bfloat16."""
    import torch
    from diffusers import FluxTransformer2DModel

    with torch.device("cuda"):
        if size != FLUX:
            return build_unet(size, torch.bfloat16)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            return FluxTransformer2DModel(**FLUX_CONFIG).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)


def example(size: str, count: int, batch: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the arguments of an ensemble's call and of an expert's own call."""
    import torch

    from benchmarks import models

    side = PIXELS[size] // 8
    with torch.device("cuda"):
        if size != FLUX:
            unet = SimpleNamespace(config=UnetConfig(UNETS[size]))
            return models.example(unet, size, count, side, batch, torch.bfloat16)
        rows = torch.arange(side // 2).repeat_interleave(side // 2)
        columns = torch.arange(side // 2).repeat(side // 2)
        ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=1).to(torch.bfloat16)
        shared = {
            "hidden_states": torch.randn(batch, len(ids), 64, dtype=torch.bfloat16),
            "img_ids": ids,
            "txt_ids": torch.zeros(512, 3, dtype=torch.bfloat16),
            "guidance": torch.full((batch,), 3.5, dtype=torch.bfloat16),
        }
        text = torch.randn(batch, 512, count * 4096, dtype=torch.bfloat16)
        pooled = torch.randn(batch, count * 768, dtype=torch.bfloat16)
    own = [
        {**shared, "encoder_hidden_states": t.contiguous(), "pooled_projections": p.contiguous()}
        for t, p in zip(text.chunk(count, -1), pooled.chunk(count, -1), strict=True)
    ]
    return {**shared, "encoder_hidden_states": text, "pooled_projections": pooled}, own


class UnetConfig:
    """The entries of a configuration as attributes; missing ones are None."""

    def __init__(self, entries: dict[str, Any]) -> None:
        self._entries = {"in_channels": 4, **entries}

    def __getattr__(self, name: str) -> Any:
        return self._entries.get(name)


def measure_steps(size: str, count: int, mode: str, num_rounds: int) -> dict[str, Any]:
    """Measure a call of the ensemble, relative to the experts' own forward passes."""
    import torch

    from afa import EnsembleDenoiser, SABWConfig
    from afa.ensemble.caching.graphs import Graphs

    batch = BATCH[size]
    experts = [build(size) for _ in range(count)]
    together, own = example(size, count, batch)
    latent = "hidden_states" if size == FLUX else "sample"
    timestep = torch.full((batch,), 0.5 if size == FLUX else 500.0, device="cuda")

    def one(expert: Any, arguments: dict[str, Any]) -> Callable[[], Any]:
        return lambda: expert(timestep=timestep, return_dict=False, **arguments)[0]

    calls = [one(expert, given) for expert, given in zip(experts, own, strict=True)]

    def runner(ensemble: EnsembleDenoiser) -> Callable[[], Tensor]:
        steps = iter(range(1_000_000, 0, -1))
        scale = 1e6 if size == FLUX else 1e3

        def run() -> Tensor:
            now = torch.full((batch,), next(steps) / scale, device="cuda")
            given = {**together, latent: together[latent].clone()}
            return ensemble(timestep=now, return_dict=False, **given)[0]

        return run

    ensembles = {MEAN: EnsembleDenoiser(experts)}
    for name, changes in SHAPES.items():
        ensembles[name] = EnsembleDenoiser(experts, replace(SABWConfig(), **changes))
    with torch.no_grad():
        functions: dict[str, Callable[[], Any]] = {
            EXPERTS: lambda: [call() for call in calls],
            **{name: runner(ensemble) for name, ensemble in ensembles.items()},
        }
        for function in functions.values():
            function()
        operations = {name: count_operations(function) for name, function in functions.items()}
        if mode.startswith("compiled"):
            for expert in experts:
                expert.compile_repeated_blocks(dynamic=False)
            for ensemble in ensembles.values():
                ensemble.compile_repeated_blocks()
            for function in functions.values():
                function()
        if mode.endswith("graphs"):
            for ensemble in ensembles.values():
                ensemble.graphs = Graphs()
            graphs = Graphs()
            replays = [graphs.record(call) for call in calls]
            functions[EXPERTS] = lambda: [replay() for replay in replays]
        timed = {name: _waited_for(function) for name, function in functions.items()}
        began = time.perf_counter()
        for function in timed.values():
            function()
        first = time.perf_counter() - began
        seconds = take_turns(timed, num_rounds, num_warmups=3)
    own_operations = operations[EXPERTS]
    return {
        "size": size,
        "num_experts": count,
        "pixels": PIXELS[size],
        "batch": batch,
        "mode": mode,
        "num_rounds": num_rounds,
        "first": first,
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "ratios": {name: ratio(seconds, name, EXPERTS).as_json() for name in ensembles},
        "floors": {name: operations[name] / own_operations for name in SHAPES},
        "operations": own_operations,
        "parameters": {
            "one expert": sum(p.numel() for p in experts[0].parameters()),
            **{
                name: sum(p.numel() for p in ensembles[name].aggregators.parameters())
                for name in SHAPES
            },
        },
    }


def _waited_for(function: Callable[[], Any]) -> Callable[[], None]:
    import torch

    def run() -> None:
        torch.cuda.synchronize()
        function()
        torch.cuda.synchronize()

    return run


def pipeline_of(size: str, denoiser: Any) -> tuple[Any, dict[str, Any]]:
    """Return a stock pipeline with a denoiser, and its call arguments, with shared embeddings."""
    import diffusers
    import torch

    no_text = {"text_encoder": None, "tokenizer": None}
    scheduler: Any = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

    with torch.device("cuda"):
        config = FLUX_VAE if size == FLUX else SD15_VAE
        vae = diffusers.AutoencoderKL(**config).to(torch.bfloat16).eval()
    call: dict[str, Any] = {"height": PIXELS[size], "width": PIXELS[size], "output_type": "pt"}
    if size == FLUX:
        pipeline = diffusers.FluxPipeline(
            diffusers.FlowMatchEulerDiscreteScheduler(),
            vae,
            None,
            None,
            None,
            None,
            denoiser,
        )
        call |= {"prompt_embeds": random(1, 512, 4096), "pooled_prompt_embeds": random(1, 768)}
    elif size == "Stable Diffusion XL":
        parts = {"text_encoder_2": None, "tokenizer_2": None, "add_watermarker": False}
        pipeline = diffusers.StableDiffusionXLPipeline(
            vae=vae, unet=denoiser, scheduler=scheduler, **no_text, **parts
        )
        for prefix in ("", "negative_"):
            call[f"{prefix}prompt_embeds"] = random(1, 77, 2048)
            call[f"{prefix}pooled_prompt_embeds"] = random(1, 1280)
    else:
        checks = {"safety_checker": None, "feature_extractor": None}
        pipeline = diffusers.StableDiffusionPipeline(
            vae=vae,
            unet=denoiser,
            scheduler=scheduler,
            requires_safety_checker=False,
            **no_text,
            **checks,
        )
        call |= {f"{prefix}prompt_embeds": random(1, 77, 768) for prefix in ("", "negative_")}
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, call


def measure_pictures(size: str, num_rounds: int, num_steps: int) -> list[dict[str, Any]]:
    """Measure pictures by one model and by three experts, with and without CUDA graphs."""
    import afa

    experts = [build(size) for _ in range(3)]
    single, call = pipeline_of(size, experts[0])
    ensemble, _ = pipeline_of(size, afa.EnsembleDenoiser(experts, afa.SABWConfig()))
    functions = {}
    for way, given in ((ONE, single), (ENSEMBLE, ensemble)):
        functions[f"{way}, plain"] = _drawing(given, call, num_steps, graphs=False)
        functions[f"{way}, graphs"] = _drawing(given, call, num_steps, graphs=True)
    memory = {
        name: peak_of(function, (ensemble if name.startswith(ENSEMBLE) else single))
        for name, function in functions.items()
    }
    seconds = take_turns(functions, num_rounds, num_warmups=0)  # measuring the peaks warmed up
    first = next(iter(functions))
    return [
        {
            "size": size,
            "pixels": PIXELS[size],
            "way": name,
            "num_steps": num_steps,
            "num_rounds": num_rounds,
            "seconds": statistics.median(seconds[name]),
            "ratio": ratio(seconds, name, first).as_json(),
            "memory": memory[name],
        }
        for name in functions
    ]


def _drawing(
    pipeline: Any, call: dict[str, Any], num_steps: int, *, graphs: bool
) -> Callable[[], None]:
    import torch

    import afa

    if graphs:
        pipeline = afa.accelerate(pipeline, cuda_graphs=True)
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    own = denoiser.graphs if graphs else None

    def draw() -> None:
        if isinstance(denoiser, afa.EnsembleDenoiser):
            denoiser.graphs = own
        fresh = {k: v.clone() if torch.is_tensor(v) else v for k, v in call.items()}
        pipeline(num_inference_steps=num_steps, **fresh)
        torch.cuda.synchronize()

    return draw


def peak_of(function: Callable[[], None], pipeline: Any) -> int:
    """Return the peak memory of a call in bytes: the pipeline's weights and activations."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    added = torch.cuda.max_memory_allocated() - before
    parts = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    tensors = {id(p): p for part in parts for p in part.parameters() if p.is_cuda}
    return added + sum(p.numel() * p.element_size() for p in tensors.values())


def measure_streaming(size: str, num_steps: int) -> list[dict[str, Any]]:
    """Measure three experts on the device, in CPU memory, and in a file."""
    import afa

    ways: dict[str, Callable[[Any], None]] = {
        "on the device": lambda denoiser: None,
        "offloaded": lambda denoiser: denoiser.offload_experts("cuda"),
        "streamed": lambda denoiser: denoiser.stream_experts("cuda", folder=Path("/var/tmp")),
    }
    results: list[dict[str, Any]] = []
    for way, place in ways.items():
        experts = [build(size) for _ in range(3)]
        denoiser = afa.EnsembleDenoiser(experts, afa.SABWConfig())
        pipeline, call = pipeline_of(size, denoiser)
        place(denoiser)
        draw = _drawing(pipeline, call, num_steps, graphs=False)
        draw()  # the first run records the order of the layers
        began = time.perf_counter()
        memory = peak_of(draw, pipeline)
        seconds = time.perf_counter() - began
        first = results[0]["seconds"] if results else seconds
        results.append(
            {
                "size": size,
                "way": way,
                "num_steps": num_steps,
                "memory": memory,
                "seconds": seconds,
                "time_ratio": seconds / first,
            }
        )
        denoiser.stop_offloading()
        del experts, denoiser, pipeline, draw
    return results


def listed(parts: list[str], sizes: list[str], modes: list[str]) -> list[dict[str, Any]]:
    """List the jobs."""
    jobs: list[dict[str, Any]] = []
    for size in sizes:
        if "steps" in parts:
            counts = (3,) if size == FLUX else (1, 2, 3, 4)
            for mode in modes:
                for count in counts if mode == "plain" else (3,):
                    jobs.append({"part": "steps", "size": size, "count": count, "mode": mode})
        if "pictures" in parts:
            jobs.append({"part": "pictures", "size": size})
        if "streaming" in parts and size != FLUX:
            jobs.append({"part": "streaming", "size": size})
    return jobs


def measure(job: dict[str, Any], num_rounds: int) -> list[dict[str, Any]]:
    """Measure one job in this process."""
    import torch

    torch.manual_seed(0)
    if job["part"] == "steps":
        return [measure_steps(job["size"], job["count"], job["mode"], num_rounds)]
    if job["part"] == "pictures":
        return measure_pictures(job["size"], min(num_rounds, 5), num_steps=20)
    return measure_streaming(job["size"], num_steps=4)


def origin(at: str | None) -> dict[str, Any]:
    """Return date, commit, machine and software; `at` is the commit outside of a repository."""
    import torch

    from afa.provenance import commit, made_from

    return {
        "date": datetime.date.today().isoformat(),
        "commit": at or commit(),
        "machine": torch.cuda.get_device_name(),
        "software": made_from()["software"],
    }


def main() -> None:
    """Measure the requested jobs that have no result yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sizes", nargs="*", choices=list(PIXELS), default=list(PIXELS))
    parser.add_argument("--modes", nargs="*", choices=MODES, default=list(MODES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--commit", help="commit of this copy, outside of a repository")
    arguments = parser.parse_args()
    known = json.loads(arguments.output.read_text()) if arguments.output.exists() else []
    made = origin(arguments.commit)
    for job in listed(arguments.parts, arguments.sizes, arguments.modes):
        if any(entry["job"] == job for entry in known):
            continue
        began = time.perf_counter()
        try:
            results = measure(job, arguments.rounds)
        except RuntimeError as error:  # such as out of memory; keep the other results
            sys.stderr.write(f"{job} failed: {str(error)[:500]}\n")
            continue
        finally:
            release()
        known.append({"job": job, "results": results, **made})
        arguments.output.write_text(json.dumps(known, indent=1))
        sys.stderr.write(f"{job}, {time.perf_counter() - began:.0f} s\n")
        for row in results:
            sys.stderr.write(f"  {line(row)}\n")


def release() -> None:
    """Free the memory of the last job."""
    import torch

    gc.collect()
    torch.compiler.reset()
    torch.cuda.empty_cache()


def line(row: dict[str, Any]) -> str:
    """Format one result as text."""
    if "ratios" in row:
        ratios = "; ".join(f"{name} {value['median']:.3f}" for name, value in row["ratios"].items())
        return f"experts {row['seconds'][EXPERTS]:.4f} s, {ratios}, floor {row['floors'][DEFAULT]}"
    return f"{row['way']}: {row['seconds']:.3f} s, {row['memory'] / 1e9:.2f} GB"


if __name__ == "__main__":
    main()
