"""The side of `tools.comfyui` that runs ComfyUI: load one file and compare its tensors.

    python -m tools.comfyui_core build/comfyui file.safetensors
    python -m tools.comfyui_core build/comfyui file.safetensors changes.safetensors lora.safetensors

With LoRAs, it compares the changes of weights with those in a file of the same layout. Prints one
line of JSON. torchvision, which ComfyUI imports for its picture nodes, is replaced by an empty
module.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import json
import sys
import types
from typing import Any

import torch
import transformers.models.clip  # noqa: F401  (looks for torchvision before it is replaced)
from safetensors import safe_open

_DENOISER = "model.diffusion_model."


class _Empty(types.ModuleType):
    """A module that has whatever is asked of it."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Empty(f"{self.__name__}.{name}")

    def __call__(self, *_: Any, **__: Any) -> None:
        return None


class _Finder:
    """Finds empty modules for torchvision and torchaudio."""

    @staticmethod
    def find_spec(name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] not in ("torchvision", "torchaudio"):
            return None
        return importlib.machinery.ModuleSpec(name, _Finder(), is_package=True)  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Empty(spec.name)

    @staticmethod
    def exec_module(_: types.ModuleType) -> None:
        return None


def use_core(folder: str) -> None:
    """Make the core importable that `tools.comfyui` installed into a folder."""
    sys.path.append(f"{folder}/packages")
    sys.meta_path.insert(0, _Finder)
    use_comfyui(f"{folder}/core")


def use_comfyui(folder: str) -> None:
    """Make a ComfyUI importable, on the CPU."""
    sys.path.insert(0, folder)
    given, sys.argv = sys.argv, [sys.argv[0], "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args

    sys.argv = given


def load(folder: str, file: str) -> tuple[Any, Any, Any]:
    """Load a file as ComfyUI's node for checkpoints does: denoiser, text encoders, autoencoder."""
    use_core(folder)
    import comfy.sd

    loaded = comfy.sd.load_checkpoint_guess_config(file, output_vae=True, output_clip=True)
    return loaded[:3]


def compared(folder: str, file: str) -> dict[str, Any]:
    """Compare the denoiser by name; encode a prompt, which needs the text encoders."""
    model, clip, vae = load(folder, file)
    own = model.model.state_dict()
    different, equal = [], 0
    with safe_open(file, framework="pt") as stored:
        names = [name for name in stored.keys() if name.startswith(_DENOISER)]  # noqa: SIM118
        for name in names:
            tensor, came = stored.get_tensor(name), own.get(name.removeprefix("model."))
            if came is not None and torch.equal(came.to(tensor.dtype), tensor):
                equal += 1
            else:
                different.append(name)
        others = {_key(stored.get_tensor(n)) for n in stored.keys() if n not in names}  # noqa: SIM118
    autoencoder = vae.first_stage_model.state_dict()
    different += [name for name, tensor in autoencoder.items() if _key(tensor) not in others]
    embedding = clip.encode_from_tokens(clip.tokenize("a fox"))
    return {
        "kind": type(model.model).__name__,
        "denoiser": equal,
        "autoencoder": len(autoencoder),
        "embedding": list(embedding.shape),
        "different": different,
    }


def compared_loras(folder: str, file: str, changes: str, loras: list[str]) -> dict[str, Any]:
    """Compare what LoRAs change in denoiser and text encoders with the expected changes."""
    model, clip, _ = load(folder, file)
    import comfy.lora
    import comfy.sd
    import comfy.utils

    found: dict[str, Any] = {}
    with safe_open(changes, framework="pt") as stored:
        expected = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    # names of ComfyUI's text encoders differ in the prefix alone
    by_end = {
        name.partition("transformer.")[2]: name for name in expected if "transformer." in name
    }
    for lora in loras:
        patched = comfy.sd.load_lora_for_models(
            model, clip, comfy.utils.load_torch_file(lora), 1.0, 1.0
        )
        seen, largest = set(), 0.0
        for patcher in (patched[0], patched[1].patcher):
            for key, patches in patcher.patches.items():
                name = f"model.{key}" if f"model.{key}" in expected else None
                name = name or by_end.get(key.partition("transformer.")[2])
                assert name is not None, key
                zeros = torch.zeros_like(expected[name])
                change = comfy.lora.calculate_weight(patches, zeros, key)
                largest = max(largest, float((change - expected[name]).abs().max()))
                seen.add(name)
        missing = [name for name, tensor in expected.items() if tensor.any() and name not in seen]
        found[lora.rpartition("/")[2]] = {
            "changed": len(seen),
            "largest_error": largest,
            "largest_change": max(float(expected[name].abs().max()) for name in seen),
            "missing": len(missing),
        }
    return found


def _key(tensor: torch.Tensor) -> bytes:
    return tensor.half().contiguous().numpy().tobytes()


if __name__ == "__main__":
    with contextlib.redirect_stdout(sys.stderr):
        folder, file, *others = sys.argv[1:]
        if others:
            found = compared_loras(folder, file, others[0], others[1:])
        else:
            found = compared(folder, file)
    sys.stdout.write(json.dumps(found) + "\n")
