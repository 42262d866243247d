"""Measure the memory of three experts of Flux's width with quantised weights (GGUF, float8).

    python -m benchmarks.packed

Random weights, with one double and one single block of Flux's real width per expert. Each format
loads and computes one step in its own process; the memory of the imports is subtracted. The bytes
of complete experts (19 double and 38 single blocks) are counted from the tensors.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.memory import peak, resident

FORMATS = ("bfloat16", "float8", "Q8_0", "Q4_K")
_BLOCKS = {"transformer_blocks": 19, "single_transformer_blocks": 38}
_COUNT = 3
_BLOCK_NAMES = tuple(f"{name}." for name in _BLOCKS)


def main() -> None:
    """Measure all formats and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one is not None:
        mode, folder = arguments.one
        print(json.dumps(measure(mode, Path(folder))))  # noqa: T201
        return
    lines = [
        "| three experts in | weights, GB | resident, GB | peak of a step, GB | step, s "
        "| complete experts, GB |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        empty = _run("imports", scratch)
        for mode in FORMATS:
            _run(f"write {mode}", scratch)
            found = _run(mode, scratch)
            own = {key: found[key] - empty[key] for key in ("resident", "peak")}
            cells = [found["bytes"], own["resident"], own["peak"]]
            texts = [*(f"{cell / 1e9:.2f}" for cell in cells), f"{found['seconds']:.1f}"]
            lines.append(f"| {mode} | {' | '.join(texts)} | {found['complete'] / 1e9:.1f} |")
    print("\n".join(lines))  # noqa: T201


def _run(mode: str, scratch: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.packed", "--one", mode, scratch]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(mode: str, folder: Path) -> dict[str, Any]:
    """Load three experts of a format and compute one step, or only write their files."""
    import torch

    import afa
    from afa.loading.single_file.parts import read_parts

    config = folder / "config"
    if mode.startswith("write "):
        for number in range(_COUNT):
            write(mode.removeprefix("write "), folder, config, number)
        return {}
    found: dict[str, Any] = {}
    if mode != "imports":
        files = [folder / f"{mode}-{number}" for number in range(_COUNT)]
        experts = [
            read_parts(file, ["transformer"], config, torch.bfloat16)["transformer"]
            for file in files
        ]
        sizes = [_sizes(expert) for expert in experts]
        ensemble = afa.EnsembleDenoiser(experts)
        found = {
            "bytes": sum(sum(size.values()) for size in sizes),
            "complete": sum(
                size["rest"] + sum(_BLOCKS[name] * size[name] for name in _BLOCKS) for size in sizes
            ),
            "seconds": _step(ensemble),
        }
    return {**found, "resident": resident(), "peak": peak()}


def _sizes(model: Any) -> dict[str, int]:
    """Return the bytes of a model's tensors, by kind of block."""
    sizes = dict.fromkeys((*_BLOCKS, "rest"), 0)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        start = name.partition(".")[0]
        sizes[start if start in _BLOCKS else "rest"] += tensor.nbytes
    return sizes


def _step(ensemble: Any) -> float:
    """Compute a step of 256 latent tokens and 64 text tokens; return its seconds."""
    import torch

    count, dtype = len(ensemble.experts), torch.bfloat16
    ids = torch.zeros(16, 16, 3, dtype=dtype)
    ids[..., 1] += torch.arange(16)[:, None]
    ids[..., 2] += torch.arange(16)
    inputs = {
        "hidden_states": torch.zeros(1, 256, 64, dtype=dtype),
        "encoder_hidden_states": torch.zeros(1, 64, 4096 * count, dtype=dtype),
        "pooled_projections": torch.zeros(1, 768 * count, dtype=dtype),
        "timestep": torch.tensor([0.5], dtype=dtype),
        "guidance": torch.tensor([3.5]),
        "img_ids": ids.flatten(0, 1),
        "txt_ids": torch.zeros(64, 3, dtype=dtype),
    }
    begin = time.perf_counter()
    with torch.no_grad():
        ensemble(**inputs, return_dict=False)
    return time.perf_counter() - begin


def write(mode: str, folder: Path, config: Path, number: int) -> None:
    """Write one expert's file, and first the configuration."""
    import numpy as np
    import torch
    from safetensors.torch import save_file

    from afa.files import read_json
    from afa.loading.single_file.conversion import expected_shapes
    from afa.loading.single_file.identify import config_folder

    if not config.exists():
        shutil.copytree(config_folder("flux-dev"), config)
        place = config / "transformer" / "config.json"
        settings = {**read_json(place), "num_layers": 1, "num_single_layers": 1}
        place.write_text(json.dumps(settings))
    shapes, target = expected_shapes("transformer", config), folder / f"{mode}-{number}"
    generator = torch.Generator().manual_seed(number)
    if mode in ("bfloat16", "float8"):
        tensors = {
            name: torch.empty(shape, dtype=torch.bfloat16).uniform_(
                -0.02, 0.02, generator=generator
            )
            for name, shape in shapes.items()
        }
        for name, shape in shapes.items():
            if mode == "float8" and len(shape) == 2 and name.startswith(_BLOCK_NAMES):
                tensors[name] = tensors[name].to(torch.float8_e4m3fn)
                tensors[f"{name}_scale"] = torch.tensor(0.5)
        save_file(tensors, target)
        return
    import gguf

    kind = gguf.GGMLQuantizationType[mode]
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    drawn = np.random.default_rng(number)
    writer = gguf.GGUFWriter(str(target), "flux")
    for name, shape in shapes.items():
        if len(shape) == 2 and name.startswith(_BLOCK_NAMES):
            blocks = drawn.integers(0, 256, (shape[0] * shape[1] // elements, size), dtype=np.uint8)
            blocks[:, :4] = np.array([1e-5, 1e-5], np.float16).view(np.uint8)  # the factors
            writer.add_tensor(name, blocks.reshape(shape[0], -1), raw_dtype=kind)
        else:
            writer.add_tensor(name, np.full(shape, 0.01, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
