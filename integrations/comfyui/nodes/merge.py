"""AFA Merge: merge checkpoint files to one, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import io
from pydantic import ValidationError

from afa.errors import AfaError
from afa.merging import plan_merge, run_merge
from afa.merging.recipe import WITH_BASE, MergeRecipe

from ..errors import codes_shown

_NONE = "none"
_METHODS = ("weighted", "add_difference", "slerp", "ties", "dare", "block_weights")
_NUMBERS = range(1, 7)


class AfaMerge(io.ComfyNode):
    """Merge checkpoint files, with one tensor of each in memory at a time."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See ComfyUI."""
        files = folder_paths.get_filename_list("checkpoints")
        others = [
            io.Combo.Input(f"checkpoint_{n}", options=[_NONE, *files], default=_NONE, optional=True)
            for n in _NUMBERS[1:]
        ]
        return io.Schema(
            node_id="AfaMerge",
            display_name="AFA Merge",
            category="afa",
            description=(
                "Merges checkpoint files to a new one in models/checkpoints, in the memory of a "
                "few tensors. Refresh the page to load it."
            ),
            inputs=[
                io.Combo.Input("method", options=list(_METHODS)),
                io.String.Input("name", default="merged", tooltip="Of the new file."),
                io.Combo.Input("checkpoint_1", options=files),
                *others,
                io.Combo.Input(
                    "base",
                    options=[_NONE, *files],
                    default=_NONE,
                    optional=True,
                    tooltip=f"What the others were fine-tuned from; for {', '.join(WITH_BASE)}.",
                ),
                io.String.Input(
                    "weights",
                    default="",
                    optional=True,
                    tooltip=(
                        "One number for each checkpoint, with commas; empty for the method's "
                        "default. For block_weights a preset's name, such as GRAD_V."
                    ),
                ),
                io.Float.Input(
                    "density",
                    default=0.2,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Share of each difference to keep; for ties and dare.",
                ),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**31 - 1, optional=True, tooltip="Of dare."
                ),
            ],
            outputs=[io.String.Output(display_name="file")],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **given: Any) -> str:
        """Executed again if an input changed, or if the merged file is gone."""
        names = [given.get(key, _NONE) for key in ("base", *(f"checkpoint_{n}" for n in _NUMBERS))]
        files = [Path(_path(name)) for name in names if name != _NONE]
        marks = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return f"{sorted(given.items())} {marks} {_output(given).exists()}"

    @classmethod
    @codes_shown()
    def execute(cls, **given: Any) -> io.NodeOutput:
        """See ComfyUI."""
        output = _output(given)
        plan = plan_merge(recipe_of(given), output)
        bar = comfy.utils.ProgressBar(1_000)
        for step in run_merge(plan):
            comfy.model_management.throw_exception_if_processing_interrupted()
            share = step.num_bytes / max(step.total_bytes, 1)
            bar.update_absolute(round(500 * share) + 500 * (step.stage == "merge"), 1_000)
        return io.NodeOutput(str(output))


def recipe_of(given: dict[str, Any]) -> MergeRecipe:
    """The recipe of a merge from the node's inputs.

    Raises:
        AfaError: if the inputs are invalid.
    """
    chosen = [given.get(f"checkpoint_{n}", _NONE) for n in _NUMBERS]
    method, base = given["method"], given.get("base", _NONE)
    recipe: dict[str, Any] = {
        "method": method,
        "experts": [_path(name) for name in chosen if name != _NONE],
        "base": None if base == _NONE else _path(base),
    }
    weights = str(given.get("weights", "")).strip()
    if weights and method == "block_weights":
        recipe["block_weights"] = weights
    elif weights:
        recipe["weights"] = _numbers(weights)
    if method in ("ties", "dare"):
        recipe["density"] = given.get("density", 0.2)
    if method == "dare":
        recipe["seed"] = given.get("seed", 0)
    try:
        return MergeRecipe.model_validate(recipe)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise AfaError(
            "AFA-COMFY-027",
            f"The merge is invalid{f': {place}' if place else ''}: {first['msg']}.",
        ) from None


def _output(given: dict[str, Any]) -> Path:
    return Path(folder_paths.get_folder_paths("checkpoints")[0]) / _file_name(given["name"])


def _path(name: str) -> str:
    return str(folder_paths.get_full_path_or_raise("checkpoints", name))


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise AfaError(
            "AFA-COMFY-028",
            f"The weights must be numbers with commas, such as 0.5, 0.3, 0.2; got '{text}'.",
        ) from None


def _file_name(name: str) -> str:
    """The name of the new file, within the folder of checkpoints.

    Raises:
        AfaError: if it names another folder.
    """
    stem = name.strip().removesuffix(".safetensors")
    if not stem or Path(stem).name != stem or stem.startswith("."):
        raise AfaError(
            "AFA-COMFY-029",
            f"The name of the new file must be a plain file name; got '{name}'.",
        )
    return f"{stem}.safetensors"
