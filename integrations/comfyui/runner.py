"""Run the experts of an ensemble in place of the denoiser of one MODEL."""

from __future__ import annotations

import inspect
import uuid
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.utils
import torch
from comfy.patcher_extension import WrapperExecutor

from afa.aggregators.lowered import Lowered
from afa.ensemble.denoiser import EnsembleDenoiser
from afa.ensemble.protocol import expert_names
from afa.errors import AfaError

from .controls import for_first_expert
from .errors import codes_shown
from .recording import Recording, positive_in

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from comfy.model_patcher import ModelPatcher
    from torch import Tensor

    from .denoisers.families import ComfyFamily
    from .settings import Settings

#: of everything that this pack adds to a MODEL
KEY = "afa"
#: combinations of LoRAs after the ensemble whose experts are kept
_NUM_PATCHED = 4
#: methods of denoisers that other packs replace in an instance; the coroutines do not call them
_FORWARDS = {"forward", "_forward", "forward_orig", "forward_core_with_concat"}


@dataclass(frozen=True)
class Origin:
    """Where an ensemble comes from.

    Attributes:
        aggregators: SHA-256 of the aggregators' file; None for the mean.
        are_checked: whether the experts' hashes were compared with those of the training.
    """

    aggregators: str | None = None
    are_checked: bool = False


