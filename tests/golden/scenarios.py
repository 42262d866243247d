"""What is run for the golden record: the commands that users run, on tiny models and the zoo.

Only commands and the library's public names are used, so that this file stays as it is while the
code behind them moves.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

import afa
from afa.cli import main
from tests.evaluation.conftest import SMALL as COMPARISON
from tests.golden import digests
from tests.golden.digests import Digest
from tests.single_file import original_layout
from tests.tiny import SD1, tiny_pipeline
from tests.tiny_pipelines import saved_experts

SIZES: dict[str, Any] = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "norm_num_groups": 4}
PROMPT = "a fox on the left and a pizza on the right, blue background"
STEPS = ["--steps", "4", "--seed", "7"]
MERGES: dict[str, dict[str, Any]] = {
    "weighted": {"weights": [0.7, 0.3]},
    "add_difference": {"base": 2},
    "slerp": {"weights": [0.4, 0.6]},
    "ties": {"base": 2, "density": 0.4},
    "dare": {"base": 2, "density": 0.4, "seed": 5},
    "block_weights": {"block_weights": {"mid": [0.1, 0.9], "text_encoder": [0.8, 0.2]}},
}
Found = Iterator[tuple[str, Digest]]


def run(*arguments: object) -> None:
    """Run a command of afa in this process.

    Raises:
        RuntimeError: it failed.
    """
    try:
        main(list(map(str, arguments)))
    except SystemExit as stop:
        if stop.code:
            raise RuntimeError(
                f"afa {' '.join(map(str, arguments))} exited with {stop.code}"
            ) from None


def write(file: Path, content: Any) -> Path:
    """Write a recipe."""
    file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return file


def stable_diffusion(root: Path) -> list[Path]:
    """Three experts of Stable Diffusion 1.x."""
    folders = []
    for seed in range(3):
        folders.append(root / f"expert{seed}")
        tiny_pipeline(root / "tokenizer", seed=seed, **SD1).save_pretrained(folders[-1])
    return folders


# -- training, saved folders, pictures --------------------------------------------------------


def train(experts: list[Any], root: Path, name: str = "run", **training: Any) -> Path:
    """Train on emoji scenes for twenty steps."""
    recipe = {
        "experts": [str(e) if isinstance(e, Path) else e for e in experts],
        "data": {"scenes": {"num_samples": 32}, "resolution": 16, "cache_folder": str(root / "c")},
        "aggregator": SIZES,
        "training": {
            "num_steps": 20,
            "batch_size": 2,
            "learning_rate": 1e-2,
            "num_warmup_steps": 2,
            "log_every": 1,
            "checkpoint_every": 10,
            "trackers": [],
            "device": "cpu",
            **training,
        },
        "validation": {"every": 10, "num_samples": 4},
    }
    run("train", write(root / f"{name}.yaml", recipe), "--output", root / name, "--no-check")
    return root / name


def trained(folder: Path, root: Path) -> Found:
    """The losses of a run, and its folder."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    figures: dict[str, list[float]] = {}
    for line in lines:
        for key in ("loss", "grad_norm", "validation/loss", "validation_loss"):
            if key in line:
                figures.setdefault(key, []).append(line[key])
    for key, values in figures.items():
        yield key, digests.of_numbers(values)
    yield from saved(folder, root)


def saved(folder: Path, root: Path) -> Found:
    """What a saved ensemble consists of."""
    yield "aggregators", digests.of_tensors(folder / "aggregators.safetensors")
    content = json.loads((folder / "config.json").read_text())
    yield "config.json", digests.of_json(content, root, has_numbers=False)


def drawn(ensemble: object, root: Path, *options: object) -> Digest:
    """A picture of an ensemble."""
    folder = root / f"pictures{len(list(root.glob('pictures*')))}"
    run("generate", ensemble, PROMPT, "--output", folder, *STEPS, "--no-check", *options)
    (picture,) = folder.glob("*.png")
    return digests.of_pictures([picture])


def of_kind(name: str, experts: Callable[[Path], list[Path]]) -> Callable[[Path], Found]:
    """Experts of one kind are trained, and draw exactly and fast."""

    def found(root: Path) -> Found:
        size = ["--height", 16, "--width", 16]
        folder = train(experts(root), root)
        yield from trained(folder, root)
        yield "picture", drawn(folder, root, *size)
        yield "picture, fast", drawn(folder, root, *size, "--speed", "fast")

    return found


def untrained(kind: str, **call: Any) -> Callable[[Path], Found]:
    """Experts of a kind that is not trained draw with aggregators of a fixed seed."""

    def found(root: Path) -> Found:
        torch.manual_seed(3)
        pipeline: Any = afa.load_pipeline(saved_experts(kind, root), afa.SABWConfig(**SIZES))
        denoiser = pipeline.components.get("unet") or pipeline.transformer
        for rule in denoiser.aggregators:
            torch.nn.init.normal_(rule.conv_out.weight)
        pipeline.set_progress_bar_config(disable=True)
        asked = dict(call)
        if kind == "refiner":
            pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
            asked["image"] = Image.fromarray(pixels)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            (picture,) = pipeline(**asked, num_inference_steps=4, generator=generator).images
        picture.save(root / "picture.png")
        yield "picture", digests.of_pictures([root / "picture.png"])
        afa.save_ensemble(pipeline, root / "saved")
        yield from saved(root / "saved", root)

    return found


