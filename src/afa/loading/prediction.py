"""The prediction type of a model (noise, velocity or flow) and the evidence for it.

A wrong prediction type draws noise, and the shapes of tensors do not show it. In order of
precedence:

1. `prediction_type:` of the expert in the recipe;
2. the file: marker tensors (`v_pred`, `ztsnr`), metadata (the keys of
   https://github.com/Stability-AI/ModelSpec), and a `.yaml` beside it with the original code's
   configuration; these must agree;
3. the configuration: `config:`, which must agree with 2, or the bundled one, which is assumed.

CosXL and Playground 2.5 predict on continuous noise levels (EDM, Karras et al., 2022, arXiv
2206.00364). They need a diffusers folder with an EDM scheduler.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import diffusers
from diffusers import EulerDiscreteScheduler

from afa.denoisers.objective import FLOW, predicted_by
from afa.errors import AfaError
from afa.files import parts_of, read_json
from afa.loading.weights import file_metadata
from afa.machine.library import library_class
from afa.recipe import read_yaml

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from diffusers import SchedulerMixin

    from afa.denoisers.objective import PredictionType
    from afa.loading.weights import Shapes

#: spellings in files and configurations of other programs
_SPELLED: dict[str, PredictionType] = {
    **dict.fromkeys(("epsilon", "eps", "noise"), "epsilon"),
    **dict.fromkeys(("v", "v_prediction", "v-prediction", "v_pred", "velocity"), "v_prediction"),
    **dict.fromkeys(("sample", "x0"), "sample"),
}
#: `modelspec.architecture` of Stable Diffusion 2, whose two variants have equal tensors
_ARCHITECTURES: dict[str, PredictionType] = {
    "stable-diffusion-v2-512": "epsilon",
    "stable-diffusion-v2-768-v": "v_prediction",
}
#: the last part of `scaling_config.target` in configurations of Stability's generative-models
_SCALINGS: dict[str, PredictionType] = {"EpsScaling": "epsilon", "VScaling": "v_prediction"}


@dataclass(frozen=True)
class Evidence:
    """The statement of one source about a model's prediction type.

    Attributes:
        where: the source, for messages.
        type: what the model predicts; None if not stated.
        zero_snr: whether it was trained with zero terminal SNR; None if not stated.
        is_edm: whether it was trained on continuous noise levels.
        is_beside: whether the source is a separate file, which may be missing the next time.
    """

    where: str
    type: PredictionType | None = None
    zero_snr: bool | None = None
    is_edm: bool = False
    is_beside: bool = False


@dataclass(frozen=True)
class Prediction:
    """What a model predicts, and the source of that information.

    Attributes:
        type: `epsilon`, `v_prediction`, `flow_prediction` or `sample`.
        zero_snr: whether its noise schedule ends in pure noise (Lin et al., 2023, arXiv
            2305.08891).
        where: the source of this information.
        is_assumed: whether there is no evidence in the file.
        overruled: contradicting evidence, which the recipe overrides.
        scheduler: the entries of the scheduler's configuration that have to change.
        kept: the type that an ensemble folder has to store, because neither the file nor a bundled
            configuration states it.
    """

    type: str
    zero_snr: bool
    where: str
    is_assumed: bool = False
    overruled: str | None = None
    scheduler: Mapping[str, Any] | None = None
    kept: PredictionType | None = None

    @property
    def text(self) -> str:
        """One line for `afa inspect`."""
        snr = ", zero terminal SNR" if self.zero_snr else ""
        return f"{self.type}{snr} ({'assumed: ' if self.is_assumed else ''}{self.where})"


# -- evidence in a file -----------------------------------------------------------------------


def evidence_of(path: Path, shapes: Shapes, *, beside: Path | None = None) -> list[Evidence]:
    """Collect the evidence in a file, and in a `.yaml` beside it, of what it predicts.

    Args:
        path: of the file; if it does not exist, only `shapes` are used.
        beside: the file whose `.yaml` is read, if not `path`: pickles are read from a copy.

    Raises:
        AfaError: if a `.yaml` beside it cannot be read, or names an unknown objective.
    """
    found = [*marks_in(shapes)]
    if path.is_file():
        found += _metadata(path)
        found += _yaml_beside(beside or path)
    return found


def marks_in(shapes: Shapes) -> list[Evidence]:
    """Return the evidence of marker tensors, as ComfyUI and trainers write them."""
    found = []
    if "v_pred" in shapes:
        found.append(Evidence("the tensor 'v_pred'", "v_prediction", "ztsnr" in shapes))
    elif "ztsnr" in shapes:
        found.append(Evidence("the tensor 'ztsnr'", zero_snr=True))
    for name in shapes:
        if name.startswith("edm_vpred."):
            found.append(Evidence(f"the tensor '{name}' (CosXL)", "v_prediction", is_edm=True))
        elif name in ("edm_mean", "edm_std"):
            found.append(Evidence(f"the tensor '{name}' (Playground 2.5)", is_edm=True))
    return found


def _metadata(path: Path) -> list[Evidence]:
    metadata, found = file_metadata(path), []
    # ComfyUI writes predict_key, the specification has prediction_type
    for key in ("modelspec.prediction_type", "modelspec.predict_key"):
        value = metadata.get(key, "").strip().lower()
        if value in _SPELLED:
            found.append(Evidence(f"'{key}' in its metadata", _SPELLED[value]))
    architecture = metadata.get("modelspec.architecture", "").strip().lower()
    if architecture in _ARCHITECTURES:
        where = f"'modelspec.architecture' ({architecture}) in its metadata"
        found.append(Evidence(where, _ARCHITECTURES[architecture]))
    return found


def _yaml_beside(path: Path) -> list[Evidence]:
    """Read the original code's configuration, which web UIs expect beside a checkpoint."""
    beside = next((p for s in (".yaml", ".yml") if (p := path.with_suffix(s)).is_file()), None)
    if beside is None:
        return []
    try:
        content = read_yaml(beside)
    except AfaError as error:
        raise AfaError(
            "AFA-LOAD-046",
            f"'{beside}' cannot be read as the YAML that describes the model beside it: {error} "
            "Correct or move that file.",
        ) from error
    model = content.get("model") if isinstance(content, dict) else None
    settings = model.get("params") if isinstance(model, dict) else None
    if not isinstance(settings, dict):
        return []  # a recipe, or an unrelated file
    where = f"'{beside.name}' beside it"
    if "denoiser_config" in settings:
        return [replace(_scaling(settings["denoiser_config"], beside, where), is_beside=True)]
    objective = settings.get("parameterization", "eps")  # the original code's default
    if str(objective).lower() not in _SPELLED:
        raise _unknown_objective(beside, "parameterization", objective)
    return [Evidence(where, _SPELLED[str(objective).lower()], is_beside=True)]


