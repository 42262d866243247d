"""What a single file cannot say: settings of its folder that differ from the published model's."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import diffusers

from afa.denoisers.architecture import difference
from afa.files import parts_of, read_json
from afa.loading.single_file.conversion import model_class_of
from afa.loading.single_file.identify import config_folder
from afa.loading.single_file.layout import described_kind
from afa.machine.library import library_class

if TYPE_CHECKING:
    from pathlib import Path

#: settings of schedulers that belong to the model; others choose how to sample
_SCHEDULER = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas"),
    *("shift", "use_dynamic_shifting", "base_shift", "max_shift"),
)
_VAE = ("scaling_factor", "shift_factor", "latents_mean", "latents_std")
_ENCODER = ("hidden_act", "num_attention_heads", "num_heads", "layer_norm_eps", "eos_token_id")


def unsaid_of(folder: Path, configuration: str) -> list[str]:
    """List settings of a pipeline folder that programs will not know from its single file.

    Args:
        configuration: the bundled configuration that programs assume.

    Returns: one line per setting.
    """
    assumed = config_folder(configuration)
    found: list[tuple[str, str, object, object]] = []
    kind = described_kind(folder)
    first, other = (_settings(place, kind.denoiser) for place in (folder, assumed))
    if (entry := difference(other, first, model_class_of(kind.denoiser, folder))) is not None:
        found.append((kind.denoiser, entry[0], entry[2], entry[1]))
    for part in parts_of(read_json(folder / "model_index.json")):
        keys = _SCHEDULER if part == "scheduler" else _VAE if part == "vae" else _ENCODER
        if part == kind.denoiser or not (part in ("scheduler", "vae") or "text_encoder" in part):
            continue
        own, theirs = _settings(folder, part), _settings(assumed, part)
        for key in keys:
            if own.get(key) != theirs.get(key):
                found.append((part, key, own.get(key), theirs.get(key)))
    return [
        f"a single file cannot say {key} = {own} of the {part}: programs assume {theirs}, as in "
        f"{configuration}"
        for part, key, own, theirs in found
    ]


def _settings(folder: Path, part: str) -> dict[str, Any]:
    """Read a part's configuration, with the defaults of its class."""
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    place = folder / part / name
    written = read_json(place) if place.is_file() else {}
    if part == "scheduler":
        named = parts_of(read_json(folder / "model_index.json")).get(part, "")
        model_class: Any = library_class(diffusers, named, diffusers.SchedulerMixin)
    else:
        model_class = model_class_of(part, folder)
        if "text_encoder" in part:
            return {**model_class.config_class().to_dict(), **written}
    taken = inspect.signature(model_class.__init__).parameters.values()
    defaults = {p.name: p.default for p in taken if p.default is not inspect.Parameter.empty}
    return {**defaults, **written}
