"""What the U-Nets of checkpoints predict, and on which noise schedule: a mean needs one of each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from afa.denoisers.stable_diffusion import STABLE_DIFFUSION_2
from afa.errors import AfaError
from afa.files import read_json
from afa.loading.prediction import evidence_of, predicted_by
from afa.merging.model_kinds import INPUT_LAYERS, model_kind

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from afa.merging.checkpoints import Checkpoint

#: what `modelspec` calls it, and ComfyUI
METADATA = ("modelspec.prediction_type", "modelspec.predict_key")
_SCHEDULE = ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")
_PRODUCTS = "alphas_cumprod"


def prediction_type(checkpoint: Checkpoint) -> str | None:
    """What the model predicts: `epsilon`, `v_prediction`, `flow_prediction`, ...

    A folder's scheduler says it; of a file what `afa.loading.prediction.evidence_of` finds.

    Returns: None for a file that does not say.

    Raises:
        AfaError: a file of which two places say different things, or a `.yaml` beside it that
            cannot be read.
    """
    if checkpoint.path.is_dir():
        config = _scheduler(checkpoint.path)
        return predicted_by(str(config.get("_class_name")), config) if config else None
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    said: dict[str, str] = {}
    for each in evidence_of(checkpoint.path, shapes):
        if each.is_edm:
            said.setdefault("EDM, on continuous noise levels", each.where)
        elif each.type is not None:
            said.setdefault(each.type, each.where)
    if len(said) > 1:
        (first, here), (second, there) = list(said.items())[:2]
        raise AfaError(
            "AFA-MERGE-023",
            f"'{checkpoint.source}' contradicts itself: {here} says that it predicts {first}, "
            f"{there} says {second}. One of them must be wrong, and a wrong one draws noise. "
            "Correct it, or leave the file out.",
        )
    return next(iter(said), None)


def check_objectives(checkpoints: Sequence[Checkpoint]) -> str | None:
    """Refuse checkpoints that predict different things, or were trained on different noise.

    A U-Net in a file that does not say is taken to predict noise, as all programs take it; one of
    Stable Diffusion 2.x, which may predict either, is taken to predict what the others do.

    Returns: what they predict, where any of them says so.

    Raises:
        AfaError: names the two that differ.
    """
    said = {c.source: prediction_type(c) for c in checkpoints}
    tensors = checkpoints[0].tensors
    is_unet = any(name in tensors for name in INPUT_LAYERS)
    is_open = not is_unet or model_kind(tensors) == STABLE_DIFFUSION_2
    unsaid = None if is_open else "epsilon"
    kinds = [(source, kind or unsaid) for source, kind in said.items() if kind or unsaid]
    for first, (source, kind) in ((kinds[0], other) for other in kinds[1:]):
        if kind != first[1]:
            raise AfaError(
                "AFA-MERGE-024",
                f"Merged checkpoints must share one objective: '{first[0]}' has prediction_type = "
                f"{first[1]}, '{source}' has {kind}. Their mean would predict neither. Leave one "
                "out; a single file says what it predicts by modelspec.prediction_type in its "
                "metadata or a .yaml beside it, and is taken for epsilon where it does not.",
            )
    _check_schedules(checkpoints)
    return next(filter(None, said.values()), None)


def _check_schedules(checkpoints: Sequence[Checkpoint]) -> None:
    first, *others = [(c.source, _schedule(c)) for c in checkpoints]
    for source, schedule in others:
        for key in first[1].keys() & schedule.keys():
            ours, theirs = first[1][key], schedule[key]
            if not isinstance(ours, torch.Tensor):
                is_equal = ours == theirs
            else:
                is_equal = ours.shape == theirs.shape and torch.allclose(
                    ours, theirs, rtol=1e-2, atol=1e-4
                )
                ours, theirs = (f"{float(end):.4g} at its end" for end in (ours[-1], theirs[-1]))
            if not is_equal:
                raise AfaError(
                    "AFA-MERGE-025",
                    "Merged checkpoints must share one noise schedule: "
                    f"'{first[0]}' has {key} = {ours}, '{source}' has {theirs}. Their mean would "
                    "fit neither. Leave one out.",
                )


def _schedule(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint says of its noise: a scheduler's settings, or the buffer in a file."""
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