def with_features(root: Path) -> Found:
    """Stable Diffusion with everything that changes what is drawn, or where it is computed."""
    experts = stable_diffusion(root)
    folder = train(experts, root, min_snr_gamma=5, ema_decay=0.9, balance_weight=0.1)
    yield from trained(folder, root)
    yield "bias", drawn(folder, root, "--bias", "expert1=+1.5", "--bias", "expert0@up=-1")
    yield "balanced", drawn(folder, root, "--speed", "balanced")
    yield "bfloat16", drawn(folder, root, "--dtype", "bfloat16")
    yield "streamed", _streamed(folder, root)
    prompts = root / "prompts.txt"
    prompts.write_text(f"{PROMPT}\na red fox\n", encoding="utf-8")
    plan = root / "plan.json"
    run("prune", folder, "--keep", 0.7, "--prompts", prompts, "--output", plan, "--steps", 4)
    yield "plan.json", digests.of_json(json.loads(plan.read_text()), root, has_numbers=False)
    yield "plan", drawn(folder, root, "--plan", plan)


def _streamed(folder: Path, root: Path) -> Digest:
    """A picture of experts whose layers are read from a file."""
    pipeline: Any = afa.load_ensemble(folder)
    pipeline.unet.stream_experts()
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    (picture,) = pipeline(PROMPT, num_inference_steps=4, generator=generator).images
    picture.save(root / "streamed.png")
    return digests.of_pictures([root / "streamed.png"])


def from_files(root: Path) -> Found:
    """Experts that are single files, and a LoRA on a base."""
    experts = stable_diffusion(root)
    files: list[Any] = []
    for n, expert in enumerate(experts[:2]):
        files.append(root / f"file{n}.safetensors")
        save_file(original_layout(StableDiffusionPipeline.from_pretrained(expert)), files[-1])
    attention = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    shapes = StableDiffusionPipeline.from_pretrained(experts[2]).unet.state_dict()
    width = shapes[attention.removeprefix("unet.") + ".weight"].shape[0]
    torch.manual_seed(4)
    lora = {
        f"{attention}.lora_A.weight": torch.randn(2, width),
        f"{attention}.lora_B.weight": torch.randn(width, 2),
    }
    save_file(lora, root / "lora.safetensors")
    both = {"base": str(experts[2]), "lora": str(root / "lora.safetensors"), "scale": 0.8}
    folder = train([experts[0], both], root, "lora")
    yield from ((f"LoRA: {key}", digest) for key, digest in trained(folder, root))
    yield "LoRA: picture", drawn(folder, root)
    merged = root / "merged.safetensors"
    recipe = {"method": "weighted", "experts": list(map(str, files)), "weights": [0.25, 0.75]}
    run("merge", write(root / "merge.yaml", recipe), "--output", merged)
    yield "merged file", digests.of_tensors(merged)


# -- merges, comparisons, the zoo -------------------------------------------------------------


def merges(root: Path) -> Found:
    """Every method, on folders of Stable Diffusion, and one of them on Flux."""
    experts = stable_diffusion(root)
    for method, settings in MERGES.items():
        recipe = {"method": method, "experts": list(map(str, experts[:2])), **settings}
        if "base" in settings:
            recipe["base"] = str(experts[settings["base"]])
        yield from _merged(root, method, recipe)
    flux = saved_experts("flux", root / "flux", 2)
    yield from _merged(root, "flux", {"method": "slerp", "experts": list(map(str, flux))})


def _merged(root: Path, name: str, recipe: dict[str, Any]) -> Found:
    output = root / f"merged-{name}"
    run("merge", write(root / f"{name}.yaml", recipe), "--output", output)
    for file in sorted(output.rglob("*.safetensors")):
        yield f"{name}: {file.relative_to(output)}", digests.of_tensors(file)
    shutil.rmtree(output)


def comparison(root: Path) -> Found:
    """A small evaluation on the zoo: its report, and the pictures behind it."""
    run("evaluate", write(root / "recipe.yaml", COMPARISON), "--output", root / "out", "--no-check")
    report = json.loads((root / "out" / "report.json").read_text())
    yield "report.json", digests.of_json(report, root)
    for folder in sorted((root / "out" / "methods").iterdir()):
        pictures = sorted(folder.rglob("*.png"))
        assert pictures, folder
        yield folder.name, digests.of_pictures(pictures)


def zoo(root: Path) -> Found:
    """The zoo's own ensemble."""
    yield "exact", drawn("zoo:ensemble", root)
    yield "fast", drawn("zoo:ensemble", root, "--speed", "fast", "--steps", "10")
    yield "bias", drawn("zoo:ensemble", root, "--bias", "food=+2")


def _kinds(kind: str) -> Callable[[Path], Found]:
    return of_kind(kind, lambda root: saved_experts(kind, root))


#: by name, what is found in an empty folder
SCENARIOS: dict[str, Callable[[Path], Found]] = {
    "Stable Diffusion": of_kind("sd", stable_diffusion),
    **{kind: _kinds(kind) for kind in ("xl", "sd3", "flux", "pixart")},
    "refiner": untrained("refiner", prompt="a fox", strength=0.9),
    "dit": untrained("dit", class_labels=[1]),
    "features": with_features,
    "files": from_files,
    "merges": merges,
    "comparison": comparison,
    "zoo": zoo,
}
