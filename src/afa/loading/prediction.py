"""What a model predicts: noise, velocity or the flow, and who says so.

Wrong predictions draw noise, and no tensor's shape tells them apart. In order of precedence:

1. `prediction_type:` of the expert in the recipe;
2. the file: marker tensors (`v_pred`, `ztsnr`) and metadata (the keys of
   https://github.com/Stability-AI/ModelSpec), and a `.yaml` beside it with the original code's
   configuration; these must agree;
3. the configuration: `config:`, which must agree with 2, or the shipped one, an assumption.

CosXL and Playground 2.5 predict on continuous noise levels (EDM, Karras et al., 2022, arXiv
2206.00364). They need a diffusers folder with an EDM scheduler.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import diffusers
from diffusers import EulerDiscreteScheduler

from afa.denoisers.kinds import PredictionType
from afa.errors import AfaError
from afa.files import parts_of, read_json
from afa.loading.weights import file_metadata
from afa.machine.library import library_class
from afa.recipe import read_yaml

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from diffusers import SchedulerMixin

    from afa.loading.weights import Shapes

_FLOW = "flow_prediction"
#: how files and configurations of others spell it
_SPELLED: dict[str, PredictionType] = {
    **dict.fromkeys(("epsilon", "eps", "noise"), "epsilon"),
    **dict.fromkeys(("v", "v_prediction", "v-prediction", "v_pred", "velocity"), "v_prediction"),
    **dict.fromkeys(("sample", "x0"), "sample"),
}
#: `modelspec.architecture` of Stable Diffusion 2, whose two kinds have equal tensors
_ARCHITECTURES: dict[str, PredictionType] = {
    "stable-diffusion-v2-512": "epsilon",
    "stable-diffusion-v2-768-v": "v_prediction",
}
#: the last part of `scaling_config.target` in configurations of Stability's generative-models
_SCALINGS: dict[str, PredictionType] = {"EpsScaling": "epsilon", "VScaling": "v_prediction"}


@dataclass(frozen=True)
class Evidence:
    """What one place says.

    Attributes:
        where: as messages name it.
        type: what the model predicts; None where the place does not say.
        zero_snr: whether it was trained to zero terminal SNR; None where the place does not say.
        is_edm: whether it was trained on continuous noise levels.
        is_beside: whether it stands beside the file, and may be gone the next time.
    """

    where: str
    type: PredictionType | None = None
    zero_snr: bool | None = None
    is_edm: bool = False
    is_beside: bool = False


@dataclass(frozen=True)
class Prediction:
    """What a model predicts, and why that is believed.

    Attributes:
        type: `epsilon`, `v_prediction`, `flow_prediction` or `sample`.
        zero_snr: whether its noise schedule ends in pure noise (Lin et al., 2023, arXiv
            2305.08891).
        where: who says it.
        is_assumed: whether nothing in the file says it.
        overruled: evidence that says otherwise, which the recipe overrules.
        scheduler: the entries of the scheduler's configuration that have to change.
        kept: what an ensemble folder has to remember, since neither the file nor a shipped
            configuration says it again.
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


# -- what a file says -------------------------------------------------------------------------


def evidence_of(path: Path, shapes: Shapes, *, beside: Path | None = None) -> list[Evidence]:
    """All that a file and a `.yaml` beside it say of what it predicts.

    Args:
        path: of the file; one that does not exist says nothing besides its tensors.
        shapes: of all tensors of the file.
        beside: beside which the `.yaml` is; None looks beside the file. A pickle is read from a
            copy elsewhere.

    Raises:
        AfaError: a `.yaml` beside it that cannot be read, or that names an unknown objective.
    """
    found = [*marks_in(shapes)]
    if path.is_file():
        found += _metadata(path)
        found += _yaml_beside(beside or path)
    return found


def marks_in(shapes: Shapes) -> list[Evidence]:
    """What marker tensors say, as ComfyUI and trainers write them."""
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
        said = metadata.get(key, "").strip().lower()
        if said in _SPELLED:
            found.append(Evidence(f"'{key}' in its metadata", _SPELLED[said]))
    architecture = metadata.get("modelspec.architecture", "").strip().lower()
    if architecture in _ARCHITECTURES:
        where = f"'modelspec.architecture' ({architecture}) in its metadata"
        found.append(Evidence(where, _ARCHITECTURES[architecture]))
    return found


