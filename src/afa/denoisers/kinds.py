"""Kinds of stock diffusers pipelines: list them, find the kind of a pipeline, build a pipeline.

Pipelines keep their diffusers class. An ensemble only replaces the denoiser and the text encoders.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from afa.denoisers.family import COMPONENTS, Component, PipelineKind
from afa.denoisers.sites import FAMILIES
from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Container, Mapping

    from diffusers import DiffusionPipeline

    from afa.denoisers.family import Conditioning


def kinds() -> list[PipelineKind]:
    """All kinds of pipelines of all families."""
    return list(dict.fromkeys(kind for family in FAMILIES for kind in family.pipelines))


def kind_of(class_name: str, source: object) -> PipelineKind:
    """Find the kind of a pipeline class.

    Args:
        class_name: the class name in `model_index.json`.
        source: the name of the pipeline, for the error.

    Raises:
        AfaError: if no kind has this class.
    """
    known = kinds()
    for kind in known:
        if class_name in kind.class_names:
            return kind
    names = ", ".join(kind.name for kind in known)
    raise AfaError(
        "AFA-MODEL-006",
        f"'{source}' is a {class_name}, which is not supported. An expert must be a pipeline of "
        f"{names}.",
    )


def kind_of_pipeline(pipeline: DiffusionPipeline) -> PipelineKind:
    """The kind of a loaded pipeline."""
    return kind_of(type(pipeline).__name__, "the pipeline")


def denoiser_of(pipeline: DiffusionPipeline) -> Any:
    """The `unet` or `transformer` of a pipeline."""
    parts = pipeline.components
    return parts[component_in({name for name, part in parts.items() if part is not None})]


def component_in(names: Container[str]) -> Component:
    """The component name of the denoiser, `unet` or `transformer`, among component names."""
    return next((name for name in COMPONENTS if name in names), COMPONENTS[-1])


def conditioning_of(pipeline: Any) -> Conditioning:
    """How prompts are encoded and passed to the denoiser of a pipeline, for training.

    Raises:
        AfaError: if the pipeline's kind has no prompts, and so cannot be trained.
    """
    kind = kind_of_pipeline(pipeline)
    if kind.conditioning is None:
        raise AfaError(
            "AFA-MODEL-007",
            f"A {kind.name} pipeline does not draw from prompts, which training needs. Train "
            "aggregators for experts of another family.",
        )
    return kind.conditioning


def options_of(pipeline: Any) -> dict[str, Any]:
    """A pipeline's class and its options besides components: `force_zeros_for_empty_prompt`, ..."""
    options = {
        key: value
        for key, value in pipeline.config.items()
        if not key.startswith("_") and not isinstance(value, list | tuple)
    }
    return {"class": type(pipeline).__name__, **options}


def build_pipeline(
    class_name: str, parts: Mapping[str, Any], options: Mapping[str, Any]
) -> DiffusionPipeline:
    """Build a stock pipeline from components, without optional ones such as a safety checker.

    Args:
        class_name: the name of the pipeline class in diffusers.
        parts: components by their names in the class's constructor.
        options: further arguments; those that the class does not have are ignored.
    """
    pipeline_class = kind_of(class_name, "the pipeline").pipeline_class(class_name)
    taken = inspect.signature(pipeline_class.__init__).parameters
    optional = ("safety_checker", "feature_extractor", "image_encoder", "text_encoder", "tokenizer")
    arguments = {name: None for name in taken if name.startswith(optional)}
    off = {"requires_safety_checker": False, "add_watermarker": False}
    given = {key: value for key, value in {**options, **off}.items() if key in taken}
    return pipeline_class(**{**arguments, **given, **parts})
