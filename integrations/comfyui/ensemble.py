"""An ensemble as a MODEL: the first expert's, with a wrapper that runs all of them in lockstep.

ComfyUI calls one denoiser. The MODEL of an ensemble is a clone of the first expert's MODEL. The
other experts and the aggregators are its additional models, so ComfyUI loads and unloads them with
it. A wrapper takes the place of the denoiser's call.
"""

from __future__ import annotations

import inspect
import uuid
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrapperExecutor, WrappersMP
from safetensors.torch import load_file

from afa.ensemble.denoiser import EnsembleDenoiser
from afa.ensemble.protocol import expert_names
from afa.ensemble.references import ExpertReference, Provenance
from afa.errors import AfaError
from afa.loading.ensemble_folder import AGGREGATORS, load_aggregator_tensors
from afa.loading.saved import read_config, saved_aggregators
from afa.loading.weights import check_safetensors, hash_files

from .controls import for_first_expert
from .denoisers.families import ComfyFamily, comfy_family
from .experts import check_alike, require_plain, with_own_weights
from .recording import Recording
from .settings import EXACT, Settings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

KEY = "afa"


def ensemble_model(
    models: Sequence[ModelPatcher],
    folder: Path | None,
    settings: Settings = EXACT,
    names: Sequence[str] | None = None,
) -> ModelPatcher:
    """Combine MODELs to the MODEL of an ensemble.

    Args:
        models: the experts, in the order of training.
        folder: an ensemble folder, of which only the aggregators are read; None fuses by the mean.
        settings: steering, speed and recording.
        names: the experts' names; None takes them from the folder, or numbers them.

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
        denoiser = _denoiser(denoisers, family, folder, names)
    rules = ModelPatcher(
        denoiser.aggregators,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    ensemble = experts[0].clone()
    ensemble.model_options = {"transformer_options": {}}
    ensemble.set_additional_models(KEY, [*_others(experts), rules])
    hashed = None if folder is None else hash_files(folder, [folder / AGGREGATORS])
    _install(ensemble, Runner(family, denoiser, experts, rules, settings, hashed))
    return ensemble


def _denoiser(
    denoisers: Sequence[Any],
    family: ComfyFamily,
    folder: Path | None,
    names: Sequence[str] | None,
) -> EnsembleDenoiser:
    """Build the ensemble with the aggregators of a folder."""
    if folder is None:
        denoiser = EnsembleDenoiser(denoisers)
        listed = names or [f"model_{n}" for n in range(1, len(denoisers) + 1)]
        references = [ExpertReference(name, "") for name in listed]
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


class Runner:
    """Runs the experts of an ensemble in place of one denoiser.

    Args:
        family: the experts' family.
        denoiser: afa's ensemble of the experts' denoisers.
        experts: the experts' MODELs.
        rules: the aggregators, as a model that ComfyUI loads.
        settings: how it runs.
        aggregators: SHA-256 of the aggregators' file; None for the mean.
    """

    def __init__(
        self,
        family: ComfyFamily,
        denoiser: EnsembleDenoiser,
        experts: Sequence[ModelPatcher],
        rules: ModelPatcher,
        settings: Settings,
        aggregators: str | None,
    ) -> None:
        self.family, self.denoiser, self.settings = family, denoiser, settings
        self.aggregators, self.recording = aggregators, Recording()
        self._experts = list(experts)
        self._texts: dict[Any, Tensor] = {}
        self._rules = rules
        #: the experts with the LoRAs that were added to the ensemble, for the last sampling
        self._loaded = self._experts
        self._patched: uuid.UUID | None = None
        settings.apply(denoiser)

    def expert_named(self, name: str) -> str:
        """The name of an expert that is given by name or by its number from 1."""
        names = expert_names(self.denoiser)
        if name not in names and name.isdecimal() and 1 <= int(name) <= len(names):
            return str(int(name) - 1)
        return name

    def with_settings(self, settings: Settings) -> Runner:
        """A runner of the same experts and aggregators with other settings."""
        with torch.inference_mode(False), torch.no_grad():
            denoiser = EnsembleDenoiser(
                list(self.denoiser.experts), list(self.denoiser.aggregators)
            )
        denoiser.provenance = self.denoiser.provenance
        return Runner(self.family, denoiser, self._experts, self._rules, settings, self.aggregators)

    # -- one picture --------------------------------------------------------------------------

    def sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around the sampling of one latent: record the fusion weights if that is switched on."""
        self.denoiser.reset_loops()
        self._texts.clear()
        if not self.settings.records:
            return executor(*args, **kwargs)
        with self.recording.of_latent() as seen:
            samples = executor(*args, **kwargs)
            seen.latent = samples.detach().to("cpu", copy=True)
        return samples

    def prepare(self, executor: Any, model: ModelPatcher, *args: Any, **kwargs: Any) -> Any:
        """Before ComfyUI loads the models: give LoRAs of the ensemble to all experts."""
        self._require_supported(model)
        first = self._experts[0]
        added = {
            key: listed[len(first.patches.get(key, ())) :]
            for key, listed in model.patches.items()
            if len(listed) > len(first.patches.get(key, ()))
        }
        if not added:
            self._loaded = self._experts
        elif self._patched != model.patches_uuid:
            self._patched = model.patches_uuid
            self._loaded = [_with_patches(expert, added) for expert in self._experts]
        model.set_additional_models(KEY, [*_others(self._loaded), self._rules])
        first.model_patches_to(model.load_device)
        return executor(model, *args, **kwargs)

    def _require_supported(self, model: ModelPatcher) -> None:
        """Check what nodes after AFA Ensemble have added.

        Raises:
            AfaError: if it would change only the first expert, or not be used at all.
        """
        first = self._experts[0]
        problems: list[str] = [
            *("a weight hook (AFA knows LoRAs, but no LoRA hooks)" for _ in model.hook_patches),
            *(f"the injection '{key}'" for key in model.injections),
            *("other weights" for _ in range(len(model.weight_wrapper_patches))),
            *(
                f"the part '{key}'"
                for key in model.object_patches
                if key.startswith("diffusion_model") or key == "manual_cast_dtype"
            ),
            *(
                f"the wrapper '{key}'"
                for named in model.wrappers.values()
                for key in named
                if key is not None and "compile" in str(key)
            ),
        ]
        if len(model.patches) < len(first.patches):
            problems.append("a change that removes LoRAs of the first expert")
        if problems:
            raise AfaError(
                "AFA-COMFY-010",
                f"A node after AFA Ensemble adds {problems[0]}, which would change only the first "
                "expert. Remove that node.",
            )

    # -- one step -----------------------------------------------------------------------------

    def calculate(
        self, executor: Any, model: Any, conditions: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Around the calls for all conditions: give ControlNets the first expert's texts."""
        denoiser, count = self.denoiser.experts[0], len(self.denoiser.experts)
        given = for_first_expert(conditions, lambda c: self.family.first(denoiser, c, count))
        return executor(model, given, *args, **kwargs)

    def predict(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        """In place of the denoiser's call; other nodes' wrappers run around the ensemble."""
        if executor.class_obj is not self.denoiser.experts[0]:
            raise AfaError(
                "AFA-COMFY-011",
                "The denoiser of this MODEL was replaced by another node. Remove that node.",
            )
        run = partial(self._predict, inspect.signature(executor.original))
        inner = executor.wrappers[executor.idx + 1 :]
        within = WrapperExecutor.new_class_executor(run, executor.class_obj, inner)
        return within.execute(*args, **kwargs)

    def _predict(self, signature: inspect.Signature, *args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = self.family.arguments(bound.arguments)
        shared: dict[str, Any] = arguments["transformer_options"] or {}
        arguments["transformer_options"] = [
            _merged(expert.model_options["transformer_options"], shared) for expert in self._loaded
        ]
        self._keep_text(arguments, shared)
        with self.recording.of_call(self.denoiser, shared, self.settings.records):
            return self.denoiser(**arguments, return_dict=False)[0]

    def _keep_text(self, arguments: dict[str, Any], shared: Mapping[str, Any]) -> None:
        """Replace a text by that of the last step if they are equal.

        ComfyUI joins the texts of a batch anew at every step. The cache of features recognises a
        denoising loop by its text, which must stay the same object.
        """
        text = arguments.get("encoder_hidden_states")
        if text is None:
            return
        key = (*map(str, shared.get("uuids", ())), tuple(text.shape))
        kept = self._texts.setdefault(key, text)
        if kept is not text and kept.device == text.device and torch.equal(kept, text):
            arguments["encoder_hidden_states"] = kept
        else:
            self._texts[key] = text


def _others(experts: Sequence[ModelPatcher]) -> list[ModelPatcher]:
    """The experts that ComfyUI must load besides the first: one for each set of weights."""
    found: list[ModelPatcher] = []
    for expert in experts[1:]:
        if not any(expert.is_clone(known) for known in (experts[0], *found)):
            found.append(expert)
    return found


def _with_patches(expert: ModelPatcher, added: Mapping[str, Sequence[Any]]) -> ModelPatcher:
    clone = expert.clone()
    for key, listed in added.items():
        clone.patches[key] = [*clone.patches.get(key, ()), *listed]
    clone.patches_uuid = uuid.uuid4()
    return clone


def _merged(own: Mapping[str, Any], shared: Mapping[str, Any]) -> dict[str, Any]:
    """An expert's own options and patches, followed by those of the ensemble."""
    lists = {
        name: [*own.get("patches", {}).get(name, ()), *shared.get("patches", {}).get(name, ())]
        for name in {**own.get("patches", {}), **shared.get("patches", {})}
    }
    replaced = {
        name: {
            **own.get("patches_replace", {}).get(name, {}),
            **shared.get("patches_replace", {}).get(name, {}),
        }
        for name in {**own.get("patches_replace", {}), **shared.get("patches_replace", {})}
    }
    options = {**own, **shared}
    if lists:
        options["patches"] = lists
    if replaced:
        options["patches_replace"] = replaced
    return options
