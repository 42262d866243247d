"""What a MODEL may carry when it becomes an expert, and what all experts must share."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from afa.errors import AfaError

from .runner import KEY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from comfy.model_patcher import ModelPatcher

_AFTER = "Connect that node after AFA Ensemble, so that it applies to the ensemble."
#: entries of a MODEL's options that belong to the denoiser; the others change the sampling
_OF_DENOISER = {"transformer_options"}


def require_plain(model: ModelPatcher, name: str) -> None:
    """Check that a MODEL carries only what an expert can use by itself.

    That are LoRAs, patches of attention and blocks, and another `model_sampling`.

    Raises:
        AfaError: if not; it names what the MODEL carries.
    """
    if any(KEY in named for named in model.wrappers.values()):
        raise AfaError(
            "AFA-COMFY-034",
            f"{name} is an ensemble itself. Connect all experts to one AFA Ensemble; its "
            "aggregators must be trained for them.",
        )
    carried: list[str] = [
        *(f"the option '{key}'" for key in model.model_options if key not in _OF_DENOISER),
        *(f"the wrapper '{key}'" for named in model.wrappers.values() for key in named),
        *(f"the callback '{key}'" for named in model.callbacks.values() for key in named),
        *(f"the injection '{key}'" for key in model.injections),
        *(f"the model '{key}'" for key in model.additional_models),
        *(f"the weights '{key}'" for key in model.weight_wrapper_patches),
        *(f"the part '{key}'" for key in model.object_patches if key != "model_sampling"),
        *(
            f"the wrapper or callback '{key}'"
            for what in ("wrappers", "callbacks")
            for named in model.model_options["transformer_options"].get(what, {}).values()
            for key in named
        ),
        *("a hook" for _ in range(bool(model.hook_patches or model.forced_hooks))),
    ]
    if carried:
        raise AfaError(
            "AFA-COMFY-004",
            f"{name} was changed by a node that adds {carried[0]}, which an expert cannot have. "
            + _AFTER,
        )


def check_alike(models: Sequence[ModelPatcher]) -> None:
    """Check that experts predict the same quantity of the same latents, in one data type.

    Raises:
        AfaError: if not.
    """
    first = models[0]
    for n, model in enumerate(models[1:], start=2):
        pairs = {
            "predict one quantity": (_predicted(first), _predicted(model)),
            "have one kind of latents": (_latent(first), _latent(model)),
            "compute in one type": (_computed(first), _computed(model)),
        }
        for what, (ours, theirs) in pairs.items():
            if ours != theirs:
                raise AfaError(
                    "AFA-COMFY-005",
                    f"All experts must {what}: model_{n} has {theirs}, model_1 has {ours}. Use "
                    "models of one kind, loaded with one weight type.",
                )
        if not _same_noise(first, model):
            raise AfaError(
                "AFA-COMFY-006",
                f"model_{n} has another noise schedule than model_1. Use the same "
                "ModelSampling node for both, or connect it after AFA Ensemble.",
            )


def _predicted(model: ModelPatcher) -> str:
    sampling = model.get_model_object("model_sampling")
    return " with ".join(base.__name__ for base in type(sampling).__bases__)


def _latent(model: ModelPatcher) -> str:
    return type(model.model.latent_format).__name__


def _computed(model: ModelPatcher) -> str:
    return str(model.model.manual_cast_dtype or model.model.get_dtype())


def _same_noise(one: ModelPatcher, other: ModelPatcher) -> bool:
    ours, theirs = (m.get_model_object("model_sampling") for m in (one, other))
    if ours.state_dict().keys() != theirs.state_dict().keys():
        return False
    buffers = all(torch.equal(b, theirs.state_dict()[k]) for k, b in ours.state_dict().items())
    names = ("sigma_data", "shift", "multiplier", "num_timesteps", "zsnr")
    return buffers and all(getattr(ours, n, None) == getattr(theirs, n, None) for n in names)


def with_own_weights(models: Sequence[ModelPatcher]) -> list[ModelPatcher]:
    """Give experts of one checkpoint with different LoRAs weights of their own.

    ComfyUI adds a LoRA to the weights that all clones of a MODEL share, one at a time; the experts
    would all run with the LoRA that was added last.
    """
    import comfy.model_management

    listed: list[ModelPatcher] = []
    for model in models:
        same = [each for each in listed if each.is_clone(model)]
        if all(_same_patches(each, model) for each in same):
            listed.append(model.clone())
            continue
        if any(each.is_clone(model) for each in comfy.model_management.loaded_models()):
            comfy.model_management.unload_all_models()  # takes the LoRAs out of the weights
        listed.append(_copied(model))
    return listed


def _same_patches(one: ModelPatcher, other: ModelPatcher) -> bool:
    is_plain = not one.patches and not other.patches
    return is_plain or one.patches_uuid == other.patches_uuid


def _copied(model: ModelPatcher) -> ModelPatcher:
    """A MODEL with a copy of the weights, without LoRAs in them, and the same patches."""
    clone = model.clone()
    own: Any = type(model)(copy.deepcopy(model.model), model.load_device, model.offload_device)
    own.patches, own.patches_uuid = clone.patches, clone.patches_uuid
    own.model_options, own.object_patches = clone.model_options, clone.object_patches
    return own