def _scaling(denoiser: Any, beside: Path, where: str) -> Evidence:
    """Read a configuration of Stability's generative-models."""
    try:
        target = str(denoiser["params"]["scaling_config"]["target"])
    except (LookupError, TypeError):
        raise _unknown_objective(beside, "scaling_config", "nothing") from None
    name = target.rpartition(".")[2]
    if "EDM" in name:
        return Evidence(where, "v_prediction" if name.startswith("V") else None, is_edm=True)
    if name not in _SCALINGS:
        raise _unknown_objective(beside, "scaling_config.target", target)
    return Evidence(where, _SCALINGS[name])


def _unknown_objective(beside: Path, key: str, value: object) -> AfaError:
    return AfaError(
        "AFA-LOAD-047",
        f"'{beside}' has {key} = {value}, an unknown objective. The model must predict noise (eps) "
        "or velocity (v). Correct or move that file.",
    )


# -- decision ---------------------------------------------------------------------------------


def decide(
    source: object,
    config: Path,
    evidence: Sequence[Evidence] = (),
    *,
    asked: PredictionType | None = None,
    is_named: bool = False,
) -> Prediction:
    """Decide what a model predicts, from all evidence.

    Args:
        config: the pipeline folder that describes it.
        evidence: of its file; empty for a folder.
        asked: the recipe's setting, which overrides everything else.
        is_named: whether the user chose this configuration, which then must agree with the file.

    Raises:
        AfaError: if the evidence is contradictory, or the objective is not supported.
    """
    settings = read_json(config / "scheduler" / "scheduler_config.json")
    class_name = parts_of(read_json(config / "model_index.json")).get("scheduler", "")
    _require_edm(source, evidence, class_name, config)
    own = predicted_by(class_name, settings)
    if own == FLOW or asked == FLOW:
        if asked not in (None, own):
            raise AfaError(
                "AFA-LOAD-048",
                f"The recipe sets prediction_type {asked} for '{source}', but its configuration "
                f"says {own}. Flow matching models must have flow_prediction, and others must not. "
                "Remove prediction_type.",
            )
        # metadata has no value for flow matching
        return Prediction(own, False, f"the configuration '{config.name}'")
    by_type = {each.type: each for each in reversed(evidence) if each.type is not None}
    if asked is None and len(by_type) > 1:
        *_, second, first = by_type.values()
        raise _contradiction(source, first, second.where, second.type)
    found = next((each for each in evidence if each.type is not None), None)
    if asked is None and is_named and found is not None and found.type != own:
        raise _contradiction(source, found, f"the configuration '{config.name}'", own)
    kind = asked or (found.type if found is not None else None) or own
    zero = any(each.zero_snr for each in evidence)
    own_zero = bool(settings.get("rescale_betas_zero_snr"))
    if kind == "epsilon" and zero and asked is None:
        raise AfaError(
            "AFA-LOAD-049",
            f"'{source}' has zero terminal SNR (the tensor 'ztsnr') and predicts epsilon. With "
            "zero terminal SNR a model must predict velocity. Set the right type in the recipe: "
            "{model: FILE, prediction_type: v_prediction}.",
        )
    zero = (zero and kind != "epsilon") or (own_zero and kind == own)
    where, overruled = f"the configuration '{config.name}'", None
    if asked is not None:
        where = "prediction_type in the recipe"
        other = next((each for each in by_type.values() if each.type != asked), None)
        overruled = None if other is None else f"{other.where} says {other.type}"
    elif found is not None:
        where = found.where
    is_assumed = asked is None and found is None and not is_named
    return Prediction(
        kind,
        zero,
        where,
        is_assumed,
        overruled,
        _changes(settings, own, kind, own_zero, zero),
        asked or (found.type if found is not None and found.is_beside else None),
    )


