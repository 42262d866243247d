"""Write the first inputs of every target, for a new corpus: small valid files.

python -m fuzz.seeds
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import yaml
from safetensors.torch import save

from afa.loading.saved import read_config
from afa.loading.single_file.identify import config_folder
from afa.zoo import shipped
from fuzz.run import CORPUS


def seeds() -> dict[str, list[bytes]]:
    """Return the seeds by target."""
    model = config_folder("stable-diffusion-1.5")
    unet, index = ((model / name).read_bytes() for name in ("unet/config.json", "model_index.json"))
    tensors = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(2, 4, 1, 1),
        "a": torch.zeros(0, 3, dtype=torch.float16),
        "b": torch.ones((), dtype=torch.int64),
    }
    train = {
        "experts": ["./a", {"base": "./b", "lora": "./c.safetensors", "scale": 0.5}],
        "vae": "./v",
        "data": {"dataset": {"path": "parquet", "data_files": "https://x/y.parquet"}},
        "aggregator": {"hidden_size": 64},
        "training": {"num_steps": 2},
        "validation": {"every": 1},
        "previews": {"prompts": ["a fox"]},
    }
    evaluate = {
        "experts": ["./a", "./b"],
        "prompts": {"zoo": {"kinds": {"mixed": 2}}},
        "methods": [{"name": "m", "merge": {"method": "weighted"}}, {"name": "e", "model": "./a"}],
        "metrics": ["scenes", {"name": "clip_t", "weights": "a/b"}],
    }
    merge = {"method": "ties", "experts": ["./a"], "base": "./b", "density": 0.2}
    search = {"experts": ["./a"], "prompts": {"text": "./p.txt"}, "metric": {"name": "aes"}}
    ensemble = (shipped("ensemble") / "config.json").read_bytes()
    assert read_config(shipped("ensemble"))
    made = {
        "recipe": {
            "ensemble": "zoo:ensemble",
            "identity": "x",
            "prompt": "a fox",
            "seed": 0,
            "steps": 1,
            "guidance": 1.0,
            "height": 8,
            "width": 8,
            "bias": {"animals": {"up": 1.0}},
        },
        "made_with": {
            **dict.fromkeys(("afa", "torch", "diffusers", "device", "processor"), "x"),
            "threads": 1,
        },
        "pixels": "x",
    }
    return {
        "safetensors": [save(tensors, {"format": "pt"}), save({})],
        "model-config": [unet],
        "model-index": [index],
        "shards": [json.dumps({"metadata": {}, "weight_map": {"a": "b.safetensors"}}).encode()],
        "ensemble-config": [ensemble],
        "recipes": [yaml.safe_dump(each).encode() for each in (train, evaluate, merge, search)]
        + [b"a: &x [1, *x]", b"a: 2001-01-01\nb: !!binary aGk=\n<<: {c: 1}"],
        "picture": [json.dumps(made).encode()],
        "captions": [b'{"file_name": "a.png", "text": "a fox"}\n'],
        "bias": [b"animals=+1.0\nfood@up=-0.5"],
    }


def main() -> None:
    """Write the seeds into the corpus."""
    for target, inputs in seeds().items():
        folder = Path(CORPUS / target)
        folder.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(inputs):
            (folder / f"seed-{number}").write_bytes(data)


if __name__ == "__main__":
    main()