def _yaml_beside(path: Path) -> list[Evidence]:
    """A configuration of the original code, as web UIs look for it beside a checkpoint."""
    beside = next((p for s in (".yaml", ".yml") if (p := path.with_suffix(s)).is_file()), None)
    if beside is None:
        return []
    try:
        content = read_yaml(beside)
    except AfaError as error:
        raise AfaError(
            "AFA-LOAD-046",
            f"'{beside}' beside a model must be YAML that describes it, but reading it says: "
            f"{error} Correct or move that file.",
        ) from error
    model = content.get("model") if isinstance(content, dict) else None
    settings = model.get("params") if isinstance(model, dict) else None
    if not isinstance(settings, dict):
        return []  # a recipe, or something else of that name
    where = f"'{beside.name}' beside it"
    if "denoiser_config" in settings:
        return [replace(_scaling(settings["denoiser_config"], beside, where), is_beside=True)]
    said = settings.get("parameterization", "eps")  # as the original code does without it
    if str(said).lower() not in _SPELLED:
        raise _unknown_objective(beside, "parameterization", said)
    return [Evidence(where, _SPELLED[str(said).lower()], is_beside=True)]


def _scaling(denoiser: Any, beside: Path, where: str) -> Evidence:
    """Of a configuration of Stability's generative-models."""
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


def _unknown_objective(beside: Path, key: str, said: object) -> AfaError:
    return AfaError(
        "AFA-LOAD-047",
        f"'{beside}' has {key} = {said}, which is no objective that afa knows. It must be that of "
        "a model that predicts noise (eps) or velocity (v). Correct or move that file.",
    )


# -- what follows -----------------------------------------------------------------------------


def decide(
    source: object,
    config: Path,
    evidence: Sequence[Evidence] = (),
    *,
    asked: PredictionType | None = None,
    is_named: bool = False,
) -> Prediction:
    """What a model predicts, from everything that says something.

    Args:
        source: the model, for the errors.
        config: the pipeline folder that describes it.
        evidence: what its file says; empty for a folder.
        asked: what the recipe says, which overrules all else.
        is_named: whether a person chose this configuration, so that it must agree with the file.

    Raises:
        AfaError: places that contradict each other, or an objective that cannot be had.
    """
    settings = read_json(config / "scheduler" / "scheduler_config.json")
    class_name = parts_of(read_json(config / "model_index.json")).get("scheduler", "")
    _require_edm(source, evidence, class_name, config)
    own = predicted_by(class_name, settings)
    if own == _FLOW or asked == _FLOW:
        if asked not in (None, own):
            raise AfaError(
                "AFA-LOAD-048",
                f"'{source}' has prediction_type = {asked} in the recipe, but it is described as a "
                f"model that predicts {own}. Flow matching models predict flow_prediction, others "
                "do not. Leave prediction_type out.",
            )
        return Prediction(
            own, False, f"the configuration '{config.name}'"
        )  # metadata knows no flow
    said = {each.type: each for each in reversed(evidence) if each.type is not None}
    if asked is None and len(said) > 1:
        *_, second, first = said.values()
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
            f"'{source}' is marked with zero terminal SNR (the tensor 'ztsnr') and said to predict "
            "epsilon. With zero terminal SNR a model must predict velocity. Say what is true: "
            "{model: FILE, prediction_type: v_prediction} in the recipe.",
        )
    zero = kind != "epsilon" and (zero or (own_zero and kind == own))
    zero = zero or (kind == own and own_zero)  # a folder's own words stay as they are
    where, overruled = f"the configuration '{config.name}'", None
    if asked is not None:
        where = "prediction_type in the recipe"
        other = next((each for each in said.values() if each.type != asked), None)
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
        changes["timestep_spacing"] = "trailing"  # or the step of pure noise would be left out
    return changes or None


def predicted_by(class_name: str, settings: Mapping[str, Any]) -> str:
    """What a scheduler's configuration says that models predict."""
    if class_name.startswith("FlowMatch"):
        return _FLOW
    return str(settings.get("prediction_type") or "epsilon")


def _require_edm(
    source: object, evidence: Sequence[Evidence], class_name: str, config: Path
) -> None:
    marked = next((each for each in evidence if each.is_edm), None)
    if marked is not None and not class_name.startswith("EDM"):
        raise AfaError(
            "AFA-LOAD-050",
            f"'{source}' predicts on continuous noise levels ({marked.where}), the configuration "
            f"'{config.name}' samples with {class_name or 'no scheduler'}. Such a model must be "
            "sampled with an EDM scheduler, and cannot be trained on or mixed with others. Leave "
            "it out, or describe it by a diffusers folder that has one: config=FOLDER.",
        )


def _contradiction(source: object, first: Evidence, where: str, kind: str | None) -> AfaError:
    return AfaError(
        "AFA-LOAD-051",
        f"'{source}' contradicts itself: {first.where} says that it predicts {first.type}, {where} "
        f"says {kind}. One of them must be wrong, and a wrong one draws noise. Say what is true: "
        "{model: FILE, prediction_type: v_prediction} or {..., prediction_type: epsilon} in the "
        "recipe.",
    )


def scheduler_of(config: Path, prediction: Prediction | None = None) -> SchedulerMixin:
    """The scheduler that a pipeline folder names, for what a model predicts.

    One that cannot rescale its noise schedule to zero terminal SNR is replaced by
    `EulerDiscreteScheduler` with the same settings.

    Raises:
        AfaError: the folder names a scheduler that the library does not have.
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
