"""Check that checkpoints have one prediction type and one noise schedule."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from afa.denoisers.objective import predicted_by
from afa.denoisers.stable_diffusion import STABLE_DIFFUSION_2
from afa.errors import AfaError
from afa.files import read_json
from afa.loading.prediction import evidence_of
from afa.merging.model_kinds import INPUT_LAYERS, model_kind

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from afa.merging.checkpoints import Checkpoint

#: the prediction type in `modelspec` metadata, and in ComfyUI's
METADATA = ("modelspec.prediction_type", "modelspec.predict_key")
_SCHEDULE = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
_PRODUCTS = "alphas_cumprod"


def prediction_type(checkpoint: Checkpoint) -> str | None:
    """Determine the prediction type: `epsilon`, `v_prediction`, `flow_prediction`, ...

    Reads a folder's scheduler, or a file's evidence (`afa.loading.prediction.evidence_of`).

    Returns: None if it is not specified.

    Raises:
        AfaError: if a file contradicts itself, or the `.yaml` beside it cannot be read.
    """
    if checkpoint.path.is_dir():
        config = _scheduler(checkpoint.path)
        return predicted_by(str(config.get("_class_name")), config) if config else None
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    found: dict[str, str] = {}
    for each in evidence_of(checkpoint.path, shapes):
        if each.is_edm:
            found.setdefault("EDM, on continuous noise levels", each.where)
        elif each.type is not None:
            found.setdefault(each.type, each.where)
    if len(found) > 1:
        (first, here), (second, there) = list(found.items())[:2]
        raise AfaError(
            "AFA-MERGE-023",
            f"'{checkpoint.source}' contradicts itself: according to {here} it predicts {first}, "
            f"according to {there} {second}. A wrong prediction type produces noise. Correct the "
            "wrong one, or remove the checkpoint from experts.",
        )
    return next(iter(found), None)


def check_objectives(checkpoints: Sequence[Checkpoint]) -> str | None:
    """Check that all checkpoints have one prediction type and one noise schedule.

    A U-Net file without a prediction type counts as `epsilon`, as in other programs. Stable
    Diffusion 2.x has models of both types, so there it counts as the type of the others.

    Returns: the prediction type, or None if no checkpoint specifies it.

    Raises:
        AfaError: if two checkpoints differ.
    """
    types = {c.source: prediction_type(c) for c in checkpoints}
    tensors = checkpoints[0].tensors
    is_unet = any(name in tensors for name in INPUT_LAYERS)
    is_epsilon = is_unet and model_kind(tensors) != STABLE_DIFFUSION_2
    default = "epsilon" if is_epsilon else None
    known = [(source, kind or default) for source, kind in types.items() if kind or default]
    for source, kind in known[1:]:
        if kind != known[0][1]:
            raise AfaError(
                "AFA-MERGE-024",
                f"The prediction types differ: '{known[0][0]}' has prediction_type = "
                f"{known[0][1]}, '{source}' has {kind}. Merge checkpoints of one type. A single "
                "file specifies its type as modelspec.prediction_type in its metadata or in a "
                ".yaml beside it; without these it counts as epsilon.",
            )
    _check_schedules(checkpoints)
    return next(filter(None, types.values()), None)


def _check_schedules(checkpoints: Sequence[Checkpoint]) -> None:
    first, *others = [(c.source, _schedule(c)) for c in checkpoints]
    for source, schedule in others:
        for key in first[1].keys() & schedule.keys():
            a, b = first[1][key], schedule[key]
            if not isinstance(a, torch.Tensor):
                is_equal = a == b
            else:
                is_equal = a.shape == b.shape and torch.allclose(a, b, rtol=1e-2, atol=1e-4)
                a, b = (f"{float(last):.4g} at the last timestep" for last in (a[-1], b[-1]))
            if not is_equal:
                raise AfaError(
                    "AFA-MERGE-025",
                    f"The noise schedules differ: '{first[0]}' has {key} = {a}, '{source}' has "
                    f"{b}. Merge checkpoints of one noise schedule.",
                )


def _schedule(checkpoint: Checkpoint) -> dict[str, Any]:
    """The noise schedule: the settings of a folder's scheduler, or the buffer in a file."""
    if checkpoint.path.is_dir():
        config = _scheduler(checkpoint.path)
        found = {key: config[key] for key in _SCHEDULE if key in config}
        if "beta_schedule" in found:
            found["rescale_betas_zero_snr"] = bool(config.get("rescale_betas_zero_snr"))
        return found
    stored = checkpoint.tensors.get(_PRODUCTS)
    is_schedule = stored is not None and len(stored.shape) == 1 and 0 < stored.shape[0] <= 10_000
    return {_PRODUCTS: stored.read().float()} if stored is not None and is_schedule else {}


def _scheduler(folder: Path) -> dict[str, Any]:
    file = folder / "scheduler" / "scheduler_config.json"
    return read_json(file) if file.is_file() else {}
