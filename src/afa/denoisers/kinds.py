"""Stock pipelines by their kind: which there are, which one a pipeline is of, and building one.

Pipelines stay the library's own; what an ensemble adds is a denoiser and text encoders that stand
for those of all experts.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Literal

from afa.denoisers.family import COMPONENTS, Component, PipelineKind
from afa.denoisers.sites import FAMILIES
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

    from diffusers import DiffusionPipeline

    from afa.denoisers.family import Conditioning

PredictionType = Literal["epsilon", "v_prediction", "flow_prediction", "sample"]


def kinds() -> list[PipelineKind]:
    """All kinds of pipelines of all families."""
    return list(dict.fromkeys(kind for family in FAMILIES for kind in family.pipelines))


def kind_of(class_name: str, source: object) -> PipelineKind:
    """The kind that a pipeline's class is of.

    Args:
        class_name: as `model_index.json` has it.
        source: for the error.

    Raises:
        AfaError: none.
    """
    known = kinds()
    for kind in known:
        if class_name in kind.class_names:
            return kind
    names = ", ".join(kind.name for kind in known)
    raise AfaError(
        "AFA-MODEL-006",
        f"An expert must be a pipeline of {names}; '{source}' is a {class_name}. Other families "
        "are not supported yet.",
    )


def kind_of_pipeline(pipeline: DiffusionPipeline) -> PipelineKind:
    """The kind of a pipeline that is there already."""
    return kind_of(type(pipeline).__name__, "the pipeline")


def denoiser_of(pipeline: DiffusionPipeline) -> Any:
    """The `unet` or `transformer` of a pipeline."""
    parts = pipeline.components
    return parts[component_in({name for name, part in parts.items() if part is not None})]


def component_in(names: Container[str]) -> Component:
    """What the denoiser is called among the parts of a pipeline that have these names."""
    return next((name for name in COMPONENTS if name in names), COMPONENTS[-1])


def conditioning_of(pipeline: Any) -> Conditioning:
    """How the denoiser of a pipeline is told what to draw.

    Raises:
        AfaError: its kind has none, and cannot be trained.
    """
    kind = kind_of_pipeline(pipeline)
    if kind.conditioning is None:
        raise AfaError(
            "AFA-MODEL-007",
            f"Training needs a model that draws from a prompt; a {kind.name} pipeline does not. "
            "Train aggregators for experts of another family.",
        )
    return kind.conditioning


def options_of(pipeline: Any) -> dict[str, Any]:
    """What a pipeline is told besides its parts, as `force_zeros_for_empty_prompt`; its class."""
    told = {
        key: value
        for key, value in pipeline.config.items()
        if not key.startswith("_") and not isinstance(value, list | tuple)
    }
    return {"class": type(pipeline).__name__, **told}


def build_pipeline(
    class_name: str, parts: Mapping[str, Any], options: Mapping[str, Any]
) -> DiffusionPipeline:
    """A stock pipeline of these parts, without what it may have besides, as a safety checker.

    Args:
        class_name: the library's.
        parts: by the names of the class's arguments.
        options: more arguments; those that the class does not take are left out.
    """
    pipeline_class = kind_of(class_name, "the pipeline").pipeline_class(class_name)
    taken = inspect.signature(pipeline_class.__init__).parameters
    optional = ("safety_checker", "feature_extractor", "image_encoder", "text_encoder", "tokenizer")
    arguments = {name: None for name in taken if name.startswith(optional)}
    off = {"requires_safety_checker": False, "add_watermarker": False}
    given = {key: value for key, value in {**options, **off}.items() if key in taken}
    return pipeline_class(**{**arguments, **given, **parts})