def _changes(
    settings: Mapping[str, Any], own: str, kind: str, own_zero: bool, zero: bool
) -> dict[str, Any] | None:
    changes: dict[str, Any] = {}
    if kind != own:
        changes["prediction_type"] = kind
    if zero != own_zero:
        changes["rescale_betas_zero_snr"] = zero
    if zero and not own_zero and settings.get("timestep_spacing") != "trailing":
        changes["timestep_spacing"] = "trailing"  # others skip the step of pure noise
    return changes or None


def _require_edm(
    source: object, evidence: Sequence[Evidence], class_name: str, config: Path
) -> None:
    marked = next((each for each in evidence if each.is_edm), None)
    if marked is not None and not class_name.startswith("EDM"):
        raise AfaError(
            "AFA-LOAD-050",
            f"'{source}' is an EDM model with continuous noise levels ({marked.where}), but the "
            f"configuration '{config.name}' has {class_name or 'no scheduler'}. It needs an EDM "
            "scheduler, and cannot be trained on or combined with other models. Remove it, or set "
            "config to a diffusers folder with an EDM scheduler.",
        )


def _contradiction(source: object, first: Evidence, where: str, kind: str | None) -> AfaError:
    return AfaError(
        "AFA-LOAD-051",
        f"The prediction type of '{source}' is contradictory: {first.where} says {first.type}, "
        f"{where} says {kind}. A wrong type draws noise. Set the right one in the recipe: "
        "{model: FILE, prediction_type: v_prediction} or {..., prediction_type: epsilon}.",
    )


def scheduler_of(config: Path, prediction: Prediction | None = None) -> SchedulerMixin:
    """Load the scheduler of a pipeline folder, adapted to what a model predicts.

    A scheduler that cannot rescale its noise schedule to zero terminal SNR is replaced by
    `EulerDiscreteScheduler` with the same settings.

    Raises:
        AfaError: if the library does not have the scheduler.
    """
    class_name = parts_of(read_json(config / "model_index.json")).get("scheduler", "none")
    scheduler_class = library_class(diffusers, class_name, diffusers.SchedulerMixin)
    scheduler = scheduler_class.from_pretrained(config / "scheduler")
    changes = dict(prediction.scheduler or {}) if prediction is not None else {}
    if not changes:
        return scheduler
    taken = inspect.signature(scheduler_class.__init__).parameters
    if changes.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in taken:
        scheduler_class = EulerDiscreteScheduler
    return scheduler_class.from_config(scheduler.config, **changes)