class Runner:
    """Runs the experts of an ensemble in place of one denoiser.

    Args:
        family: the experts' family.
        denoiser: afa's ensemble of the experts' denoisers.
        experts: the experts' MODELs.
        settings: how it runs.
        origin: where it comes from, for recipes.
    """

    def __init__(
        self,
        family: ComfyFamily,
        denoiser: EnsembleDenoiser,
        experts: Sequence[ModelPatcher],
        settings: Settings,
        origin: Origin,
    ) -> None:
        self.family, self.denoiser, self.settings = family, denoiser, settings
        self.origin, self.recording = origin, Recording()
        self._experts = list(experts)
        #: the experts of the sampling in progress, with the LoRAs that were added to the ensemble
        self._loaded = self._experts
        #: the same by the identity of these LoRAs
        self._patched: dict[uuid.UUID, list[ModelPatcher]] = {}
        self._texts = Texts()
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
        return Runner(self.family, denoiser, self._experts, settings, self.origin)

    # -- one picture --------------------------------------------------------------------------

    @codes_shown()
    def sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around the sampling of one latent: record the fusion weights if that is switched on."""
        try:
            if not self.settings.records:
                return executor(*args, **kwargs)
            with self.recording.of_latent(positive_in(executor.class_obj), args[0]) as seen:
                samples = executor(*args, **kwargs)
                seen.latent = samples.detach().to("cpu", copy=True)
            return samples
        finally:  # nothing stays on the device that ComfyUI does not know
            self.denoiser.reset_loops()
            self.denoiser.lowered = Lowered()
            self._texts = Texts()
            self._move_aggregators(comfy.model_management.unet_offload_device())

    def prepare(self, executor: Any, model: ModelPatcher, *args: Any, **kwargs: Any) -> Any:
        """Before ComfyUI loads the models: give LoRAs of the ensemble to all experts.

        The aggregators are small and must be on the device as a whole, which ComfyUI does not
        promise for a model of its own; so they are moved here, before it measures free memory.
        """
        self._require_supported(model)
        first = self._experts[0]
        added = {
            key: listed[len(first.patches.get(key, ())) :]
            for key, listed in model.patches.items()
            if len(listed) > len(first.patches.get(key, ()))
        }
        self._loaded = self._with_loras(model.patches_uuid, added) if added else self._experts
        patches = [each for expert in self._loaded for each in expert.model_patches_models()]
        model.set_additional_models(KEY, [*others_of(self._loaded), *patches])
        for expert in self._loaded:
            expert.model_patches_to(model.load_device)
            expert.model_patches_to(expert.model_dtype())
        self._move_aggregators(model.load_device)
        return executor(model, *args, **kwargs)

    def _with_loras(
        self, identity: uuid.UUID, added: Mapping[str, Sequence[Any]]
    ) -> list[ModelPatcher]:
        """The experts with added patches; the same objects for the same patches."""
        if identity not in self._patched:
            kept = list(self._patched.items())[1 - _NUM_PATCHED :]
            own = [_with_patches(expert, added) for expert in self._experts]
            self._patched = {**dict(kept), identity: own}
        return self._patched[identity]

    def _move_aggregators(self, device: torch.device) -> None:
        """Move the aggregators, and free memory for them before."""
        aggregators = self.denoiser.aggregators
        first = next(aggregators.parameters(), None)
        if first is None or first.device == device:
            return
        if device != comfy.model_management.unet_offload_device():
            size = comfy.model_management.module_size(aggregators)
            comfy.model_management.free_memory(size, device)
        with torch.inference_mode(False), torch.no_grad():
            aggregators.to(device)

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

    def apply(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Around ComfyUI's call of the denoiser, which some denoisers do not let be wrapped.

        For these the ensemble takes the denoiser's place during the call, as ComfyUI's own
        `set_torch_compile_wrapper` does it.
        """
        if self.family.has_wrappers:
            return executor(*args, **kwargs)
        model, denoiser = executor.class_obj, self.denoiser.experts[0]
        signature = inspect.signature(denoiser.forward)
        comfy.utils.set_attr(model, "diffusion_model", _InPlace(denoiser, self._predict, signature))
        try:
            return executor(*args, **kwargs)
        finally:
            comfy.utils.set_attr(model, "diffusion_model", denoiser)

    def predict(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        """In place of the denoiser's call; other nodes' wrappers run around the ensemble."""
        if executor.class_obj is not self.denoiser.experts[0]:
            raise _replaced("denoiser")
        run = partial(self._predict, inspect.signature(executor.original))
        inner = executor.wrappers[executor.idx + 1 :]
        within = WrapperExecutor.new_class_executor(run, executor.class_obj, inner)
        return within.execute(*args, **kwargs)

    def _predict(self, signature: inspect.Signature, *args: Any, **kwargs: Any) -> Tensor:
        for expert in self.denoiser.experts:
            for name in _FORWARDS & vars(expert).keys():
                raise _replaced(name)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = self.family.arguments(bound.arguments)
        shared: dict[str, Any] = arguments["transformer_options"] or {}
        arguments["transformer_options"] = [
            _merged(expert.model_options["transformer_options"], shared) for expert in self._loaded
        ]
        self._texts.keep(arguments, shared)
        with self.recording.of_call(self.denoiser, shared, arguments):
            return self.denoiser(**arguments, return_dict=False)[0]


class Texts:
    """The texts of a sampling, each as one object for all steps of a denoising loop.

    ComfyUI joins the texts of a batch anew at every step. The cache of features recognises a loop
    by its text, which must stay the same object; calls of another kind at the same step, such as
    those of perturbed attention guidance, must have another one.
    """

    def __init__(self) -> None:
        self._kept: dict[Any, Tensor] = {}
        #: by kind of call, the noise level of the last one and how many there were at it
        self._last: dict[Any, tuple[float, int]] = {}

    def keep(self, arguments: dict[str, Any], options: Mapping[str, Any]) -> None:
        """Replace the text of a call by the object that its loop has had so far."""
        text = arguments.get("encoder_hidden_states")
        if text is None:
            return
        kind = (*map(str, options.get("uuids", ())), tuple(text.shape), *_patches_in(options))
        step = float(arguments["timestep"].flatten()[0])
        before, count = self._last.get(kind, (step, -1))
        count = count + 1 if before == step else 0
        self._last[kind] = (step, count)
        kept = self._kept.get((kind, count))
        if kept is None or kept.device != text.device or not torch.equal(kept, text):
            kept = self._kept[kind, count] = text.clone()
        arguments["encoder_hidden_states"] = kept


def _patches_in(options: Mapping[str, Any]) -> list[int]:
    """What identifies the patches of a call."""
    lists = options.get("patches", {}).values()
    tables = options.get("patches_replace", {}).values()
    patches = [each for listed in lists for each in listed]
    return [id(each) for each in [*patches, *(e for table in tables for e in table.values())]]


def _replaced(what: str) -> AfaError:
    return AfaError(
        "AFA-COMFY-011",
        f"Another node has replaced the {what} of a model, which an ensemble does not call. Remove "
        "that node.",
    )


class _InPlace(torch.nn.Module):
    """In the place of a denoiser during one call; it has no parameters of its own."""

    def __init__(self, denoiser: Any, predict: Any, signature: inspect.Signature) -> None:
        super().__init__()
        self._given = (denoiser, predict, signature)  # in a tuple, so it is not a submodule

    @property
    def dtype(self) -> torch.dtype:
        """The denoiser's data type."""
        return self._given[0].dtype

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Predict with all experts."""
        _, predict, signature = self._given
        return predict(signature, *args, **kwargs)


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


def others_of(experts: Sequence[ModelPatcher]) -> list[ModelPatcher]:
    """The experts that ComfyUI must load besides the first: one for each set of weights."""
    found: list[ModelPatcher] = []
    for expert in experts[1:]:
        if not any(expert.is_clone(known) for known in (experts[0], *found)):
            found.append(expert)
    return found
