"""An ensemble as a MODEL: the first expert's, with a wrapper that runs all of them in lockstep.

ComfyUI calls one denoiser. The MODEL of an ensemble is a clone of the first expert's MODEL. The
other experts are its additional models, so ComfyUI loads and unloads them with it. A wrapper takes
the place of the denoiser's call; see `runner`.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP
from safetensors.torch import load_file

from afa.ensemble.denoiser import EnsembleDenoiser
from afa.ensemble.references import ExpertReference, Provenance
from afa.errors import AfaError
from afa.loading.ensemble_folder import AGGREGATORS, load_aggregator_tensors
from afa.loading.saved import read_config, saved_aggregators
from afa.loading.weights import check_safetensors, hash_files

from .denoisers.families import ComfyFamily, comfy_family
from .experts import check_alike, require_plain, with_own_weights
from .runner import KEY, Origin, Runner, others_of
from .settings import EXACT, Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from comfy.model_patcher import ModelPatcher


def ensemble_model(
    models: Sequence[ModelPatcher],
    folder: Path | None,
    settings: Settings = EXACT,
    *,
    are_checked: bool = False,
) -> ModelPatcher:
    """Combine MODELs to the MODEL of an ensemble.

    Args:
        models: the experts, in the order of training.
        folder: an ensemble folder, of which only the aggregators are read; None fuses by the mean.
        settings: steering, speed and recording.
        are_checked: whether the experts' hashes were compared with those of the folder.

    Raises:
        AfaError: if the experts do not fit each other or the aggregators, or a MODEL carries
            something that an expert cannot have.
    """
    for n, model in enumerate(models, start=1):
        require_plain(model, f"model_{n}")
    check_alike(models)
    family = comfy_family(models[0].model.diffusion_model)
    experts = with_own_weights(models)
    denoisers = [expert.model.diffusion_model for expert in experts]
    with torch.inference_mode(False), torch.no_grad():
        denoiser = _denoiser(denoisers, family, folder)
    ensemble = experts[0].clone()
    ensemble.model_options = {"transformer_options": {}}
    ensemble.set_additional_models(KEY, others_of(experts))
    hashed = None if folder is None else hash_files(folder, [folder / AGGREGATORS])
    origin = Origin(hashed, are_checked)
    _install(ensemble, Runner(family, denoiser, experts, settings, origin))
    return ensemble


def _denoiser(
    denoisers: Sequence[Any],
    family: ComfyFamily,
    folder: Path | None,
) -> EnsembleDenoiser:
    """Build the ensemble with the aggregators of a folder."""
    if folder is None:
        denoiser = EnsembleDenoiser(denoisers)
        references = [ExpertReference(f"model_{n + 1}", "") for n in range(len(denoisers))]
    else:
        saved = read_config(folder)
        references = [ExpertReference(each["source"], each["sha256"]) for each in saved["experts"]]
        if saved["family"] != family.saved:
            raise AfaError(
                "AFA-COMFY-007",
                f"The ensemble '{folder.name}' is of the family '{saved['family']}', the experts "
                f"are of '{family.saved}'. Load the checkpoints that it was trained with.",
            )
        if len(references) != len(denoisers):
            raise AfaError(
                "AFA-COMFY-008",
                f"The ensemble '{folder.name}' has {len(references)} experts: "
                f"{', '.join(each.name for each in references)}; {len(denoisers)} models are "
                "connected. Connect the MODEL of each, in this order.",
            )
        if saved["judge"] is not None:
            logging.warning(
                "The ensemble '%s' draws by drafts in afa. In ComfyUI its aggregators draw all "
                "prompts; see the page 'In ComfyUI' of afa's documentation.",
                folder.name,
            )
        check_safetensors(folder / AGGREGATORS)
        denoiser = EnsembleDenoiser(denoisers, saved_aggregators(saved))
        load_aggregator_tensors(denoiser, load_file(folder / AGGREGATORS))
    denoiser.provenance = Provenance(experts=tuple(references))
    return denoiser


def _install(ensemble: ModelPatcher, runner: Runner) -> None:
    """Let a runner replace the denoiser's call of a MODEL."""
    for kind, wrapper in (
        (WrappersMP.OUTER_SAMPLE, runner.sample),
        (WrappersMP.PREPARE_SAMPLING, runner.prepare),
        (WrappersMP.CALC_COND_BATCH, runner.calculate),
        (WrappersMP.APPLY_MODEL, runner.apply),
        (WrappersMP.DIFFUSION_MODEL, runner.predict),
    ):
        ensemble.remove_wrappers_with_key(kind, KEY)
        ensemble.add_wrapper_with_key(kind, KEY, wrapper)
    ensemble.remove_callbacks_with_key(CallbacksMP.ON_LOAD, KEY)
    ensemble.add_callback_with_key(CallbacksMP.ON_LOAD, KEY, refuse_saving)


def refuse_saving(
    model: ModelPatcher, device: Any, memory: Any, force_patch_weights: bool, *_: Any
) -> None:
    """When a MODEL is loaded: ComfyUI forces LoRAs into the weights only to save them.

    Raises:
        AfaError: in that case, because the file would hold the first expert alone.
    """
    del model, device, memory
    if force_patch_weights:
        raise AfaError(
            "AFA-COMFY-019",
            "An ensemble cannot be saved as one checkpoint; the file would hold only the first "
            "expert. Use `afa distill` for one checkpoint, or AFA Merge for a merge.",
        )


def runner_of(model: ModelPatcher) -> Runner:
    """The runner of an ensemble's MODEL.

    Raises:
        AfaError: if the MODEL is not an ensemble.
    """
    for wrapper in model.get_wrappers(WrappersMP.DIFFUSION_MODEL, KEY):
        return wrapper.__self__
    raise AfaError(
        "AFA-COMFY-009",
        "This MODEL is not an ensemble. Connect the MODEL of AFA Ensemble or AFA Load Ensemble.",
    )


def with_settings(model: ModelPatcher, **changes: Any) -> ModelPatcher:
    """A clone of an ensemble's MODEL with other settings.

    Raises:
        AfaError: if the MODEL is not an ensemble, or a setting does not fit it.
    """
    runner, clone = runner_of(model), model.clone()
    _install(clone, runner.with_settings(replace(runner.settings, **changes)))
    return clone
